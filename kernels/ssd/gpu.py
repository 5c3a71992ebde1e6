"""Triton back end of SSD: chooses tiles and launches the kernels of `gpu_kernels` and `gpu_gradient`.

Forward: decays, the states between chunks, outputs. Backward: decays, the adjoint states between chunks, the gradient
of x, the gradients of B and C, the gradients of the step sizes. The two kernels that walk along a sequence keep the
state in registers; where there are too few sequences and heads to fill the GPU, sequences are cut into segments, whose
ends are chained first. Directions along rows and along columns are launched apart.
"""

# num_warps is an argument of every launch that the kernels' signatures do not have, and they take constants as given:
# pyright: reportCallIssue=false, reportArgumentType=false

from contextlib import nullcontext

import torch
from torch import Tensor

from .gpu_gradient import (
    ssd_input_gradient_kernel,
    ssd_projection_gradient_kernel,
    ssd_step_gradient_kernel,
)  # fmt: skip
from .gpu_kernels import ssd_combine_kernel, ssd_decay_kernel, ssd_output_kernel, ssd_state_kernel
from .gpu_plan import Axis, Inputs, Plan, alignment, cdiv, chunk_length, operand_type
from .reference import length_of, lines_of


def _on(t: Tensor):
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def saved(
    x: Tensor, orders: tuple[int, ...], groups: int, states: int, chunk: int, *, started: bool = True
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape (S, K, E, Q, P, N) and dtype of the states that `forward` keeps."""
    count = cdiv(length_of(x, orders), chunk_length(x, chunk))
    sequences = x.shape[0] * lines_of(x, orders)
    return (sequences, len(orders), x.shape[3], count, x.shape[4], states), operand_type(x.dtype)


def _decays(plan: Plan, inputs: Inputs, softplus: bool) -> tuple[Tensor, Tensor]:
    """Step sizes (S, K, E, Q, T) and summed log2 decays (S, K, E, Q, 2, T), each as two float32."""
    dt = inputs.dt.unsqueeze(-1)
    steps = inputs.A.new_empty(plan.sequences, plan.directions, plan.heads, plan.count, plan.chunk)
    decays = steps.new_empty((*steps.shape[:-1], 2, steps.shape[-1]))
    for axis in plan.axes:
        programs = plan.sequences * plan.count * len(axis.directions) * cdiv(plan.heads, plan.block_e)
        ssd_decay_kernel[(programs,)](
            dt, inputs.A, inputs.bias, steps, decays, axis.strides(dt, True), **plan.geometry(axis),
            n_dirs=len(axis.directions), heads=plan.heads, T=plan.chunk, BE=plan.block_e, SOFTPLUS=softplus,
            num_warps=4,
        )  # fmt: skip
    return steps, decays


def _states(
    plan: Plan, value: Tensor, of_value: bool, row: Tensor, steps: Tensor, decays: Tensor,
    start: Tensor | None, *, adjoint: bool, want_last: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """States before every chunk as it is walked (S, K, E, Q, P, N), and the last one (S, K, E, P, N) float32."""
    tile = plan.tiles.state
    shape = (plan.sequences, plan.directions, plan.heads)
    size = (plan.head_dim, plan.states)
    states = value.new_empty((*shape, plan.count, *size), dtype=plan.operand)
    if plan.count == 1 and start is None and not want_last:
        return states.zero_(), None
    final = decays.new_empty((*shape, *size)) if want_last else None
    for axis in plan.axes:
        sequences = plan.sequences * len(axis.directions) * plan.heads
        walks = sequences * plan.blocks_p(tile) * plan.blocks_n(tile)
        segments = min(cdiv(plan.processors, walks), cdiv(plan.count, 4))
        per_segment = cdiv(plan.count, segments)
        segments = cdiv(plan.count, per_segment)

        def walk(start, states, ends, totals, axis=axis, walks=walks, segments=segments, per_segment=per_segment):
            ssd_state_kernel[(walks * segments,)](
                value, row, steps, decays, start, states, ends, totals,
                axis.strides(value, of_value), axis.strides(row, True), **plan.geometry(axis),
                n_dirs=len(axis.directions), n_segments=segments, per_segment=per_segment, **plan.sizes,
                **plan.dot(tile), STAGES=tile.stages, ADJOINT=adjoint, ALIGN_V=alignment(value),
                ALIGN_R=alignment(row),
            )  # fmt: skip

        if segments == 1:
            walk(start, states, final, None)
            continue
        ends, totals = decays.new_empty((*shape, segments, *size)), decays.new_empty((*shape, segments))
        walk(None, None, ends, totals)
        numbers = plan.head_dim * plan.states
        ssd_combine_kernel[(sequences * cdiv(numbers, 512),)](
            start, ends, totals, final, axis.packed, len(axis.directions), plan.directions, segments, plan.heads,
            numbers, BLOCK=512, num_warps=4,
        )  # fmt: skip
        walk(ends, states, None, None)
    return states, final


def forward(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, *,
    orders: tuple[int, ...], chunk: int, softplus: bool, merge: bool, strict: bool, need_backward: bool,
    want_final: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, final states if wanted, and the chunk states kept for `backward` (canonical form: see op.py)."""
    inputs = Inputs(x, dt, A, Bm, C, D, dt_bias, initial_state)
    plan = Plan.of(x, Bm, orders, chunk)
    with _on(x):
        steps, decays = _decays(plan, inputs, softplus)
        states, final = _states(
            plan, x, False, Bm, steps, decays, initial_state, adjoint=False, want_last=want_final
        )  # fmt: skip
        y = _output(plan, inputs, steps, decays, states, merge, strict)
    final = decays.new_empty(0) if final is None else final.unflatten(0, (x.shape[0], plan.lines))
    return y, final, states if need_backward else states.new_empty(0)


def _output(
    plan: Plan, inputs: Inputs, steps: Tensor, decays: Tensor, states: Tensor, merge: bool, strict: bool
) -> Tensor:
    """Launches the output kernel once for each axis; the sum of the first passes on in float32."""
    x, _, _, Bm, C, D, _, _ = inputs
    tile = plan.tiles.output
    y = x.new_empty(x.shape if merge else (*x.shape[:3], plan.directions, *x.shape[3:]))
    earlier = None
    for number, axis in enumerate(plan.axes):
        each, fan = (len(axis.directions), 1) if merge else (1, len(axis.directions))
        passes_on = merge and number < len(plan.axes) - 1
        target = torch.empty_like(y, dtype=torch.float32) if passes_on else y
        ssd_output_kernel[(plan.sequences * plan.count * fan * plan.heads * plan.blocks_p(tile),)](
            x, Bm, C, steps, decays, D, states, earlier, target,
            axis.strides(x, False), axis.strides(Bm, True), axis.strides(C, True), axis.strides(y, not merge),
            **plan.geometry(axis), fan=fan, strict=int(strict), **plan.sizes,
            NB=plan.blocks_n(tile), DIRS=each, **plan.dot(tile),
            ALIGN_X=alignment(x), ALIGN_B=alignment(Bm), ALIGN_C=alignment(C),
        )  # fmt: skip
        earlier = target if passes_on else None
    return y


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, C: Tensor,
    D: Tensor | None, dt_bias: Tensor | None, initial_state: Tensor | None, saved: Tensor, *,
    orders: tuple[int, ...], chunk: int, softplus: bool, merge: bool, strict: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients that ``needs`` asks for, in the order of the inputs; the same bits at every call."""
    inputs = Inputs(x, dt, A, Bm, C, D, dt_bias, initial_state)
    plan = Plan.of(x, Bm, orders, chunk)
    dy = grad_y if grad_y.stride(-1) == 1 else grad_y.contiguous()
    grad_final = None if grad_final is None else grad_final.contiguous()
    with _on(x):
        steps, decays = _decays(plan, inputs, softplus)
        behind, start = _states(
            plan, dy, not merge, C, steps, decays, grad_final, adjoint=True, want_last=needs[7]
        )  # fmt: skip
        found = _Gradient(plan, inputs, dy, merge, strict, needs, steps, decays, saved, behind).run(softplus)
    return [*found, None if start is None else start.unflatten(0, (x.shape[0], plan.lines))]


class _Gradient:
    """Buffers and launches of the three gradient kernels.

    A kernel that works on blocks of head_dim or states, or on some heads of a group, writes partial sums, which are
    added here or in the last kernel in a fixed order.
    """

    def __init__(
        self, plan: Plan, inputs: Inputs, dy: Tensor, merge: bool, strict: bool, needs: tuple[bool, ...],
        steps: Tensor, decays: Tensor, saved: Tensor, behind: Tensor,
    ) -> None:  # fmt: skip
        self.plan, self.inputs, self.dy, self.merge, self.strict, self.needs = plan, inputs, dy, merge, strict, needs
        self.steps, self.decays, self.saved, self.behind = steps, decays, saved, behind
        self.of_steps = needs[1] or needs[2] or needs[6]
        named = {"X": inputs.x, "DY": dy, "B": inputs.B, "C": inputs.C}
        self.alignments = {f"ALIGN_{name}": alignment(t) for name, t in named.items()}
        self.parts = plan.blocks_p(plan.tiles.input_gradient)
        self.state_parts = plan.blocks_p(tile := plan.tiles.projection_gradient) * plan.blocks_n(tile)

    def _partial(self, wanted: bool, parts: int, *last: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Buffer (parts, S, K, E, Q, ...), or None."""
        return self.steps.new_empty((parts, *self.steps.shape[:4], *last), dtype=dtype) if wanted else None

    def _strides(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        of = axis.strides
        return (
            of(self.inputs.x, False), of(self.dy, not self.merge), of(self.inputs.B, True), of(self.inputs.C, True)
        )  # fmt: skip

    def run(self, softplus: bool) -> list[Tensor | None]:
        """Gradients of x, dt, A, B, C, D and the bias."""
        plan, needs, chunk = self.plan, self.needs, self.plan.chunk
        gstep, ginput = (self._partial(self.of_steps, self.parts, chunk) for _ in range(2))
        # What the pairs give to a position mostly cancels.
        wide = torch.float64 if self.inputs.x.dtype == torch.float32 else torch.float32
        gdecay = self._partial(self.of_steps, self.parts, chunk, dtype=wide)
        gout = self._partial(self.of_steps, self.state_parts, chunk)
        gpath = self._partial(self.of_steps, self.state_parts)
        gskip = self._partial(needs[5], plan.blocks_p(plan.tiles.projection_gradient))
        gx = self._input_gradient((gstep, gdecay, ginput)) if needs[0] or self.of_steps else None
        gb, gc = self._projection_gradient((gout, gpath, gskip))
        of_steps = self._step_gradient(softplus, (gstep, gdecay, ginput, gout, gpath))
        gd = gskip.sum((0, 1, 4)) if gskip is not None else None
        return [gx, of_steps[0], of_steps[1], gb, gc, gd, of_steps[2]]

    def _input_gradient(self, parts: tuple[Tensor | None, ...]) -> Tensor | None:
        plan, tile = self.plan, self.plan.tiles.input_gradient
        x, _, _, Bm, C, D, _, _ = self.inputs
        gx = torch.empty_like(x, memory_format=torch.contiguous_format) if self.needs[0] else None
        earlier = None
        for number, axis in enumerate(plan.axes):
            target = gx
            if gx is not None and number < len(plan.axes) - 1:
                target = torch.empty_like(gx, dtype=torch.float32)
            ssd_input_gradient_kernel[(plan.sequences * plan.count * plan.heads * self.parts,)](
                x, self.dy, Bm, C, self.steps, self.decays, D, self.behind, earlier, target, *parts,
                *self._strides(axis), axis.strides(x if gx is None else gx, False), plan.parts * plan.chunk,
                **plan.geometry(axis), strict=int(self.strict), **plan.sizes, NB=plan.blocks_n(tile),
                DIRS=len(axis.directions), **plan.dot(tile), **self.alignments,
            )  # fmt: skip
            earlier = None if target is gx else target
        return gx

    def _projection_gradient(self, parts: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None]:
        plan, tile = self.plan, self.plan.tiles.projection_gradient
        x, _, _, Bm, C, _, _, _ = self.inputs
        want_b, want_c = self.needs[3], self.needs[4]
        if not (want_b or want_c or any(t is not None for t in parts)):
            return None, None
        directions = max(len(axis.directions) for axis in plan.axes)
        per_program = plan.per_program(tile, plan.sequences * plan.count * directions * plan.blocks_n(tile))
        shares = plan.heads // plan.groups // per_program

        def buffer(like: Tensor) -> Tensor:
            return like.new_empty((shares, *like.shape), dtype=torch.float32 if shares > 1 else like.dtype)

        gb, gc = buffer(Bm) if want_b else None, buffer(C) if want_c else None
        layout = next((t for t in (gb, gc) if t is not None), Bm.unsqueeze(0))
        for axis in plan.axes:
            cells = plan.sequences * plan.count * len(axis.directions) * plan.blocks_n(tile)
            ssd_projection_gradient_kernel[(cells * (plan.heads // per_program),)](
                x, self.dy, Bm, C, self.steps, self.decays, self.saved, self.behind, gb, gc, *parts,
                *self._strides(axis), (*axis.strides(layout[0], True), layout.stride(0)), plan.parts,
                **plan.geometry(axis), n_dirs=len(axis.directions), strict=int(self.strict), per_program=per_program,
                **plan.sizes, **plan.dot(tile), STAGES=tile.stages, **self.alignments,
            )  # fmt: skip
        return _total(gb, Bm), _total(gc, C)

    def _step_gradient(self, softplus: bool, parts: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Gradients of dt, A and the bias."""
        if not self.of_steps:
            return None, None, None
        plan, (_, need_dt, need_a, *_) = self.plan, self.needs
        _, dt, A, _, _, _, bias, _ = self.inputs
        gdt = torch.empty_like(dt, memory_format=torch.contiguous_format) if need_dt else None
        ga, gbias = (
            self.steps.new_empty(plan.sequences, plan.count, plan.directions, plan.heads) if need else None
            for need in (need_a, self.needs[6])
        )
        dt_, gdt_ = dt.unsqueeze(-1), (dt if gdt is None else gdt).unsqueeze(-1)
        for axis in plan.axes:
            programs = plan.sequences * plan.count * len(axis.directions) * cdiv(plan.heads, plan.block_e)
            ssd_step_gradient_kernel[(programs,)](
                dt_, A, bias, self.steps, *parts, gdt, ga, gbias, axis.strides(dt_, True), axis.strides(gdt_, True),
                plan.parts, **plan.geometry(axis), n_dirs=len(axis.directions), parts_p=self.parts,
                parts_np=self.state_parts, heads=plan.heads, T=plan.chunk, BE=plan.block_e, SOFTPLUS=softplus,
                num_warps=4,
            )  # fmt: skip
        return gdt, None if ga is None else ga.sum((0, 1)), None if gbias is None else gbias.sum((0, 1))


def _total(parts: Tensor | None, like: Tensor) -> Tensor | None:
    """Sum of the shares' partial results in the dtype of the input."""
    if parts is None:
        return None
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(like.dtype)
