"""Triton kernels of the selective scan: chunk states, their combination, output, gradients.

Shape legend: B batch, H height, W width, D channels, K directions, G groups, N states, R rank, L steps, T chunk length.

One warp owns a tile ``[BN states, BD channels]``. The states of a channel must live in one thread, because the sum over
states is taken at every step, and neighbouring channels in neighbouring lanes. Triton picks that layout if the memory
accesses of such a tile ask for it and none asks for wide vectors: see `lanes_last`.

A direction is only a way to turn step ``t`` into an address: ``t -> (t // inner, t % inner)`` in a reading order, with
strides that are swapped for columns and negated for reversed directions.
"""

# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false

import os

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The interpreter (CPU tests) and other vendors have no PTX; there the plain exp2 is taken.
USE_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1" and torch.version.hip is None)
# `one` must stay unknown to the compiler; the others would only multiply the number of compiled variants.
GEOMETRY = ["one", "height", "width", "lines", "length", "orders", "K", "rank", "chunk", "n_chunks"]


@triton.jit
def exp2(x):
    """2**x in one instruction (denormals flushed) where the inputs run on an NVIDIA GPU."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def lanes_last(ptr, offs):
    """Pointers to a tile whose second axis shall lie across the lanes, one element each.

    Triton orders a layout by contiguity and widens it by alignment. The hint claims the first; the second stays unknown
    because every offset is a multiple of the run-time ``one``, so that no wide access can come of a wrong claim.
    """
    return tl.max_contiguous(ptr + offs, [1, offs.shape[1]])


@triton.jit
def softplus(x):
    """log(1 + e**x), linear above 20, relative error about 1e-7 also for very negative x."""
    u = exp2(-tl.abs(x) * LOG2E)
    # log1p(u) = 2 atanh(u / (2 + u)); the series converges fast because the argument is at most 1/3.
    s = u / (2.0 + u)
    q = s * s
    p = 1.0 / 15.0 * q + 1.0 / 13.0
    p = p * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 0.2
    p = p * q + 1.0 / 3.0
    p = p * q + 1.0
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * p)


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x) without overflow."""
    u = exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0.0, 1.0, u) / (1.0 + u)


@triton.jit
def direction(orders, k, height, width, length):
    """Column and reversed flag of direction ``k`` (two bits each in ``orders``) and its inner and outer length."""
    bits = (orders >> (2 * k)) & 3
    column = bits & 1
    inner = tl.where(column == 1, height, width)
    return column, bits >> 1, inner, length // inner


@triton.jit
def place(ptr, strides, offset, b, w, column, backwards, inner, outer):
    """(pointer to step 0, outer stride, inner stride) of a tensor read along a direction, for `pixel`.

    ``strides`` = (batch, height, width, ...); ``offset`` selects direction and group; ``w`` is the sequence's place on
    the width axis of line scans, else 0.
    """
    step_out = tl.where(column == 1, strides[2], strides[1]).to(tl.int64)
    step_in = tl.where(column == 1, strides[1], strides[2]).to(tl.int64)
    last = (outer - 1) * step_out + (inner - 1) * step_in
    base = b * strides[0] + w * strides[2] + offset + tl.where(backwards == 1, last, 0)
    sign = (1 - 2 * backwards).to(tl.int64)
    return ptr + base, sign * step_out, sign * step_in


@triton.jit
def pixel(at, o, i):
    """Pointer to the step at outer position ``o`` and inner position ``i`` of a `place`."""
    return at[0] + o * at[1] + i * at[2]


@triton.jit
def chunk_bounds(r, backwards, n_chunks, chunk, length):
    """First and past-the-last step of the r-th chunk in reading order.

    Chunks are cut in pixel order, so that a direction and its reverse share them; the ragged one is read first there.
    """
    start = tl.where(backwards == 1, length - (n_chunks - r) * chunk, r * chunk)
    return tl.maximum(start, 0), tl.minimum(start + chunk, length)


@triton.jit
def load_row(ptr, offs, mask, ALIGN: tl.constexpr):
    """Values of one step shared by all channels, float32; ALIGN is the byte alignment the host has checked."""
    return tl.load(tl.multiple_of(ptr + offs, [ALIGN]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_raw_delta(ptr, ok, offs_d, d_ok, rank, weight, bias, RP: tl.constexpr):
    """Step size before softplus [BD], the bias included; formed from ``rank`` values when RP > 0."""
    if RP > 0:
        offs_r = tl.arange(0, RP)
        low = tl.load(ptr + offs_r, mask=(offs_r < rank) & ok, other=0.0).to(tl.float32)
        raw = tl.sum(weight * low[:, None], axis=0)
    else:
        raw = tl.load(ptr + offs_d, mask=d_ok & ok, other=0.0).to(tl.float32)
    return raw + bias


@triton.jit
def activate(raw, ok, SOFTPLUS: tl.constexpr):
    """Step size; 0 for steps outside the chunk, which then change no state."""
    dt = softplus(raw) if SOFTPLUS else raw
    return tl.where(ok, dt, 0.0)


@triton.jit
def load_channel_constants(bias_ptr, weight_ptr, k, channels, rank, d, d_ok, one, BD: tl.constexpr, RP: tl.constexpr):
    """Bias [BD] and low-rank weight [RP, BD] (a dummy when RP is 0) of one direction."""
    bias = tl.zeros([BD], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + (k * channels + d) * one, mask=d_ok, other=0.0)
    weight = bias
    if RP > 0:
        offs_r = tl.arange(0, RP)
        offs = (k * channels + d)[None, :] * (rank * one) + offs_r[:, None] * one
        weight = tl.load(lanes_last(weight_ptr, offs), mask=(offs_r < rank)[:, None] & d_ok[None, :], other=0.0).to(
            tl.float32
        )
    return bias, weight


@triton.jit
def load_decay(a_ptr, k, channels, states, n, d, tile_ok, one):
    """A * log2(e) as [BN, BD]."""
    offs = ((k * channels + d) * states)[None, :] * one + n[:, None] * one
    return tl.load(lanes_last(a_ptr, offs), mask=tile_ok, other=0.0) * LOG2E


@triton.jit
def state_tile(ptr, strides, b, w, k, r, n, d, one):
    """Pointers [BN, BD] into a state tensor with strides (batch, width, direction, chunk, state, channel)."""
    base = b * strides[0] + w * strides[1] + k * strides[2] + tl.cast(r, tl.int64) * strides[3]
    offs = n[:, None].to(tl.int64) * (strides[4] * one) + d[None, :].to(tl.int64) * (strides[5] * one)
    return lanes_last(ptr, base * one + offs)


@triton.jit(do_not_specialize=GEOMETRY)
def scan_chunk_kernel(
    value, gate, row, delta, weight, a, bias, states, decay_sum,
    s_value, s_gate, s_row, s_delta, s_states,
    height, width, lines, length, orders, K, channels, group_channels, n_states, rank, chunk, n_chunks, one,
    BN: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the state behind it (ADJOINT: to the adjoint state before it), starting from zero.

    value, row: x and B forward, the gradient of y and C for the adjoint. Writes ``states`` [.., chunk slot, N, D] and,
    from its first state block, ``decay_sum`` [.., chunk, D], the sum of the step sizes.
    """
    n_blocks = tl.cdiv(n_states, BN)
    blocks = tl.cdiv(group_channels, BD)
    groups = channels // group_channels
    pid = tl.program_id(0)
    nb = pid % n_blocks
    pid = pid // n_blocks
    db = pid % (blocks * groups)
    pid = pid // (blocks * groups)
    r = pid % n_chunks
    pid = pid // n_chunks
    k = pid % K
    b = (pid // K // lines).to(tl.int64)
    w = ((pid // K) % lines).to(tl.int64)
    group = db // blocks
    local = (db % blocks) * BD + tl.arange(0, BD)
    d_ok = local < group_channels
    d = group * group_channels + local
    offs_d = d * one
    n = nb * BN + tl.arange(0, BN)
    n_ok = n < n_states
    tile_ok = n_ok[:, None] & d_ok[None, :]

    column, backwards, inner, outer = direction(orders, k, height, width, length)
    t0, t1 = chunk_bounds(r, backwards, n_chunks, chunk, length)
    v_at = place(value, s_value, k * s_value[3], b, w, column, backwards, inner, outer)
    row_at = place(row, s_row, k * s_row[3] + group * s_row[4], b, w, column, backwards, inner, outer)
    delta_at = place(delta, s_delta, k * s_delta[3], b, w, column, backwards, inner, outer)
    if gate is not None:
        z_at = place(gate, s_gate, 0, b, w, column, backwards, inner, outer)

    decay = load_decay(a, k, channels, n_states, n, d, tile_ok, one)
    bias_d, weight_rd = load_channel_constants(bias, weight, k, channels, rank, d, d_ok, one, BD, RP)
    h = tl.zeros([BN, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    sign = -1 if ADJOINT else 1
    first = t1 - 1 if ADJOINT else t0
    o = first // inner
    i = first % inner
    for _ in range(t0, t1):
        raw = load_raw_delta(pixel(delta_at, o, i), True, offs_d, d_ok, rank, weight_rd, bias_d, RP)
        v = tl.load(pixel(v_at, o, i) + offs_d, mask=d_ok, other=0.0).to(tl.float32)
        m = load_row(pixel(row_at, o, i), n, n_ok, ALIGN)
        dt = activate(raw, True, SOFTPLUS)
        total += dt
        step = exp2(decay * dt[None, :])
        if ADJOINT:
            if gate is not None:
                g = tl.load(pixel(z_at, o, i) + offs_d, mask=d_ok, other=0.0).to(tl.float32)
                v *= g * sigmoid(g)
            h = step * (h + m[:, None] * v[None, :])
        else:
            h = step * h + m[:, None] * (dt * v)[None, :]
        i += sign
        wrap = (i == inner) | (i < 0)
        o += tl.where(wrap, sign, 0)
        i = tl.where(wrap, tl.where(i < 0, inner - 1, 0), i)

    slot = r if ADJOINT else r + 1
    tl.store(state_tile(states, s_states, b, w, k, slot, n, d, one), h, mask=tile_ok)
    if nb == 0:
        base = (((b * lines + w) * K + k) * n_chunks + r) * channels
        tl.store(decay_sum + base + offs_d, total, mask=d_ok)


@triton.jit
def _join(a0, h0, a1, h1):
    """Two neighbouring pieces of h -> a h + b as one."""
    return a1 * a0, a1 * h0 + h1


@triton.jit(do_not_specialize=["lines", "K", "n_chunks", "one"])
def scan_combine_kernel(
    states, decay_sum, a, border, last, s_border, s_last,
    lines, K, channels, n_states, n_chunks, one,
    BC: tl.constexpr, BE: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Turns the chunks' own contributions in ``states`` into true states, in place, BC chunks at a time.

    ``border`` (may be None: zero) is the state the sequence begins with; ``last`` (may be None) receives the one it
    ends with. ADJOINT runs from the last chunk to the first.
    """
    per = n_states * channels
    blocks = tl.cdiv(per, BE)
    pid = tl.program_id(0)
    e = (pid % blocks) * BE + tl.arange(0, BE)
    seq = (pid // blocks).to(tl.int64)
    k = seq % K
    b = seq // K // lines
    w = (seq // K) % lines
    ok = e < per
    n = e // channels
    d = e % channels
    decay = tl.load(a + ((k * channels + d) * n_states + n) * one, mask=ok, other=0.0) * LOG2E
    carry = tl.zeros([BE], tl.float32)
    if border is not None:
        offs = b * s_border[0] + w * s_border[1] + k * s_border[2] + n * (s_border[4] * one) + d * (s_border[5] * one)
        carry += tl.load(border + offs, mask=ok, other=0.0)
    base = states + seq * (n_chunks + 1) * per
    sums = decay_sum + seq * n_chunks * channels
    tl.store(base + (n_chunks * per if ADJOINT else 0) + e * one, carry, mask=ok)
    c = tl.arange(0, BC)
    for c0 in range(0, n_chunks, BC):
        r = (n_chunks - 1 - c0 - c) if ADJOINT else (c0 + c)
        live = (c0 + c < n_chunks)[:, None] & ok[None, :]
        slot = r if ADJOINT else r + 1
        ptrs = lanes_last(base, (slot.to(tl.int64)[:, None] * per + e[None, :]) * one)
        h = tl.load(ptrs, mask=live, other=0.0)
        s = tl.load(lanes_last(sums, (r.to(tl.int64)[:, None] * channels + d[None, :]) * one), mask=live, other=0.0)
        f, h = tl.associative_scan((exp2(s * decay[None, :]), h), 0, _join)
        h = f * carry[None, :] + h
        tl.store(ptrs, h, mask=live)
        carry = tl.sum(tl.where((c == BC - 1)[:, None], h, 0.0), axis=0)
    if last is not None:
        offs = b * s_last[0] + w * s_last[1] + k * s_last[2] + n * (s_last[4] * one) + d * (s_last[5] * one)
        tl.store(last + offs, carry, mask=ok)


@triton.jit(do_not_specialize=[*(g for g in GEOMETRY if g != "K"), "dirs", "n_dirs", "fan", "is_first", "is_last"])
def scan_output_kernel(
    x, gate, bm, cm, delta, weight, a, skip, bias, start, final, y,
    s_x, s_gate, s_b, s_c, s_delta, s_start, s_final, s_y,
    height, width, lines, length, orders, dirs, n_dirs, fan, is_first, is_last,
    channels, group_channels, n_states, rank, chunk, n_chunks, one,
    BN: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, SOFTPLUS: tl.constexpr, ACCUMULATE: tl.constexpr,
    ALIGN_B: tl.constexpr, ALIGN_C: tl.constexpr,
):  # fmt: skip
    """y of one chunk of pixels from the true start states: ``n_dirs`` directions and all state blocks one by one.

    With ACCUMULATE each sweep adds to what the one before wrote (y is then float32); ``is_first`` and ``is_last`` say
    whether launches came before or follow. ``fan`` programs take different directions of the packed list ``dirs``.
    """
    n_blocks = tl.cdiv(n_states, BN)
    blocks = tl.cdiv(group_channels, BD)
    groups = channels // group_channels
    pid = tl.program_id(0)
    db = pid % (blocks * groups)
    pid = pid // (blocks * groups)
    c = pid % n_chunks
    pid = pid // n_chunks
    share = pid % fan
    b = (pid // fan // lines).to(tl.int64)
    w = ((pid // fan) % lines).to(tl.int64)
    group = db // blocks
    local = (db % blocks) * BD + tl.arange(0, BD)
    d_ok = local < group_channels
    d = group * group_channels + local
    offs_d = d * one

    for sweep in range(0, n_dirs * n_blocks):
        k = (dirs >> (4 * (share * n_dirs + sweep // n_blocks))) & 15
        nb = sweep % n_blocks
        n = nb * BN + tl.arange(0, BN)
        n_ok = n < n_states
        tile_ok = n_ok[:, None] & d_ok[None, :]
        column, backwards, inner, outer = direction(orders, k, height, width, length)
        r = tl.where(backwards == 1, n_chunks - 1 - c, c)
        t0, t1 = chunk_bounds(r, backwards, n_chunks, chunk, length)
        x_at = place(x, s_x, 0, b, w, column, backwards, inner, outer)
        b_at = place(bm, s_b, k * s_b[3] + group * s_b[4], b, w, column, backwards, inner, outer)
        c_at = place(cm, s_c, k * s_c[3] + group * s_c[4], b, w, column, backwards, inner, outer)
        delta_at = place(delta, s_delta, k * s_delta[3], b, w, column, backwards, inner, outer)
        y_at = place(y, s_y, k * s_y[3], b, w, column, backwards, inner, outer)
        if gate is not None:
            z_at = place(gate, s_gate, 0, b, w, column, backwards, inner, outer)
        decay = load_decay(a, k, channels, n_states, n, d, tile_ok, one)
        bias_d, weight_rd = load_channel_constants(bias, weight, k, channels, rank, d, d_ok, one, BD, RP)
        skip_d = tl.zeros([BD], tl.float32)
        if skip is not None:
            skip_d += tl.load(skip + (k * channels + d) * one, mask=d_ok & (nb == 0), other=0.0)
        h = tl.zeros([BN, BD], tl.float32)
        if start is not None:
            h += tl.load(state_tile(start, s_start, b, w, k, r, n, d, one), mask=tile_ok, other=0.0)
        o = t0 // inner
        i = t0 % inner
        for _ in range(t0, t1):
            raw = load_raw_delta(pixel(delta_at, o, i), True, offs_d, d_ok, rank, weight_rd, bias_d, RP)
            v = tl.load(pixel(x_at, o, i) + offs_d, mask=d_ok, other=0.0).to(tl.float32)
            b_n = load_row(pixel(b_at, o, i), n, n_ok, ALIGN_B)
            c_n = load_row(pixel(c_at, o, i), n, n_ok, ALIGN_C)
            y_ptrs = pixel(y_at, o, i) + offs_d
            out = skip_d * v
            if ACCUMULATE:
                seen = (sweep > 0) | (is_first == 0)
                out += tl.load(y_ptrs, mask=d_ok & seen, other=0.0)
            dt = activate(raw, True, SOFTPLUS)
            h = exp2(decay * dt[None, :]) * h + b_n[:, None] * (dt * v)[None, :]
            out += tl.sum(h * c_n[:, None], axis=0)
            if gate is not None:
                g = tl.load(pixel(z_at, o, i) + offs_d, mask=d_ok, other=0.0).to(tl.float32)
                done = (sweep == n_dirs * n_blocks - 1) & (is_last == 1)
                out *= tl.where(done, g * sigmoid(g), 1.0)
            tl.store(y_ptrs, out.to(y.dtype.element_ty), mask=d_ok)
            i += 1
            wrap = i == inner
            o += tl.where(wrap, 1, 0)
            i = tl.where(wrap, 0, i)
        if final is not None:
            tl.store(state_tile(final, s_final, b, w, k, 0, n, d, one), h, mask=tile_ok)
        # The next sweep reads what this one wrote, possibly from other lanes.
        tl.debug_barrier()
