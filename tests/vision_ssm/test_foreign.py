"""Foreign .pt files: tensors and plain containers come out, everything else stays inert, nothing is executed."""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from vision_ssm.errors import UserError
from vision_ssm.foreign import find_state_dict, load_foreign
from vision_ssm.inert_pickle import ForeignName, Record

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])

# Saves {"model": module, "ema": averaged module, ...} of classes that do not exist when the file is read.
WRITER = """
import sys, types
import torch
from torch import nn
lost = types.ModuleType("lost_package.nn.tasks")
for name in ("lost_package", "lost_package.nn"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[lost.__name__] = lost
class Conv(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, c, 3, bias=False), nn.BatchNorm2d(c), nn.SiLU()
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Conv(4), Conv(2))
        self.tied = self.model[0].conv
        self.names, self.stride = {0: "cat", 1: "dog"}, torch.tensor([8.0, 16.0])
for cls in (Conv, Net):
    cls.__module__ = lost.__name__
    setattr(lost, cls.__name__, cls)
torch.manual_seed(0)
model, ema = Net(), Net().half()
for zipped in (True, False):
    torch.save({"epoch": 3, "best_fitness": None, "model": model, "ema": ema, "train_args": {"imgsz": 640}},
               f"{sys.argv[1]}/whole_{zipped}.pt", _use_new_zipfile_serialization=zipped)
torch.save(ema.state_dict(), f"{sys.argv[1]}/plain.pt")
"""


def save(path: Path, value: object, zipped: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@FORMATS
def test_tensors_of_every_kind(tmp_path, zipped):
    base = torch.arange(24.0)
    saved = {
        "view": base.view(4, 6)[1:, ::2],
        "transposed": base.view(4, 6).T,
        "shared": base,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "expanded": torch.ones(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        **{
            str(d): torch.tensor([1, 0, 1]).to(d)
            for d in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
        },
        **{str(d): torch.tensor([1, 0, 1]).to(d) for d in (torch.int8, torch.uint8, torch.bool, torch.complex64)},
        **{str(d): torch.tensor([1, 0, 1]).to(d) for d in (torch.float8_e4m3fn, torch.uint16) if zipped},
    }
    got = load_foreign(save(tmp_path / "a.pt", saved, zipped))
    assert list(got) == list(saved)
    for name, want in saved.items():
        assert type(got[name]) is torch.Tensor, name
        assert got[name].dtype == want.dtype, name
        assert got[name].shape == want.shape, name
        assert torch.equal(got[name].to(torch.complex128), want.detach().to(torch.complex128)), name
    assert got["view"].untyped_storage().data_ptr() == got["shared"].untyped_storage().data_ptr()


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_containers(tmp_path, zipped, protocol):
    saved = {
        "plain": [1, -2.5, True, None, "text é", b"\x00\xff", 1 << 70, 2 + 1j, bytearray(b"ab")],
        "nested": ({"a": [{"b": (1, 2)}]}, {1, 2}, frozenset({"x"}), (1, "k")),
        "ordered": OrderedDict(a=1, b=2),
        "default": defaultdict(list, {"k": [1]}),
        "torch": [torch.Size([2, 3]), torch.float16, torch.device("cuda:1")],
        ("tuple", 1): "key",
        "numpy": [
            np.arange(6, dtype=np.float32).reshape(2, 3),
            np.float64(2.5),
            np.array([b"ab", b"c"]),
            np.array(True),
        ],
    }
    path = tmp_path / "a.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    got = load_foreign(path)
    assert got["plain"] == saved["plain"]
    assert got["nested"] == saved["nested"]
    assert (got["ordered"], got["default"], got["torch"]) == ({"a": 1, "b": 2}, {"k": [1]}, saved["torch"])
    assert got["tuple", 1] == "key"
    for want, array in zip(saved["numpy"], got["numpy"], strict=True):
        assert array.dtype == want.dtype
        np.testing.assert_array_equal(array, want)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with whole_True.pt (zip), whole_False.pt (legacy) and plain.pt, written by another process."""
    folder = tmp_path_factory.mktemp("written")
    subprocess.run([sys.executable, "-c", WRITER, str(folder)], check=True, capture_output=True)
    return folder


@FORMATS
def test_whole_modules_of_classes_that_no_longer_exist(written, zipped):
    saved = load_foreign(written / f"whole_{zipped}.pt")
    assert "lost_package" not in sys.modules
    assert saved["epoch"] == 3
    assert isinstance(saved["ema"], Record)
    assert saved["ema"].class_name == "lost_package.nn.tasks.Net"
    assert saved["ema"].attributes["names"] == {0: "cat", 1: "dog"}
    want = torch.load(written / "plain.pt", weights_only=True)
    got = find_state_dict(saved)
    assert got.keys() == want.keys()  # no scratch buffer; the tied layer under both names
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert got["model.0.conv.weight"].dtype == torch.float16
    assert find_state_dict({"ema": None, "model": saved["model"]})["model.0.conv.weight"].dtype == torch.float32
    assert find_state_dict(load_foreign(written / "plain.pt")).keys() == want.keys()


def test_find_state_dict_in_the_usual_places():
    weights = {"a.weight": torch.ones(1)}
    for saved in (
        weights,
        {"state_dict": weights, "epoch": 1},
        {"params": weights, "params_ema": None},
        {"net": weights},
    ):
        assert find_state_dict(saved) == weights
    assert find_state_dict({"model": {"module.a": torch.ones(1)}}).keys() == {"a"}
    with pytest.raises(UserError, match="several sets of weights: net_a, net_b"):
        find_state_dict({"net_a": weights, "net_b": weights})
    for saved in ({"epoch": 1}, [1, 2], Record("a.B", attributes={"_modules": 3, "_parameters": [1]})):
        with pytest.raises(UserError, match="no weights found"):
            find_state_dict(saved)


def test_a_module_that_contains_itself_ends():
    loop = Record("a.B")
    loop.attributes = {"_parameters": {"w": torch.ones(1)}, "_modules": {"again": loop}}
    with pytest.raises(UserError, match="contains itself"):
        find_state_dict(loop)


# ---- hostile files


def zip_file(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def attacks(command: str) -> dict[str, bytes]:
    import os

    system, run = stack_global("os", "system"), short(command) + b"\x85R"
    code = f"__import__('os').system({command!r})"
    return {
        "reduce": pickle.dumps(Call(os.system, command)),
        "reduce_protocol_0": pickle.dumps(Call(os.system, command), protocol=0),
        "eval": pickle.dumps(Call(eval, code)),
        "exec": pickle.dumps({"a": [Call(exec, code)]}),
        "subprocess": pickle.dumps(Call(subprocess.check_output, command)),
        "stack_global": b"\x80\x04" + system + run + b".",
        "dotted": b"\x80\x04" + stack_global("torch", "serialization.os.system") + run + b".",
        "memoized_name": b"\x80\x04" + short("os") + b"\x94" + short("system") + b"\x94h\x00h\x01\x93" + run + b".",
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "newobj": b"\x80\x04" + stack_global("subprocess", "Popen") + short(command) + b"\x85\x81.",
        "build_setstate": b"\x80\x04"
        + stack_global("a", "B") + b")\x81}" + short("__setstate__") + system + b"sb" + short(command) + b"b.",
        "build_on_a_name": b"\x80\x04" + stack_global("a", "B") + b"N}" + short("x") + system + b"s\x86b.",
        "getattr": b"\x80\x04" + stack_global("builtins", "getattr") + stack_global("os", "x") + short("system")
        + b"\x86R" + run + b".",
        "extension": b"\x80\x02\x82\x01" + run + b".",
        "ordered_dict_of": b"\x80\x04" + stack_global("collections", "OrderedDict") + system + run + b"\x85R.",
    }  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
@pytest.mark.parametrize("attack", sorted(attacks("")))
def test_nothing_in_a_file_is_ever_executed(tmp_path, attack, zipped):
    marker = tmp_path / "executed"
    data = attacks(f"touch {marker}")[attack]
    path = tmp_path / "evil.pt"
    if zipped:
        zip_file(path, data)
    else:
        path.write_bytes(data)
    try:
        got = load_foreign(path)
    except UserError:
        pass
    else:
        assert isinstance(got, Record | dict)
        assert zipped  # without torch.save's header a bare pickle is refused
    assert not marker.exists()


def test_the_attacks_would_work_on_plain_pickle(tmp_path):
    for name in ("reduce", "eval", "stack_global", "inst", "obj"):
        marker = tmp_path / name
        pickle.loads(attacks(f"touch {marker}")[name])
        assert marker.exists(), name


def test_a_call_stays_a_record(tmp_path):
    got = load_foreign(zip_file(tmp_path / "a.pt", attacks("date")["stack_global"]))
    assert (got.class_name, got.arguments) == ("os.system", ("date",))
    got = load_foreign(zip_file(tmp_path / "b.pt", b"\x80\x04" + stack_global("os", "system") + b"."))
    assert got == ForeignName("os", "system")


def tensor_pickle(
    numel: int = 4, offset: int = 0, size=(2, 2), stride=(2, 1), kind: str = "FloatStorage", key: str = "0"
) -> bytes:
    """A pickle of one tensor with any claims about its storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return (
                ("storage", getattr(torch, kind), key, "cpu", numel)
                if isinstance(obj, str) and obj == "STORAGE"
                else None
            )

        def reducer_override(self, obj):
            if isinstance(obj, Call):
                return vars(torch)["_utils"]._rebuild_tensor_v2, obj.args
            return NotImplemented

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(Call(None, "STORAGE", offset, size, stride, False, OrderedDict()))
    return out.getvalue()


def test_the_tensor_maker_of_these_tests_makes_good_tensors(tmp_path):
    path = zip_file(tmp_path / "a.pt", tensor_pickle(), {"0": struct.pack("<4f", 1, 2, 3, 4)})
    assert load_foreign(path).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "claims",
    [
        {"numel": 1 << 40},
        {"numel": 5},
        {"numel": -4},
        {"offset": 1},
        {"offset": -1},
        {"size": (2, 3)},
        {"stride": (1000, 1)},
        {"stride": (-2, 1), "offset": 3},
        {"size": (-2, 2)},
        {"size": (1 << 40,), "stride": (0,)},
        {"size": (1 << 62, 1 << 62), "stride": (0, 0)},
        {"size": (2,), "stride": (1, 1)},
        {"size": (2.0, 2)},
        {"kind": "DoubleStorage"},
        {"kind": "QUInt8Storage"},
        {"key": "../../etc/passwd"},
    ],
    ids=str,
)
def test_tensors_that_lie_about_their_storage_are_refused(tmp_path, claims):
    path = zip_file(tmp_path / "a.pt", tensor_pickle(**claims), {"0": bytes(16)})
    with pytest.raises(UserError, match="a.pt"):
        load_foreign(path)


@pytest.mark.parametrize("sparse", [torch.eye(3).to_sparse()], ids=["coo"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_are_refused_by_name(tmp_path, sparse):
    with pytest.raises(UserError, match="_rebuild_sparse"):
        load_foreign(save(tmp_path / "a.pt", {"w": sparse}, True))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x.",  # BINBYTES8
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b"x.",  # BYTEARRAY8
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"N.",  # FRAME
        b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"Ns.",  # a key nested so deep that hashing it would crash
        b"\x80\x04"
        + stack_global("builtins", "list")
        + b"\x94("
        + b"N" * 4096
        + b"t\x94"
        + b"h\x00h\x01\x85R0" * 70_000
        + b"N.",
        b"\x80\x04(" * 3 + b".",
        b"",
        b"\x80\x04h\x07.",
        b"\x80\x04N",
    ],
    ids=["bytes", "bytearray", "frame", "deep_key", "copies", "marks", "empty", "memo", "no_stop"],
)
def test_absurd_and_damaged_pickles_are_refused(tmp_path, data):
    with pytest.raises(UserError, match="a.pt"):
        load_foreign(zip_file(tmp_path / "a.pt", data))


def test_compressed_zip_is_refused(tmp_path):
    bomb = zip_file(tmp_path / "a.pt", pickle.dumps({}), {"0": bytes(1 << 22)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        load_foreign(bomb)


@FORMATS
def test_random_damage_never_gets_out_as_anything_but_a_message(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2))
    path = save(tmp_path / "a.pt", {"model": module, "numpy": np.arange(3.0), "set": {1, 2}}, zipped)
    whole = path.read_bytes()
    if zipped:
        with zipfile.ZipFile(path) as archive:
            whole = archive.read("a/data.pkl")
    readable = 0
    for seed in range(150):
        random = np.random.default_rng(seed)
        damaged = bytearray(whole)
        for place in random.integers(len(damaged), size=2):
            damaged[place] = random.integers(256)
        if zipped:
            zip_file(path, bytes(damaged))
        else:
            path.write_bytes(damaged)
        try:
            find_state_dict(load_foreign(path))
            readable += 1
        except UserError as refused:
            message = str(refused)
            assert "\n" not in message
    assert readable < 150


@FORMATS
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_cut_off_files_are_refused(tmp_path, zipped, part):
    path = save(tmp_path / "a.pt", {"w": torch.ones(1000)}, zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError, match="a.pt"):
        load_foreign(path)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80", b"\x80\x02K\x01.", bytes(500)])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(UserError, match="a.pt"):
        load_foreign(tmp_path / "a.pt")
