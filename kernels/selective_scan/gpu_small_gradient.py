"""Triton kernel of the gradients of the selective scan for one or two states (method and legend: `gpu_small_kernels`).

A program walks the tiles of one direction from the last to the first. It recomputes the states of a tile from the saved
state before it and runs the adjoint through the same tile, both by one scan over the segments; the formulas stand in
`gpu_gradient`. With G_t = a_t g_t, what step t hands to the step before it: g_t = C_t dy_t + G_{t+1}.
"""

# Triton adds tuples but does not unpack them:
# ruff: noqa: RUF005
# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from kernels.selective_scan.gpu_kernels import LN2, LOG2E, exp2, sigmoid, softplus
from kernels.selective_scan.gpu_small_kernels import (
    load_constants,
    load_rows,
    load_signal,
    load_slabs,
    load_states,
    log2,
    own_channels,
    pixel_of,
    reciprocal,
    stage_steps,
    staged_slabs,
    store_slab,
    store_states,
    tile_places,
)

RUN_TIME = ["height", "width", "lines", "length", "backwards", "dirs", "n_dirs", "first_program", "K",
            "rank", "n_tiles"]  # fmt: skip


@triton.jit
def step_and_slope(value, bias, ok, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """Step sizes [S, BD] as `step_size` gives them, and log2(e) times their derivatives, by raw ones in usual units."""
    raw = value.to(tl.float32) * LOG2E + bias[None, :]
    step = raw
    slope = tl.full(raw.shape, LOG2E, tl.float32)
    if SOFTPLUS:
        u = exp2(-tl.abs(raw))
        step = softplus(raw * LN2) * LOG2E if EXACT else tl.maximum(raw, 0.0) + log2(1.0 + u)
        slope = tl.where(raw >= 0.0, 1.0, u) * reciprocal(1.0 + u) * LOG2E
    if MASKED:
        step = tl.where(ok[:, None], step, 0.0)
        slope = tl.where(ok[:, None], slope, 0.0)
    return step, slope


@triton.jit
def join_both(a0, h0, c0, g0, a1, h1, c1, g1):
    """Two neighbouring pieces of h -> a h + b and of g -> c g + d as one."""
    return a1 * a0, a1 * h0 + h1, c1 * c0, c1 * g0 + g1


@triton.jit
def around_segments(decays, adds, flows, carry_h, carry_g, memory, s, S: tl.constexpr, BD: tl.constexpr,
                    U: tl.constexpr):  # fmt: skip
    """State before each segment, adjoint behind it, both [S, BD], and what the tile hands to the one before it [BD].

    ``flows`` are C_t dy_t; ``carry_h`` [BD] is the state before the tile, ``carry_g`` what it is handed from behind.
    One scan serves both: the adjoints enter it in mirrored order, by ``memory`` [4, S, BD] of the program's own.
    """
    p = decays[0]
    h = adds[0]
    g = decays[U - 1] * flows[U - 1]
    for u in tl.static_range(1, U):
        p *= decays[u]
        h = decays[u] * h + adds[u]
        g = decays[U - 1 - u] * (flows[U - 1 - u] + g)
    j = tl.arange(0, BD)[None, :]
    here = memory + (s * BD)[:, None] + j
    mirrored = memory + ((S - 1 - s) * BD)[:, None] + j
    tl.store(here, p)
    tl.store(here + S * BD, g)
    tl.debug_barrier()
    c = tl.load(mirrored)
    g = tl.load(mirrored + S * BD)
    first = (s == 0)[:, None]
    h += tl.where(first, p * carry_h[None, :], 0.0)
    g += tl.where(first, c * carry_g[None, :], 0.0)
    _, h, _, g = tl.associative_scan((p, h, c, g), 0, join_both)
    tl.store(here + 2 * S * BD, h)
    tl.store(here + 3 * S * BD, g)
    tl.debug_barrier()
    before = tl.load(here + (2 * S - 1) * BD, mask=(s > 0)[:, None], other=0.0)
    behind = tl.load(mirrored + (3 * S - 1) * BD, mask=(s < S - 1)[:, None], other=0.0)
    before = tl.where(first, carry_h[None, :], before)
    behind = tl.where((s == S - 1)[:, None], carry_g[None, :], behind)
    return before, behind, tl.load(memory + (4 * S - 1) * BD + tl.arange(0, BD))


@triton.jit
def stack_rows(rows, S: tl.constexpr, U: tl.constexpr):
    """U slabs [S], U one of 1, 2, 4, 8, as the steps [S * U] of a tile."""
    if U == 1:
        steps = rows[0]
    elif U == 2:
        steps = tl.join(rows[0], rows[1])
    elif U == 4:
        steps = tl.join(tl.join(rows[0], rows[2]), tl.join(rows[1], rows[3]))
    else:
        even = tl.join(tl.join(rows[0], rows[4]), tl.join(rows[2], rows[6]))
        steps = tl.join(even, tl.join(tl.join(rows[1], rows[5]), tl.join(rows[3], rows[7])))
    return tl.reshape(steps, [S * U])


@triton.jit
def store_rows(at, stride, rows, t0, length, height, width, backward, S: tl.constexpr, U: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
    """Stores the sums over channels of a tile, given as U slabs [S]."""
    t = t0 + tl.arange(0, S * U)
    p = pixel_of(t, length, height, width, backward, COLUMNS)
    tl.store(at + p.to(tl.int64) * stride, stack_rows(rows, S, U).to(at.dtype.element_ty), mask=t < length)


@triton.jit
def place(ptr, strides, b, w, k, group, share):
    """Pointer to the first pixel of a sequence in an output."""
    at = ptr + b * strides[0] + w * strides[1] + k * strides[3] + group * strides[4]
    return at + tl.cast(share, tl.int64) * strides[5]


@triton.jit
def state_gradients(
    parts, n, decay, carry_h, carry_g, steps, xs, dys, ats, strides, places, t0, length, height, width, backward,
    memory, s, S: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    WANT: tl.constexpr,
):  # fmt: skip
    """Adds what state ``n`` contributes to the gradients of a tile.

    parts: 3 U slabs, the gradients of x and (times ln 2) of the step sizes, and the outputs before the gate; then that
    of A over ln 2 [S, BD].
    Returns them and what the tile hands to the one before. ats: B, C and the places of their gradients.
    """
    decays = ()
    adds = ()
    flows = ()
    b_rows = load_rows(ats[0] + n, strides[0], places, backward, U, COLUMNS, WIDE)
    c_rows = load_rows(ats[1] + n, strides[1], places, backward, U, COLUMNS, WIDE)
    for u in tl.static_range(U):
        decays = decays + (exp2(decay[None, :] * steps[u]),)
        adds = adds + (steps[u] * xs[u].to(tl.float32) * (b_rows[u] * LN2),)
        flows = flows + (dys[u] * c_rows[u],)
    h, g, end = around_segments(decays, adds, flows, carry_h, carry_g, memory, s, S, BD, U)
    states = ()
    for u in tl.static_range(U):
        states = states + (h,)
        h = decays[u] * h + adds[u]
    ga = parts[3 * U]
    g_x = ()
    g_dt = ()
    outs = ()
    g_bs = ()
    g_cs = ()
    for u in tl.static_range(U - 1, -1, -1):
        x_u = xs[u].to(tl.float32)
        g = flows[u] + g
        carried = decays[u] * states[u]
        h = carried + adds[u]
        if WANT & 4:
            g_bs = (tl.sum(g * (steps[u] * x_u), axis=1) * LN2,) + g_bs
        if WANT & 8:
            g_cs = (tl.sum(h * dys[u], axis=1),) + g_cs
        g_b = g * (b_rows[u] * LN2)
        e = g * carried
        ga += steps[u] * e
        g_x = (parts[u] + steps[u] * g_b,) + g_x
        g_dt = (parts[U + u] + x_u * g_b + (decay * LN2)[None, :] * e,) + g_dt
        outs = (parts[2 * U + u] + h * c_rows[u],) + outs
        g = decays[u] * g
    if WANT & 4:
        store_rows(ats[2] + n, strides[2], g_bs, t0, length, height, width, backward, S, U, COLUMNS)
    if WANT & 8:
        store_rows(ats[3] + n, strides[3], g_cs, t0, length, height, width, backward, S, U, COLUMNS)
    return g_x + g_dt + outs + (ga,), end


@triton.jit
def low_rank_gradients(
    g_weight, g_raws, memory, signal, weight, at, stride, t0, s, rank, length, height, width, backward,
    S: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, U: tl.constexpr, COLUMNS: tl.constexpr, WANT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores this block's share of the signal's gradient of a tile; returns that of the weight [BD, RP], updated."""
    T: tl.constexpr = S * U
    j = tl.arange(0, BD)
    for u in tl.static_range(U):
        tl.store(memory + ((s * U + u) * BD)[:, None] + j[None, :], g_raws[u])
    tl.debug_barrier()
    tile = tl.load(memory + (tl.arange(0, T) * BD)[:, None] + j[None, :])
    if WANT & 2:
        t = t0 + tl.arange(0, T)
        r = tl.arange(0, RP)
        low = tl.dot(tile, tl.trans(weight), input_precision=PRECISION)
        p = pixel_of(t, length, height, width, backward, COLUMNS)
        ok = (t < length)[:, None] & (r < rank)[None, :]
        tl.store(at + (p.to(tl.int64) * stride)[:, None] + r[None, :], low.to(at.dtype.element_ty), mask=ok)
    if WANT & 64:
        g_weight += tl.dot(tl.trans(tile), signal.to(tl.float32), input_precision=PRECISION)
    return g_weight


@triton.jit
def store_pixel_sums(outs, sums, g_a, row, d, d_ok, rank, N: tl.constexpr, RP: tl.constexpr, WANT: tl.constexpr):
    """Stores the gradients of A, D, weight and bias that a sequence contributes; its channel rows begin at ``row``."""
    ga, gskip, gweight, gbias = outs
    g_skip, g_weight, g_bias = sums
    if WANT & 16:
        for n in tl.static_range(N):
            tl.store(ga + (row + d) * N + n, tl.sum(g_a[n], axis=0) * LN2, mask=d_ok)
    if WANT & 32:
        tl.store(gskip + row + d, tl.sum(g_skip, axis=0), mask=d_ok)
    if WANT & 64:
        r = tl.arange(0, RP)
        ptrs = gweight + ((row + d) * rank)[:, None] + r[None, :]
        tl.store(ptrs, g_weight, mask=d_ok[:, None] & (r < rank)[None, :])
    if WANT & 128:
        tl.store(gbias + row + d, tl.sum(g_bias, axis=0), mask=d_ok)


@triton.jit(do_not_specialize=RUN_TIME)
def small_gradient_kernel(
    x, gate, dy, bm, cm, delta, weight, a, skip, bias, border, behind,
    gx, ggate, gdelta, gb, gc, ga, gskip, gweight, gbias, gstart, scratch,
    s_x, s_gate, s_dy, s_b, s_c, s_delta, s_behind, s_gx, s_ggate, s_gdelta, s_gb, s_gc, s_gstart,
    height, width, lines, length, backwards, dirs, n_dirs, first_program, K, channels, group_channels, rank, n_tiles,
    N: tl.constexpr, S: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, WANT: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one direction of one sequence and BD channels; a launch covers the directions of one axis.

    Strides are (batch, line, pixel, direction, group, share); those of states (batch, line, direction, channel, state).
    Sums over channels go to the block's own share of ``gb``, ``gc`` and, with low rank, ``gdelta``, sums over pixels to
    the sequence's own row of ``ga``, ``gskip``, ``gweight``, ``gbias``: no atomics. WANT: bit set over x, delta, B, C,
    A, D, weight, bias, z.
    """
    T: tl.constexpr = S * U
    MASKED: tl.constexpr = RP > 0 or not SOFTPLUS
    NOTHING: tl.constexpr = 0.0 if MASKED else float("-inf")
    all_blocks = tl.cdiv(group_channels, BD) * (channels // group_channels)
    program = first_program + tl.program_id(0)
    k = (dirs >> (4 * ((program // all_blocks) % n_dirs))) & 15
    sequence = (program // (all_blocks * n_dirs)).to(tl.int64)
    b = sequence // lines
    w = sequence % lines
    block, group, part, d, d_ok = own_channels(program, channels, group_channels, BD, EVEN)
    s = tl.arange(0, S)
    backward = (backwards >> k) & 1
    own = scratch + tl.program_id(0).to(tl.int64) * (4 * S * BD + (3 * T * BD if RP > 0 else 0))
    raws = own + 4 * S * BD
    x_at = x + b * s_x[0] + w * s_x[1]
    dy_at = dy + b * s_dy[0] + w * s_dy[1] + k * s_dy[3]
    delta_at = delta + b * s_delta[0] + w * s_delta[1] + k * s_delta[3]
    bm_at = bm + b * s_b[0] + w * s_b[1] + k * s_b[3] + group * s_b[4]
    cm_at = cm + b * s_c[0] + w * s_c[1] + k * s_c[3] + group * s_c[4]
    # Outputs that are not wanted are None; their inputs stand in, nothing is stored there.
    gx_at = place(x if gx is None else gx, s_gx, b, w, k, 0, 0)
    gdelta_at = place(delta if gdelta is None else gdelta, s_gdelta, b, w, k, 0, block if RP > 0 else 0)
    gb_at = place(bm if gb is None else gb, s_gb, b, w, k, group, part)
    gc_at = place(cm if gc is None else gc, s_gc, b, w, k, group, part)
    ats = (bm_at, cm_at, gb_at, gc_at)
    strides = (s_b[2], s_c[2], s_gb[2], s_gc[2])
    bias_d, weight_rd, skip_d = load_constants(bias, weight, skip, k * channels, d, d_ok, rank, BD, RP)
    carries = load_states(behind, s_behind, b, w, k, d, d_ok, N, BD)
    g_a = (tl.zeros([S, BD], tl.float32),) * N
    g_skip = tl.zeros([S, BD], tl.float32)
    g_bias = tl.zeros([S, BD], tl.float32)
    g_weight = g_bias
    if RP > 0:
        g_weight = tl.zeros([BD, RP], tl.float32)
        t0 = (n_tiles - 1) * T
        signal = load_signal(delta_at, s_delta[2], t0, rank, length, height, width, backward, T, RP, COLUMNS)
        stage_steps(raws, signal, weight_rd, T, BD, PRECISION)
        tl.debug_barrier()
    places = tile_places((n_tiles - 1) * T, s, length, height, width, backward, U, COLUMNS)
    next_x = load_slabs(x_at, s_x[2], places, d, d_ok, backward, U, COLUMNS, WIDE, 0.0)
    next_dy = load_slabs(dy_at, s_dy[2], places, d, d_ok, backward, U, COLUMNS, WIDE, 0.0)
    if RP == 0:
        next_delta = load_slabs(delta_at, s_delta[2], places, d, d_ok, backward, U, COLUMNS, WIDE, NOTHING)
    for index in range(0, n_tiles):
        tile = n_tiles - 1 - index
        earlier = tile_places((tile - 1) * T, s, length, height, width, backward, U, COLUMNS)
        more_ok = d_ok & (tile > 0)
        xs = next_x
        next_x = load_slabs(x_at, s_x[2], earlier, d, more_ok, backward, U, COLUMNS, WIDE, 0.0)
        stored_dys = next_dy
        next_dy = load_slabs(dy_at, s_dy[2], earlier, d, more_ok, backward, U, COLUMNS, WIDE, 0.0)
        dys = ()
        for u in tl.static_range(U):
            dys = dys + (stored_dys[u].to(tl.float32),)
        if gate is not None:
            z_at = gate + b * s_gate[0] + w * s_gate[1]
            zs = load_slabs(z_at, s_gate[2], places, d, d_ok, backward, U, COLUMNS, WIDE, 0.0)
            plain_dys = dys
            dys = ()
            for u in tl.static_range(U):
                z = zs[u].to(tl.float32)
                dys = dys + (plain_dys[u] * z * sigmoid(z),)
        if RP > 0:
            deltas = staged_slabs(raws + (index & 1) * (T * BD), s, U, BD)
            t0 = tl.maximum(tile - 1, 0) * T
            next_signal = load_signal(delta_at, s_delta[2], t0, rank, length, height, width, backward, T, RP, COLUMNS)
            stage_steps(raws + ((index + 1) & 1) * (T * BD), next_signal, weight_rd, T, BD, PRECISION)
        else:
            deltas = next_delta
            next_delta = load_slabs(delta_at, s_delta[2], earlier, d, more_ok, backward, U, COLUMNS, WIDE, NOTHING)
        steps = ()
        slopes = ()
        for u in tl.static_range(U):
            step, slope = step_and_slope(deltas[u], bias_d, places[u], SOFTPLUS, EXACT, MASKED)
            steps = steps + (step,)
            slopes = slopes + (slope,)
        g_x = ()
        g_dt = ()
        outs = ()
        for u in tl.static_range(U):
            x_u = xs[u].to(tl.float32)
            g_x = g_x + (skip_d[None, :] * dys[u],)
            g_dt = g_dt + (tl.zeros([S, BD], tl.float32),)
            outs = outs + (skip_d[None, :] * x_u,)
            g_skip += dys[u] * x_u
        handed = ()
        sums = ()
        for n in tl.static_range(N):
            decay = tl.load(a + (k * channels + d) * N + n, mask=d_ok, other=0.0)
            border_at = border + (((sequence * K + k) * n_tiles + tile) * N + n) * channels
            carry_h = tl.load(border_at + d, mask=d_ok, other=0.0)
            parts, end = state_gradients(
                g_x + g_dt + outs + (g_a[n],), n, decay, carry_h, carries[n], steps, xs, dys, ats, strides, places,
                tile * T, length, height, width, backward, own, s, S, BD, U, COLUMNS, WIDE, WANT,
            )  # fmt: skip
            g_x = parts[:U]
            g_dt = parts[U : 2 * U]
            outs = parts[2 * U : 3 * U]
            sums = sums + (parts[3 * U],)
            handed = handed + (end,)
        carries = handed
        g_a = sums
        g_raws = ()
        for u in tl.static_range(U):
            g_raw = g_dt[u] * slopes[u]
            g_bias += g_raw
            g_raws = g_raws + (g_raw,)
            if WANT & 1:
                store_slab(gx_at, s_gx[2], places, d, d_ok, backward, g_x[u], u, U, COLUMNS, WIDE)
            if RP == 0 and WANT & 2:
                store_slab(gdelta_at, s_gdelta[2], places, d, d_ok, backward, g_raw, u, U, COLUMNS, WIDE)
            if WANT & 256:
                z = zs[u].to(tl.float32)
                sig = sigmoid(z)
                g_z = plain_dys[u] * outs[u] * sig * (1.0 + z * (1.0 - sig))
                gz_at = ggate + b * s_ggate[0] + w * s_ggate[1]
                store_slab(gz_at, s_ggate[2], places, d, d_ok, backward, g_z, u, U, COLUMNS, WIDE)
        if RP > 0:
            if WANT & 66:
                g_weight = low_rank_gradients(
                    g_weight, g_raws, raws + 2 * T * BD, signal, weight_rd, gdelta_at, s_gdelta[2], tile * T, s, rank,
                    length, height, width, backward, S, BD, RP, U, COLUMNS, WANT, PRECISION,
                )  # fmt: skip
            signal = next_signal
        places = earlier
    outs = (ga, gskip, gweight, gbias)
    sums = (g_skip, g_weight, g_bias)
    store_pixel_sums(outs, sums, g_a, (sequence * K + k) * channels, d, d_ok, rank, N, RP, WANT)
    if gstart is not None:
        store_states(gstart, s_gstart, b, w, k, d, d_ok, carries, N)
