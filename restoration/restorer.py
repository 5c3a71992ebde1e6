"""One picture through a network: whole, in exact strips or in tiles, in the precision asked for, finite."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from restoration.card import WeightsCard
from restoration.forward import keep_known, network_input
from restoration.memory import allowed_bytes, strip_bytes, whole_bytes
from restoration.networks import Restorer
from restoration.pretrained import load_model
from restoration.stream import program_of, require_strips, restore_streamed
from restoration.strips import Limits, Machine, Program, Tick, strip_in_memory
from restoration.tasks import find_task, weights_for
from restoration.tiles import origins, restore_tiled
from vision_ssm.device import choose_device, size_text
from vision_ssm.errors import UserError, is_out_of_memory

Precision = Literal["fp32", "bf16", "fp16"]
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LEAST_TILE = 32
_SAMPLE, _SAMPLE_MEMORY = 128, 1 << 26

Method = Literal["whole", "strips", "tiles"]
"""Whole picture at once, exact strips, independent tiles."""


@dataclass(frozen=True)
class Route:
    """How pictures go through the network. Without a tile or a strip: whole where memory allows, else in strips.

    Attributes:
        tile: side of independent tiles in pixels; None for the exact result.
        overlap: pixels that neighbouring tiles have in common; None for an eighth of a tile.
        strip: lines of a strip.
        max_memory: bytes that inference may take on the device that computes; None for what is free.
        precision: of convolutions and projections; the scan is always in fp32.
        ensemble: average the results of the 8 ways to flip and turn the picture (geometric self-ensemble; EDSR, Lim et
            al. 2017, section 3.4), which takes 8 times as long.
    """

    tile: int | None = None
    overlap: int | None = None
    strip: int | None = None
    max_memory: int | None = None
    precision: Precision = "fp32"
    ensemble: bool = False

    def __post_init__(self) -> None:
        if self.precision not in _TYPES:
            raise UserError(f"precision must be one of {', '.join(_TYPES)}; got {self.precision!r}")
        if self.tile is not None and self.strip is not None:
            raise UserError("give --tile (independent tiles) or --strip (the exact result), not both")
        if self.tile is not None and self.tile < _LEAST_TILE:
            raise UserError(f"tile must be at least {_LEAST_TILE} pixels, got {self.tile}")
        if self.overlap is not None and self.tile is None:
            raise UserError("--overlap is for --tile; strips need none")
        if self.tile is not None and not 0 <= self.shared <= self.tile // 2:
            raise UserError(f"overlap must lie between 0 and half a tile, {self.tile // 2}; got {self.overlap}")
        if self.strip is not None and self.strip < 1:
            raise UserError(f"strip must be at least 1 line, got {self.strip}")

    @property
    def shared(self) -> int:
        """Pixels that neighbouring tiles have in common."""
        return (self.tile or 0) // 8 if self.overlap is None else self.overlap


USUAL = Route()


@dataclass(frozen=True)
class Plan:
    """What will happen to one picture.

    Attributes:
        method: see `Method`.
        memory: estimate of the bytes that inference takes.
        scratch: bytes of maps on the disk.
        pixels: that go through the network.
        reason: why it is not the whole picture at once, or "".
    """

    method: Method
    memory: int
    scratch: int
    pixels: int
    reason: str = ""


class PictureRestorer:
    """Trained weights, ready for pictures of any size.

    Args:
        model: in eval mode; moved to the device.
        card: what the weights are for.
        device: "auto" (CUDA, else Apple's GPU, else the CPU) or any torch device.
        route: see `Route`.

    Raises:
        UserError: the device is not there.
    """

    def __init__(
        self, model: Restorer, card: WeightsCard, *, device: str | torch.device = "auto", route: Route = USUAL
    ) -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device).eval()
        self.card = card
        self.route = route
        self._last: tuple[tuple[int, int], Program] | None = None  # frames of a video are all of one size

    @classmethod
    def from_pretrained(
        cls, weights: str | Path | None, task: str | None, *, device: str = "auto", route: Route = USUAL
    ) -> "PictureRestorer":
        """Load weights for a task.

        Args:
            weights: a checkpoint folder, a published file or a shipped name; None for the shipped ones of the task.
            task: a name of `restoration.tasks`; None for that of the weights.
            device: see the class.
            route: see the class.

        Raises:
            UserError: neither is given, no such weights, or weights of another task.
        """
        if task is not None:
            find_task(task)
        if weights is None:
            if task is None:
                raise UserError("give --task, or --weights with weights of your own")
            weights = weights_for(task)[0]
        model, card = load_model(weights)
        if task is not None and card.task != task:
            raise UserError(
                f"the weights {weights} are for the task {card.task!r}, not {task!r}: give that task, or other weights"
            )
        return cls(model, card, device=device, route=route)

    @property
    def needs_mask(self) -> bool:
        """Whether the network reads which pixels are known."""
        return self.model.in_channels == 4

    def plan(self, height: int, width: int) -> Plan:
        """What will happen to a picture of that size, in pixels of the file.

        Raises:
            UserError: not one line of it fits into the memory that is allowed, or strips are not for this network.
        """
        side = self.card.scale // self.model.scale
        plan = self._plan(height * side, width * side)
        return replace(plan, pixels=len(_WAYS) * plan.pixels) if self.route.ensemble else plan

    def _plan(self, height: int, width: int) -> Plan:
        tile = self.route.tile
        if tile is not None:
            count = len(origins(height, tile, self.route.shared)) * len(origins(width, tile, self.route.shared))
            shape = (min(height, tile), min(width, tile))
            return Plan("tiles", whole_bytes(self._program(*shape)), 0, count * shape[0] * shape[1])
        program = self._program(height, width)
        whole, allowed = whole_bytes(program), self._allowed()
        if self.route.strip is None and whole <= allowed:
            return Plan("whole", whole, 0, height * width)
        require_strips(self.model)
        reason = "" if self.route.strip else f"whole needs about {size_text(whole)}, {size_text(allowed)} are allowed"
        memory = strip_in_memory(program, self._limits(height, width))
        return Plan("strips", memory, program.scratch_bytes, height * width, reason)

    def _program(self, height: int, width: int) -> Program:
        if self._last is None or self._last[0] != (height, width):
            self._last = (height, width), program_of(self.model, height, width)
        return self._last[1]

    def _allowed(self) -> int:
        return allowed_bytes(self.device, self.route.max_memory)

    def _limits(self, height: int, width: int) -> Limits:
        if self.route.strip is not None:
            return Limits(lines=self.route.strip)
        pixels = height * width * self.model.scale**2
        return Limits(bytes=strip_bytes(self.device, self._allowed(), pixels))

    def speed(self, method: Method) -> float:
        """Pixels per second of a method, measured on a small random picture: cost grows with the number of pixels."""
        kind = _TYPES[self.route.precision]
        x = torch.rand(self.model.in_channels, _SAMPLE, _SAMPLE)

        def once() -> None:
            if method == "strips":
                restore_streamed(self.model, x, memory=_SAMPLE_MEMORY, precision=kind)
            else:
                self._forward(x[None], kind).cpu()

        once()  # the first call compiles and fills caches
        started = time.perf_counter()
        once()
        return _SAMPLE**2 / (time.perf_counter() - started)

    def restore(
        self,
        image: Tensor,
        *,
        known: Tensor | None = None,
        scratch: Path | None = None,
        say: Callable[[str], None] = lambda message: None,
        tick: Tick = lambda share: None,
    ) -> Tensor:
        """Restore one picture.

        Args:
            image: (3, H, W) float on the CPU, 1.0 for white.
            known: (1, H, W), 1.0 where pixels are known, 0.0 where they are missing; for inpainting.
            scratch: folder for the maps of strips, by which an interrupted call goes on; by default a temporary one.
            say: gets what a person should know: that strips are used, that a result was not finite.
            tick: gets the shares of the work that are done, 1 in all.

        Returns:
            (3, s * H, s * W) float32 on the CPU, not limited to [0, 1]; s is the scale of the task.

        Raises:
            UserError: a mask is missing or too much, too little memory, or a result that is not finite in fp32 either.
        """
        if self.needs_mask != (known is not None):
            wanted = "needs a mask (--mask)" if self.needs_mask else "takes no mask"
            raise UserError(f"the task {self.card.task!r} {wanted}")
        if not self.route.ensemble:
            return self._restore(image, known, scratch, say, tick)
        total = torch.zeros(())
        for number, way in enumerate(_WAYS):
            result = self._restore(
                _turned(image, way),
                None if known is None else _turned(known, way),
                None if scratch is None else scratch / f"way{way}",
                say if number == 0 else lambda message: None,
                lambda share: tick(share / len(_WAYS)),
            )
            total = total + _turned_back(result, way)
        if scratch is not None and scratch.is_dir():
            scratch.rmdir()
        return total / len(_WAYS)

    def _restore(
        self, image: Tensor, known: Tensor | None, scratch: Path | None, say: Callable[[str], None], tick: Tick
    ) -> Tensor:
        given = image[None] if known is None else torch.cat((image * known, known))[None]
        x = network_input(given, self.card.scale, self.model.scale)
        result = self._compute(x[0], self.route.precision, scratch, say, tick)
        if not torch.isfinite(result).all() and self.route.precision != "fp32":
            say(f"the result in {self.route.precision} is not finite; restored again in fp32")
            result = self._compute(x[0], "fp32", scratch, say, tick)
        if not torch.isfinite(result).all():
            raise UserError("the result is not finite (NaN or infinite), in fp32 too: the weights are damaged")
        return keep_known(given, result[None])[0]

    def _compute(
        self,
        x: Tensor,
        precision: Precision,
        scratch: Path | None,
        say: Callable[[str], None],
        tick: Tick,
    ) -> Tensor:
        """The network's result (3, s H, s W) for its input (C, H, W)."""
        plan, kind = self._plan(*x.shape[1:]), _TYPES[precision]
        if plan.method == "tiles":
            assert self.route.tile is not None

            def one_tile(tile: Tensor) -> Tensor:
                return self._forward(tile, kind)

            try:
                return restore_tiled(
                    one_tile, x, tile=self.route.tile, overlap=self.route.shared, scale=self.model.scale, tick=tick
                )
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError("out of memory: take a smaller --tile") from error
        if plan.method == "whole":
            try:
                result = self._forward(x[None], kind)[0].float().cpu()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                say("the whole picture did not fit into memory; restored in strips, with the same result")
            else:
                tick(1)
                return result
        if plan.reason:
            say(f"restored in strips, with the result of the whole picture ({plan.reason})")
        return self._strips(x, kind, scratch, tick)

    def _strips(self, x: Tensor, kind: torch.dtype, scratch: Path | None, tick: Tick) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # after an attempt with the whole picture
        limits = self._limits(*x.shape[1:])
        try:
            return restore_streamed(
                self.model, x, strip=limits.lines, memory=limits.bytes, precision=kind, scratch=scratch, tick=tick
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("out of memory: take a smaller --max-memory or --strip") from error

    @torch.inference_mode()
    def _forward(self, x: Tensor, kind: torch.dtype) -> Tensor:
        with Machine(self.device, kind).computing():
            return self.model(x.to(self.device))


_WAYS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Flips and turns of the ensemble; first those that keep the size."""


def _turned(image: Tensor, way: int) -> Tensor:
    turned = torch.rot90(image, way % 4, (1, 2))
    return turned.flip(2) if way >= 4 else turned


def _turned_back(image: Tensor, way: int) -> Tensor:
    return torch.rot90(image.flip(2) if way >= 4 else image, -(way % 4), (1, 2))
