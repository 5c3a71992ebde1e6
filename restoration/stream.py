"""The exact result for a whole picture in bounded memory: scans carry their state from strip to strip.

Each scan direction reads the picture in strips, rows from the top or the bottom, columns from the left or the right,
and hands its state on; convolutions see a halo of their neighbours' lines; everything else is done pixel by pixel. So
the result is that of the whole picture up to rounding, whatever the thickness of the strips. Maps wait in files, see
`restoration.strips`.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vision_ssm
from kernels import selective_scan_2d
from restoration.blocks import Blocks, ConvBlock, SerpentBlock
from restoration.mambair import MambaIR, MambaIRBlock, ResidualGroup
from restoration.scratch import Map, Scratch
from restoration.strips import (
    Limits,
    LocalPass,
    Machine,
    MeanPass,
    Pass,
    Program,
    ScanPass,
    ScanStep,
    Tick,
    run_program,
)
from restoration.unet import DecoderLevel, EncoderLevel, RestorationUNet, pad_to_multiple
from vision_ssm.errors import UserError
from vision_ssm.mixer_config import NO_OPTIONS
from vision_ssm.ss2d import DIRECTIONS, SS2D, GatedMap

_PROBE = 8  # side of the small map by which a part shows what it makes of a map; a multiple of every stride

_ORDER = ("rows", "columns", "columns_reversed", "rows_reversed")
"""Directions in the order of their passes; the last one reads rows, so that what follows can be done at once."""


@torch.inference_mode()
def program_of(model: nn.Module, height: int, width: int) -> Program:
    """The passes that compute a network on a picture of the given size.

    Raises:
        UserError: a network of another kind than Serpent and MambaIR.
    """
    if isinstance(model, RestorationUNet):
        return _unet(model, height, width)
    if isinstance(model, MambaIR):
        return _mambair(model, height, width)
    raise UserError(f"a {type(model).__name__} cannot be computed strip by strip; use --tile")


def require_strips(model: nn.Module) -> None:
    """Refuse a network whose mixers cannot hand a state from strip to strip; its program tells what it needs, no more.

    Raises:
        UserError: with the mixer, and what to do instead.
    """
    for block in model.modules():
        if isinstance(block, SerpentBlock) and not _carries(block.ss2d):
            raise UserError(
                f"only SS2D without options hands its state from strip to strip, and this network has "
                f"{type(block.ss2d).__name__}: allow more memory (--max-memory), so that the picture is computed as a "
                "whole, or use --tile"
            )


def restore_streamed(
    model: nn.Module,
    image: Tensor,
    *,
    strip: int | None = None,
    memory: int | None = None,
    precision: torch.dtype = torch.float32,
    scratch: Path | None = None,
    tick: Tick = lambda share: None,
) -> Tensor:
    """Restore one picture strip by strip, with the result of the whole picture.

    Args:
        model: Serpent or MambaIR in eval mode, on the device that computes.
        image: (C_in, H, W) float on the CPU, 1.0 for white.
        strip: lines of a strip; by default as many as `memory` allows.
        memory: bytes for the tensors of a strip (1 GiB where neither is given).
        precision: of convolutions and projections; scans, sums and stored maps are float32.
        scratch: folder for maps; after an interruption, a call with the same folder, picture, weights and precision
            goes on. By default a temporary one.
        tick: gets the shares of the work that are done, 1 in all.

    Returns:
        (C_out, H_out, W_out) float32 on the CPU.

    Raises:
        UserError: the network or its mixer is of another kind, not one line fits into memory, or the disk has no room.
    """
    require_strips(model)
    device = _device(model)
    limits = Limits(lines=strip, bytes=(memory or 1 << 30) if strip is None else None)
    with tempfile.TemporaryDirectory(prefix="vssm-") as temporary, torch.inference_mode():
        program = program_of(model, *image.shape[1:])
        maps = Scratch(scratch or Path(temporary) / "maps", _identity(model, image, precision) if scratch else "")
        try:
            if not maps.done:
                _write_source(model, image, program.source, maps)
            run_program(program, maps, limits=limits, machine=Machine(device, precision), tick=tick)
        finally:
            if not maps.done:
                maps.remove()  # nothing in it to go on from
        result = _read_result(program, image, maps)
        maps.remove()
    return result


def _identity(model: nn.Module, image: Tensor, precision: torch.dtype) -> str:
    """What a result depends on: an interrupted run may go on only if nothing of it has changed."""
    digest = hashlib.sha256(f"{vision_ssm.__version__} {model} {tuple(image.shape)} {precision}".encode())
    for tensor in (*model.state_dict().values(), image):
        digest.update(np.ascontiguousarray(tensor.cpu()).data)
    return digest.hexdigest()


def _write_source(model: nn.Module, image: Tensor, source: Map, maps: Scratch) -> None:
    padded = image[None]
    if isinstance(model, RestorationUNet):
        padded = pad_to_multiple(padded, model.multiple)
    maps.make(source)
    maps.write(source, slice(0, source.height), slice(0, source.width), padded)


def _read_result(program: Program, image: Tensor, maps: Scratch) -> Tensor:
    """The picture's part of the result map, without padding."""
    scale = program.result.height // program.source.height
    height, width = image.shape[1] * scale, image.shape[2] * scale
    return maps.read(program.result, slice(0, height), slice(0, width))[0].contiguous()


class _Plan:
    """Passes in the making; every map gets a name of its own."""

    def __init__(self, source: Map, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.passes: list[Pass] = []

    def add(self, one: Pass) -> Map:
        self.passes.append(one)
        return one.output

    def map(self, height: int, width: int, channels: int) -> Map:
        return Map(f"{len(self.passes):04d}", height, width, channels)

    def part(
        self,
        name: str,
        part: nn.Module,
        inputs: Sequence[Map],
        function: Callable[..., Tensor] | None = None,
        *,
        everywhere: tuple[Map, ...] = (),
    ) -> Map:
        """Add a `LocalPass` for a part of a network.

        Args:
            name: for messages.
            part: the module whose convolutions set the halo.
            inputs: maps it reads.
            function: what is computed; by default `part` itself.
            everywhere: 1 x 1 maps that the function gets too.
        """
        function = function or part
        units = min(one.height for one in inputs)
        sizes = [(one.channels, *(_PROBE * one.height // units,) * 2) for one in inputs]
        sizes += [(one.channels, 1, 1) for one in everywhere]
        with _counted(part) as floats:
            result = function(*(torch.zeros(1, *size, device=self.device) for size in sizes))
        _, channels, side, _ = result.shape
        numerator, denominator = side * inputs[0].height, sizes[0][1]
        output = self.map(numerator // denominator, side * inputs[0].width // denominator, channels)
        work = sum(floats) // side**2
        return self.add(LocalPass(name, tuple(inputs), output, function, _halo(part), work, everywhere))

    def mean(self, name: str, of: Map) -> Map:
        """Add a `MeanPass`."""
        return self.add(MeanPass(name, (of,), self.map(1, 1, of.channels)))

    def scan(self, name: str, x: Map, norm: nn.Module, ss2d: Any, join: Callable[[Tensor, Tensor], Tensor]) -> Map:
        """Add the four passes of join(x, SS2D(norm(x))); of another mixer, passes of that size that cannot run."""
        carries = _carries(ss2d)
        inner = ss2d.conv.in_channels if isinstance(ss2d, GatedMap) else 2 * x.channels
        result, earlier = x, ()

        def finish(own: Tensor, scanned: Tensor) -> Tensor:
            return join(own, _outer(cast(SS2D, ss2d), norm(own), scanned))

        for direction in _ORDER:
            last = direction == _ORDER[-1]
            output = self.map(x.height, x.width, x.channels if last else inner)
            one = ScanPass(
                name=f"{name}, {direction.replace('_', ' ')}",
                inputs=(x, *earlier),
                output=output,
                step=_step(cast(SS2D, ss2d), norm, direction) if carries else _no_step,
                finish=finish if last else None,
                columns=direction.startswith("columns"),
                reverse=direction.endswith("reversed"),
                work=3 * x.channels + 6 * inner,
            )
            result = self.add(one)
            earlier = (result,)
        return result

    def done(self, result: Map) -> Program:
        return Program(self.source, tuple(self.passes), result)


def _step(ss2d: SS2D, norm: nn.Module, direction: str) -> ScanStep:
    """One direction of `SS2D.core` on a strip, from a given state."""
    k = DIRECTIONS.index(direction)
    own = slice(k, k + 1)
    size = sum(ss2d.split)
    columns = direction.startswith("columns")

    def step(strip: Tensor, inner: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        u = ss2d.act(ss2d.conv(ss2d.in_proj(norm(strip))))
        u = u[..., inner] if columns else u[:, :, inner]
        x = u.permute(0, 2, 3, 1).contiguous()
        projected = F.conv2d(x.permute(0, 3, 1, 2), ss2d.x_proj.weight[k * size : (k + 1) * size])
        delta, B, C = projected.permute(0, 2, 3, 1).contiguous().unsqueeze(3).split(ss2d.split, dim=-1)
        y, state = cast(
            tuple[Tensor, Tensor],
            selective_scan_2d(
                x, delta, ss2d.scan.A[own], B, C, ss2d.scan.D[own], directions=(direction,),
                delta_weight=ss2d.scan.dt_weight[own], delta_bias=ss2d.scan.dt_bias[own], softplus=True,
                initial_state=state, return_final_state=True, backend=ss2d.backend,
            ),
        )  # fmt: skip
        return y.permute(0, 3, 1, 2), state

    return step


def _no_step(strip: Tensor, inner: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
    raise AssertionError("require_strips refuses this network")


def _carries(mixer: nn.Module) -> bool:
    """Whether a mixer's state can be handed from strip to strip as `_step` does it."""
    return isinstance(mixer, SS2D) and mixer.options == NO_OPTIONS


def _outer(ss2d: SS2D, normed: Tensor, scanned: Tensor) -> Tensor:
    """What `SS2D.forward` does after the scans: norm, gate, projection; maps (1, ., h, w)."""
    y = ss2d.norm(scanned.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return ss2d.out_proj(y * ss2d.act(ss2d.gate_proj(normed)))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _counted(part: nn.Module) -> Iterator[list[int]]:
    """Collect the sizes of what the modules inside a part return, an estimate of the memory it works in."""
    floats: list[int] = []
    leaves = [one for one in part.modules() if not any(one.children())]
    hooks = [leaf.register_forward_hook(lambda *call: floats.append(call[2].numel())) for leaf in leaves]
    try:
        yield floats
    finally:
        for hook in hooks:
            hook.remove()


def _halo(part: nn.Module) -> int:
    """Lines above and below that a part without skips depends on."""
    convolutions = [one for one in part.modules() if isinstance(one, nn.Conv2d)]
    return sum(one.dilation[0] * (one.kernel_size[0] // 2) for one in convolutions if one.stride[0] == 1)


def _unet(model: RestorationUNet, height: int, width: int) -> Program:
    """`RestorationUNet.forward` as passes."""
    height, width = (side + -side % model.multiple for side in (height, width))
    image = Map("source", height, width, model.in_channels)
    plan = _Plan(image, _device(model))
    x = plan.part("stem", model.stem, (image,))
    skips = []
    for number, level in enumerate(cast(Iterable[EncoderLevel], model.encoder), 1):
        skips.append(_blocks(plan, f"encoder {number}", level.blocks, x))
        x = plan.part(f"down {number}", level.down, skips[-1:])
    x = _blocks(plan, "middle", model.middle, x)
    for number, level in enumerate(cast(Iterable[DecoderLevel], model.decoder), 1):

        def joined(x: Tensor, skip: Tensor, level: DecoderLevel = level) -> Tensor:
            return level.merge(torch.cat((level.up(x), skip), dim=1))

        x = plan.part(f"up {number}", level.up, (x, skips.pop()), joined)
        x = _blocks(plan, f"decoder {number}", level.blocks, x)
    head = model.head
    if isinstance(head, nn.Sequential):  # MambaIR's: blocks, then a convolution
        x = _blocks(plan, "refinement", cast(Blocks, head[0]), x)
        head = head[1:]

    def result(x: Tensor, image: Tensor) -> Tensor:
        return image[:, : model.out_channels] + head(x)

    return plan.done(plan.part("head", head, (x, image), result))


def _mambair(model: MambaIR, height: int, width: int) -> Program:
    """`MambaIR.forward` as passes."""
    image = Map("source", height, width, model.in_channels)
    plan = _Plan(image, _device(model))
    shallow = plan.part("stem", model.stem, (image,), lambda image: model.stem(image - model.mean))
    x = plan.part("norm", model.stem_norm, (shallow,))
    for number, group in enumerate(cast(Iterable[ResidualGroup], model.groups), 1):
        inside = _blocks(plan, f"group {number}", group.blocks, x)

        def joined(x: Tensor, inside: Tensor, group: ResidualGroup = group) -> Tensor:
            return x + group.conv(inside)

        x = plan.part(f"group {number}, convolution", group.conv, (x, inside), joined)
    x = plan.part("body", model.body, (x, shallow), lambda x, shallow: model.body(model.norm(x)) + shallow)
    if model.scale > 1:
        return plan.done(plan.part("tail", model.tail, (x,), lambda x: model.tail(x) + model.mean))
    return plan.done(plan.part("tail", model.tail, (x, image), lambda x, image: image + model.tail(x)))


def _blocks(plan: _Plan, name: str, blocks: Blocks, x: Map) -> Map:
    for number, block in enumerate(blocks, 1):
        where = f"{name}, block {number}"
        if isinstance(block, SerpentBlock):
            x = plan.scan(where, x, block.norm, block.ss2d, torch.add)
        elif isinstance(block, ConvBlock):
            x = plan.part(where, block, (x,))
        elif isinstance(block, MambaIRBlock):
            x = _mambair_block(plan, where, block, x)
        else:
            raise UserError(f"a {type(block).__name__} cannot be computed strip by strip; use --tile")
    return x


def _mambair_block(plan: _Plan, name: str, block: MambaIRBlock, x: Map) -> Map:
    """Scan, then convolutions whose channels are weighted by a function of their means over the whole picture."""
    *layers, attention = block.conv
    convolutions, attention = nn.Sequential(*layers), cast(Any, attention)  # timm's SqueezeExcite
    x = plan.scan(name, x, block.norm1, block.ss2d, lambda own, scanned: block.scale1(own) + scanned)
    y = plan.part(f"{name}, convolutions", convolutions, (x,), lambda x: convolutions(block.norm2(x)))
    mean = plan.mean(f"{name}, channel means", y)

    def weighted(x: Tensor, y: Tensor, mean: Tensor) -> Tensor:
        weight = attention.gate(attention.fc2(attention.act(attention.fc1(mean))))
        return block.scale2(x) + y * weight

    return plan.part(f"{name}, channel attention", attention, (x, y), weighted, everywhere=(mean,))
