"""Power-function averages: their profile, and that a run keeps and resumes them."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.vision_ssm.training_runs import TinyTask, tiny_config
from vision_ssm.checkpoint import load_checkpoint
from vision_ssm.errors import UserError
from vision_ssm.training import EmaConfig, train
from vision_ssm.training.ema import PowerEma, power_exponent


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_the_profile_has_the_width_that_was_asked_for(width):
    steps, model = 400, nn.Linear(400, 1, bias=False)
    ema = PowerEma(model, width)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.zero_()[0, step - 1] = 1.0  # so that the average shows the weight of every step
        ema.update(model, step)
    profile = ema.module.weight[0].detach().double().numpy()
    places = (np.arange(steps) + 0.5) / steps
    assert profile.sum() == pytest.approx(1)
    mean = (profile * places).sum()
    assert np.sqrt((profile * (places - mean) ** 2).sum()) == pytest.approx(width, rel=0.02)
    exponent = power_exponent(width)
    assert profile[300] / profile[150] == pytest.approx((300.5 / 150.5) ** exponent, rel=0.02)


def test_a_run_keeps_every_width_and_a_resumed_one_goes_on_with_them(tmp_path):
    ema = EmaConfig(decay=0.9, warmup_steps=3, power_widths=(0.05, 0.2))
    whole = train(TinyTask(), tiny_config(tmp_path / "whole", ema=ema))
    stopped = TinyTask()

    def interrupt(images):
        raise UserError("stopped here")

    stopped.actions[12] = interrupt  # the first batch of the last epoch
    config = tiny_config(tmp_path / "stopped", ema=ema)
    with pytest.raises(UserError, match="stopped here"):
        train(stopped, config)
    resumed = train(TinyTask(), config, resume=tmp_path / "stopped")
    found = {}
    for width in ("0.05", "0.2"):
        want, settings = load_checkpoint(whole.run_dir / "averages" / width)
        got, _ = load_checkpoint(resumed.run_dir / "averages" / width)
        assert settings["task"] == "tiny"
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        found[width] = want["0.weight"]
    assert not torch.equal(found["0.05"], found["0.2"])


def test_widths_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="power_widths must be different numbers above 0 and below 0.28"):
        EmaConfig(power_widths=(0.1, 0.5))
