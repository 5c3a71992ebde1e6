"""Gluon twins of the forward kernels in `gpu_kernels`: the same results, with layouts written out.

A program owns a tile ``[BN states, BD channels]``, ``BD / W`` channels for each of its ``W`` warps; a lane holds ``SN``
neighbouring states of a few neighbouring channels. A block of ``TB`` steps at a time is staged in shared memory: the
step sizes (softplus, bias and the low-rank product done once for each element, every lane on another one), their
products with x, and the rows of B and C, all in float32, so that the loop over steps holds nothing but wide shared
loads and the recurrence itself.

Unlike `gpu_kernels`, all states are taken at once (at most BN), and every tensor must have one stride from pixel to
pixel (`s_*[1]`), as an image or a slice of its channels has: a step is then one number, its pixel.
"""

# Gluon's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import gpu_kernels as plain

RUNTIME = ["height", "width", "lines", "length", "orders", "rank", "chunk", "n_chunks"]
"""Sizes that would only multiply the number of compiled variants."""
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # renamed after Triton 3.6
chunk_bounds = gluon.jit(plain.chunk_bounds.fn)


@gluon.jit
def exp2(x):
    """2**x in one instruction, denormals flushed."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def log2(x):
    """log2(x) in one instruction, absolute error 1.6e-7 near 1."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    """1 / x in one instruction, to one unit in the last place."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softplus(x):
    """log(1 + e**x) to a relative error of about 2e-6, also for very negative x, where 1 + u would lose the digits."""
    u = exp2(-gl.abs(x) * LOG2E)
    series = u * (1.0 - u * (0.5 - u * (1.0 / 3.0 - u * 0.25)))
    return gl.maximum(x, 0.0) + gl.where(u < 0.05, series, LN2 * log2(1.0 + u))


@gluon.jit
def sigmoid(x):
    """1 / (1 + e**-x); the exponential may overflow to infinity, whose reciprocal is 0."""
    return reciprocal(1.0 + exp2(-x * LOG2E))


@gluon.jit
def softplus_slope(y):
    """Derivative of softplus where its value is ``y``: 1 - e**-y, without losing the digits of small ones."""
    series = y * (1.0 - y * (0.5 - y * (1.0 / 6.0 - y * (1.0 / 24.0))))
    return gl.where(y < 0.05, series, 1.0 - exp2(-y * LOG2E))


@gluon.constexpr_function
def state_layout(BN, BD, SN, W):
    """[BN, BD]: lanes over BN / SN groups of states, the others side by side along a warp's channels."""
    lanes = BN // SN
    return gl.BlockedLayout([SN, BD // W * lanes // 32], [lanes, 32 // lanes], [1, W], [1, 0])


@gluon.constexpr_function
def tile_layout(ROWS, COLUMNS, W):
    """[ROWS steps, COLUMNS] with up to eight neighbouring columns a lane: 16-byte loads of two-byte types."""
    each = max(1, ROWS * COLUMNS // (32 * W))
    wide = min(8, each, COLUMNS)
    across = min(32, COLUMNS // wide)
    return gl.BlockedLayout([max(1, each // wide), wide], [32 // across, across], [W, 1], [1, 0])


@gluon.jit
def buffer(ROWS: gl.constexpr, COLUMNS: gl.constexpr, DTYPE: gl.constexpr = gl.float32):
    """Shared memory [ROWS, COLUMNS]."""
    return gl.allocate_shared_memory(DTYPE, [ROWS, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def rows_of(shared, j, STEPS: gl.constexpr):
    """Rows ``STEPS * j`` to ``STEPS * (j + 1)`` of a `buffer`, laid end to end."""
    ROWS: gl.constexpr = shared.shape[0] // STEPS
    COLUMNS: gl.constexpr = shared.shape[1] * STEPS
    return shared._reinterpret(shared.dtype, [ROWS, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(j)


@gluon.jit
def along_states(shared, j, S: gl.constexpr):
    """Row ``j`` of a `buffer` [TB, BN] as [BN, 1]."""
    return rows_of(shared, j, 1).load(gl.SliceLayout(1, S))[:, None]


@gluon.jit
def along_channels(shared, j, S: gl.constexpr):
    """Row ``j`` of a `buffer` [TB, BD] as [1, BD]."""
    return rows_of(shared, j, 1).load(gl.SliceLayout(0, S))[None, :]


@gluon.jit
def stack4(a, b, c, d):
    """Four tensors [X] or [X, Y] as one with a last axis of 4."""
    both = gl.join(gl.join(a, c), gl.join(b, d))
    if len(a.shape) == 1:
        return gl.reshape(both, [a.shape[0], 4])
    else:
        return gl.reshape(both, [a.shape[0], a.shape[1], 4])


@gluon.jit
def direction(orders, k, height, width, length, w, t0, t1):
    """What `pixels` needs to know of direction ``k`` (two bits each in ``orders``: column, reversed) and a chunk."""
    bits = (orders >> (2 * k)) & 3
    return bits & 1, bits >> 1, height, width, length, w, t0, t1


@gluon.jit
def pixels(way, first, sign: gl.constexpr, TB: gl.constexpr, L: gl.constexpr):
    """Pixel index and validity of the ``TB`` steps first, first + sign, ... of a direction, each [TB].

    Step t is pixel t along rows and (t mod H) W + t div H along columns; a reversed direction starts from the end.
    """
    column, backwards, height, width, length, w, t0, t1 = way
    t = first + sign * gl.arange(0, TB, L)
    u = gl.where(backwards == 1, length - 1 - t, t)
    low = first - (TB - 1) if sign < 0 else first
    high = first if sign < 0 else first + (TB - 1)
    low = gl.maximum(gl.where(backwards == 1, length - 1 - high, low), 0)
    # One division of scalars; the steps of a block then wrap once, or, in tiny images, so few times that a float tells.
    outer = low // height
    q = low - outer * height + (u - low)
    wraps = gl.where(height >= TB, (q >= height).to(gl.int32), ((q + 0.5) / height.to(gl.float32)).to(gl.int32))
    p = gl.where(column == 1, (q - wraps * height) * width + outer + wraps + w, u)
    return p, (t >= t0) & (t < t1)


@gluon.jit
def wide(x, WIDE: gl.constexpr):
    """An index as it is multiplied by strides: 64 bits only where some tensor has that many elements."""
    return x.to(gl.int64) if WIDE else x


@gluon.jit
def tile_at(start, p, stride, offs, WIDE: gl.constexpr):
    """Offsets [TB, X] of the pixels ``p`` of a tensor whose sequence begins at ``start``."""
    return (start + wide(p, WIDE) * stride)[:, None] + offs[None, :]


@gluon.jit
def load_tile(ptr, start, p, p_ok, stride, offs, ok, WIDE: gl.constexpr):
    """[TB, X] as stored, 0 where not ok."""
    return gl.load(ptr + tile_at(start, p, stride, offs, WIDE), mask=p_ok[:, None] & ok[None, :], other=0.0)


@gluon.jit
def load_rows_at(ptr, start, stride, p, ok, count, X: gl.constexpr, L: gl.constexpr, ALIGN: gl.constexpr,
                 WIDE: gl.constexpr):  # fmt: skip
    """The first ``count`` values of B, C or the low-rank signal at the pixels ``p`` [TB, X], aligned to ALIGN bytes."""
    n = gl.arange(0, X, gl.SliceLayout(0, L))
    ptrs = gl.multiple_of(ptr + tile_at(start, p, stride, n, WIDE), [1, ALIGN])
    return gl.load(ptrs, mask=ok[:, None] & (n < count)[None, :], other=0.0)


@gluon.jit
def pixel_table(pixel_s, way, first, sign: gl.constexpr, W: gl.constexpr):
    """Fills pixel_s [steps of a chunk, 1] in the order in which they are taken; negative where there is none."""
    L: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [W, 1], [1, 0])
    p, ok = pixels(way, first, sign, pixel_s.shape[0], gl.SliceLayout(1, L))
    pixel_s.store(gl.where(ok, p, -1)[:, None])


@gluon.jit
def load_block(ptr, start, stride, pixel_s, block, channel, TB: gl.constexpr, T: gl.constexpr, WIDE: gl.constexpr):
    """A block of steps [TB, BD] of x, dy, delta or the gate as stored, 0 where there is none."""
    p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(1, T))
    return load_tile(ptr, start, p, p >= 0, stride, channel[0], channel[1], WIDE)


@gluon.jit
def load_block_rows(
    ptr, start, stride, pixel_s, block, count,
    TB: gl.constexpr, X: gl.constexpr, W: gl.constexpr, ALIGN: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """A block of rows [TB, X] of B, C or a low-rank signal as stored."""
    L: gl.constexpr = tile_layout(TB, X, W)
    p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(1, L))
    return load_rows_at(ptr, start, stride, p, p >= 0, count, X, L, ALIGN, WIDE)


@gluon.jit
def fetch_block(
    ptr, start, stride, pixel_s, block, first, end,
    TB: gl.constexpr, X: gl.constexpr, W: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Brings a block of steps [TB, X], from column ``first`` and below ``end``, into the second-level cache."""
    COLUMNS: gl.constexpr = X // 16 if X >= 16 else 1
    L: gl.constexpr = tile_layout(TB, COLUMNS, W)
    p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(1, L))
    column = gl.minimum(first + 16 * gl.arange(0, COLUMNS, gl.SliceLayout(0, L)), end - 1)
    ptrs = ptr + tile_at(start, gl.maximum(p, 0), stride, column, WIDE)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_steps(
    tensors, starts, strides, pixel_s, block, channel, n_states, rank,
    TB: gl.constexpr, BN: gl.constexpr, T: gl.constexpr, W: gl.constexpr, RP: gl.constexpr, ALIGN_B: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """x, delta (or its low-rank signal) and B of a block of steps; with these begin tensors, starts and strides."""
    x_t = load_block(tensors[0], starts[0], strides[0], pixel_s, block, channel, TB, T, WIDE)
    if RP > 0:
        delta_t = load_block_rows(tensors[1], starts[1], strides[1], pixel_s, block, rank, TB, RP, W, 1, WIDE)
    else:
        delta_t = load_block(tensors[1], starts[1], strides[1], pixel_s, block, channel, TB, T, WIDE)
    b_rows = load_block_rows(tensors[2], starts[2], strides[2], pixel_s, block, n_states, TB, BN, W, ALIGN_B, WIDE)
    return x_t, delta_t, b_rows


@gluon.jit
def weight_places(k, channels, rank, d0, limit, RP: gl.constexpr, BD: gl.constexpr, L: gl.constexpr):
    """Offsets and mask [RP, BD] of the weight (K, channels, rank) of the channels from ``d0`` below ``limit``."""
    r = gl.arange(0, RP, gl.SliceLayout(1, L))
    d = d0 + gl.arange(0, BD, gl.SliceLayout(0, L))
    return (k * channels + d)[None, :] * rank + r[:, None], (r < rank)[:, None] & (d < limit)[None, :]


@gluon.jit
def low_rank_product(low_s, weight_s, bias, rank, L: gl.constexpr):
    """Step sizes before softplus [TB, BD], bias included."""
    TB: gl.constexpr = low_s.shape[1]
    BD: gl.constexpr = weight_s.shape[1]
    raw = gl.zeros([TB, BD], gl.float32, L) + bias[None, :]
    for r in range(0, rank):
        raw += along_states(low_s, r, L) * along_channels(weight_s, r, L)
    return raw


@gluon.jit
def channel_vector(ptr, offs, ok):
    """[BD] constants of one direction, 0 if there are none."""
    out = offs.to(gl.float32) * 0.0
    if ptr is not None:
        out = gl.load(ptr + offs, mask=ok, other=0.0).to(gl.float32)
    return out


@gluon.jit
def state_tile(ptr, strides, b, w, k, r, n, d):
    """Pointers [BN, BD] into a state tensor with strides (batch, width, direction, chunk, state, channel)."""
    start = gl.cast(b, gl.int64) * strides[0] + gl.cast(w, gl.int64) * strides[1] + gl.cast(r, gl.int64) * strides[3]
    return ptr + start + k * strides[2] + (n[:, None] * strides[4] + d[None, :] * strides[5])


@gluon.jit(do_not_specialize=[*RUNTIME, "K"])
def scan_chunk_kernel(
    value, gate, row, delta, weight, a, bias, states, decay_sum,
    s_value, s_gate, s_row, s_delta, s_states,
    height, width, lines, length, orders, K, channels, group_channels, n_states, rank, chunk, n_chunks,
    BN: gl.constexpr, BD: gl.constexpr, RP: gl.constexpr, SOFTPLUS: gl.constexpr, ADJOINT: gl.constexpr,
    ALIGN: gl.constexpr, SN: gl.constexpr, TB: gl.constexpr, CHUNK: gl.constexpr, W: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """See `gpu_kernels.scan_chunk_kernel`; at most CHUNK steps a chunk; strides (batch, pixel, direction, group)."""
    blocks = gl.cdiv(group_channels, BD)
    groups = channels // group_channels
    pid = gl.program_id(0)
    db = pid % (blocks * groups)
    pid = pid // (blocks * groups)
    r = pid % n_chunks
    pid = pid // n_chunks
    k = pid % K
    b = wide(pid // K // lines, WIDE)
    w = (pid // K) % lines
    group = db // blocks
    S: gl.constexpr = state_layout(BN, BD, SN, W)
    T: gl.constexpr = tile_layout(TB, BD, W)
    d0 = group * group_channels + (db % blocks) * BD
    limit = (group + 1) * group_channels
    d = d0 + gl.arange(0, BD, gl.SliceLayout(0, T))
    d_ok = d < limit
    ds = d0 + gl.arange(0, BD, gl.SliceLayout(0, S))
    n = gl.arange(0, BN, gl.SliceLayout(1, S))
    tile_ok = (n < n_states)[:, None] & (ds < limit)[None, :]
    t0, t1 = chunk_bounds(r, (orders >> (2 * k + 1)) & 1, n_chunks, chunk, length)
    way = direction(orders, k, height, width, length, w, t0, t1)
    value_at = b * s_value[0] + k * s_value[2]
    row_at = b * s_row[0] + k * s_row[2] + group * s_row[3]
    delta_at = b * s_delta[0] + k * s_delta[2]

    decay = gl.load(a + (k * channels + ds)[None, :] * n_states + n[:, None], mask=tile_ok, other=0.0) * LOG2E
    bias_d = channel_vector(bias, k * channels + d, d_ok)
    dt_s = buffer(TB, BD)
    v_s = buffer(TB, BD)
    row_s = buffer(TB, BN)
    pixel_s = buffer(CHUNK, 1, gl.int32)
    if RP > 0:
        low_s = buffer(RP, TB)
        weight_s = buffer(RP, BD)
        L: gl.constexpr = tile_layout(RP, BD, W)
        offs, ok = weight_places(k, channels, rank, d0, limit, RP, BD, L)
        weight_s.store(gl.load(weight + offs, mask=ok, other=0.0).to(gl.float32))

    h = gl.zeros([BN, BD], gl.float32, S)
    total = gl.zeros([TB, BD], gl.float32, T)
    channel = (d, d_ok)
    pixel_table(pixel_s, way, t1 - 1 if ADJOINT else t0, -1 if ADJOINT else 1, W)
    # The next block is on its way while one is worked on.
    v, raw, rows = load_steps(
        (value, delta, row), (value_at, delta_at, row_at), (s_value[1], s_delta[1], s_row[1]), pixel_s, 0, channel,
        n_states, rank, TB, BN, T, W, RP, ALIGN, WIDE,
    )  # fmt: skip
    n_blocks = gl.cdiv(t1 - t0, TB)
    for block in range(0, n_blocks):
        if RP > 0:
            low_s.permute((1, 0)).store(raw.to(gl.float32))
            barrier()
            steps = low_rank_product(low_s, weight_s, bias_d, rank, T)
        else:
            steps = raw.to(gl.float32) + bias_d[None, :]
        row_s.store(rows.to(gl.float32))
        u = v.to(gl.float32)
        p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(1, T))
        dt = gl.where((p >= 0)[:, None], softplus(steps) if SOFTPLUS else steps, 0.0)
        total += dt
        if ADJOINT:
            if gate is not None:
                z = load_block(gate, b * s_gate[0], s_gate[1], pixel_s, block, channel, TB, T, WIDE).to(gl.float32)
                u *= z * sigmoid(z)
        else:
            u *= dt
        dt_s.store(dt)
        v_s.store(u)
        v, raw, rows = load_steps(
            (value, delta, row), (value_at, delta_at, row_at), (s_value[1], s_delta[1], s_row[1]), pixel_s,
            gl.minimum(block + 1, n_blocks - 1), channel, n_states, rank, TB, BN, T, W, RP, ALIGN, WIDE,
        )  # fmt: skip
        barrier()  # once, instead of at the first load of every step
        for quad in range(0, TB // 4):
            for i in gl.static_range(4):
                j = 4 * quad + i
                step = exp2(decay * along_channels(dt_s, j, S))
                add = along_states(row_s, j, S) * along_channels(v_s, j, S)
                h = step * (h + add) if ADJOINT else step * h + add

    slot = r if ADJOINT else r + 1
    gl.store(state_tile(states, s_states, b, w, k, slot, n, ds), h, mask=tile_ok)
    base = (((gl.cast(b, gl.int64) * lines + w) * K + k) * n_chunks + r) * channels
    gl.store(decay_sum + base + d, gl.sum(total, axis=0), mask=d_ok)


@gluon.jit(do_not_specialize=[*RUNTIME, "dirs", "n_dirs", "fan", "is_first", "is_last"])
def scan_output_kernel(
    x, gate, bm, cm, delta, weight, a, skip, bias, start, final, y, out,
    s_x, s_gate, s_b, s_c, s_delta, s_start, s_final, s_y,
    height, width, lines, length, orders, dirs, n_dirs, fan, is_first, is_last,
    channels, group_channels, n_states, rank, chunk, n_chunks,
    BN: gl.constexpr, BD: gl.constexpr, RP: gl.constexpr, SOFTPLUS: gl.constexpr, ACCUMULATE: gl.constexpr,
    ALIGN_B: gl.constexpr, ALIGN_C: gl.constexpr, SN: gl.constexpr, TB: gl.constexpr, CHUNK: gl.constexpr,
    W: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """See `gpu_kernels.scan_output_kernel`; strides are (batch, pixel, direction, group).

    With ACCUMULATE the sweeps add up in ``y`` (float32), and the last one writes ``out`` instead, in its dtype.
    """
    blocks = gl.cdiv(group_channels, BD)
    groups = channels // group_channels
    pid = gl.program_id(0)
    db = pid % (blocks * groups)
    pid = pid // (blocks * groups)
    c = pid % n_chunks
    pid = pid // n_chunks
    share = pid % fan
    b = wide(pid // fan // lines, WIDE)
    w = (pid // fan) % lines
    group = db // blocks
    S: gl.constexpr = state_layout(BN, BD, SN, W)
    T: gl.constexpr = tile_layout(TB, BD, W)
    d0 = group * group_channels + (db % blocks) * BD
    limit = (group + 1) * group_channels
    d = d0 + gl.arange(0, BD, gl.SliceLayout(0, T))
    d_ok = d < limit
    ds = d0 + gl.arange(0, BD, gl.SliceLayout(0, S))
    n = gl.arange(0, BN, gl.SliceLayout(1, S))
    tile_ok = (n < n_states)[:, None] & (ds < limit)[None, :]
    dt_s = buffer(TB, BD)
    v_s = buffer(TB, BD)
    y_s = buffer(TB, BD)
    b_s = buffer(TB, BN)
    c_s = buffer(TB, BN)
    pixel_s = buffer(CHUNK, 1, gl.int32)
    channel = (d, d_ok)
    if RP > 0:
        low_s = buffer(RP, TB)
        weight_s = buffer(RP, BD)

    for sweep in range(0, n_dirs):
        k = (dirs >> (4 * (share * n_dirs + sweep))) & 15
        backwards = (orders >> (2 * k + 1)) & 1
        r = gl.where(backwards == 1, n_chunks - 1 - c, c)
        t0, t1 = chunk_bounds(r, backwards, n_chunks, chunk, length)
        way = direction(orders, k, height, width, length, w, t0, t1)
        b_at = b * s_b[0] + k * s_b[2] + group * s_b[3]
        c_at = b * s_c[0] + k * s_c[2] + group * s_c[3]
        delta_at = b * s_delta[0] + k * s_delta[2]
        decay = gl.load(a + (k * channels + ds)[None, :] * n_states + n[:, None], mask=tile_ok, other=0.0) * LOG2E
        bias_d = channel_vector(bias, k * channels + d, d_ok)
        skip_d = channel_vector(skip, k * channels + d, d_ok)
        if RP > 0:
            L: gl.constexpr = tile_layout(RP, BD, W)
            offs, ok = weight_places(k, channels, rank, d0, limit, RP, BD, L)
            weight_s.store(gl.load(weight + offs, mask=ok, other=0.0).to(gl.float32))
        h = gl.zeros([BN, BD], gl.float32, S)
        if start is not None:
            h = gl.load(state_tile(start, s_start, b, w, k, r, n, ds), mask=tile_ok, other=0.0)
        ends = (sweep == n_dirs - 1) & (is_last == 1)
        pixel_table(pixel_s, way, t0, 1, W)
        n_blocks = gl.cdiv(t1 - t0, TB)
        for block in range(0, n_blocks):
            # All loads first: the block waits for memory once.
            v = load_block(x, b * s_x[0], s_x[1], pixel_s, block, channel, TB, T, WIDE)
            b_rows = load_block_rows(bm, b_at, s_b[1], pixel_s, block, n_states, TB, BN, W, ALIGN_B, WIDE)
            c_rows = load_block_rows(cm, c_at, s_c[1], pixel_s, block, n_states, TB, BN, W, ALIGN_C, WIDE)
            p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(1, T))
            p_ok = p >= 0
            place = tile_at(b * s_y[0] + k * s_y[2], p, s_y[1], d, WIDE)
            y_ok = p_ok[:, None] & d_ok[None, :]
            total = gl.zeros([TB, BD], gl.float32, T)
            if ACCUMULATE:
                total = gl.load(y + place, mask=y_ok & ((sweep > 0) | (is_first == 0)), other=0.0)
            if RP > 0:
                low = load_block_rows(delta, delta_at, s_delta[1], pixel_s, block, rank, TB, RP, W, 1, WIDE)
                low_s.permute((1, 0)).store(low.to(gl.float32))
                barrier()
                raw = low_rank_product(low_s, weight_s, bias_d, rank, T)
            else:
                raw = load_tile(delta, delta_at, p, p_ok, s_delta[1], d, d_ok, WIDE).to(gl.float32) + bias_d[None, :]
            b_s.store(b_rows.to(gl.float32))
            c_s.store(c_rows.to(gl.float32))
            v = v.to(gl.float32)
            dt = gl.where(p_ok[:, None], softplus(raw) if SOFTPLUS else raw, 0.0)
            dt_s.store(dt)
            v_s.store(v * dt)
            total += skip_d[None, :] * v
            # There are no registers for reading the next block ahead: it only comes nearer.
            coming = gl.minimum(block + 1, n_blocks - 1)
            fetch_block(x, b * s_x[0], s_x[1], pixel_s, coming, d0, limit, TB, BD, W, WIDE)
            if RP > 0:
                fetch_block(delta, delta_at, s_delta[1], pixel_s, coming, 0, rank, TB, RP, W, WIDE)
            else:
                fetch_block(delta, delta_at, s_delta[1], pixel_s, coming, d0, limit, TB, BD, W, WIDE)
            fetch_block(bm, b_at, s_b[1], pixel_s, coming, 0, n_states, TB, BN, W, WIDE)
            fetch_block(cm, c_at, s_c[1], pixel_s, coming, 0, n_states, TB, BN, W, WIDE)
            barrier()
            for quad in range(0, TB // 4):
                found = ()
                for i in gl.static_range(4):
                    j = 4 * quad + i
                    h = exp2(decay * along_channels(dt_s, j, S)) * h
                    h += along_states(b_s, j, S) * along_channels(v_s, j, S)
                    found = found + (gl.sum(h * along_states(c_s, j, S), axis=0),)  # noqa: RUF005 (no * in kernels)
                four = gl.permute(stack4(found[0], found[1], found[2], found[3]), (1, 0))
                rows_of(y_s, quad, 4).store(gl.reshape(four, [4 * BD]))
            total += y_s.load(T)
            if gate is not None:
                z = load_tile(gate, b * s_gate[0], p, p_ok, s_gate[1], d, d_ok, WIDE).to(gl.float32)
                total *= gl.where(ends, z * sigmoid(z), 1.0)
            if ACCUMULATE:
                gl.store(y + place, total, mask=y_ok & (not ends))
            gl.store(out + place, total.to(out.dtype.element_ty), mask=y_ok & ends if ACCUMULATE else y_ok)
        if final is not None:
            gl.store(state_tile(final, s_final, b, w, k, 0, n, ds), h, mask=tile_ok)
        barrier()  # the next sweep reads what this one wrote, possibly from other lanes
