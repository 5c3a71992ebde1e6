"""Pipelines: what they draw, that a sample does not depend on its batch, saving and loading without a network."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from generation.objectives import Objective, sample_generators
from generation.pipelines import DiMPipeline, VideoDiMPipeline, load_pipeline
from kernels.testing import assert_close
from tests.generation.small_models import small_dim
from vision_ssm.errors import UserError

NAMES = {0: "river", 1: "forest", 2: "sea"}


def images(kind: str = "flow", scheduler: str | None = None, **changes) -> DiMPipeline:
    pipe = DiMPipeline(small_dim(objective=kind, **changes), Objective(kind).scheduler(scheduler), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def videos(vae: AutoencoderKL | None = None, **changes) -> VideoDiMPipeline:
    model = small_dim(**{"layout": "sst", "sample_frames": 3, **changes})
    pipe = VideoDiMPipeline(model, Objective().scheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


@pytest.mark.parametrize("kind, name", [(k, n) for k in ("flow", "eps", "x0", "v") for n in Objective(k).schedulers])
def test_a_sample_does_not_depend_on_its_batch(kind, name):
    pipe = images(kind, name)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"}
    three = pipe([0, 2, 1], generator=sample_generators([5, 6, 7]), **options).images
    one = pipe([2], generator=sample_generators([6]), **options).images
    assert (three[1] - one[0]).abs().max() <= 1e-4
    assert (three[1] - three[0]).abs().max() > 1e-2


def test_a_model_that_streams_is_not_drawn_at_once_in_silence():
    with pytest.warns(UserWarning, match="use generation.VideoStream") as found:
        videos(layout="st", causal=True)([0], num_inference_steps=1)
    assert found[0].filename == __file__


def test_a_video_does_not_depend_on_its_batch():
    pipe = videos()
    two = pipe([0, 2], generator=sample_generators([5, 6]), num_inference_steps=3, output_type="latent").frames
    one = pipe([2], generator=sample_generators([6]), num_inference_steps=3, output_type="latent").frames
    assert (two[1] - one[0]).abs().max() <= 1e-4


def test_the_models_own_size_need_not_be_a_square():
    assert images(sample_size=(8, 12))(num_inference_steps=1, output_type="pt").images.shape == (1, 3, 8, 12)


@pytest.mark.parametrize("scheduler", ["euler", "heun"])
def test_the_steps_are_those_of_the_scheduler(scheduler):
    """An unguided sample is what a loop written out by hand gives."""
    pipe = images(scheduler=scheduler)
    noise = torch.randn(1, 3, 8, 8)
    got = pipe([1], latents=noise, num_inference_steps=3, output_type="latent").images
    reference = Objective().scheduler(scheduler)
    reference.set_timesteps(3)
    x = noise
    with torch.no_grad():
        for t in reference.timesteps:
            x = reference.step(pipe.transformer(x, t, torch.tensor([1])).sample, t, x).prev_sample
    assert_close("sample", got, x, rel=1e-5)


def test_guidance_acts_in_its_interval_only():
    pipe = images()
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    options = {
        "generator": None,
        "num_inference_steps": 10,
        "output_type": "latent",
        "latents": torch.randn(1, 3, 8, 8),
    }
    plain = pipe([1], **options).images
    assert rows == [1] * 10
    rows.clear()
    part = pipe([1], guidance_scale=3.0, guidance_interval=(0.2, 0.65), **options).images
    levels = pipe.scheduler.timesteps / 1000
    assert rows == [2 if 0.2 <= level <= 0.65 else 1 for level in levels]
    assert 2 in rows
    assert (part - plain).abs().max() > 1e-3


def test_guidance_moves_away_from_no_class():
    pipe = images()
    noise = torch.randn(1, 3, 8, 8)
    got = pipe([1], latents=noise, guidance_scale=3.0, num_inference_steps=1, output_type="latent").images
    t = pipe.scheduler.timesteps[:1]
    with torch.no_grad():
        guided, free = (pipe.transformer(noise, t, label).sample for label in (torch.tensor([1]), None))
    assert_close("one step", got, noise - t / 1000 * (free + 3.0 * (guided - free)), rel=1e-5)


def test_classes_by_name_and_number():
    pipe = images()
    assert pipe.labels == {"river": 0, "forest": 1, "sea": 2}
    assert pipe.get_label_ids("river").tolist() == [0]
    assert pipe.get_label_ids(["sea", 1]).tolist() == [2, 1]
    assert pipe.get_label_ids(torch.tensor([2, 0])).tolist() == [2, 0]


def test_what_comes_out():
    pipe = images()
    options = {"num_inference_steps": 1, "latents": torch.randn(2, 3, 8, 12), "height": 8, "width": 12, "batch_size": 2}
    latent = pipe(output_type="latent", **options).images
    want = (latent / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pipe(output_type="pt", **options).images, want)
    array = pipe(output_type="np", **options).images
    assert np.array_equal(array, want.permute(0, 2, 3, 1).numpy())
    pictures = pipe(output_type="pil", **options).images
    assert [picture.size for picture in pictures] == [(12, 8), (12, 8)]
    assert np.abs(np.asarray(pictures[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(pipe(output_type="latent", return_dict=False, **options)[0], latent)


def test_what_comes_out_of_videos():
    pipe = videos()
    options = {"num_inference_steps": 1, "latents": torch.randn(2, 3, 3, 8, 8), "batch_size": 2}
    latent = pipe(output_type="latent", **options).frames
    want = (latent / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert torch.equal(pipe(output_type="pt", **options).frames, want)
    assert np.array_equal(pipe(output_type="np", **options).frames, want.permute(0, 1, 3, 4, 2).numpy())
    assert [len(video) for video in pipe(output_type="pil", **options).frames] == [3, 3]
    assert pipe(num_frames=5, num_inference_steps=1, output_type="pt").frames.shape == (1, 5, 3, 8, 8)


def test_callbacks_see_and_change_the_steps():
    pipe = images()
    seen = []

    def callback(pipeline, i, t, given):
        seen.append((pipeline is pipe, i, float(t)))
        return {"latents": torch.zeros_like(given["latents"])} if i == 2 else given

    final = pipe(num_inference_steps=3, callback_on_step_end=callback, output_type="latent").images
    assert seen == [(True, i, float(t)) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert not final.any()


def test_latents_go_through_the_vae():
    vae = small_vae()
    pipe = videos(vae, in_channels=4, sample_size=4)
    options = {"num_inference_steps": 1, "latents": torch.randn(1, 4, 3, 4, 4)}
    latent = pipe(output_type="latent", **options).frames
    frames = pipe(output_type="pt", **options).frames
    assert frames.shape == (1, 3, 3, 8, 8)
    with torch.no_grad():
        want = vae.decode(latent[:, :, 1] / 0.5 + 0.1).sample
        pixels = torch.rand(3, 3, 8, 8)
        encoded = (vae.encode(pixels).latent_dist.mode() - 0.1) * 0.5
        assert_close("encoded", pipe.encode(pixels), encoded, rel=1e-5)
    assert_close("frame", frames[:, 1], (want / 2 + 0.5).clamp(0, 1), rel=1e-5)
    assert pipe.latent_size(None, 16) == (4, 8)


@pytest.mark.parametrize("with_vae", [False, True])
def test_saved_pipelines_come_back(tmp_path, monkeypatch, with_vae):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = images("v") if not with_vae else videos(small_vae(), in_channels=4, sample_size=4)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert type(again) is type(pipe)
    assert type(again.vae) is type(pipe.vae)
    assert again.labels == pipe.labels
    assert again.scheduler.config["_class_name"] == type(pipe.scheduler).__name__
    options = {"num_inference_steps": 2, "output_type": "np", "return_dict": False}
    want, got = (p([1], generator=sample_generators([3]), **options)[0] for p in (pipe, again))
    assert np.abs(want - got).max() <= 1e-5
    assert type(type(pipe).from_pretrained(tmp_path)) is type(pipe)


def test_a_pipeline_in_bfloat16(tmp_path):
    pipe = images()
    pipe.save_pretrained(tmp_path)
    half = load_pipeline(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    options = {"latents": torch.randn(1, 3, 8, 8), "num_inference_steps": 2, "output_type": "latent"}
    got = half([1], **options).images
    assert got.dtype == torch.float32
    assert_close("sample", got, pipe([1], **options).images, rel=0.05)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(class_labels=[3]), "no class 3.* 0 to 2"),
        (dict(class_labels=[-1]), "no class -1"),
        (dict(class_labels=["lake"]), "'lake'.*river, forest, sea"),
        (dict(class_labels=[]), "empty"),
        (dict(class_labels=[0, 1], batch_size=3), "batch_size is 3"),
        (dict(batch_size=0), "batch_size"),
        (dict(height=9), "multiples of 2"),
        (dict(width=-2), "multiples of 2"),
        (dict(num_inference_steps=0), "num_inference_steps"),
        (dict(guidance_scale=2.0), "needs class_labels"),
        (dict(class_labels=[0], guidance_scale=0.2), "at least 1"),
        (dict(class_labels=[0], generator=sample_generators([0, 1])), "2 generators for 1"),
        (dict(latents=torch.zeros(1, 3, 4, 4)), "latents"),
        (dict(output_type="jpg"), "pil, np, pt, latent"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "noise"),
    ],
)
def test_calls_that_do_not_fit(call, message):
    with pytest.raises(UserError, match=message):
        images()(**call)


def test_video_calls_that_do_not_fit():
    with pytest.raises(UserError, match="num_frames"):
        videos()(num_frames=0)
    with pytest.raises(UserError, match="without classes"):
        videos(num_classes=None)([0])


def test_a_scheduler_of_another_objective():
    pipe = images("eps")
    pipe.scheduler = Objective("flow").scheduler()
    with pytest.raises(UserError, match="trained for 'eps'"):
        pipe()


def test_folders_that_hold_no_pipeline(tmp_path):
    with pytest.raises(UserError, match="model_index"):
        load_pipeline(tmp_path / "nothing")
    index = tmp_path / "model_index.json"
    index.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_pipeline(tmp_path)
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="StableDiffusionPipeline"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_weights_that_were_cut_off(tmp_path, keep):
    images().save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UserError, match="damaged"):
        load_pipeline(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="damaged or incomplete"):
        load_pipeline(tmp_path)


def test_weights_of_another_model(tmp_path):
    images().save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"width": 64}))
    with pytest.raises(UserError, match="damaged"):
        load_pipeline(tmp_path)
    config.write_text(json.dumps(values | {"depth": 4}))
    with pytest.raises(UserError, match=r"blocks\.3"):
        load_pipeline(tmp_path)


def test_untrained_pictures_are_noise_that_the_flow_leaves_alone():
    pipe = images()
    nn.init.zeros_(pipe.transformer.head.linear.weight)
    nn.init.zeros_(pipe.transformer.head.linear.bias)
    noise = torch.randn(1, 3, 8, 8)
    assert_close("sample", pipe(latents=noise, num_inference_steps=5, output_type="latent").images, noise, rel=1e-6)
