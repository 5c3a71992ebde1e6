"""How far back a mixer hears (Wang et al., "Understanding and mitigating bottlenecks of SSMs", 2025, section 3).

Two curves of untrained mixers over distance: influence, the root mean square of dy_t / dx_{t-k} relative to k = 0, for
every mixer; and transmission, the product of k decays, for those that have decays. Then a trained classifier of digits
loses its first, middle or last pixels to noise: a model without a recency bias loses as much at either end.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.mixing import S4D, S6, SSD
from vision_ssm.mixer_config import NO_OPTIONS, ScanOptions
from vision_ssm.mixers import SCAN_MIXERS
from vision_ssm.mixing import mixings
from vision_ssm.probe import digits
from vision_ssm.probe.options import RecencyOptions
from vision_ssm.probe.report import Curve, Report
from vision_ssm.probe.stack import Stack, StackConfig

# Shapes: B sequences, L tokens, C model width.

DISTANCES = (1, 16, 64)
SEQUENCES = 4
PROBES = 32
"""Random directions of the output for each sequence."""
NOISY = 8
"""Pixels that are replaced."""


def influence(mixer: nn.Module, x: Tensor) -> Tensor:
    """(L,): root mean square over inputs, outputs and sequences of dy_last / dx_{last-k}, relative to k = 0.

    For v of unit covariance, the mean square of v' J is that of the entries of J, so no Jacobian is formed.
    """
    x = x.detach().requires_grad_()
    last = mixer(x, 1)[:, -1]
    total = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(PROBES):
        (grad,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), x, retain_graph=True)
        total += grad.square().mean((0, 2))
    curve = total.sqrt().flip(0)
    return curve / curve[0]


def log_decays(mixer: nn.Module, x: Tensor, options: ScanOptions = NO_OPTIONS) -> Tensor | None:
    """(B, L, M): what every step of the forward scan multiplies each state by, as a logarithm; None without a scan.

    States that share a decay (a head of ssd, a complex mode of s4d) count once; those of polar count, though some are
    computed beside the scan.
    """
    if not isinstance(mixer, tuple(SCAN_MIXERS.values())):
        return None
    scan = cast(S6 | SSD | S4D, mixings(mixer, x, 1)[0].directions[0])
    ones, zeros = options.polar
    if isinstance(scan, S4D):
        log_dt, log_A_real, *_ = scan.parameters
        decays = F.pad(-(log_dt[:, None] + log_A_real).exp(), (0, ones)).expand(*x.shape[:2], -1, -1)
    elif isinstance(scan, S6):
        decays = scan.steps[..., None] * scan.A
    else:
        decays = scan.steps * scan.A
    return F.pad(decays, (0, zeros), value=-torch.inf).flatten(2)


def transmission(log_decays: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) each, for (B, L, M) decays: product of the last k, mean over states, and of the state that keeps most."""
    summed = log_decays.flip(1).cumsum(1)
    kept = torch.cat([torch.zeros_like(summed[:, :1]), summed], dim=1)[:, :-1].exp().mean(0)  # (L, M)
    return kept.mean(1), kept.amax(1)


@torch.inference_mode()
def accuracies(model: Stack, pixels: Tensor, labels: Tensor, pool: digits.Pool, seed: int) -> list[float]:
    """Percent right, clean and with noise on the first, middle and last ``NOISY`` tokens."""
    middle = (pixels.shape[1] - NOISY) // 2
    found = []
    for start in (None, 0, middle, pixels.shape[1] - NOISY):
        given = pixels.clone()
        if start is not None:
            generator = torch.Generator().manual_seed(seed)
            given[:, start : start + NOISY] = torch.randn(given[:, :NOISY].shape, generator=generator)
        right = digits.scores(model, given, pool).argmax(1) == labels
        found.append(100 * right.float().mean().item())
    return found


def _untrained(config: StackConfig, options: RecencyOptions) -> tuple[list[float | None], list[Curve]]:
    """Cells and curves of the first layer's mixer."""
    torch.manual_seed(options.seed)
    mixer = config.build(0)
    x = torch.randn(SEQUENCES, options.length, config.dim)
    found: list[Tensor | None] = [influence(mixer, x), None, None]
    with torch.inference_mode():
        decays = log_decays(mixer, x, config.options)
    if decays is not None:
        found[1:] = transmission(decays)
    names = (f"{config.label}: influence", f"{config.label}: transmission")
    curves = [
        Curve(name, range(1, options.length), curve[1:].tolist())
        for name, curve in zip(names, found, strict=False)
        if curve is not None
    ]
    return [None if curve is None else curve[k].item() for curve in found for k in _distances(options)], curves


def _distances(options: RecencyOptions) -> list[int]:
    return [k for k in DISTANCES if k < options.length]


def _corrupted(config: StackConfig, options: RecencyOptions) -> list[float]:
    """Accuracies of a classifier that was trained on clean digits."""
    pixels, labels = digits.load()
    torch.manual_seed(options.seed)
    model = digits.classifier(config)
    digits.train(model, pixels, labels, pool=options.pool, steps=options.steps, seed=options.seed)
    test = slice(-digits.TEST, None)
    return accuracies(model, pixels[test], labels[test], options.pool, options.seed)


def measure(options: RecencyOptions, stacks: list[StackConfig]) -> Report:
    """Both curves, and the corruption test, for every stack."""
    kinds = ("influence", "transmission", "best state")
    columns = ("stack", *(f"{kind} {k}" for kind in kinds for k in _distances(options)))
    columns += ("clean %", "first %", "middle %", "last %")
    rows, curves = [], []
    for config in stacks:
        cells, drawn = _untrained(config, options)
        curves += drawn
        rows.append((config.label, *cells, *(_corrupted(config, options) if options.steps else [None] * 4)))
    settings = options.settings(stacks) | {"noisy pixels": NOISY}
    axes = {"xlabel": "distance in tokens", "ylabel": "relative to distance 0", "xscale": "log", "yscale": "log"}
    return Report("recency", settings, columns, rows, curves, axes)
