"""`vssm doctor` reports what is there and finds a back end that computes wrongly."""

import pytest
import torch

import kernels
from vision_ssm import doctor as module
from vision_ssm.cli import main


def test_this_machine_is_well(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("Python", "torch", torch.__version__.partition("+")[0], "GPU", "the name is ours", "all is well"):
        assert part in out
    for name, reason in kernels.backends().items():
        assert (
            f"{name:<10} not used: {reason}" in out if reason else f"{name:<10} on cpu: right" in out or "cuda" in out
        )


@pytest.mark.parametrize("what", ["value", "gradient", "error"])
def test_a_broken_back_end_is_found(capsys, monkeypatch, what):
    def broken(x, delta, A, B, C, D, *, backend, **options):
        y, state = right(x, delta, A, B, C, D, backend=backend, **options)
        if backend != "torch":
            return y, state
        if what == "error":
            raise RuntimeError("no such\nkernel")
        return (y * (1 + 1e-3), state) if what == "value" else (y + (C - C.detach()).sum(), state)

    right = kernels.selective_scan_2d
    monkeypatch.setattr(kernels, "selective_scan_2d", broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    wanted = {"value": "image: y is wrong", "gradient": "image: gradient of C is wrong", "error": "no such kernel"}[
        what
    ]
    assert "back end torch on cpu: image: " in out
    assert wanted in out
    assert "reference  on cpu: right" in out
    assert "all is well" not in out


def test_a_second_package_named_kernels_is_a_problem(capsys, monkeypatch):
    monkeypatch.setattr(module.vision_ssm, "check_kernels_name", lambda: "another distribution of that name")
    assert main(["doctor"]) == 1
    assert "  another distribution of that name" in capsys.readouterr().out
