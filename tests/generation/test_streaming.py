"""Streaming: pieces equal the whole, a stream goes on identically after saving, and its state does not grow."""

import gc

import numpy as np
import pytest
import torch

from generation.attributes import centroids
from generation.config import GenerateDataConfig
from generation.evaluate import stored_reference
from generation.generator import load_generator
from generation.objectives import Objective, sample_generators
from generation.pipelines import VideoDiMPipeline, load_pipeline
from generation.reference import attribute_reference
from generation.streaming import VideoStream, forward_chunked
from generation.synthetic import MovingShapes
from kernels.testing import assert_close
from tests.generation.small_models import small_dim
from vision_ssm.errors import UserError

MIXERS = ("s6", "ssd")
CONDITIONINGS = ("adaln_zero", "adaln_single", "token")


def pipeline(**changes) -> VideoDiMPipeline:
    return VideoDiMPipeline(small_dim(**{"layout": "stj", "causal": True, **changes}), Objective().scheduler())


def stream(pipe: VideoDiMPipeline, **changes) -> VideoStream:
    return VideoStream(pipe, **{"seeds": [1, 2], "class_labels": [0, 1], "num_inference_steps": 2, **changes})


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_video_in_pieces_equals_the_whole(mixer, conditioning):
    model = small_dim(mixer=mixer, conditioning=conditioning, layout="stjc", depth=4, causal=True)
    x, t, labels = torch.randn(2, 3, 9, 8, 8), 1000 * torch.rand(2, 9), torch.tensor([0, 2])
    with torch.no_grad():
        whole = model(x, t, labels).sample
        states, start = None, 0
        for length in (1, 2, 1, 5):  # below and above the window of the convolution
            part = slice(start, start + length)
            y, states = model.advance(x[:, :, part], t[:, part], labels, states)
            assert (y - whole[:, :, part]).abs().max() <= 1e-5
            start += length


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 4, 20])
def test_chunked_equals_the_whole(mixer, conditioning, causal, length):
    model = small_dim(mixer=mixer, conditioning=conditioning, layout="stjc", depth=4, causal=causal)
    x, labels = torch.randn(1, 3, 9, 8, 8), torch.tensor([2])
    for t in (1000 * torch.rand(1, 9), torch.tensor([400.0])):
        with torch.no_grad():
            whole = model(x, t, labels).sample
        assert (forward_chunked(model, x, t, labels, frames_at_once=length) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("layout", ["st", "stc", "stj"])
def test_all_frames_after_a_past_in_one_pass_are_those_of_a_stream(mixer, conditioning, layout):
    model = small_dim(mixer=mixer, conditioning=conditioning, layout=layout, causal=True)
    x, past, t = torch.randn(2, 3, 5, 8, 8), torch.randn(2, 3, 5, 8, 8), 1000 * torch.rand(2, 5)
    labels, states = torch.tensor([0, 2]), None
    with torch.no_grad():
        y = model(x, t, labels, past=past).sample
        for i in range(5):
            frame = slice(i, i + 1)
            alone, after = model.advance(x[:, :, frame], t[:, frame], labels, states, last=True)
            assert not after
            assert_close(f"frame {i}", y[:, :, frame], alone, rel=1e-5)
            states = model.advance(past[:, :, frame], 0.0, labels, states)[1]


def test_pasts_that_cannot_be():
    video = torch.zeros(1, 3, 4, 8, 8)
    for changes, past, message in (
        ({"layout": "st", "causal": True}, video[:, :, 1:], "shaped as sample"),
        ({"layout": "st", "causal": True, "mixer_pattern": "alternating"}, video, "attention along time"),
        ({"layout": "st", "causal": False}, video, "causal=True"),
    ):
        with pytest.raises(UserError, match=message):
            small_dim(**changes)(video, 500.0, torch.tensor([0]), past=past)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_stream_is_the_loop_over_the_whole_history(mixer, guidance):
    """Each frame equals one drawn by running the model on all frames so far, the finished ones at the clean level."""
    pipe = pipeline(mixer=mixer)
    frames = stream(pipe, guidance_scale=guidance)
    history = torch.empty(2, 3, 0, 8, 8)
    labels, none = torch.tensor([0, 1]), torch.tensor([3, 3])
    for i in range(4):
        got = next(frames)
        scheduler = Objective().scheduler()
        scheduler.set_timesteps(2)
        x = _noise_of(frames, i)
        for t in scheduler.timesteps:
            video = torch.cat([history, x], dim=2)
            levels = torch.cat([torch.zeros(2, i), t.expand(2, 1)], dim=1)
            with torch.no_grad():
                guided, free = (pipe.transformer(video, levels, who).sample[:, :, -1:] for who in (labels, none))
            x = scheduler.step(free + guidance * (guided - free), t, x).prev_sample
        history = torch.cat([history, x], dim=2)
        assert_close(f"frame {i}", got, (x.squeeze(2) / 2 + 0.5).clamp(0, 1), rel=1e-4)


def _noise_of(frames: VideoStream, i: int) -> torch.Tensor:
    """The noise that frame i starts from, found by a stream whose model predicts no change."""
    twin = pipeline()
    torch.nn.init.zeros_(twin.transformer.head.linear.weight)
    torch.nn.init.zeros_(twin.transformer.head.linear.bias)
    found: list[torch.Tensor] = []
    twin.decode = lambda latents: found.append(latents) or latents
    other = VideoStream(twin, seeds=frames.seeds, num_inference_steps=1)
    for _ in range(i + 1):
        next(other)
    return found[-1].unsqueeze(2)


def test_the_first_two_frames_have_steps_of_their_own():
    pipe = pipeline()
    always, first = stream(pipe, num_inference_steps=4), stream(pipe, num_inference_steps=1, first_steps=4)
    assert torch.equal(next(always), next(first))
    assert torch.equal(next(always), next(first))
    assert not torch.allclose(next(always), next(first)), "the third frame took as many steps as the first"


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", ["euler", "dpm++"])
def test_saved_streams_go_on_identically(tmp_path, guidance, scheduler):
    pipe = pipeline()
    pipe.scheduler = Objective().scheduler(scheduler)
    frames = stream(pipe, guidance_scale=guidance, guidance_interval=(0.1, 0.9), first_steps=3)
    for saved_after in range(4):
        file = tmp_path / f"{saved_after}.safetensors"
        frames.save(file)
        again = VideoStream.load(file, pipe)
        assert (again.frame_index, again.state_bytes) == (saved_after, frames.state_bytes)
        frame = next(frames)
        assert torch.equal(next(again), frame)
        assert again.frame_index == frames.frame_index


def test_streams_saved_before_first_steps_were_told_go_on(tmp_path, monkeypatch):
    pipe, card = pipeline(), VideoStream._card
    frames = stream(pipe)
    next(frames)
    monkeypatch.setattr(VideoStream, "_card", lambda self: {k: v for k, v in card(self).items() if k != "first_steps"})
    frames.save(tmp_path / "old.safetensors")
    assert torch.equal(next(VideoStream.load(tmp_path / "old.safetensors", pipe)), next(frames))


def test_first_steps_that_cannot_be():
    for number in (0, 1001):
        with pytest.raises(UserError, match=f"first_steps must be 1 to 1000, got {number}"):
            stream(pipeline(), first_steps=number)


def test_a_stream_goes_on_around_weights_from_another_folder(tmp_path):
    pipe = pipeline()
    frames = stream(pipe)
    next(frames)
    frames.save(tmp_path / "stream.safetensors")
    pipe.save_pretrained(tmp_path / "weights")
    again = VideoStream.load(tmp_path / "stream.safetensors", load_pipeline(tmp_path / "weights"))
    assert_close("frame", next(again), next(frames), rel=1e-5)


def test_a_stream_does_not_depend_on_the_others():
    pipe = pipeline()
    two = stream(pipe, guidance_scale=2.0, guidance_interval=(0.0, 0.7))
    one = stream(pipe, seeds=[2], class_labels=[1], guidance_scale=2.0, guidance_interval=(0.0, 0.7))
    for _ in range(3):
        both, alone = next(two), next(one)
        assert (both[1] - alone[0]).abs().max() <= 1e-4
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_ancestral_noise_does_not_depend_on_the_others_either():
    pipe = VideoDiMPipeline(
        small_dim(layout="st", causal=True, objective="eps"), Objective("eps").scheduler("ddpm")
    )  # fmt: skip
    two, one = stream(pipe), stream(pipe, seeds=[2], class_labels=[1])
    for _ in range(2):
        assert (next(two)[1] - next(one)[0]).abs().max() <= 1e-4


def test_the_state_does_not_grow():
    frames = stream(pipeline())
    assert frames.state_bytes == 0
    next(frames)
    size = frames.state_bytes
    for _ in range(20):
        frame = next(frames)
    assert frames.frame_index == 21
    assert frames.state_bytes == size
    assert frame.shape == (2, 3, 8, 8)
    assert 0 <= frame.min() <= frame.max() <= 1


def test_pushed_frames_are_gone_on_from():
    pipe = pipeline()
    first = stream(pipe)
    for parameter in pipe.transformer.head.parameters():
        parameter.data.mul_(0.05)  # keeps pixels inside [0, 1], where pushing loses nothing
    drawn = []
    for _ in range(3):
        drawn.append(next(first))
    given = torch.stack(drawn, dim=1)
    other, again = stream(pipe), stream(pipe)
    other.push(given)
    again.push(given[:, :2])
    again.push(given[:, 2:])
    assert other.frame_index == 3
    assert_close("pushed at once and in parts", next(again), next(other), rel=1e-5)
    different = stream(pipe)
    different.push(1 - given)
    assert (next(different) - next(stream_after(pipe, given))).abs().max() > 1e-4


def stream_after(pipe: VideoDiMPipeline, given: torch.Tensor) -> VideoStream:
    found = stream(pipe)
    found.push(given)
    return found


def test_another_size_than_that_of_training():
    frames = stream(pipeline(), height=4, width=12)
    assert next(frames).shape == next(frames).shape == (2, 3, 4, 12)


def test_streams_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="causal=True"):
        stream(pipeline(causal=False))
    with pytest.raises(UserError, match="1 class_labels for 2 seeds"):
        stream(pipeline(), class_labels=[0])
    with pytest.raises(UserError, match="seeds"):
        stream(pipeline(), seeds=[])
    with pytest.raises(UserError, match="no class 9"):
        stream(pipeline(), class_labels=[0, 9])
    with pytest.raises(UserError, match="trained for 'v'"):
        stream(pipeline(objective="v"))
    with pytest.raises(UserError, match="push takes"):
        stream(pipeline()).push(torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(UserError, match="channels, height, width"):
        stream(pipeline()).push(torch.zeros(2, 1, 3, 6, 8))
    with pytest.raises(UserError, match="frames_at_once"):
        forward_chunked(small_dim(), torch.zeros(1, 3, 2, 8, 8), 1.0, frames_at_once=0)


def test_files_that_are_no_stream(tmp_path):
    pipe, file = pipeline(), tmp_path / "stream.safetensors"
    with pytest.raises(UserError, match="no such file"):
        VideoStream.load(file, pipe)
    frames = stream(pipe)
    next(frames)
    frames.save(file)
    with pytest.raises(UserError, match="another model"):
        VideoStream.load(file, pipeline(mixer="ssd"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        VideoStream.load(file, pipe)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_stream_on_the_gpu_is_that_of_the_cpu(mixer):
    pipe = pipeline(mixer=mixer)
    want = stream(pipe)
    expected = [next(want) for _ in range(3)]
    got = stream(pipe.to("cuda"))
    for i, frame in enumerate(expected):
        assert_close(f"frame {i}", next(got).cpu(), frame, rel=5e-3)


GRAPHED = {
    "s6 with memory replay": {"mixer": "s6", "smr": 2},
    "ssd": {"mixer": "ssd"},
    "s4d": {"mixer": "s4d", "polar": [1, 0]},
    "no scan": {"mixer": "gated_conv"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GRAPHED)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_cuda_graphs_change_nothing_of_a_stream(kind, guidance, tmp_path):
    pipe = pipeline(**GRAPHED[kind]).to("cuda")
    options = {"guidance_scale": guidance, "guidance_interval": (0.0, 0.7), "num_inference_steps": 3}
    given = torch.rand(2, 2, 3, 8, 8)
    eager, graphed = stream(pipe, graph=False, **options), stream(pipe, **options)
    for frames in (eager, graphed):
        frames.push(given)
    for i in range(3):
        assert_close(f"frame {i}", next(graphed), next(eager), rel=1e-3)
    assert graphed._graphs is not None
    graphed.save(tmp_path / "stream.safetensors")
    pipe.to("cpu").to("cuda")  # the weights are elsewhere now
    again = VideoStream.load(tmp_path / "stream.safetensors", pipe)
    for i in range(2):
        frame = next(eager)
        assert_close(f"later frame {i}", next(graphed), frame, rel=1e-3)
        assert_close(f"frame {i} of the loaded stream", next(again), frame, rel=1e-3)


@pytest.mark.gpu
def test_graphs_do_not_disturb_samplers_that_keep_predictions():
    objective = Objective("x0", clip_sample=False)
    model = small_dim(layout="st", causal=True, objective="x0")
    pipe = VideoDiMPipeline(model, objective.scheduler("dpm++")).to("cuda")
    eager, graphed = (stream(pipe, graph=graph, num_inference_steps=5) for graph in (False, True))
    for i in range(3):
        assert_close(f"frame {i}", next(graphed), next(eager), rel=1e-3)


@pytest.mark.gpu
def test_graphs_under_autocast():
    pipe = pipeline(mixer="ssd").to("cuda")
    eager, graphed = stream(pipe, graph=False), stream(pipe)
    for i in range(4):
        with torch.autocast("cuda", torch.bfloat16):  # its copies of weights are gone after each frame
            frames = next(graphed), next(eager)
        assert_close(f"frame {i}", *frames, rel=2e-2)


@pytest.mark.gpu
def test_streams_that_are_over_leave_no_memory():
    pipe, sizes = pipeline(mixer="ssd").to("cuda"), []
    for _ in range(6):
        frames = stream(pipe)
        for _ in range(3):
            next(frames)
        del frames
        gc.collect()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] <= sizes[1], sizes


def test_a_state_takes_over_another():
    model = small_dim(mixer="s6", smr=2, layout="st", depth=2, causal=True)
    x = torch.randn(2, 3, 2, 8, 8)
    with torch.no_grad():
        first, second = (model.advance(frames, 0.0, None, None)[1] for frames in x.split(1, dim=2))
    kept = [state.clone() for state in first]
    for state, other in zip(first, second, strict=True):
        assert state.memory is not None
        state.copy_(other)
    for state, other, before in zip(first, second, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_a_whole_video_of_a_causal_model_is_drawn_with_a_warning():
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="one frame after the other"):
        frames = pipe(
            [0], num_frames=4, num_inference_steps=2, generator=sample_generators([0]), output_type="pt"
        ).frames
    assert frames.shape == (1, 4, 3, 8, 8)


def test_the_shipped_video_goes_on_where_its_bodies_are_bound_to_be():
    pipe, count, given = load_generator("shapes_stream"), 12, 8
    assert isinstance(pipe, VideoDiMPipeline)
    source = MovingShapes(count, frames=given + 1, side=32, seed=5)
    real = np.stack([source.read(index) for index in range(count)])
    labels = [source.label(index) for index in range(count)]
    frames = VideoStream(pipe, seeds=list(range(count)), class_labels=labels, num_inference_steps=4)
    frames.push(torch.from_numpy(real[:, :given]).permute(0, 1, 4, 2, 3) / 255)
    drawn = next(frames).permute(0, 2, 3, 1).double().numpy()
    at, there, before = (centroids(f.max(axis=-1)) for f in (drawn, real[:, given] / 255, real[:, given - 1] / 255))
    assert np.median(np.linalg.norm(there - before, axis=1)) > 0.5, "bodies move"
    assert np.median(np.linalg.norm(at - there, axis=1)) < 0.1  # 0.03 measured; 0.8 if the frame before were repeated
    colors = np.abs(drawn - real[:, given] / 255).mean()
    assert colors < 0.01, f"mean difference {colors:.3f}"


def test_the_shipped_reference_is_that_of_moving_shapes():
    stored = stored_reference("shapes_stream")
    assert stored is not None
    made = attribute_reference(16, GenerateDataConfig(side=32, frames=24))
    assert made.attributes is not None
    assert stored.attributes is not None
    assert np.allclose(stored.attributes[:16], made.attributes)
