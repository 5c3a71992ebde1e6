"""Triton kernel of the selective scan's gradients (legend and layout: see `gpu_kernels`).

With h_t = a_t h_{t-1} + dt_t B_t x_t and y_t = C_t h_t + D x_t, and g_t the adjoint of h_t behind step t:
g_t = C_t dy_t + a_{t+1} g_{t+1}, and with e_t = g_t a_t h_{t-1}

    dB_t = sum_d g_t dt_t x_t        dC_t = sum_d h_t dy_t        dx_t = dt_t sum_n g_t B_t + D dy_t
    d(dt_t) = x_t sum_n g_t B_t + sum_n A e_t                     dA = sum_t dt_t e_t

h_{t-1} is wanted from the last step to the first. A program first runs forward through its chunk and keeps every fourth
state in a scratch of its own; then it takes four steps at a time from the end, recomputing their states in registers.
"""

# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false

import triton
import triton.language as tl

from kernels.selective_scan.gpu_kernels import (
    GEOMETRY,
    LN2,
    activate,
    chunk_bounds,
    direction,
    exp2,
    lanes_last,
    load_channel_constants,
    load_decay,
    load_raw_delta,
    load_row,
    pixel,
    place,
    sigmoid,
    state_tile,
)


@triton.jit
def add_to(ptrs, value, mask, again, ACCUMULATE: tl.constexpr):
    """Stores ``value``, added to what is there where ``again``."""
    if ACCUMULATE:
        value += tl.load(ptrs, mask=mask & again, other=0.0)
    tl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def load_step(ats, tile, constants, t, t1, inner, RP: tl.constexpr, SOFTPLUS: tl.constexpr, ALIGN: tl.constexpr):
    """Raw and activated step size, x [BD], B [BN] and the position of step ``t``; harmless zeros from ``t1`` on."""
    _, n, n_ok, offs_d, d_ok = tile
    rank, weight, bias, _ = constants
    o = t // inner
    i = t % inner
    ok = t < t1
    raw = load_raw_delta(pixel(ats[4], o, i), ok, offs_d, d_ok, rank, weight, bias, RP)
    v = tl.load(pixel(ats[0], o, i) + offs_d, mask=d_ok & ok, other=0.0).to(tl.float32)
    b_n = load_row(pixel(ats[2], o, i), n, n_ok & ok, ALIGN)
    return raw, activate(raw, ok, SOFTPLUS), v, b_n, o, i, ok


@triton.jit
def advance(h, decay, step):
    """The state one step on."""
    _, dt, v, b_n, _, _, _ = step
    return exp2(decay * dt[None, :]) * h + b_n[:, None] * (dt * v)[None, :]


@triton.jit
def step_gradients(
    sums, h, step, ats, again, tile, constants,
    RP: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, WANT: tl.constexpr, ACC: tl.constexpr,
    ALIGN_B: tl.constexpr, ALIGN_C: tl.constexpr,
):  # fmt: skip
    """Gradients of one step from the state ``h`` before it; returns the updated ``sums``.

    sums: adjoint [BN, BD], dA [BN, BD], dD [BD], dbias [BD], dweight [RP, BD]. ats: places of x, z, B, C, delta, dy and
    of the gradients of x, z, B, C, delta. again: whether those of x and z, of delta, of B and C hold something already.
    WANT and ACC: bit sets over x, delta, B, C, A, D, weight, bias, z.
    """
    g, ga, gskip, gbias, gweight = sums
    raw, dt, v, _, o, i, ok = step
    decay, n, n_ok, offs_d, d_ok = tile
    rank, weight, _, skip_d = constants
    c_n = load_row(pixel(ats[3], o, i), n, n_ok & ok, ALIGN_C)
    b_n = load_row(pixel(ats[2], o, i), n, n_ok & ok, ALIGN_B)
    dy = tl.load(pixel(ats[5], o, i) + offs_d, mask=d_ok & ok, other=0.0).to(tl.float32)
    a = exp2(decay * dt[None, :])
    carried = a * h
    after = carried + b_n[:, None] * (dt * v)[None, :]
    if HAS_Z:
        z = tl.load(pixel(ats[1], o, i) + offs_d, mask=d_ok & ok, other=0.0).to(tl.float32)
        s = sigmoid(z)
        if WANT & 256:
            plain = tl.sum(after * c_n[:, None], axis=0) + skip_d * v
            gz = dy * plain * s * (1.0 + z * (1.0 - s))
            add_to(pixel(ats[7], o, i) + offs_d, gz, d_ok & ok, again[0], (ACC & 1) != 0)
        dy *= z * s
    g += c_n[:, None] * dy[None, :]
    if WANT & 8:
        add_to(pixel(ats[9], o, i) + n, tl.sum(after * dy[None, :], axis=1), n_ok & ok, again[2], (ACC & 8) != 0)
    if WANT & 4:
        add_to(pixel(ats[8], o, i) + n, tl.sum(g * (dt * v)[None, :], axis=1), n_ok & ok, again[2], (ACC & 4) != 0)
    g_b = tl.sum(g * b_n[:, None], axis=0)
    if WANT & 1:
        add_to(pixel(ats[6], o, i) + offs_d, dt * g_b + skip_d * dy, d_ok & ok, again[0], (ACC & 1) != 0)
    e = g * carried
    ga += dt[None, :] * e
    gskip += dy * v
    if WANT & 194:
        graw = v * g_b + LN2 * tl.sum(decay * e, axis=0)
        if SOFTPLUS:
            graw *= tl.where(raw > 20.0, 1.0, sigmoid(raw))
        graw = tl.where(ok, graw, 0.0)
        gbias += graw
        if RP > 0:
            offs_r = tl.arange(0, RP)
            r_ok = (offs_r < rank) & ok
            if WANT & 2:
                low = tl.sum(weight * graw[None, :], axis=1)
                add_to(pixel(ats[10], o, i) + offs_r, low, r_ok, again[1], (ACC & 2) != 0)
            if WANT & 64:
                low = tl.load(pixel(ats[4], o, i) + offs_r, mask=r_ok, other=0.0).to(tl.float32)
                gweight += graw[None, :] * low[:, None]
        elif WANT & 2:
            add_to(pixel(ats[10], o, i) + offs_d, graw, d_ok & ok, again[1], (ACC & 2) != 0)
    return g * a, ga, gskip, gbias, gweight


@triton.jit
def all_places(tensors, strides, k, group, part, share, b, w, axis, HAS_Z: tl.constexpr, RP: tl.constexpr):
    """Places for `step_gradients`; without a gate those of x stand in."""
    x, gate, bm, cm, delta, dy, gx, ggate, gb, gc, gdelta = tensors
    s_x, s_gate, s_b, s_c, s_delta, s_dy, s_gx, s_gb, s_gc, s_gdelta = strides
    column, backwards, inner, outer = axis
    x_at = place(x, s_x, 0, b, w, column, backwards, inner, outer)
    gx_at = place(gx, s_gx, 0, b, w, column, backwards, inner, outer)
    z_at = x_at
    gz_at = gx_at
    if HAS_Z:
        z_at = place(gate, s_gate, 0, b, w, column, backwards, inner, outer)
        gz_at = place(ggate, s_gx, 0, b, w, column, backwards, inner, outer)
    row = part.to(tl.int64)
    low_part = share.to(tl.int64) * s_gdelta[4] if RP > 0 else 0
    return (
        x_at,
        z_at,
        place(bm, s_b, k * s_b[3] + group * s_b[4], b, w, column, backwards, inner, outer),
        place(cm, s_c, k * s_c[3] + group * s_c[4], b, w, column, backwards, inner, outer),
        place(delta, s_delta, k * s_delta[3], b, w, column, backwards, inner, outer),
        place(dy, s_dy, k * s_dy[3], b, w, column, backwards, inner, outer),
        gx_at,
        gz_at,
        place(gb, s_gb, k * s_gb[3] + group * s_gb[4] + row * s_gb[5], b, w, column, backwards, inner, outer),
        place(gc, s_gc, k * s_gc[3] + group * s_gc[4] + row * s_gc[5], b, w, column, backwards, inner, outer),
        place(gdelta, s_gdelta, k * s_gdelta[3] + low_part, b, w, column, backwards, inner, outer),
    )


@triton.jit
def store_pixel_sums(
    outs, sums, row, n, d, nb, tile_ok, d_ok, later, n_states, rank, one, WANT: tl.constexpr, RP: tl.constexpr
):
    """Adds dA, dD, dweight and dbias of one sweep to the program's own slices, whose channel rows begin at ``row``."""
    ga, gskip, gweight, gbias = outs
    if WANT & 16:
        offs = ((row + d) * n_states)[None, :] * one + n[:, None] * one
        add_to(lanes_last(ga, offs), sums[1], tile_ok, later, True)
    if WANT & 32:
        add_to(gskip + (row + d) * one, sums[2], d_ok & (nb == 0), later, True)
    if WANT & 64:
        offs_r = tl.arange(0, RP)
        offs = (row + d)[None, :] * (rank * one) + offs_r[:, None] * one
        add_to(lanes_last(gweight, offs), sums[4], (offs_r < rank)[:, None] & d_ok[None, :], later | (nb > 0), True)
    if WANT & 128:
        add_to(gbias + (row + d) * one, sums[3], d_ok, later | (nb > 0), True)


@triton.jit(do_not_specialize=[*GEOMETRY, "dirs", "n_dirs", "is_first", "n_tasks", "n_shares", "per_share"])
def scan_gradient_kernel(
    x, gate, dy, bm, cm, delta, weight, a, skip, bias, start, behind,
    gx, ggate, gdelta, gb, gc, ga, gskip, gweight, gbias, gstart, scratch,
    s_x, s_gate, s_dy, s_b, s_c, s_delta, s_start, s_behind, s_gx, s_gdelta, s_gb, s_gc, s_gstart,
    height, width, lines, length, orders, dirs, n_dirs, is_first, n_tasks, n_shares, per_share,
    K, channels, group_channels, n_states, rank, chunk, n_chunks, one,
    BN: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, SOFTPLUS: tl.constexpr, WANT: tl.constexpr,
    ACC: tl.constexpr, ALIGN_B: tl.constexpr, ALIGN_C: tl.constexpr,
):  # fmt: skip
    """All gradients of ``n_dirs`` directions (packed in ``dirs``), chunk by chunk.

    A program belongs to one share (``per_share`` channel blocks of one group) and takes every n-th (sequence, chunk)
    task. Sums over channels go to the share's own slice of ``gb``, ``gc`` and, with low rank, ``gdelta`` (first
    stride); sums over pixels to the program's own slice of ``ga``, ``gskip``, ``gweight``, ``gbias``: no atomics.
    ``behind`` is the adjoint state behind each chunk.
    """
    n_blocks = tl.cdiv(n_states, BN)
    groups = channels // group_channels
    share = tl.program_id(0) % (groups * n_shares)
    rep = tl.program_id(0) // (groups * n_shares)
    group = share // n_shares
    part = share % n_shares
    sweeps = n_dirs * per_share * n_blocks
    HAS_Z: tl.constexpr = gate is not None
    keep = scratch + tl.program_id(0).to(tl.int64) * (tl.cdiv(chunk, 4) * BN * BD)
    tile_offs = (tl.arange(0, BN)[:, None] * BD + tl.arange(0, BD)[None, :]) * one
    for work in range(0, tl.cdiv(n_tasks - rep, tl.num_programs(0) // (groups * n_shares)) * sweeps):
        task = rep + (work // sweeps) * (tl.num_programs(0) // (groups * n_shares))
        sweep = work % sweeps
        nb = sweep % n_blocks
        q = (sweep // n_blocks) % per_share
        k = (dirs >> (4 * (sweep // (n_blocks * per_share)))) & 15
        c = task % n_chunks
        b = (task // n_chunks // lines).to(tl.int64)
        w = ((task // n_chunks) % lines).to(tl.int64)
        local = (part * per_share + q) * BD + tl.arange(0, BD)
        d_ok = local < group_channels
        d = group * group_channels + local
        offs_d = d * one
        n = nb * BN + tl.arange(0, BN)
        n_ok = n < n_states
        tile_ok = n_ok[:, None] & d_ok[None, :]
        column, backwards, inner, outer = direction(orders, k, height, width, length)
        r = tl.where(backwards == 1, n_chunks - 1 - c, c)
        t0, t1 = chunk_bounds(r, backwards, n_chunks, chunk, length)
        ats = all_places(
            (x, gate, bm, cm, delta, dy, gx, ggate, gb, gc, gdelta),
            (s_x, s_gate, s_b, s_c, s_delta, s_dy, s_gx, s_gb, s_gc, s_gdelta),
            k, group, part, share, b, w, (column, backwards, inner, outer), HAS_Z, RP,
        )  # fmt: skip
        decay = load_decay(a, k, channels, n_states, n, d, tile_ok, one)
        bias_d, weight_rd = load_channel_constants(bias, weight, k, channels, rank, d, d_ok, one, BD, RP)
        skip_d = tl.zeros([BD], tl.float32)
        if skip is not None:
            skip_d += tl.load(skip + (k * channels + d) * one, mask=d_ok & (nb == 0), other=0.0)
        h = tl.zeros([BN, BD], tl.float32)
        if start is not None:
            h += tl.load(state_tile(start, s_start, b, w, k, r, n, d, one), mask=tile_ok, other=0.0)
        g = tl.zeros([BN, BD], tl.float32)
        if behind is not None:
            g += tl.load(state_tile(behind, s_behind, b, w, k, r, n, d, one), mask=tile_ok, other=0.0)

        tile = (decay, n, n_ok, offs_d, d_ok)
        constants = (rank, weight_rd, bias_d, skip_d)
        for t in range(t0, t1):
            if (t - t0) % 4 == 0:
                tl.store(lanes_last(keep + ((t - t0) // 4) * (BN * BD), tile_offs), h)
            step = load_step(ats, tile, constants, t, t1, inner, RP, SOFTPLUS, ALIGN_B)
            h = advance(h, decay, step)
        # The scratch is read back by other lanes than wrote it if the compiler lays the two accesses out differently.
        tl.debug_barrier()

        zero_d = tl.zeros([BD], tl.float32)
        sums = (g, tl.zeros([BN, BD], tl.float32), zero_d, zero_d, weight_rd * 0.0)
        again = (
            (sweep // (n_blocks * per_share) > 0) | (nb > 0) | (is_first == 0),
            (nb > 0) | ((q > 0) & (RP > 0)),
            q > 0,
        )
        for back in range(0, tl.cdiv(t1 - t0, 4)):
            quad = tl.cdiv(t1 - t0, 4) - 1 - back
            t = t0 + 4 * quad
            h0 = tl.load(lanes_last(keep + quad * (BN * BD), tile_offs))
            s0 = load_step(ats, tile, constants, t, t1, inner, RP, SOFTPLUS, ALIGN_B)
            s1 = load_step(ats, tile, constants, t + 1, t1, inner, RP, SOFTPLUS, ALIGN_B)
            s2 = load_step(ats, tile, constants, t + 2, t1, inner, RP, SOFTPLUS, ALIGN_B)
            s3 = load_step(ats, tile, constants, t + 3, t1, inner, RP, SOFTPLUS, ALIGN_B)
            h1 = advance(h0, decay, s0)
            h2 = advance(h1, decay, s1)
            h3 = advance(h2, decay, s2)
            sums = step_gradients(sums, h3, s3, ats, again, tile, constants,
                                  RP, SOFTPLUS, HAS_Z, WANT, ACC, ALIGN_B, ALIGN_C)  # fmt: skip
            sums = step_gradients(sums, h2, s2, ats, again, tile, constants,
                                  RP, SOFTPLUS, HAS_Z, WANT, ACC, ALIGN_B, ALIGN_C)  # fmt: skip
            sums = step_gradients(sums, h1, s1, ats, again, tile, constants,
                                  RP, SOFTPLUS, HAS_Z, WANT, ACC, ALIGN_B, ALIGN_C)  # fmt: skip
            sums = step_gradients(sums, h0, s0, ats, again, tile, constants,
                                  RP, SOFTPLUS, HAS_Z, WANT, ACC, ALIGN_B, ALIGN_C)  # fmt: skip

        row = (rep.to(tl.int64) * K + k) * channels
        store_pixel_sums(
            (ga, gskip, gweight, gbias),
            sums,
            row,
            n,
            d,
            nb,
            tile_ok,
            d_ok,
            work >= sweeps,
            n_states,
            rank,
            one,
            WANT,
            RP,
        )
        if gstart is not None:
            tl.store(state_tile(gstart, s_gstart, b, w, k, 0, n, d, one), sums[0], mask=tile_ok)
        tl.debug_barrier()
