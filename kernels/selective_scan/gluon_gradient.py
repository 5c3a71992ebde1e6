"""Gluon twin of the gradient kernel in `gpu_gradient`: the same results (formulas there).

A program first runs forward through its chunk and keeps the state before every block of ``TB`` steps in shared memory.
Then it takes four steps at a time from the end: their states are recomputed in registers, and every sum over states or
channels is taken within the lanes first, for the four steps at once through shared memory after that, so that no step
waits for an exchange between lanes.
"""

# Gluon's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_kernels import (
    LN2,
    LOG2E,
    RUNTIME,
    along_channels,
    along_states,
    barrier,
    buffer,
    channel_vector,
    chunk_bounds,
    direction,
    exp2,
    fetch_block,
    load_block,
    load_block_rows,
    load_steps,
    low_rank_product,
    pixel_table,
    rows_of,
    scan_chunk_kernel,
    scan_output_kernel,
    sigmoid,
    softplus,
    softplus_slope,
    stack4,
    state_layout,
    state_tile,
    tile_at,
    tile_layout,
    weight_places,
    wide,
)

__all__ = ["scan_chunk_kernel", "scan_gradient_kernel", "scan_output_kernel"]


@gluon.jit
def add_to(ptrs, value, mask, again, ACCUMULATE: gl.constexpr):
    """Stores ``value``, added to what is there where ``again``."""
    if ACCUMULATE:
        value += gl.load(ptrs, mask=mask & again, other=0.0)
    gl.store(ptrs, value.to(ptrs.dtype.element_ty), mask=mask)


@gluon.jit
def advance(h, decay, j, dt_s, v_s, b_s, S: gl.constexpr):
    """The state after step ``j`` of the staged block."""
    return exp2(decay * along_channels(dt_s, j, S)) * h + along_states(b_s, j, S) * along_channels(v_s, j, S)


@gluon.jit
def stage_steps(staged, x, raw, p_ok, SOFTPLUS: gl.constexpr):
    """Fills dt and dt x of a block of steps; returns x in float32."""
    x = x.to(gl.float32)
    dt = gl.where(p_ok[:, None], softplus(raw) if SOFTPLUS else raw, 0.0)
    staged[0].store(dt)
    staged[1].store(dt * x)
    return x


@gluon.jit
def raw_steps(shared, delta_t, bias, channel, rank, T: gl.constexpr, RP: gl.constexpr):
    """Step sizes of a block before softplus [TB, BD]; a low-rank signal stays in low_s [RP, TB] and low_rows_s.

    channel: index and validity [BD], and where the constants of the direction begin. The bias is loaded anew for each
    block, because registers are scarcer than loads.
    """
    low_s, low_rows_s, weight_s = shared
    d, d_ok, d_k = channel
    bias = channel_vector(bias, d_k + d, d_ok)
    if RP > 0:
        low = delta_t.to(gl.float32)
        low_s.permute((1, 0)).store(low)
        low_rows_s.store(low)
        barrier()
        raw = low_rank_product(low_s, weight_s, bias, rank, T)
    else:
        raw = delta_t.to(gl.float32) + bias[None, :]
    return raw


@gluon.jit
def within_lanes_channels(value, S: gl.constexpr):
    """[BN, BD] summed over the channels of each lane: [BN, lanes]."""
    each: gl.constexpr = S.size_per_thread[1]
    return gl.sum(gl.reshape(value, [value.shape[0], value.shape[1] // each, each]), axis=2)


@gluon.jit
def within_lanes_states(value, S: gl.constexpr):
    """[BN, BD] summed over the states of each lane: [groups, BD]."""
    each: gl.constexpr = S.size_per_thread[0]
    return gl.sum(gl.reshape(value, [value.shape[0] // each, each, value.shape[1]]), axis=1)


@gluon.constexpr_function
def sum_layout(ROWS, COLUMNS, W):
    """[ROWS partial sums, COLUMNS]: rows in a lane as far as there are columns for all lanes."""
    lanes = min(32, max(1, COLUMNS // W))
    return gl.BlockedLayout([ROWS * lanes // 32, max(1, COLUMNS // (W * 32))], [32 // lanes, lanes], [1, W], [1, 0])


@gluon.constexpr_function
def scratch_layout(CONFLICTS):
    """Rows of partial sums; CONFLICTS lanes of a write would fall on the same banks and are swizzled apart."""
    return (
        gl.SwizzledSharedLayout(4, 1, CONFLICTS, [1, 0]) if CONFLICTS > 1 else gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )


@gluon.jit
def spread(scratch, parts, order: gl.constexpr):
    """Writes the partial sums of four steps as [partial sums, step by step]; ``order`` moves (.., .., step) there."""
    stacked = gl.permute(stack4(parts[0], parts[1], parts[2], parts[3]), order)
    scratch.store(gl.reshape(stacked, [scratch.shape[0], scratch.shape[1]]))


@gluon.jit
def gather(scratch, W: gl.constexpr):
    """The sums of four steps [4, X] from what `spread` wrote."""
    total = gl.sum(scratch.load(sum_layout(scratch.shape[0], scratch.shape[1], W)), axis=0)
    return gl.reshape(total, [4, scratch.shape[1] // 4])


@gluon.jit
def four_rows(shared, quad, W: gl.constexpr):
    """Four rows of a `buffer` [TB, BD] as [4, BD], laid out as `gather` does."""
    BD: gl.constexpr = shared.shape[1]
    flat = rows_of(shared, quad, 4).load(gl.SliceLayout(0, sum_layout(1, 4 * BD, W)))
    return gl.convert_layout(gl.reshape(flat, [4, BD]), tile_layout(4, BD, W))


@gluon.jit
def store_rows(ptr, start, stride, value, pixel_s, four, n_states, WIDE: gl.constexpr):
    """Writes sums over channels [4, BN] of the chunk's steps from ``4 * four``."""
    L: gl.constexpr = value.type.layout
    p = rows_of(pixel_s, four, 4).load(gl.SliceLayout(1, L))
    n = gl.arange(0, value.shape[1], gl.SliceLayout(0, L))
    mask = (p >= 0)[:, None] & (n < n_states)[None, :]
    gl.store(ptr + tile_at(start, p, stride, n, WIDE), value.to(ptr.dtype.element_ty), mask=mask)


@gluon.jit
def store_low(graw_s, weight_s, ptr, start, stride, pixel_s, block, rank, W: gl.constexpr, WIDE: gl.constexpr):
    """Gradient of the low-rank signal of one block: graw [TB, BD] times the weight [RP, BD] transposed."""
    TB: gl.constexpr = graw_s.shape[0]
    BD: gl.constexpr = graw_s.shape[1]
    RP: gl.constexpr = weight_s.shape[0]
    L: gl.constexpr = gl.BlockedLayout([max(1, RP // W), 1, TB * BD // 32], [1, TB, 32 // TB], [W, 1, 1], [2, 1, 0])
    graw = gl.expand_dims(graw_s.load(gl.SliceLayout(0, L)), 0)
    low = gl.sum(graw * gl.expand_dims(weight_s.load(gl.SliceLayout(1, L)), 1), axis=2)
    p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(0, gl.SliceLayout(2, L)))
    r = gl.arange(0, RP, gl.SliceLayout(1, gl.SliceLayout(2, L)))
    ptrs = ptr + ((start + wide(p, WIDE) * stride)[None, :] + r[:, None])
    gl.store(ptrs, low.to(ptr.dtype.element_ty), mask=(p >= 0)[None, :] & (r < rank)[:, None])


@gluon.jit
def shared_memory(
    BN: gl.constexpr, BD: gl.constexpr, TB: gl.constexpr, RP: gl.constexpr, KEPT: gl.constexpr, WANT: gl.constexpr,
    S: gl.constexpr,
):  # fmt: skip
    """The staged block, scratch for sums, kept states, and what a low rank needs; unused places name used ones."""
    dt_s = buffer(TB, BD)
    v_s = buffer(TB, BD)
    x_s = buffer(TB, BD)
    dy_s = buffer(TB, BD)
    b_s = buffer(TB, BN)
    c_s = buffer(TB, BN)
    channel_lanes: gl.constexpr = BD // S.size_per_thread[1]
    state_lanes: gl.constexpr = BN // S.size_per_thread[0]
    c_scratch = gl.allocate_shared_memory(gl.float32, [channel_lanes, 4 * BN], scratch_layout(8))
    b_scratch = gl.allocate_shared_memory(gl.float32, [channel_lanes, 4 * BN], scratch_layout(8))
    x_scratch = gl.allocate_shared_memory(gl.float32, [state_lanes, 4 * BD], scratch_layout(1))
    dt_scratch = gl.allocate_shared_memory(gl.float32, [state_lanes, 4 * BD], scratch_layout(1))
    kept = gl.allocate_shared_memory(gl.float32, [KEPT, BN, BD], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    gate_s = dt_s
    gate_scratch = x_scratch
    if WANT & 256:
        gate_s = buffer(TB, BD)
        gate_scratch = gl.allocate_shared_memory(gl.float32, [state_lanes, 4 * BD], scratch_layout(1))
    low_s = b_s
    low_rows_s = b_s
    weight_s = b_s
    if RP > 0:
        low_s = buffer(RP, TB)
        low_rows_s = buffer(TB, RP)
        weight_s = buffer(RP, BD)
    staged = (dt_s, v_s, x_s, dy_s, b_s, c_s, gate_s)
    return staged, (c_scratch, b_scratch, x_scratch, dt_scratch, gate_scratch), kept, (low_s, low_rows_s, weight_s)


@gluon.jit
def stage_backward(
    staged, low_shared, tensors, starts, strides, pixel_s, block, bias, channel, n_states, rank,
    T: gl.constexpr, W: gl.constexpr, RP: gl.constexpr, SOFTPLUS: gl.constexpr, WANT: gl.constexpr,
    ALIGN_B: gl.constexpr, ALIGN_C: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Fills the staged block for the way back. tensors, starts, strides: x, delta, B, C, dy, gate."""
    dt_s, v_s, x_s, dy_s, b_s, c_s, gate_s = staged
    TB: gl.constexpr = b_s.shape[0]
    BN: gl.constexpr = b_s.shape[1]
    # All loads first: the block waits for memory once.
    x_t, delta_t, b_rows = load_steps(
        tensors, starts, strides, pixel_s, block, channel, n_states, rank, TB, BN, T, W, RP, ALIGN_B, WIDE
    )
    c_rows = load_block_rows(tensors[3], starts[3], strides[3], pixel_s, block, n_states, TB, BN, W, ALIGN_C, WIDE)
    dy_t = load_block(tensors[4], starts[4], strides[4], pixel_s, block, channel, TB, T, WIDE)
    raw = raw_steps(low_shared, delta_t, bias, channel, rank, T, RP)
    p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(1, T))
    x_s.store(stage_steps((dt_s, v_s), x_t, raw, p >= 0, SOFTPLUS))
    b_s.store(b_rows.to(gl.float32))
    c_s.store(c_rows.to(gl.float32))
    dy_t = dy_t.to(gl.float32)
    if tensors[5] is not None:
        z = load_block(tensors[5], starts[5], strides[5], pixel_s, block, channel, TB, T, WIDE).to(gl.float32)
        s = sigmoid(z)
        if WANT & 256:
            gate_s.store(dy_t * s * (1.0 + z * (1.0 - s)))
        dy_t *= z * s
    dy_s.store(dy_t)


@gluon.jit
def keep_states(h, decay, block, last, staged, kept, S: gl.constexpr):
    """Runs over a staged block; keeps the state before every eighth step of the chunk but the first."""
    dt_s, v_s, b_s = staged
    TB: gl.constexpr = dt_s.shape[0]
    for eighth in range(0, TB // 8):
        if block + eighth > 0:
            kept.index((block * TB) // 8 + eighth - 1).store(h)
        # Behind the last one kept, no state is wanted.
        halves = gl.where((block == last) & (eighth == TB // 8 - 1), 0, 2)
        for half in range(0, halves):
            for i in gl.static_range(4):
                h = advance(h, decay, 8 * eighth + 4 * half + i, dt_s, v_s, b_s, S)
    return h


@gluon.jit
def four_gradients(h, g, sum_a, decay, quad, staged, scratch, S: gl.constexpr, WANT: gl.constexpr):
    """Takes the adjoint ``g`` back over four steps that begin with state ``h``.

    Leaves what is summed over channels (C, B) or states (x, dt, gate) in ``scratch``; returns g and the sum for A.
    """
    dt_s, v_s, dy_s, b_s, c_s = staged
    states = (h,)
    for i in gl.static_range(4):
        states = states + (advance(states[i], decay, 4 * quad + i, dt_s, v_s, b_s, S),)  # noqa: RUF005 (no * here)
    for_c = ()
    for_b = ()
    for_x = ()
    for_dt = ()
    for_gate = ()
    for i in gl.static_range(3, -1, -1):
        dt_j = along_channels(dt_s, 4 * quad + i, S)
        dy_j = along_channels(dy_s, 4 * quad + i, S)
        c_j = along_states(c_s, 4 * quad + i, S)
        g += c_j * dy_j
        if WANT & 8:
            for_c = (within_lanes_channels(states[i + 1] * dy_j, S),) + for_c  # noqa: RUF005
        if WANT & 256:
            for_gate = (within_lanes_states(states[i + 1] * c_j, S),) + for_gate  # noqa: RUF005
        if WANT & 4:
            for_b = (within_lanes_channels(g * along_channels(v_s, 4 * quad + i, S), S),) + for_b  # noqa: RUF005
        for_x = (within_lanes_states(g * along_states(b_s, 4 * quad + i, S), S),) + for_x  # noqa: RUF005
        g *= exp2(decay * dt_j)
        e = g * states[i]
        if WANT & 194:
            for_dt = (within_lanes_states(decay * e, S),) + for_dt  # noqa: RUF005
        if WANT & 16:
            sum_a += dt_j * e
    if WANT & 8:
        spread(scratch[0], for_c, (1, 2, 0))
    if WANT & 4:
        spread(scratch[1], for_b, (1, 2, 0))
    spread(scratch[2], for_x, (0, 2, 1))
    if WANT & 194:
        spread(scratch[3], for_dt, (0, 2, 1))
    if WANT & 256:
        spread(scratch[4], for_gate, (0, 2, 1))
    return g, sum_a


@gluon.jit
def store_sums(
    outs, sums, line, channels, n_states, rank, d0, end, later,
    S: gl.constexpr, Q: gl.constexpr, LW: gl.constexpr, WANT: gl.constexpr,
):  # fmt: skip
    """Adds the sums over pixels (A, D, weight, bias) to the program's own slices, whose directions are ``line``."""
    ga, gskip, gweight, gbias = outs
    sum_a, sum_skip, sum_weight, sum_bias = sums
    BN: gl.constexpr = sum_a.shape[0]
    BD: gl.constexpr = sum_a.shape[1]
    dq = d0 + gl.arange(0, BD, gl.SliceLayout(0, Q))
    if WANT & 16:
        n = gl.arange(0, BN, gl.SliceLayout(1, S))
        ds = d0 + gl.arange(0, BD, gl.SliceLayout(0, S))
        ok = (n < n_states)[:, None] & (ds < end)[None, :]
        add_to(ga + (line * channels + ds)[None, :] * n_states + n[:, None], sum_a, ok, later, True)
    if WANT & 32:
        add_to(gskip + line * channels + dq, gl.sum(sum_skip, axis=0), dq < end, later, True)
    if WANT & 64:
        offs, ok = weight_places(line, channels, rank, d0, end, sum_weight.shape[0], BD, LW)
        add_to(gweight + offs, sum_weight, ok, later, True)
    if WANT & 128:
        add_to(gbias + line * channels + dq, gl.sum(sum_bias, axis=0), dq < end, later, True)


@gluon.jit
def place_of(task, n_chunks, lines, K, orders, k, height, width, chunk, length, WIDE: gl.constexpr):
    """Batch index, width index, chunk in reading order and `direction` of one task along direction ``k``."""
    c = task % n_chunks
    b = wide(task // n_chunks // lines, WIDE)
    w = (task // n_chunks) % lines
    backwards = (orders >> (2 * k + 1)) & 1
    r = gl.where(backwards == 1, n_chunks - 1 - c, c)
    t0, t1 = chunk_bounds(r, backwards, n_chunks, chunk, length)
    return b, w, r, direction(orders, k, height, width, length, w, t0, t1)


@gluon.jit(do_not_specialize=[*RUNTIME, "dirs", "n_dirs", "is_first", "is_last", "n_tasks", "n_shares"])
def scan_gradient_kernel(
    x, gate, dy, bm, cm, delta, weight, a, skip, bias, start, behind,
    gx, gx_out, ggate, gdelta, gb, gc, ga, gskip, gweight, gbias, gstart,
    s_x, s_gate, s_dy, s_b, s_c, s_delta, s_start, s_behind, s_gx, s_gdelta, s_gb, s_gc, s_gstart,
    height, width, lines, length, orders, dirs, n_dirs, is_first, is_last, n_tasks, n_shares,
    K, channels, group_channels, n_states, rank, chunk, n_chunks,
    BN: gl.constexpr, BD: gl.constexpr, RP: gl.constexpr, SOFTPLUS: gl.constexpr, WANT: gl.constexpr,
    ACC: gl.constexpr, ALIGN_B: gl.constexpr, ALIGN_C: gl.constexpr, KEPT: gl.constexpr, SN: gl.constexpr,
    TB: gl.constexpr, W: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """See `gpu_gradient.scan_gradient_kernel`; at most 8 (KEPT + 1) steps a chunk; strides are (batch, pixel, ...).

    Where the gradient of x adds up over directions, the last one writes ``gx_out`` in its dtype.
    """
    groups = channels // group_channels
    share = gl.program_id(0) % (groups * n_shares)
    rep = gl.program_id(0) // (groups * n_shares)
    group = share // n_shares
    part = share % n_shares
    leap = gl.num_programs(0) // (groups * n_shares)
    group_end = (group + 1) * group_channels
    S: gl.constexpr = state_layout(BN, BD, SN, W)
    T: gl.constexpr = tile_layout(TB, BD, W)
    Q: gl.constexpr = tile_layout(4, BD, W)
    LW: gl.constexpr = tile_layout(RP if RP > 0 else 1, BD, W)
    staged, scratch, kept, low_shared = shared_memory(BN, BD, TB, RP, KEPT, WANT, S)
    dt_s, v_s, x_s, dy_s, b_s, c_s, gate_s = staged
    c_scratch, b_scratch, x_scratch, dt_scratch, gate_scratch = scratch
    pixel_s = buffer(8 * (KEPT + 1), 1, gl.int32)
    low_rows_s, weight_s = low_shared[1], low_shared[2]
    d0 = group * group_channels + part * BD
    d = d0 + gl.arange(0, BD, gl.SliceLayout(0, T))
    dq = d0 + gl.arange(0, BD, gl.SliceLayout(0, Q))
    ds = d0 + gl.arange(0, BD, gl.SliceLayout(0, S))
    n = gl.arange(0, BN, gl.SliceLayout(1, S))
    d_ok = d < group_end
    tile_ok = (n < n_states)[:, None] & (ds < group_end)[None, :]

    for work in range(0, gl.cdiv(n_tasks - rep, leap) * n_dirs):
        task = rep + (work // n_dirs) * leap
        sweep = work % n_dirs
        k = (dirs >> (4 * sweep)) & 15
        b, w, r, way = place_of(task, n_chunks, lines, K, orders, k, height, width, chunk, length, WIDE)
        t0 = way[6]
        last = gl.cdiv(way[7] - t0, TB) - 1
        channel = (d, d_ok, k * channels)
        delta_at = b * s_delta[0] + k * s_delta[2]
        b_at = b * s_b[0] + k * s_b[2] + group * s_b[3]
        c_at = b * s_c[0] + k * s_c[2] + group * s_c[3]
        gb_at = b * s_gb[0] + k * s_gb[2] + group * s_gb[3] + wide(part, WIDE) * s_gb[4]
        gc_at = b * s_gc[0] + k * s_gc[2] + group * s_gc[3] + wide(part, WIDE) * s_gc[4]
        decay = gl.load(a + (k * channels + ds)[None, :] * n_states + n[:, None], mask=tile_ok, other=0.0) * LOG2E
        if RP > 0:
            w_offs, w_ok = weight_places(k, channels, rank, d0, group_end, RP, BD, LW)
            weight_s.store(gl.load(weight + w_offs, mask=w_ok, other=0.0).to(gl.float32))
        h = gl.zeros([BN, BD], gl.float32, S)
        if start is not None:
            h = gl.load(state_tile(start, s_start, b, w, k, r, n, ds), mask=tile_ok, other=0.0)
        tensors = (x, delta, bm, cm, dy, gate)
        dy_at = b * s_dy[0] + k * s_dy[2]
        starts = (b * s_x[0], delta_at, b_at, c_at, dy_at, b * s_gate[0])
        strides = (s_x[1], s_delta[1], s_b[1], s_c[1], s_dy[1], s_gate[1])
        pixel_table(pixel_s, way, t0, 1, W)
        # The next block is on its way while one is worked on. On the way back there are no registers for that, but
        # the cache then has everything.
        x_t, delta_t, b_rows = load_steps(
            tensors, starts, strides, pixel_s, 0, channel, n_states, rank, TB, BN, T, W, RP, ALIGN_B, WIDE
        )
        for block in range(0, last + 1):
            raw = raw_steps(low_shared, delta_t, bias, channel, rank, T, RP)
            p = rows_of(pixel_s, block, TB).load(gl.SliceLayout(1, T))
            stage_steps((dt_s, v_s), x_t, raw, p >= 0, SOFTPLUS)
            b_s.store(b_rows.to(gl.float32))
            x_t, delta_t, b_rows = load_steps(
                tensors, starts, strides, pixel_s, gl.minimum(block + 1, last), channel, n_states, rank,
                TB, BN, T, W, RP, ALIGN_B, WIDE,
            )  # fmt: skip
            fetch_block(dy, dy_at, s_dy[1], pixel_s, block, d0, group_end, TB, BD, W, WIDE)
            fetch_block(cm, c_at, s_c[1], pixel_s, block, 0, n_states, TB, BN, W, WIDE)
            barrier()
            h = keep_states(h, decay, block, last, (dt_s, v_s, b_s), kept, S)

        g = gl.zeros([BN, BD], gl.float32, S)
        if behind is not None:
            g = gl.load(state_tile(behind, s_behind, b, w, k, r, n, ds), mask=tile_ok, other=0.0)
        sum_a = gl.zeros([BN, BD], gl.float32, S)
        sum_weight = gl.zeros([RP if RP > 0 else 1, BD], gl.float32, LW)
        sum_skip = gl.zeros([4, BD], gl.float32, Q)
        sum_bias = gl.zeros([4, BD], gl.float32, Q)
        x_again = (sweep > 0) | (is_first == 0)
        x_ends = (sweep == n_dirs - 1) & (is_last == 1)
        for back in range(0, last + 1):
            block = last - back
            stage_backward(
                staged, low_shared, tensors, starts, strides, pixel_s, block, bias, channel, n_states, rank,
                T, W, RP, SOFTPLUS, WANT, ALIGN_B, ALIGN_C, WIDE,
            )  # fmt: skip
            barrier()
            for half in range(0, TB // 4):
                quad = TB // 4 - 1 - half
                four = block * (TB // 4) + quad
                pq = rows_of(pixel_s, four, 4).load(gl.SliceLayout(1, Q))
                q_mask = (pq >= 0)[:, None] & (dq < group_end)[None, :]
                x_place = tile_at(b * s_gx[0], pq, s_gx[1], dq, WIDE)
                if WANT & ACC & 1:
                    so_far = gl.load(gx + x_place, mask=q_mask & x_again, other=0.0)
                h = gl.zeros([BN, BD], gl.float32, S)
                eighth = (block * TB) // 8 + quad // 2
                if eighth > 0:
                    h = kept.index(eighth - 1).load(S)
                else:
                    if start is not None:
                        # eighth is 0: it keeps the addresses from being computed, and held, outside of the loop
                        h = gl.load(state_tile(start, s_start, b, w, k, r + eighth, n, ds), mask=tile_ok, other=0.0)
                if quad % 2 == 1:
                    for i in gl.static_range(4):
                        h = advance(h, decay, 4 * quad - 4 + i, dt_s, v_s, b_s, S)
                g, sum_a = four_gradients(h, g, sum_a, decay, quad, (dt_s, v_s, dy_s, b_s, c_s), scratch, S, WANT)
                skip_q = channel_vector(skip, k * channels + dq, dq < group_end)
                x_q = four_rows(x_s, quad, W)
                dy_q = four_rows(dy_s, quad, W)
                dt_q = four_rows(dt_s, quad, W)
                barrier()
                if WANT & 8:
                    store_rows(gc, gc_at, s_gc[1], gather(c_scratch, W), pixel_s, four, n_states, WIDE)
                if WANT & 4:
                    store_rows(gb, gb_at, s_gb[1], gather(b_scratch, W), pixel_s, four, n_states, WIDE)
                g_b = gl.convert_layout(gather(x_scratch, W), Q)
                if WANT & 1:
                    g_x = dt_q * g_b + skip_q[None, :] * dy_q
                    if ACC & 1:
                        g_x += so_far
                        gl.store(gx + x_place, g_x, mask=q_mask & (not x_ends))
                    gl.store(gx_out + x_place, g_x.to(gx_out.dtype.element_ty), mask=q_mask & (x_ends | (ACC & 1 == 0)))
                if WANT & 32:
                    sum_skip += dy_q * x_q
                if WANT & 194:
                    graw = x_q * g_b + LN2 * gl.convert_layout(gather(dt_scratch, W), Q)
                    graw = gl.where(q_mask, graw * softplus_slope(dt_q) if SOFTPLUS else graw, 0.0)
                    if WANT & 128:
                        sum_bias += graw
                    if RP > 0:
                        # x of these steps is not needed any more
                        rows_of(x_s, quad, 4).store(gl.reshape(graw, [4 * BD]))
                    elif WANT & 2:
                        place = tile_at(b * s_gdelta[0] + k * s_gdelta[2], pq, s_gdelta[1], dq, WIDE)
                        gl.store(gdelta + place, graw.to(gdelta.dtype.element_ty), mask=q_mask)
                if WANT & 256:
                    g_z = gl.convert_layout(gather(gate_scratch, W), Q) + skip_q[None, :] * x_q
                    g_z *= four_rows(gate_s, quad, W)
                    gl.store(ggate + x_place, g_z.to(ggate.dtype.element_ty), mask=q_mask)
            if RP > 0:
                barrier()
                if WANT & 2:
                    low_at = b * s_gdelta[0] + k * s_gdelta[2] + wide(share, WIDE) * s_gdelta[3]
                    store_low(x_s, weight_s, gdelta, low_at, s_gdelta[1], pixel_s, block, rank, W, WIDE)
                if WANT & 64:
                    for j in range(0, TB):
                        sum_weight += along_states(low_rows_s, j, LW) * along_channels(x_s, j, LW)

        store_sums(
            (ga, gskip, gweight, gbias), (sum_a, sum_skip, sum_weight, sum_bias), gl.cast(rep, gl.int64) * K + k,
            channels, n_states, rank, d0, group_end, work >= n_dirs, S, Q, LW, WANT,
        )  # fmt: skip
        if gstart is not None:
            gl.store(state_tile(gstart, s_gstart, b, w, k, 0, n, ds), g, mask=tile_ok)
        barrier()  # the next sweep reads what this one wrote, possibly from other lanes
