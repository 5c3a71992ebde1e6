"""DiM: sizes, shapes, what an untrained net gives, conditioning, layouts, mixers."""

import pytest
import torch
from torch import Tensor

from generation.conditioning import grid_positions
from generation.dim import PATCHES, SIZES, DiM
from generation.layouts import expand_layout, turned
from kernels.testing import assert_close
from tests.generation.small_models import small_dim
from vision_ssm.errors import UserError
from vision_ssm.mixers import S6Mixer, SSDMixer

CONDITIONINGS = ("adaln_zero", "adaln_single", "token")
# specs of the design: millions of weights for latents of 4 channels, patch 2, 1,000 classes
COUNTS = {"adaln_zero": {"S": 37, "B": 141, "L": 494, "XL": 726}, "token": {"S": 26, "B": 99, "L": 343, "XL": 503}}


@pytest.mark.parametrize("conditioning", COUNTS)
@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_number_of_weights(size, conditioning):
    with torch.device("meta"):
        model = DiM(size, in_channels=4, num_classes=1000, conditioning=conditioning)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == COUNTS[conditioning][size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", PATCHES)
def test_shape_of_every_size_and_patch(size, patch):
    model = DiM(size, patch=patch, width=32, num_classes=10)
    assert len(model.blocks) == SIZES[size].depth
    images = torch.randn(2, 3, 16, 8)
    with torch.no_grad():
        assert model(images, 5.0, torch.zeros(2, dtype=torch.long)).sample.shape == images.shape


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("mixer", ["s6", "ssd"])
def test_every_pixel_reaches_every_pixel_and_stays_in_place(patch, mixer):
    """The net is told apart from a shuffled one by its head alone: with blocks off, a patch sees itself only."""
    model = small_dim(patch=patch, mixer=mixer)
    x = torch.randn(1, 3, 16, 24, requires_grad=True)
    (seen,) = torch.autograd.grad(model(x, 500.0).sample[0, :, 8, 8].sum(), x)
    assert (seen.abs().sum(1) > 0).all()
    for block in model.blocks:
        torch.nn.init.zeros_(block.modulation.linear.weight)
        torch.nn.init.zeros_(block.modulation.linear.bias)
    (seen,) = torch.autograd.grad(model(x, 500.0).sample[0, :, 8, 8].sum(), x)
    cell = torch.zeros(16, 24, dtype=torch.bool)
    corner = 8 - 8 % patch
    cell[corner : corner + patch, corner : corner + patch] = True
    assert ((seen[0].abs().sum(0) > 0) == cell).all()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layout", ["s", "sst", "stj"])
def test_an_untrained_net_gives_zeros_and_can_learn(conditioning, layout):
    torch.manual_seed(0)
    model = DiM("tiny", width=32, depth=3, layout=layout, num_classes=3, conditioning=conditioning)
    output = model(torch.randn(2, 3, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])).sample
    assert output.shape == (2, 3, 4, 8, 8)
    assert not output.any()
    (output - 1).square().mean().backward()
    assert model.head.linear.weight.grad.any() or model.head.linear.bias.grad.any()


@pytest.mark.parametrize("mixer", ["s6", "ssd"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_weight_takes_part(mixer, conditioning):
    model = small_dim(mixer=mixer, conditioning=conditioning, layout="stj").train()
    model(torch.randn(2, 3, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 2])).sample.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_time_and_class_change_the_result(conditioning):
    model = small_dim(conditioning=conditioning)
    x = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1)
    t, labels = torch.tensor([10.0, 10.0, 900.0, 10.0]), torch.tensor([0, 1, 0, 0])
    with torch.no_grad():
        y = model(x, t, labels).sample
        free = model(x, t).sample
        no_class = model(x, t, torch.full((4,), 3)).sample
    assert_close("same condition", y[3], y[0], rel=1e-5)
    for other in (y[1], y[2], free[0]):
        assert (other - y[0]).abs().max() > 1e-2
    assert_close("no labels are no class", no_class, free, rel=1e-6)


def test_labels_are_dropped_in_training_only():
    model = small_dim(label_dropout=0.5).train()
    labels = torch.zeros(400, dtype=torch.long)
    dropped = (model.classes(labels) == model.classes.table.weight[3]).all(1)
    assert 130 < dropped.sum() < 270
    with torch.no_grad():
        assert not (model.classes(labels) == model.classes.table.weight[3]).all(1).any()
    assert not (model.eval().classes(labels) == model.classes.table.weight[3]).all(1).any()


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_noise_levels_per_frame(conditioning):
    model = small_dim(layout="s", conditioning=conditioning)
    x, t = torch.randn(2, 3, 4, 8, 8), 1000 * torch.rand(2, 4)
    with torch.no_grad():
        whole = model(x, t).sample
        for f in range(4):
            assert_close(f"frame {f}", whole[:, :, f], model(x[:, :, f], t[:, f]).sample, rel=1e-5)
        equal = model(x, t[:, :1].expand(2, 4)).sample
        assert_close("one level for all", equal, model(x, t[:, 0]).sample, rel=1e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_an_image_model_goes_on_as_a_video_model(conditioning, causal):
    """Added layers along time start as the identity: each frame comes out as the image model's picture."""
    images = small_dim(conditioning=conditioning, layout="s", depth=2)
    torch.manual_seed(1)
    videos = DiM(
        "tiny", width=32, depth=3, num_classes=3, conditioning=conditioning, layout="sst", causal=causal
    ).eval()  # fmt: skip
    report = videos.load_state_dict(images.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith(("blocks.2.", "frame_gate")) for key in report.missing_keys)
    x, t = torch.randn(2, 3, 5, 8, 8), torch.tensor([30.0, 600.0])
    with torch.no_grad():
        got = videos(x, t).sample
        for f in range(5):
            assert_close(f"frame {f}", got[:, :, f], images(x[:, :, f], t).sample, rel=1e-5)


def test_an_image_skips_the_layers_along_time():
    model = small_dim(layout="st")
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        image, one_frame = model(x, 5.0).sample, model(x.unsqueeze(2), 5.0).sample.squeeze(2)
        for parameter in model.blocks[1].parameters():
            parameter.zero_()
        assert_close("image", model(x, 5.0).sample, image, rel=1e-6)
    assert (one_frame - image).abs().max() > 1e-3


@pytest.mark.parametrize("mixer", ["s6", "ssd"])
@pytest.mark.parametrize("layout", ["t", "j"])
def test_causal_layers_do_not_look_ahead(mixer, layout):
    x = torch.randn(1, 3, 4, 8, 8, requires_grad=True)
    for causal in (True, False):
        model = small_dim(layout=layout, mixer=mixer, causal=causal)
        (seen,) = torch.autograd.grad(model(x, 500.0).sample[:, :, 1].sum(), x)
        reached = seen.abs().amax((0, 1, 3, 4)) > 0
        assert reached.tolist() == [True, True, not causal, not causal]


@pytest.mark.parametrize("mixer", ["s6", "ssd"])
def test_gradient_checkpointing_changes_nothing(mixer):
    model = small_dim(mixer=mixer, layout="st").train()
    x, t = torch.randn(2, 3, 3, 8, 8), torch.tensor([3.0, 700.0])

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x, t).sample.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    want = gradients()
    model.enable_gradient_checkpointing()
    for (name, _), w, g in zip(model.named_parameters(), want, gradients(), strict=True):
        assert_close(name, g, w, rel=1e-5)


@pytest.mark.parametrize("mixer", ["s6", "ssd"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(mixer, autocast):
    model = small_dim(mixer=mixer, layout="st")
    x = torch.randn(1, 3, 2, 8, 8)
    with torch.no_grad():
        want = model(x, 5.0).sample
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                got = model(x, 5.0).sample
        else:
            got = model.to(torch.bfloat16)(x.bfloat16(), 5.0).sample
            assert got.dtype == torch.bfloat16
    assert_close("bfloat16", got.float(), want, rel=0.04)


@pytest.mark.parametrize("mixer", ["s6", "ssd"])
def test_bfloat16_training_stays_finite(mixer):
    """The published complaint: two directions summed and a shortened state give NaN in mixed precision."""
    torch.manual_seed(0)
    model = DiM("tiny", width=32, depth=4, mixer=mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x = torch.randn(4, 3, 8, 8)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x, torch.full((4,), 300.0)).sample.float() - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mixer", ["s6", "ssd"])
def test_compiles_to_one_graph(mixer):
    model = small_dim(layout="ts", depth=2, mixer=mixer)
    x, t, labels = torch.randn(2, 3, 3, 8, 8), torch.tensor([3.0, 5.0]), torch.tensor([0, 1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close("compiled", compiled(x, t, labels).sample, model(x, t, labels).sample, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["s6", "ssd"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_gpu_gives_what_the_cpu_gives(mixer, conditioning):
    results = []
    for device in ("cpu", "cuda"):
        model = small_dim(layout="stj", mixer=mixer, conditioning=conditioning, width=64).to(device)
        x = torch.randn(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
        y = model(x, torch.tensor([3.0, 700.0], device=device), torch.tensor([0, 2], device=device)).sample
        y.square().sum().backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
        results.append({"sample": y.detach().cpu(), **gradients})
    for name, want in results[0].items():
        assert_close(name, results[1][name], want, rel=5e-3)


def test_saved_models_come_back(tmp_path):
    model = small_dim(layout="sst", causal=True, objective="v", mixer="ssd")
    model.save_pretrained(tmp_path)
    again = DiM.from_pretrained(tmp_path, local_files_only=True)
    for name in ("layout", "causal", "objective", "mixer", "width", "depth", "sample_size"):
        assert again.config[name] == model.config[name]
    x = torch.randn(1, 3, 2, 8, 8)
    with torch.no_grad():
        assert_close("loaded", again(x, 5.0).sample, model(x, 5.0).sample, rel=1e-5)
    half = DiM.from_pretrained(tmp_path, local_files_only=True, torch_dtype=torch.bfloat16)
    kept = {name.rsplit(".", 1)[-1] for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias"}


def test_positions_of_a_grid():
    positions = grid_positions(3, 5, 8, torch.device("cpu"))
    assert positions.shape == (15, 8)
    assert torch.unique(positions, dim=0).shape == (15, 8)
    assert torch.equal(positions[7], torch.cat([grid_positions(2, 1, 8, positions.device)[1, :4], positions[2, 4:]]))
    assert_close("cosine first", positions[1, 4], torch.tensor(1.0).cos(), rel=1e-6)


@pytest.mark.parametrize("front", [0, 2])
def test_columns_are_rows_of_the_turned_grid(front):
    block = small_dim(layout="c", width=32).blocks[0]
    x, condition = torch.randn(2, 3, front + 12, 32), torch.randn(2, 1, 1, 32)
    down = [*range(front), *(front + 4 * row + column for column in range(4) for row in range(3))]
    assert torch.equal(turned(x, 3, 4), x[:, :, down])
    with torch.no_grad():
        by_columns = block(x, condition, (3, 4))
        block.letter = "s"
        assert_close("columns", by_columns[:, :, down], block(x[:, :, down], condition, (4, 3)), rel=1e-6)


def test_layouts():
    assert "".join(expand_layout("sst", 7)) == "sstssts"
    for layout, depth in (("", 3), ("sx", 3), ("s", 0)):
        with pytest.raises(UserError):
            expand_layout(layout, depth)


@pytest.mark.parametrize("mixer", [S6Mixer, SSDMixer])
def test_the_axis_that_is_read(mixer):
    torch.manual_seed(0)
    layer = mixer(32)
    x = torch.randn(2, 5, 3, 32)
    with torch.no_grad():
        assert_close("axis 1", layer(x, 1), layer(x.transpose(1, 2), 2).transpose(1, 2), rel=1e-5)
        assert_close("rows", layer(x, 2)[0], layer(x[0], 1), rel=1e-5)


@pytest.mark.parametrize("mixer", [S6Mixer, SSDMixer])
def test_both_directions_count_the_same(mixer):
    torch.manual_seed(0)
    layer = mixer(32)
    mirrored = mixer(32)
    mirrored.load_state_dict(layer.state_dict())
    mirrored.forwards.load_state_dict(layer.backwards.state_dict())
    mirrored.backwards.load_state_dict(layer.forwards.state_dict())
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        assert_close("mirror", mirrored(x.flip(1), 1).flip(1), layer(x, 1), rel=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(size="huge"), "tiny, mini, S, B, L, XL"),
        (dict(patch=3), "1, 2, 4, 8"),
        (dict(mixer="lstm"), "s6, ssd"),
        (dict(mixer="nc_ssd", layout="t", causal=True), "no order"),
        (dict(conditioning="film"), '"adaln_zero"'),
        (dict(layout="xyz"), "sst"),
        (dict(objective="noise"), "flow, eps, x0, v"),
        (dict(num_classes=0), "num_classes"),
        (dict(label_dropout=1.0), "label_dropout"),
        (dict(width=30), "multiple of 4"),
        (dict(width=48, mixer="ssd"), "multiple of 32"),
        (dict(state_size=1000), "1 to 256"),
        (dict(depth=0), "depth"),
    ],
)
def test_configurations_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        DiM(**{"size": "tiny", "depth": 2, **arguments})


@pytest.mark.parametrize(
    "shape, timestep, labels, message",
    [
        ((1, 4, 8, 8), 1.0, None, r"\(B, 3, H, W\)"),
        ((3, 8, 8), 1.0, None, r"\(B, 3, H, W\)"),
        ((1, 3, 9, 8), 1.0, None, "multiples of the patch"),
        ((2, 3, 8, 8), torch.zeros(3), None, "timestep"),
        ((2, 3, 4, 8, 8), torch.zeros(2, 3), None, "timestep"),
        ((2, 3, 8, 8), 1.0, torch.tensor([0, 4]), "no class 4.* 0 to 2"),
        ((2, 3, 8, 8), 1.0, torch.tensor([0]), "one per sample"),
    ],
)
def test_inputs_that_do_not_fit(shape, timestep, labels, message):
    with pytest.raises(UserError, match=message):
        small_dim()(torch.zeros(shape), timestep, labels)


def test_labels_for_a_model_without_classes():
    with pytest.raises(UserError, match="without classes"):
        small_dim(num_classes=None)(torch.zeros(1, 3, 8, 8), 1.0, torch.tensor([0]))
