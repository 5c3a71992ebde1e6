"""The classifier: readers of labelled pictures, training, scoring, predicting, messages."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vision_ssm.checkpoint import save_checkpoint
from vision_ssm.classify.commands import COMMANDS
from vision_ssm.classify.config import ClassifyConfig, NetworkConfig
from vision_ssm.classify.model import Classifier, build_network
from vision_ssm.classify.train import ClassifyTask, Squares, read_squares, run_train, scores_of
from vision_ssm.cli import call
from vision_ssm.config import from_dict, load_config, shipped_configs
from vision_ssm.data.labelled import find_labelled, read_idx, to_square
from vision_ssm.errors import UserError
from vision_ssm.training import SampleKey, train
from vision_ssm.viz import save_picture

SMALL = {"name": "resnet10t", "options": {"channels": [8, 8, 8, 8], "stem_width": 8, "output_stride": 8}}
COLORS = {"blue": (20, 30, 220), "green": (20, 220, 30), "red": (220, 30, 20)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Noisy squares in three colours, a folder per class and split."""
    root, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(3)
    for split, count in (("train", 8), ("val", 3)):
        for name, color in COLORS.items():
            for number in range(count):
                noise = rng.integers(-20, 20, (20, 24, 3))
                save_picture(root / split / name / f"{number}.png", (np.array(color) + noise).clip(0, 255).astype("u1"))
    return root


def settings(folder: Path, run_dir: Path, **changes) -> ClassifyConfig:
    values = {
        "network": SMALL,
        "data": {"train": str(folder), "side": 16, "color": 0.05},
        "train": {
            "run_dir": str(run_dir), "epochs": 6, "batch_size": 8, "workers": 0, "device": "cpu",
            "optim": {"lr": 0.01}, "schedule": {"warmup_epochs": 0}, "ema": {"decay": 0.5, "warmup_steps": 1},
        },
    }  # fmt: skip
    for group, items in changes.items():
        values[group] = {**values.get(group, {}), **items} if isinstance(items, dict) else items
    return from_dict(ClassifyConfig, values)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    config = settings(folder, tmp_path_factory.mktemp("run"))
    result = train(ClassifyTask(config), config.train)
    assert result.best is not None
    assert result.metrics["accuracy"] == 1.0
    return result.best


def test_a_trained_classifier_is_right_about_new_pictures(trained, folder, tmp_path, capsys):
    report = tmp_path / "val.json"
    assert call("vssm classify val", COMMANDS["val"], [str(trained), str(folder), "--output", str(report)]) == 0
    scores = json.loads(report.read_text())
    assert scores["pictures"] == 9
    assert scores["per_class"] == {"blue": 1.0, "green": 1.0, "red": 1.0}
    picture = str(folder / "val" / "red" / "0.png")
    assert call("vssm classify predict", COMMANDS["predict"], [str(trained), picture, "--top", "1"]) == 0
    assert "red 0." in capsys.readouterr().out


def test_features_and_probabilities_do_not_depend_on_the_batch(trained):
    classifier = Classifier.load(trained, device="cpu")
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, probabilities = classifier(images)
    parts, _ = classifier(images, batch_size=2)
    torch.testing.assert_close(features, parts)
    assert features.shape == (5, 8)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))


def test_packed_weights_are_half_as_large_and_say_the_same(trained, folder, tmp_path):
    assert call("vssm classify pack", COMMANDS["pack"], [str(trained), str(tmp_path / "packed")]) == 0
    sizes = [(place / "model.safetensors").stat().st_size for place in (tmp_path / "packed", trained)]
    assert sizes[0] < 0.75 * sizes[1]
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed, whole = Classifier.load(tmp_path / "packed", device="cpu"), Classifier.load(trained, device="cpu")
    assert packed.accuracy == whole.accuracy == 1.0
    with pytest.raises(UserError, match="packed is not empty"):
        call("vssm classify pack", COMMANDS["pack"], [str(trained), str(tmp_path / "packed")])
    torch.testing.assert_close(packed(images)[1], whole(images)[1], atol=5e-3, rtol=0)


def test_shipped_weights_have_names(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("vision_ssm.classify.model._SHIPPED", trained.parent)
    monkeypatch.chdir(tmp_path)
    assert Classifier.load("best", device="cpu").classes == ("blue", "green", "red")
    with pytest.raises(UserError, match="no checkpoint at other"):
        Classifier.load("other", device="cpu")


def test_the_shipped_judge_recognises_satellite_pictures(shared_root):
    judge = Classifier.load("eurosat", device="cpu")
    pictures = find_labelled(shared_root / "data" / "generation" / "eurosat", "val", judge.classes)
    assert len(pictures) == 500
    assert scores_of(judge, read_squares(pictures, judge.side), pictures.labels)["accuracy"] > 0.95


def test_a_sample_depends_on_its_key_alone(folder):
    config = settings(folder, Path("unused")).data
    data = Squares(find_labelled(folder, "train"), config)
    key = SampleKey(1, 2, 3)
    assert torch.equal(data[key][0], data[key][0])
    assert not torch.equal(data[key][0], data[SampleKey(1, 3, 3)][0])


def test_a_damaged_picture_does_not_stop_the_others(trained, folder, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    sources = [str(tmp_path), str(folder / "val" / "blue")]
    assert call("vssm classify predict", COMMANDS["predict"], [str(trained), *sources]) == 1
    printed = capsys.readouterr()
    assert "bad.png" in printed.err
    assert printed.out.count("blue 0.") == 3


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    data = header + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_idx_files_are_read_gzipped_or_not(tmp_path):
    pictures = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pictures)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array([2, 0], np.uint8))
    found = find_labelled(tmp_path, "train")
    assert found.classes == ("0", "1", "2")
    assert found.labels.tolist() == [2, 0]
    np.testing.assert_array_equal(found.read(1)[..., 2], pictures[1])
    with pytest.raises(UserError, match="no t10k-images-idx3-ubyte"):
        find_labelled(tmp_path, "val")
    (tmp_path / "cut").write_bytes((tmp_path / "train-labels-idx1-ubyte").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cut off: its header says \(2,\), it holds 1"):
        read_idx(tmp_path / "cut")


def test_the_middle_square_is_taken():
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 2:6] = 200
    assert (to_square(picture, 4) == 200).all()
    assert to_square(picture, 16).shape == (16, 16, 3)


def test_mistakes_are_told(folder, trained, tmp_path):
    with pytest.raises(UserError, match="timm has no network 'resnet10x'; did you mean 'resnet10t'"):
        build_network(NetworkConfig(name="resnet10x"), 3)
    with pytest.raises(UserError, match="timm cannot build resnet10t with"):
        build_network(NetworkConfig(name="resnet10t", options={"chanels": 3}), 3)
    with pytest.raises(UserError, match="are for training and for scoring"):
        ClassifyTask(settings(folder, tmp_path, data={"train": str(folder / "val")}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in folders per class"):
        find_labelled(tmp_path / "empty", "train")
    with pytest.raises(UserError, match="classes that the training set has not: blue"):
        find_labelled(folder, "val", ("green", "red"))
    with pytest.raises(UserError, match="--data.train"):
        run_train(ClassifyConfig())
    vit = {"name": "vit_tiny_patch16_224", "options": {"embed_dim": 12, "depth": 1, "num_heads": 2}}
    with pytest.raises(UserError, match="vit_tiny_patch16_224 does not take pictures of 16x16 pixels .*224"):
        ClassifyTask(settings(folder, tmp_path, network=vit)).build()
    shutil.copytree(trained.parent, tmp_path / "run")
    save_checkpoint(tmp_path / "run" / "last", {}, {"task": "classify"})  # as one that was packed
    with pytest.raises(UserError, match="run is no run of `vssm classify train`"):
        run_train(ClassifyConfig(), resume=tmp_path / "run")


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("classify/")])
def test_shipped_recipes_can_be_built_and_are_small(name):
    config = load_config(ClassifyConfig, name)
    weights = sum(p.numel() for p in build_network(config.network, 10).parameters())
    assert weights * 2 < 1.5e6, "packed"
