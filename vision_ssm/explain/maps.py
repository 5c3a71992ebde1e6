"""Heat maps from a recording: hidden attention, roll-out and attribution (Ali et al., 2024, section 4).

No matrix is ever made whole. A vector of relevance, one number for each position, is carried from the last layer to
the first by products with transposed matrices, which the scans do in linear time; so maps of any size work.

Networks of several resolutions: relevance is carried through layers of one resolution that follow one another and
starts anew where the resolution changes; the heats are enlarged and added (`combine`).

Shapes: B batch, T positions of a sample, S sequences, L positions of a sequence, D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.mixing import Direction, Mixing
from vision_ssm.errors import UserError
from vision_ssm.explain import Method
from vision_ssm.explain.recording import Layer, Recording

Query = Callable[[Layer], Sequence[int] | None] | None
"""Positions (of a sample, 0 .. T - 1) whose view is asked for, in a given layer; None for the mean over all."""
MOST_ROWS = 4096
"""Positions of a layer up to which the mean over all rows of its matrix is made: its cost is quadratic."""


@dataclass(frozen=True)
class Heat:
    """Relevance of the positions of one resolution.

    Attributes:
        layers: names of the layers it comes from, in the order in which they ran.
        values: (B, T), not negative.
        grid: height and width of the map, None for sequences.
    """

    layers: tuple[str, ...]
    values: Tensor
    grid: tuple[int, int] | None


def hidden_attention(
    recording: Recording, *, query: Query = None, batch: int = 1, direction: int | None = None
) -> list[Heat]:
    """Raw hidden attention: mean over the channels of |M|, at the query's rows; one heat for each layer, of sum 1.

    The size and not the sign of M is averaged: how much of a position reaches another, whatever the channel does with
    it later.

    Args:
        recording: of `record`.
        query: whose rows; by default the mean over all.
        batch: B.
        direction: number of one reading direction; by default all are added.

    Raises:
        UserError: a layer of too many positions and no query, or no such direction.
    """

    def seen_by(layer: Layer) -> Tensor:
        asked = None if query is None else query(layer)
        total = torch.zeros(layer.places, dtype=torch.float64)
        for mixing, _, part in _chosen(layer, direction):
            index = mixing.index().cpu()  # (S, L)
            if asked is None and index.shape[1] > MOST_ROWS:
                raise UserError(
                    f"the mean over all {index.shape[1]} positions of {layer.name} would take too long: "
                    "ask for a query, a smaller picture, or --method attribution"
                )
            wanted = None if asked is None else torch.isin(index % (layer.places // batch), torch.tensor(list(asked)))
            total[index.flatten()] += _mean_row(part, wanted).flatten()
        return total.view(batch, -1)

    return [Heat((layer.name,), _shares(seen_by(layer)), layer.grid) for layer in recording.layers]


@torch.no_grad()
def _mean_row(part: Direction, wanted: Tensor | None) -> Tensor:
    """(S, L): mean over the channels of |M|, summed over the wanted rows (S, L) of each sequence, or over all."""
    at = None if wanted is None else wanted.any(0).nonzero().squeeze(1).to(part.value.device)
    total = torch.zeros(part.value.shape[:2], dtype=torch.float64)
    for _, block in part.blocks(at):
        weight = 1.0 if wanted is None or at is None else wanted[:, None, at.cpu(), None].double()
        total += (block.abs().cpu().double() * weight).sum((1, 2))
    return total / part.heads


def rollout(recording: Recording, *, query: Query = None, batch: int = 1, direction: int | None = None) -> list[Heat]:
    """Roll-out: the query's row of the product of all I + E[M], rows divided by their size; a heat for each resolution.

    E is the mean over the channels. Row i is divided by 1 + E|sum_j M_ij|, which stays positive where signs differ.

    Args:
        recording: of `record`.
        query: by default the mean over all positions.
        batch: B.
        direction: number of one reading direction; by default all are added.
    """

    @torch.no_grad()
    def through(layer: Layer, relevance: Tensor) -> Tensor:
        size, parts = torch.ones_like(relevance), list(_chosen(layer, direction))
        for mixing, _, part in parts:
            size += _placed(mixing, part.apply(torch.ones_like(part.value)).abs().mean(-1))
        share = relevance / size
        passed = sum(
            _placed(mixing, part.transposed(_read(mixing, share, part.value).expand_as(part.value)).mean(-1))
            for mixing, _, part in parts
        )
        return share + passed

    def start(layer: Layer) -> Tensor:
        relevance = torch.zeros(batch, layer.places // batch, dtype=torch.float64)
        asked = None if query is None else query(layer)
        relevance[:, slice(None) if asked is None else list(asked)] = 1
        return relevance.flatten()

    return [
        Heat(names, _shares(relevance.view(batch, -1).clamp(min=0)), grid)
        for names, relevance, grid in _carried(recording, start, through)
    ]


def attribution(recording: Recording, target: Tensor, *, batch: int = 1, direction: int | None = None) -> list[Heat]:
    """Attribution: how much every position changes a target through the scans; one heat for each resolution.

    Roll-out of I + |dt/dy * M * value|: gradient of the target at a scan's gated output, times M, times the value that
    is mixed. The paper averages gradient and M over the channels one by one and keeps the positive part. Here the
    three stay together in each channel, summed over the outputs (so that the cost is linear), and sizes are added:
    of small classifiers, the positive part named the pixels that matter worse than chance (see docs/explain.md).
    Relevance starts at 1 everywhere, for the gradient already knows which outputs matter (a class token, one anchor,
    all positions of a mean), and this start is taken off in the end.

    Args:
        recording: of `record`, of a forward pass with gradients.
        target: scalar, or (B,) with one for each sample.
        batch: B.
        direction: number of one reading direction; by default all are added.

    Raises:
        UserError: the target does not depend on any recorded scan.
    """
    outputs = [mixing.output for layer in recording.layers for mixing in layer.mixings]
    with_graph = [output for output in outputs if output.requires_grad]
    if not target.requires_grad or not with_graph:
        raise UserError("attribution needs a forward pass with gradients: record outside of torch.no_grad")
    found = torch.autograd.grad(target.sum(), with_graph, retain_graph=True, allow_unused=True)
    gradients = {id(output): g for output, g in zip(with_graph, found, strict=True) if g is not None}
    if not gradients:
        raise UserError("the target does not depend on any recorded scan")

    def through(layer: Layer, relevance: Tensor) -> Tensor:
        added = torch.zeros_like(relevance)
        for mixing, k, part in _chosen(layer, direction):
            if id(mixing.output) not in gradients:
                continue
            weight = mixing.output_of(k, gradients[id(mixing.output)]).to(part.value.dtype)
            weight = weight if mixing.gate is None else weight * mixing.gate.detach()
            back = part.transposed(weight * _read(mixing, relevance, part.value))
            added += _placed(mixing, (part.value.detach() * back).abs().sum(-1))
        return relevance + added

    def start(layer: Layer) -> Tensor:
        return torch.ones(layer.places, dtype=torch.float64)

    return [Heat(names, (r - 1).view(batch, -1), grid) for names, r, grid in _carried(recording, start, through)]


def _carried(
    recording: Recording, start: Callable[[Layer], Tensor], through: Callable[[Layer, Tensor], Tensor]
) -> list[tuple[tuple[str, ...], Tensor, tuple[int, int] | None]]:
    """Relevance (B T,) carried from last to first through every run of layers of one resolution."""
    done = []
    for (_, grid), group in groupby(reversed(recording.layers), key=lambda layer: (layer.places, layer.grid)):
        layers = list(group)
        relevance = start(layers[0])
        for layer in layers:
            relevance = through(layer, relevance)
        done.append((tuple(layer.name for layer in reversed(layers)), relevance, grid))
    return done[::-1]


def _chosen(layer: Layer, direction: int | None) -> list[tuple[Mixing, int, Direction]]:
    parts = list(layer.directions())
    if direction is None:
        return parts
    if not 0 <= direction < len(parts):
        raise UserError(f"{layer.name} has {len(parts)} directions, numbered from 0; there is no {direction}")
    return [parts[direction]]


def _placed(mixing: Mixing, values: Tensor) -> Tensor:
    """Values (S, L) of a call's positions in the order of the layer's tensor, (B T,) float64 on the CPU."""
    placed = torch.empty(values.numel(), dtype=torch.float64)
    placed[mixing.index().flatten().cpu()] = values.flatten().detach().cpu().double()
    return placed


def _read(mixing: Mixing, placed: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_placed`, as (S, L, 1) of the type of `like`."""
    return placed[mixing.index().cpu()].to(like).unsqueeze(-1)


def _shares(values: Tensor) -> Tensor:
    """(B, T) divided by the sum of each sample; nothing stays nothing."""
    return values / values.sum(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


def combine(
    heats: Sequence[Heat],
    size: Sequence[int],
    *,
    grid: tuple[int, int] | None = None,
    tokens: Sequence[int] | None = None,
) -> Tensor:
    """Heats of all resolutions as one map of the picture: enlarged so that each keeps its sum, and added.

    Args:
        heats: of a map function.
        size: height and width of the picture.
        grid: of sequences, which have none of their own; by default the one of the picture's proportions.
        tokens: positions of a sequence that belong to the picture, in order; by default all.

    Returns:
        (B, H, W) float32.

    Raises:
        UserError: a sequence does not fill a grid.
    """
    height, width = size
    total = torch.zeros(len(heats[0].values), height, width)
    for heat in heats:
        values = heat.values if heat.grid or tokens is None else heat.values[:, list(tokens)]
        rows, columns = heat.grid or grid or guess_grid(values.shape[1], height / width)
        if rows * columns != values.shape[1]:
            raise UserError(
                f"{heat.layers[0]} has {values.shape[1]} positions, which do not fill a grid of {rows} x {columns}; "
                "leave tokens that are no part of the picture out"
            )
        maps = values.float().view(-1, 1, rows, columns)
        enlarged = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)[:, 0]
        total += enlarged * (rows * columns / (height * width))
    return total


def guess_grid(length: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of `length` cells whose proportions come nearest to `aspect` = height / width."""
    sides = [(rows, length // rows) for rows in range(1, length + 1) if length % rows == 0]
    return min(sides, key=lambda side: abs(side[0] / side[1] / aspect + side[1] / side[0] * aspect))


def make_maps(
    recording: Recording,
    method: Method,
    *,
    target: Tensor,
    query: Query = None,
    batch: int = 1,
    per_direction: bool = False,
) -> list[tuple[str, list[Heat]]]:
    """The maps that a page shows: over all layers, for each resolution, and for each direction if asked for.

    Args:
        recording: of `record`, of a forward pass with gradients.
        method: which maps.
        target: of attribution.
        query: of the others.
        batch: B.
        per_direction: add a map for each reading direction; the layers must have equally many.

    Returns:
        (title, heats to combine) for each map.
    """

    def heats(direction: int | None = None) -> list[Heat]:
        if method == "attribution":
            return attribution(recording, target, batch=batch, direction=direction)
        if method == "rollout":
            return rollout(recording, query=query, batch=batch, direction=direction)
        return _merged(hidden_attention(recording, query=query, batch=batch, direction=direction))

    whole = heats()
    maps = [(f"{method}, all layers", whole)]
    if len(whole) > 1:
        maps += [(f"{method}, {_span(heat)}", [heat]) for heat in whole]
    if per_direction:
        counts = {len(list(layer.directions())) for layer in recording.layers}
        if len(counts) > 1:
            raise UserError(
                f"these layers have {', '.join(map(str, sorted(counts)))} directions; choose some that have equally "
                "many with --layer"
            )
        maps += [(f"{method}, direction {k}{_name(recording, k)}", heats(k)) for k in range(counts.pop())]
    return maps


def _merged(heats: list[Heat]) -> list[Heat]:
    """One heat for every run of layers of one resolution: their mean."""
    merged = []
    for (grid, _), group in groupby(heats, key=lambda heat: (heat.grid, heat.values.shape[1])):
        run = list(group)
        names = tuple(name for heat in run for name in heat.layers)
        merged.append(Heat(names, torch.stack([heat.values for heat in run]).mean(0), grid))
    return merged


def _span(heat: Heat) -> str:
    names = heat.layers[0] if len(heat.layers) == 1 else f"{heat.layers[0]} to {heat.layers[-1]}"
    return names if heat.grid is None else f"{names} ({heat.grid[0]} x {heat.grid[1]})"


def _name(recording: Recording, k: int) -> str:
    """How a direction reads, by the first position that it reads and the next."""
    layer = recording.layers[0]
    _, _, part = list(layer.directions())[k]
    order = getattr(part, "order", None)
    if order is None or len(order) < 2 or layer.grid is None:
        return "" if order is None or len(order) < 2 else (" (forwards)" if order[0] == 0 else " (backwards)")
    along = "rows" if abs(int(order[1] - order[0])) == 1 else "columns"
    return f" ({along}{'' if order[0] == 0 else ', backwards'})"
