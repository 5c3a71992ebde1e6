"""Vim and VMamba as published, written down once more as plain as can be: float64, one picture, one position at a time.

They read parameters in the published names and shapes, and know nothing of our modules.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden import fill

Weights = dict[str, Tensor]


def vim_weights(dim: int, depth: int, patch: int, grid: int, classes: int, states: int = 16) -> Weights:
    """A Vim's state dict with values that follow from the names."""
    inner, rank = 2 * dim, math.ceil(dim / 16)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim), "pos_embed": (1, grid * grid + 1, dim), "norm_f.weight": (dim,),
        "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
        "head.weight": (classes, dim), "head.bias": (classes,),
    }  # fmt: skip
    for layer in range(depth):
        mixer = f"layers.{layer}.mixer."
        shapes |= {
            f"layers.{layer}.norm.weight": (dim,),
            f"{mixer}in_proj.weight": (2 * inner, dim),
            f"{mixer}out_proj.weight": (dim, inner),
        }
        for b in ("", "_b"):
            shapes |= {
                f"{mixer}A{b}_log": (inner, states), f"{mixer}D{b}": (inner,),
                f"{mixer}conv1d{b}.weight": (inner, 1, 4), f"{mixer}conv1d{b}.bias": (inner,),
                f"{mixer}x_proj{b}.weight": (rank + 2 * states, inner),
                f"{mixer}dt_proj{b}.weight": (inner, rank), f"{mixer}dt_proj{b}.bias": (inner,),
            }  # fmt: skip
    return {name: fill(name, shape) for name, shape in shapes.items()}


def vmamba_weights(
    dim: int, depths: Sequence[int], classes: int, *, ratio: int = 1, states: int = 1, as_convolutions: bool = False
) -> Weights:
    """A VMamba's state dict; its linear layers were published as matrices and as 1x1 convolutions."""
    one = (1, 1) if as_convolutions else ()
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.0.weight": (dim // 2, 3, 3, 3), "patch_embed.0.bias": (dim // 2,),
        "patch_embed.2.weight": (dim // 2,), "patch_embed.2.bias": (dim // 2,),
        "patch_embed.5.weight": (dim, dim // 2, 3, 3), "patch_embed.5.bias": (dim,),
        "patch_embed.7.weight": (dim,), "patch_embed.7.bias": (dim,),
    }  # fmt: skip
    for i, depth in enumerate(depths):
        width = dim * 2**i
        inner, rank = ratio * width, math.ceil(width / 16)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            shapes |= {
                f"{block}norm.weight": (width,), f"{block}norm.bias": (width,),
                f"{block}norm2.weight": (width,), f"{block}norm2.bias": (width,),
                f"{block}op.in_proj.weight": (inner, width, *one), f"{block}op.out_proj.weight": (width, inner, *one),
                f"{block}op.conv2d.weight": (inner, 1, 3, 3), f"{block}op.x_proj_weight": (4, rank + 2 * states, inner),
                f"{block}op.dt_projs_weight": (4, inner, rank), f"{block}op.dt_projs_bias": (4, inner),
                f"{block}op.A_logs": (4 * inner, states), f"{block}op.Ds": (4 * inner,),
                f"{block}op.out_norm.weight": (inner,), f"{block}op.out_norm.bias": (inner,),
                f"{block}mlp.fc1.weight": (4 * width, width, *one), f"{block}mlp.fc1.bias": (4 * width,),
                f"{block}mlp.fc2.weight": (width, 4 * width, *one), f"{block}mlp.fc2.bias": (width,),
            }  # fmt: skip
        if i + 1 < len(depths):
            down = f"layers.{i}.downsample."
            shapes |= {f"{down}1.weight": (2 * width, width, 3, 3), f"{down}1.bias": (2 * width,)}
            shapes |= {f"{down}3.weight": (2 * width,), f"{down}3.bias": (2 * width,)}
        else:
            shapes |= {"classifier.norm.weight": (width,), "classifier.norm.bias": (width,)}
            shapes |= {"classifier.head.weight": (classes, width), "classifier.head.bias": (classes,)}
    return {name: fill(name, shape) for name, shape in shapes.items()}


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """u, dt (L, D), A (D, N), B, C (L, N), D (D,) -> (L, D)."""
    state, outputs = torch.zeros_like(A), []
    for t in range(len(u)):
        state = torch.exp(dt[t, :, None] * A) * state + (dt[t] * u[t])[:, None] * B[t]
        outputs.append(state @ C[t] + D * u[t])
    return torch.stack(outputs)


def vim(weights: Weights, picture: Tensor, stride: int) -> Tensor:
    """Scores of one picture (3, H, W) whose grid is the one of the positions."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    maps = F.conv2d(picture.double()[None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride)
    patches = maps[0].flatten(1).T
    middle = len(patches) // 2
    hidden = torch.cat((patches[:middle], w["cls_token"][0], patches[middle:])) + w["pos_embed"][0]
    residual: Tensor | None = None
    for layer in range(sum(name.endswith(".A_b_log") for name in w)):
        residual = hidden if residual is None else residual + hidden
        normed = rms_norm(residual, w[f"layers.{layer}.norm.weight"])
        prefix = f"layers.{layer}.mixer."
        hidden = vim_mixer({name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}, normed)
    assert residual is not None
    return w["head.weight"] @ rms_norm(residual + hidden, w["norm_f.weight"])[middle] + w["head.bias"]


def vim_mixer(w: Weights, x: Tensor) -> Tensor:
    value, gate = (x @ w["in_proj.weight"].T).chunk(2, dim=-1)
    forwards = vim_direction(w, "", value) * F.silu(gate)
    backwards = vim_direction(w, "_b", value.flip(0)).flip(0) * F.silu(gate)
    return (forwards + backwards) / 2 @ w["out_proj.weight"].T


def vim_direction(w: Weights, b: str, value: Tensor) -> Tensor:
    before = torch.cat((torch.zeros_like(value[:1]).expand(3, -1), value))
    taps = w[f"conv1d{b}.weight"][:, 0]
    u = F.silu(sum(before[k : k + len(value)] * taps[:, k] for k in range(4)) + w[f"conv1d{b}.bias"])
    rank, states = w[f"dt_proj{b}.weight"].shape[1], w[f"A{b}_log"].shape[1]
    low, B, C = (u @ w[f"x_proj{b}.weight"].T).split((rank, states, states), dim=-1)
    dt = F.softplus(low @ w[f"dt_proj{b}.weight"].T + w[f"dt_proj{b}.bias"])
    return scan(u, dt, -w[f"A{b}_log"].exp(), B, C, w[f"D{b}"])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def vmamba(weights: Weights, picture: Tensor) -> Tensor:
    """Scores of one picture (3, H, W)."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = F.conv2d(picture.double()[None], w["patch_embed.0.weight"], w["patch_embed.0.bias"], 2, 1)
    x = F.gelu(map_norm(w, "patch_embed.2", x))
    x = map_norm(w, "patch_embed.7", F.conv2d(x, w["patch_embed.5.weight"], w["patch_embed.5.bias"], 2, 1))
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))):
        for j in range(sum(name.startswith(f"layers.{i}.") and name.endswith(".op.Ds") for name in w)):
            block = f"layers.{i}.blocks.{j}."
            x = x + ss2d({n.removeprefix(f"{block}op."): t for n, t in w.items()}, map_norm(w, f"{block}norm", x))
            y = F.gelu(dense(w[f"{block}mlp.fc1.weight"], map_norm(w, f"{block}norm2", x), w[f"{block}mlp.fc1.bias"]))
            x = x + dense(w[f"{block}mlp.fc2.weight"], y, w[f"{block}mlp.fc2.bias"])
        down = f"layers.{i}.downsample."
        if f"{down}1.weight" in w:
            x = map_norm(w, f"{down}3", F.conv2d(x, w[f"{down}1.weight"], w[f"{down}1.bias"], 2, 1))
    pooled = map_norm(w, "classifier.norm", x).mean((0, 2, 3))
    return w["classifier.head.weight"] @ pooled + w["classifier.head.bias"]


def ss2d(w: Weights, x: Tensor) -> Tensor:
    """The four-direction scan without a gate, place by place, of a map (1, C, H, W)."""
    u = dense(w["in_proj.weight"], x)
    u = F.silu(F.conv2d(u, w["conv2d.weight"], padding=1, groups=u.shape[1]))[0]
    _, height, width = u.shape
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    rank, states = w["dt_projs_weight"].shape[2], w["A_logs"].shape[1]
    A, D = -w["A_logs"].exp().unflatten(0, (4, -1)), w["Ds"].unflatten(0, (4, -1))
    total = torch.zeros_like(u)
    for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
        read = torch.stack([u[:, i, j] for i, j in order])
        low, B, C = (read @ w["x_proj_weight"][k].T).split((rank, states, states), dim=-1)
        dt = F.softplus(low @ w["dt_projs_weight"][k].T + w["dt_projs_bias"][k])
        for (i, j), y in zip(order, scan(read, dt, A[k], B, C, D[k]), strict=True):
            total[:, i, j] += y
    return dense(w["out_proj.weight"], map_norm(w, "out_norm", total[None]))


def dense(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.einsum("oc,bchw->bohw", weight.flatten(1), x)
    return y if bias is None else y + bias[:, None, None]


def map_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Layer norm over the channels of a map."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    normed = (x - mean) / (variance + 1e-5).sqrt()
    return normed * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
