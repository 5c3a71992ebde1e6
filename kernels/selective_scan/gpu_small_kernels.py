"""Triton kernel of the selective scan for one or two states: every input is read once, bytes are the bound.

One program (several warps) takes BD channels of one sequence and walks it in tiles of S * U steps. Segment s of a tile
is U consecutive steps; segments lie across lanes and warps, the steps of a segment are U named values ("slabs"
[S, BD]), so that a thread scans its steps in registers. Each thread first reduces its segment to (decay, end state);
an associative scan over the S segments gives every segment the state before it; the steps are then taken again from
there. The state after a tile is handed to the next one in registers.

What passes between threads other than by that scan goes through a scratch of the program's own, which stays in the
caches: the states at segment borders, and step sizes formed from a low-rank signal. A matrix product in the middle
would otherwise impose its register layout on the whole loop, and a gather that of a warp.

Legend: B batch, D channels, K directions, G groups, N states, R rank; L steps, T = S * U steps of a tile. A pixel's
address is base + pixel * stride: rows and columns of an image must have one stride between pixels, see gpu_small_state.
"""

# Triton adds tuples but does not unpack them:
# ruff: noqa: RUF005
# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from kernels.selective_scan.gpu_kernels import LN2, LOG2E, USE_PTX, exp2, sigmoid, softplus

RUN_TIME = ["height", "width", "lines", "length", "backwards", "dirs", "n_dirs", "fan", "is_first", "is_last",
            "first_program", "K", "rank", "n_tiles"]  # fmt: skip


@triton.jit
def log2(x):
    """Base-2 logarithm in one instruction on NVIDIA GPUs (absolute error 2e-7 between 1 and 2)."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    """1 / x in one instruction on NVIDIA GPUs (relative error 1e-7), for x whose reciprocal is no denormal."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def step_size(value, bias, ok, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """Step sizes [S, BD] in units of ln 2, so that a decay is 2**(A step), from raw ones and the bias in these units.

    MASKED: steps that are not ``ok`` [S] become 0 and change no state. With a softplus minus infinity does that too.
    """
    raw = value.to(tl.float32) * LOG2E + bias[None, :]
    step = raw
    if SOFTPLUS:
        # The short form has an absolute error of 3e-7: 3e-4 of a step size of 1e-3.
        short = tl.maximum(raw, 0.0) + log2(1.0 + exp2(-tl.abs(raw)))
        step = softplus(raw * LN2) * LOG2E if EXACT else short
    if MASKED:
        step = tl.where(ok[:, None], step, 0.0)
    return step


@triton.jit
def join(a0, h0, a1, h1):
    """Two neighbouring pieces of h -> a h + b as one."""
    return a1 * a0, a1 * h0 + h1


@triton.jit
def pixel_of(t, length, height, width, backward, COLUMNS: tl.constexpr):
    """Number of the pixel read at step ``t``."""
    p = (t % height) * width + t // height if COLUMNS else t
    return tl.where(backward == 1, length - 1 - p, p)


@triton.jit
def tile_places(t0, s, length, height, width, backward, U: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the U slabs of the tile lie that begins at step ``t0``: their masks [S], then what `slab_at` needs.

    Along rows that is the first pixel and the distance of the segments from it, along columns the pixels of each slab.
    """
    t = t0 + s * U
    found = (t < length,)
    for u in tl.static_range(1, U):
        found = found + (t + u < length,)
    if COLUMNS:
        sign = 1 - 2 * backward
        left = height - t % height
        p = pixel_of(t, length, height, width, backward, COLUMNS)
        found = found + (p,)
        for u in tl.static_range(1, U):
            p += sign * tl.where(left == u, 1 - (height - 1) * width, width)
            left = tl.where(left == u, height + u, left)
            found = found + (p,)
    else:
        found = found + (pixel_of(t0, length, height, width, backward, COLUMNS), (1 - 2 * backward) * U * s)
    return found


@triton.jit
def slab_at(at, stride, places, backward, u: tl.constexpr, U: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Address and offsets [S] of slab ``u``; WIDE: the pixels of a sequence need 64-bit offsets."""
    if COLUMNS:
        base = at
        offs = (places[U + u].to(tl.int64) if WIDE else places[U + u]) * stride
    else:
        base = at + places[U].to(tl.int64) * stride
        offs = (places[U + 1] + (1 - 2 * backward) * u) * stride
    return base, offs


@triton.jit
def load_slabs(at, stride, places, d, d_ok, backward, U: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
               OUTSIDE: tl.constexpr):  # fmt: skip
    """U slabs [S, BD] as they are stored, and OUTSIDE where nothing is."""
    slabs = ()
    for u in tl.static_range(U):
        base, offs = slab_at(at, stride, places, backward, u, U, COLUMNS, WIDE)
        mask = places[u][:, None] & d_ok[None, :]
        slabs = slabs + (tl.load(base + (offs[:, None] + d[None, :]), mask=mask, other=OUTSIDE),)
    return slabs


@triton.jit
def store_slab(at, stride, places, d, d_ok, backward, value, u: tl.constexpr, U: tl.constexpr, COLUMNS: tl.constexpr,
               WIDE: tl.constexpr):  # fmt: skip
    """Stores slab ``u`` [S, BD] in the dtype of its tensor."""
    base, offs = slab_at(at, stride, places, backward, u, U, COLUMNS, WIDE)
    mask = places[u][:, None] & d_ok[None, :]
    tl.store(base + (offs[:, None] + d[None, :]), value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(at, stride, places, backward, U: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """U slabs of a value shared by all channels, each [S, 1] float32."""
    rows = ()
    for u in tl.static_range(U):
        base, offs = slab_at(at, stride, places, backward, u, U, COLUMNS, WIDE)
        rows = rows + (tl.load(base + offs, mask=places[u], other=0.0).to(tl.float32)[:, None],)
    return rows


@triton.jit
def load_signal(at, stride, t0, rank, length, height, width, backward,
                T: tl.constexpr, RP: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Low-rank signal [T, RP] of the tile that begins at step ``t0``, as it is stored."""
    t = t0 + tl.arange(0, T)
    r = tl.arange(0, RP)
    p = pixel_of(t, length, height, width, backward, COLUMNS).to(tl.int64)
    return tl.load(at + (p * stride)[:, None] + r[None, :], mask=(t < length)[:, None] & (r < rank)[None, :], other=0.0)


@triton.jit
def stage_steps(memory, signal, weight, T: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """Writes the raw step sizes of a tile, signal times weight, into the program's own memory [T, BD]."""
    raw = tl.dot(signal.to(tl.float32), weight, input_precision=PRECISION)
    tl.store(memory + tl.arange(0, T)[:, None] * BD + tl.arange(0, BD)[None, :], raw)


@triton.jit
def staged_slabs(memory, s, U: tl.constexpr, BD: tl.constexpr):
    """The U slabs [S, BD] of what `stage_steps` wrote."""
    slabs = ()
    for u in tl.static_range(U):
        slabs = slabs + (tl.load(memory + ((s * U + u) * BD)[:, None] + tl.arange(0, BD)[None, :]),)
    return slabs


@triton.jit
def load_states(ptr, strides, b, w, k, d, d_ok, N: tl.constexpr, BD: tl.constexpr):
    """The N states [BD] at one end of a sequence, zeros where ``ptr`` is None."""
    states = ()
    for n in tl.static_range(N):
        state = tl.zeros([BD], tl.float32)
        if ptr is not None:
            at = ptr + b * strides[0] + w * strides[1] + k * strides[2] + d * strides[3] + n * strides[4]
            state += tl.load(at, mask=d_ok, other=0.0)
        states = states + (state,)
    return states


@triton.jit
def store_states(ptr, strides, b, w, k, d, d_ok, states, N: tl.constexpr):
    """Stores what `load_states` loads."""
    for n in tl.static_range(N):
        at = ptr + b * strides[0] + w * strides[1] + k * strides[2] + d * strides[3] + n * strides[4]
        tl.store(at, states[n], mask=d_ok)


@triton.jit
def load_constants(bias_ptr, weight_ptr, skip_ptr, row, d, d_ok, rank, BD: tl.constexpr, RP: tl.constexpr):
    """Bias [BD] in units of ln 2, low-rank weight [RP, BD] (a dummy when RP is 0) and skip [BD] of one direction."""
    bias = tl.zeros([BD], tl.float32)
    skip = tl.zeros([BD], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + row + d, mask=d_ok, other=0.0) * LOG2E
    if skip_ptr is not None:
        skip += tl.load(skip_ptr + row + d, mask=d_ok, other=0.0)
    weight = bias
    if RP > 0:
        r = tl.arange(0, RP)
        ptrs = weight_ptr + (row + d)[None, :] * rank + r[:, None]
        weight = tl.load(ptrs, mask=(r < rank)[:, None] & d_ok[None, :], other=0.0).to(tl.float32)
    return bias, weight, skip


@triton.jit
def own_channels(program, channels, group_channels, BD: tl.constexpr, EVEN: tl.constexpr):
    """Channel block of a program, its group, its number in the group, its channels [BD] and which of them exist."""
    blocks = tl.cdiv(group_channels, BD)
    block = program % (blocks * (channels // group_channels))
    group = block // blocks
    local = (block % blocks) * BD + tl.arange(0, BD)
    ok = tl.full([BD], True, tl.int1) if EVEN else local < group_channels
    return block, group, block % blocks, group * group_channels + local, ok


@triton.jit
def before_segments(decays, adds, carry, memory, s, S: tl.constexpr, BD: tl.constexpr, U: tl.constexpr):
    """State before each segment [S, BD] and state behind the tile [BD], from the state before the tile [BD].

    A segment learns by ``memory`` [S, BD] what its neighbour found; the next call must be given another one.
    """
    p = decays[0]
    h = adds[0]
    for u in tl.static_range(1, U):
        p *= decays[u]
        h = decays[u] * h + adds[u]
    first = (s == 0)[:, None]
    h += tl.where(first, p * carry[None, :], 0.0)
    _, h = tl.associative_scan((p, h), 0, join)
    j = tl.arange(0, BD)
    tl.store(memory + (s * BD)[:, None] + j[None, :], h)
    tl.debug_barrier()
    before = tl.load(memory + (s * BD - BD)[:, None] + j[None, :], mask=(s > 0)[:, None], other=0.0)
    return tl.where(first, carry[None, :], before), tl.load(memory + (S - 1) * BD + j)


@triton.jit(do_not_specialize=RUN_TIME)
def small_forward_kernel(
    x, gate, bm, cm, delta, weight, a, skip, bias, start, border, final, total, y, scratch,
    s_x, s_gate, s_b, s_c, s_delta, s_start, s_final, s_total, s_y,
    height, width, lines, length, backwards, dirs, n_dirs, fan, is_first, is_last, first_program, K,
    channels, group_channels, rank, n_tiles,
    N: tl.constexpr, S: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y of ``n_dirs`` directions along one axis, one after the other; ``fan`` programs take different ones.

    Strides are (batch, line, pixel, direction, group); those of states (batch, line, direction, channel, state). With
    ACCUMULATE each sweep adds to what the one before wrote into ``total`` (float32) and the last one writes ``y``;
    ``is_first`` and ``is_last`` say whether launches came before or follow. ``border`` (may be None) [sequence, K,
    tile, N, D] keeps the state before each tile.
    """
    T: tl.constexpr = S * U
    MASKED: tl.constexpr = RP > 0 or not SOFTPLUS
    NOTHING: tl.constexpr = 0.0 if MASKED else float("-inf")
    all_blocks = tl.cdiv(group_channels, BD) * (channels // group_channels)
    program = first_program + tl.program_id(0)
    share = (program // all_blocks) % fan
    sequence = (program // (all_blocks * fan)).to(tl.int64)
    b = sequence // lines
    w = sequence % lines
    _, group, _, d, d_ok = own_channels(program, channels, group_channels, BD, EVEN)
    s = tl.arange(0, S)
    own = scratch + tl.program_id(0).to(tl.int64) * (2 * N * S * BD + (2 * T * BD if RP > 0 else 0))
    raws = own + 2 * N * S * BD
    x_at = x + b * s_x[0] + w * s_x[1]
    z_at = x_at if gate is None else gate + b * s_gate[0] + w * s_gate[1]
    for sweep in range(0, n_dirs):
        k = (dirs >> (4 * (share * n_dirs + sweep))) & 15
        backward = (backwards >> k) & 1
        bm_at = bm + b * s_b[0] + w * s_b[1] + k * s_b[3] + group * s_b[4]
        cm_at = cm + b * s_c[0] + w * s_c[1] + k * s_c[3] + group * s_c[4]
        delta_at = delta + b * s_delta[0] + w * s_delta[1] + k * s_delta[3]
        y_at = y + b * s_y[0] + w * s_y[1] + k * s_y[3]
        total_at = y_at
        if ACCUMULATE:
            total_at = total + b * s_total[0] + w * s_total[1]
        bias_d, weight_rd, skip_d = load_constants(bias, weight, skip, k * channels, d, d_ok, rank, BD, RP)
        carries = load_states(start, s_start, b, w, k, d, d_ok, N, BD)
        seen = (sweep > 0) | (is_first == 0)
        done = (sweep == n_dirs - 1) & (is_last == 1)
        places = tile_places(0, s, length, height, width, backward, U, COLUMNS)
        next_x = load_slabs(x_at, s_x[2], places, d, d_ok, backward, U, COLUMNS, WIDE, 0.0)
        if RP > 0:
            signal = load_signal(delta_at, s_delta[2], 0, rank, length, height, width, backward, T, RP, COLUMNS)
            stage_steps(raws, signal, weight_rd, T, BD, PRECISION)
            next_delta = load_signal(delta_at, s_delta[2], T, rank, length, height, width, backward, T, RP, COLUMNS)
            tl.debug_barrier()
        else:
            next_delta = load_slabs(delta_at, s_delta[2], places, d, d_ok, backward, U, COLUMNS, WIDE, NOTHING)
        for tile in range(0, n_tiles):
            after = tile_places(tile * T + T, s, length, height, width, backward, U, COLUMNS)
            xs = next_x
            next_x = load_slabs(x_at, s_x[2], after, d, d_ok, backward, U, COLUMNS, WIDE, 0.0)
            if RP > 0:
                deltas = staged_slabs(raws + (tile & 1) * (T * BD), s, U, BD)
                stage_steps(raws + ((tile + 1) & 1) * (T * BD), next_delta, weight_rd, T, BD, PRECISION)
                next_delta = load_signal(
                    delta_at, s_delta[2], tile * T + 2 * T, rank, length, height, width, backward, T, RP, COLUMNS
                )
            else:
                deltas = next_delta
                next_delta = load_slabs(delta_at, s_delta[2], after, d, d_ok, backward, U, COLUMNS, WIDE, NOTHING)
            steps = ()
            for u in tl.static_range(U):
                steps = steps + (step_size(deltas[u], bias_d, places[u], SOFTPLUS, EXACT, MASKED),)
            outs = ()
            if ACCUMULATE:
                before = load_slabs(total_at, s_total[2], places, d, d_ok & seen, backward, U, COLUMNS, WIDE, 0.0)
                for u in tl.static_range(U):
                    outs = outs + (before[u] + skip_d[None, :] * xs[u].to(tl.float32),)
            else:
                for u in tl.static_range(U):
                    outs = outs + (skip_d[None, :] * xs[u].to(tl.float32),)
            ends = ()
            for n in tl.static_range(N):
                decay = tl.load(a + (k * channels + d) * N + n, mask=d_ok, other=0.0)
                decays = ()
                adds = ()
                b_rows = load_rows(bm_at + n, s_b[2], places, backward, U, COLUMNS, WIDE)
                c_rows = load_rows(cm_at + n, s_c[2], places, backward, U, COLUMNS, WIDE)
                for u in tl.static_range(U):
                    decays = decays + (exp2(decay[None, :] * steps[u]),)
                    adds = adds + (steps[u] * xs[u].to(tl.float32) * (b_rows[u] * LN2),)
                if border is not None:
                    border_at = border + (((sequence * K + k) * n_tiles + tile) * N + n) * channels
                    tl.store(border_at + d, carries[n], mask=d_ok)
                memory = own + ((tile & 1) * N + n) * (S * BD)
                h, end = before_segments(decays, adds, carries[n], memory, s, S, BD, U)
                ends = ends + (end,)
                more = ()
                for u in tl.static_range(U):
                    h = decays[u] * h + adds[u]
                    more = more + (outs[u] + h * c_rows[u],)
                outs = more
            carries = ends
            if gate is not None:
                zs = load_slabs(z_at, s_gate[2], places, d, d_ok, backward, U, COLUMNS, WIDE, 0.0)
            for u in tl.static_range(U):
                out = outs[u]
                if gate is not None:
                    z = zs[u].to(tl.float32)
                    out *= tl.where(done, z * sigmoid(z), 1.0)
                if ACCUMULATE:
                    store_slab(y_at, s_y[2], places, d, d_ok & done, backward, out, u, U, COLUMNS, WIDE)
                    ok = d_ok & (done == 0)
                    store_slab(total_at, s_total[2], places, d, ok, backward, out, u, U, COLUMNS, WIDE)
                else:
                    store_slab(y_at, s_y[2], places, d, d_ok, backward, out, u, U, COLUMNS, WIDE)
            places = after
        if final is not None:
            store_states(final, s_final, b, w, k, d, d_ok, carries, N)
        # The next sweep reads what this one wrote from other lanes.
        tl.debug_barrier()
