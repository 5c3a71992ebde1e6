"""Triton kernels of SSD, forward: decays of the chunks, states between chunks, outputs.

Shape legend: S sequences, L length, K directions, E heads, P head_dim, G groups, N states, T chunk length, Q chunks.

Chunks are cut in pixel order, so a direction and its reverse share their pixels: what a reversed direction changes is
the triangle of the [T, T] matrix and the side from which decays are summed, never an address. Strides of the large
tensors come as (batch, line, outer, inner, head or group, direction); position t lies at (t // inner, t % inner).

The operands of a product have the dtype CT: bfloat16 for bfloat16 inputs, else float32, multiplied with the input
precision PREC ("tf32x3" keeps float32 accuracy; "tf32" is exact for float16 values and has float32's range).
"""

# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..selective_scan.gpu_kernels import LOG2E, exp2, softplus

GEOMETRY = ["lines", "length", "inner", "n_chunks", "dirs", "n_dirs", "K"]
"""Arguments whose value must not multiply the compiled variants."""


@triton.jit
def direction(dirs, i):
    """Index and reversed flag of the i-th direction of a launch (four bits each in ``dirs``)."""
    code = (dirs >> (4 * i)) & 15
    return code >> 1, code & 1


@triton.jit
def positions(strides, s, lines, t, inner):
    """Offsets [T] of the positions t of sequence s."""
    base = (s // lines) * strides[0] + (s % lines) * strides[1]
    return base + (t // inner).to(tl.int64) * strides[2] + (t % inner).to(tl.int64) * strides[3]


@triton.jit
def load_rows(ptr, rows, columns, rows_ok, columns_ok, ALIGN: tl.constexpr, CT: tl.constexpr):
    """Tile [T, columns] in CT; ALIGN is the byte alignment of the rows that the host has checked."""
    ptrs = tl.multiple_of(ptr + (rows[:, None] + columns[None, :]), [1, ALIGN])
    return tl.load(ptrs, mask=rows_ok[:, None] & columns_ok[None, :], other=0.0).to(CT)


@triton.jit
def load_state(ptr, p, n, head_dim, n_states, CT: tl.constexpr):
    """Tile [BP, BN] of one state (P, N)."""
    ok = (p < head_dim)[:, None] & (n < n_states)[None, :]
    return tl.load(ptr + (p[:, None] * n_states + n[None, :]), mask=ok, other=0.0).to(CT)


@triton.jit
def slot(s, k, e, c, K, heads, count):
    """Index of (sequence, direction, head, c) in an array (S, K, E, count, ...)."""
    return ((s * K + k) * heads + e) * count + c


@triton.jit
def in_reading_order(T: tl.constexpr, backwards):
    """Places [T] of a chunk as they are read (a reversed tl.cumsum is wrong in Triton 3.6 where warps repeat rows)."""
    i = tl.arange(0, T)
    return tl.where(backwards == 1, T - 1 - i, i)


@triton.jit
def load_decays(steps, decays, at, T: tl.constexpr, backwards, CT: tl.constexpr):
    """Step sizes [T]; summed log2 decays [T] up to each position; their sum and those from each to the chunk's end.

    Sums up to a position are pairs of float32; with half-precision products (CT) the second of a pair is left out.
    """
    i = tl.arange(0, T)
    last = tl.where(backwards == 1, 0, T - 1)
    total = tl.load(decays + 2 * at * T + last)
    high = tl.load(decays + 2 * at * T + i)
    low = high
    to_end = total - high
    if CT == tl.float32:  # noqa: SIM300
        low = tl.load(decays + (2 * at + 1) * T + i)
        to_end += tl.load(decays + (2 * at + 1) * T + last) - low
    return tl.load(steps + at * T + i), (high, low), (total, to_end)


@triton.jit
def decay_between(decay, later: tl.constexpr, CT: tl.constexpr):
    """[T, T] log2 decay from one position to another; ``later``: the axis of the position that is read later.

    A small difference of two large sums needs the digits that one float32 loses.
    """
    between = tl.expand_dims(decay[0], 1 - later) - tl.expand_dims(decay[0], later)
    if CT == tl.float32:  # noqa: SIM300
        between += tl.expand_dims(decay[1], 1 - later) - tl.expand_dims(decay[1], later)
    return between


@triton.jit(do_not_specialize=GEOMETRY)
def ssd_decay_kernel(
    dt, a, bias, steps, decays, s_dt,
    lines, length, inner, n_chunks, dirs, n_dirs, K, heads,
    T: tl.constexpr, BE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Step sizes and, summed from the chunk's first position read to each position, log2 of the decays.

    steps (S, K, E, Q, T), decays (S, K, E, Q, 2, T), each sum as two float32. Positions past the end get a step of
    zero, which changes no state.
    """
    blocks = tl.cdiv(heads, BE)
    pid = tl.program_id(0)
    e = (pid % blocks) * BE + tl.arange(0, BE)
    pid = pid // blocks
    k, backwards = direction(dirs, pid % n_dirs)
    c = (pid // n_dirs) % n_chunks
    s = (pid // n_dirs // n_chunks).to(tl.int64)
    i = in_reading_order(T, backwards)
    t = c * T + i
    e_ok = e < heads
    ok = (t < length)[:, None] & e_ok[None, :]
    rows = positions(s_dt, s, lines, t, inner) + k * s_dt[5]
    raw = tl.load(dt + (rows[:, None] + e[None, :] * s_dt[4]), mask=ok, other=0.0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias + k * heads + e, mask=e_ok, other=0.0)[None, :]
    step = tl.where(ok, softplus(raw) if SOFTPLUS else raw, 0.0)
    logs = step * (tl.load(a + k * heads + e, mask=e_ok, other=0.0) * LOG2E)[None, :]
    out = slot(s, k, e, c, K, heads, n_chunks)[None, :] * T + i[:, None]
    tl.store(steps + out, step, mask=e_ok[None, :])
    sums = tl.cumsum(logs.to(tl.float64), 0)
    high = sums.to(tl.float32)
    pair = slot(s, k, e, c, K, heads, n_chunks)[None, :] * (2 * T) + i[:, None]
    tl.store(decays + pair, high, mask=e_ok[None, :])
    tl.store(decays + pair + T, (sums - high.to(tl.float64)).to(tl.float32), mask=e_ok[None, :])


@triton.jit(do_not_specialize=[*GEOMETRY, "n_segments", "per_segment"])
def ssd_state_kernel(
    value, row, steps, decays, start, states, ends, totals, s_value, s_row,
    lines, length, inner, n_chunks, dirs, n_dirs, K, n_segments, per_segment,
    heads, groups, head_dim, n_states,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
    ADJOINT: tl.constexpr, ALIGN_V: tl.constexpr, ALIGN_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walks the chunks of one segment with the state [BP, BN] in registers.

    value, row: x and B forward; the gradient of y and C for the adjoint, which walks from the last position read.
    ``start`` (S, K, E, segments, P, N) or None for zero. Writes the state before every chunk to ``states``
    (S, K, E, Q, P, N), the state at the end to ``ends`` and the summed log2 decays to ``totals``, each unless None.
    """
    blocks_p = tl.cdiv(head_dim, BP)
    blocks_n = tl.cdiv(n_states, BN)
    pid = tl.program_id(0)
    p = (pid % blocks_p) * BP + tl.arange(0, BP)
    pid = pid // blocks_p
    n = (pid % blocks_n) * BN + tl.arange(0, BN)
    pid = pid // blocks_n
    e = (pid % heads).to(tl.int64)
    pid = pid // heads
    segment = pid % n_segments
    pid = pid // n_segments
    k, backwards = direction(dirs, pid % n_dirs)
    s = (pid // n_dirs).to(tl.int64)
    p_ok = p < head_dim
    n_ok = n < n_states
    tile = p[:, None] * n_states + n[None, :]
    tile_ok = p_ok[:, None] & n_ok[None, :]
    size = head_dim * n_states
    from_end = (backwards == 0) if ADJOINT else (backwards == 1)

    here = slot(s, k, e, segment, K, heads, n_segments)
    h = tl.zeros([BP, BN], tl.float32)
    if start is not None:
        h += tl.load(start + here * size + tile, mask=tile_ok, other=0.0)
    total = 0.0
    v_at = value + e * s_value[4] + k * s_value[5]
    row_at = row + (e // (heads // groups)) * s_row[4] + k * s_row[5]
    first = segment * per_segment
    for r in tl.range(first, tl.minimum(first + per_segment, n_chunks), num_stages=STAGES):
        c = tl.where(from_end, n_chunks - 1 - r, r)
        at = slot(s, k, e, c, K, heads, n_chunks)
        t = c * T + tl.arange(0, T)
        ok = t < length
        v = load_rows(v_at, positions(s_value, s, lines, t, inner), p, ok, p_ok, ALIGN_V, CT)
        m = load_rows(row_at, positions(s_row, s, lines, t, inner), n, ok, n_ok, ALIGN_R, CT)
        step, decay, end = load_decays(steps, decays, at, T, backwards, CT)
        if states is not None:
            tl.store(states + at * size + tile, h.to(states.dtype.element_ty), mask=tile_ok)
        weight = exp2(decay[0]) if ADJOINT else exp2(end[1]) * step
        weighted = (v.to(tl.float32) * weight[:, None]).to(CT)
        h = tl.dot(tl.trans(weighted), m, h * exp2(end[0]), input_precision=PREC)
        total += end[0]
    if ends is not None:
        tl.store(ends + here * size + tile, h, mask=tile_ok)
    if totals is not None:
        tl.store(totals + here, total)


@triton.jit(do_not_specialize=["n_segments", "dirs", "n_dirs", "K"])
def ssd_combine_kernel(start, ends, totals, final, dirs, n_dirs, K, n_segments, heads, size, BLOCK: tl.constexpr):
    """Chains segments: replaces what each adds from zero (``ends``) by the state before it; writes the final state."""
    blocks = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = offs < size
    pid = pid // blocks
    e = pid % heads
    k, backwards = direction(dirs, (pid // heads) % n_dirs)  # noqa: RUF059
    s = (pid // heads // n_dirs).to(tl.int64)
    whole = slot(s, k, e, 0, K, heads, 1)
    h = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        h += tl.load(start + whole * size + offs, mask=ok, other=0.0)
    for segment in range(0, n_segments):
        at = whole * n_segments + segment
        end = tl.load(ends + at * size + offs, mask=ok, other=0.0)
        tl.store(ends + at * size + offs, h, mask=ok)
        h = h * exp2(tl.load(totals + at)) + end
    if final is not None:
        tl.store(final + whole * size + offs, h, mask=ok)


@triton.jit
def triangle(T: tl.constexpr, backwards, strict, TRANSPOSED: tl.constexpr):
    """[T, T] mask of the pairs (i, j) where the output at i reads the input at j; TRANSPOSED as (j, i)."""
    a = tl.arange(0, T)[:, None]
    b = tl.arange(0, T)[None, :]
    ahead = (b - a) if TRANSPOSED else (a - b)
    return tl.where(backwards == 1, -ahead >= strict, ahead >= 0)


@triton.jit(do_not_specialize=[*(g for g in GEOMETRY if g != "n_dirs"), "fan", "strict"])
def ssd_output_kernel(
    x, bm, cm, steps, decays, skip, states, earlier, y, s_x, s_b, s_c, s_y,
    lines, length, inner, n_chunks, dirs, fan, K, strict,
    heads, groups, head_dim, n_states,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
    DIRS: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_B: tl.constexpr, ALIGN_C: tl.constexpr,
):  # fmt: skip
    """y of one chunk and head from the states before it.

    Sums DIRS directions; ``fan`` programs take different ones of the list ``dirs``. ``earlier``, unless None, holds the
    float32 sum of the directions of an earlier launch.
    """
    blocks_p = tl.cdiv(head_dim, BP)
    pid = tl.program_id(0)
    p = (pid % blocks_p) * BP + tl.arange(0, BP)
    pid = pid // blocks_p
    e = (pid % heads).to(tl.int64)
    pid = pid // heads
    share = pid % fan
    c = (pid // fan) % n_chunks
    s = (pid // fan // n_chunks).to(tl.int64)
    g = e // (heads // groups)
    p_ok = p < head_dim
    t = c * T + tl.arange(0, T)
    ok = t < length
    xt = load_rows(x + e * s_x[4], positions(s_x, s, lines, t, inner), p, ok, p_ok, ALIGN_X, CT)
    y_at = y + e * s_y[4]
    total = tl.zeros([T, BP], tl.float32)
    for d in tl.static_range(DIRS):
        k, backwards = direction(dirs, share * DIRS + d)
        if d == 0:
            y_at += k * s_y[5]
        at = slot(s, k, e, c, K, heads, n_chunks)
        step, decay, end = load_decays(steps, decays, at, T, backwards, CT)  # noqa: RUF059
        rows_b = positions(s_b, s, lines, t, inner) + g * s_b[4] + k * s_b[5]
        rows_c = positions(s_c, s, lines, t, inner) + g * s_c[4] + k * s_c[5]
        before = tl.zeros([T, BP], tl.float32)
        products = tl.zeros([T, T], tl.float32)
        for block in tl.static_range(NB):
            n = block * BN + tl.arange(0, BN)
            n_ok = n < n_states
            b = load_rows(bm, rows_b, n, ok, n_ok, ALIGN_B, CT)
            ct = load_rows(cm, rows_c, n, ok, n_ok, ALIGN_C, CT)
            h = load_state(states + at * head_dim * n_states, p, n, head_dim, n_states, CT)
            products = tl.dot(ct, tl.trans(b), products, input_precision=PREC)
            before = tl.dot(ct, tl.trans(h), before, input_precision=PREC)
        mask = triangle(T, backwards, strict, False)
        mixing = products * exp2(tl.where(mask, decay_between(decay, 0, CT), float("-inf"))) * step[None, :]
        total += before * exp2(decay[0])[:, None]
        total = tl.dot(mixing.to(CT), xt, total, input_precision=PREC)
        if skip is not None:
            total += tl.load(skip + k * heads + e) * xt.to(tl.float32)
    out = positions(s_y, s, lines, t, inner)[:, None] + p[None, :]
    live = ok[:, None] & p_ok[None, :]
    if earlier is not None:
        total += tl.load(earlier + e * s_y[4] + out, mask=live, other=0.0)
    tl.store(y_at + out, total.to(y.dtype.element_ty), mask=live)
