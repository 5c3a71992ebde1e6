"""Triton kernels of the causal convolution: forward and all gradients, each in one pass over its inputs.

One warp owns BD channels of a chunk of one sequence and walks along it. The last WIDTH inputs stay in registers, so
that every input is loaded once (and WIDTH - 1 more at each chunk border); rows are fetched U at a time, and the next U
while these are used. Reading order is a sign of the stride: the host passes the address of the first position read.

Legend: L length, T taps (WIDTH), BD channels of a program. ``task`` numbers (sequence, chunk) pairs.
"""

# Triton adds tuples but does not unpack them:
# ruff: noqa: RUF005
# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import triton
import triton.language as tl

from kernels.selective_scan.gpu_kernels import LOG2E, exp2
from kernels.selective_scan.gpu_small_kernels import reciprocal

RUN_TIME = ["length", "lines", "chunk", "n_chunks", "n_tasks"]


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x); where e**-x overflows, the reciprocal of infinity."""
    return reciprocal(1.0 + exp2(-x * LOG2E))


@triton.jit
def load_taps(weight, d, d_ok, WIDTH: tl.constexpr):
    """The WIDTH taps, each [BD]."""
    taps = (tl.load(weight + d * WIDTH, mask=d_ok, other=0.0).to(tl.float32),)
    for j in tl.static_range(1, WIDTH):
        taps = taps + (tl.load(weight + d * WIDTH + j, mask=d_ok, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_bias(bias, d, d_ok, BD: tl.constexpr):
    """Bias [BD], zero where there is none."""
    value = tl.zeros([BD], tl.float32)
    if bias is not None:
        value += tl.load(bias + d, mask=d_ok, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_rows(at, stride, t, end, d_ok, U: tl.constexpr):
    """U rows from step ``t``, zeros from ``end`` on, as they are stored."""
    rows = (tl.load(at + t * stride, mask=d_ok & (t < end), other=0.0),)
    for u in tl.static_range(1, U):
        rows = rows + (tl.load(at + (t + u) * stride, mask=d_ok & (t + u < end), other=0.0),)
    return rows


@triton.jit
def load_any(x_at, s_x, state_at, s_state, t, d_ok, WIDTH: tl.constexpr):
    """What is read at step ``t`` > -WIDTH, float32: x from 0 on, before that the initial state (None: zeros)."""
    value = tl.load(x_at + t * s_x, mask=d_ok & (t >= 0), other=0.0).to(tl.float32)
    if state_at is not None:
        value += tl.load(state_at + (t + WIDTH - 1) * s_state, mask=d_ok & (t < 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def load_history(x_at, s_x, state_at, s_state, t, d_ok, BD: tl.constexpr, WIDTH: tl.constexpr):
    """The window of WIDTH inputs before step ``t``, oldest first; the oldest is never used and left zero."""
    window = (tl.zeros([BD], tl.float32),)
    for j in tl.static_range(1, WIDTH):
        window = window + (load_any(x_at, s_x, state_at, s_state, t - WIDTH + j, d_ok, WIDTH),)
    return window


@triton.jit
def dot(taps, window, start, WIDTH: tl.constexpr):
    """start + the sum of taps times window."""
    for j in tl.static_range(WIDTH):
        start += taps[j] * window[j]
    return start


@triton.jit
def sequence(task, n_chunks, lines):
    """Chunk number and the place of the sequence on the two batch axes."""
    number = (task // n_chunks).to(tl.int64)
    return task % n_chunks, number // lines, number % lines


@triton.jit(do_not_specialize=RUN_TIME)
def conv_forward_kernel(
    x, weight, bias, initial, y, final, s_x, s_initial, s_y, s_final,
    length, lines, channels, chunk, n_chunks, n_tasks,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """y, and with ``final`` the last WIDTH - 1 inputs. Strides are (batch, step, line); programs take tasks in turn."""
    blocks = tl.cdiv(channels, BD)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_ok = d < channels
    taps = load_taps(weight, d, d_ok, WIDTH)
    bias_d = load_bias(bias, d, d_ok, BD)
    step_x = s_x[1].to(tl.int64)
    step_y = s_y[1].to(tl.int64)
    for task in range(tl.program_id(0) // blocks, n_tasks, tl.num_programs(0) // blocks):
        c, b, w = sequence(task, n_chunks, lines)
        t0 = c * chunk
        t1 = tl.minimum(t0 + chunk, length)
        x_at = x + b * s_x[0] + w * s_x[2] + d
        y_at = y + b * s_y[0] + w * s_y[2] + d
        state_at = None if initial is None else initial + b * s_initial[0] + w * s_initial[2] + d
        window = load_history(x_at, step_x, state_at, s_initial[1], t0, d_ok, BD, WIDTH)
        rows = load_rows(x_at, step_x, t0, t1, d_ok, U)
        for t in range(t0, t1, U):
            current = rows
            rows = load_rows(x_at, step_x, t + U, t1, d_ok, U)
            for u in tl.static_range(U):
                window = window[1:] + (current[u].to(tl.float32),)
                out = dot(taps, window, bias_d, WIDTH)
                if SILU:
                    out *= sigmoid(out)
                tl.store(y_at + (t + u) * step_y, out.to(y.dtype.element_ty), mask=d_ok & (t + u < t1))
        if final is not None:
            f_at = final + b * s_final[0] + w * s_final[2] + d
            ok = d_ok & (c == n_chunks - 1)
            for j in tl.static_range(WIDTH - 1):
                value = load_any(x_at, step_x, state_at, s_initial[1], length - WIDTH + 1 + j, ok, WIDTH)
                tl.store(f_at + j * s_final[1], value.to(final.dtype.element_ty), mask=ok)


@triton.jit
def input_gradient(taps, slopes, final_at, s_final, p, length, d_ok, BD: tl.constexpr, WIDTH: tl.constexpr):
    """Gradient [BD] of what was read at step ``p``, from the slopes at p .. p + WIDTH - 1 and the final state's."""
    out = tl.zeros([BD], tl.float32)
    for j in tl.static_range(WIDTH):
        out += taps[WIDTH - 1 - j] * slopes[j]
    if final_at is not None:
        i = p - length + WIDTH - 1
        out += tl.load(final_at + i * s_final, mask=d_ok & (i >= 0) & (p < length), other=0.0).to(tl.float32)
    return out


@triton.jit
def add_products(sums, own, window, WIDTH: tl.constexpr):
    """Gradients of the taps and, last, of the bias, one step more."""
    more = (sums[0] + own * window[0],)
    for j in tl.static_range(1, WIDTH):
        more = more + (sums[j] + own * window[j],)
    return more + (sums[WIDTH] + own,)


@triton.jit(do_not_specialize=RUN_TIME)
def conv_backward_kernel(
    x, dy, weight, bias, initial, g_final, gx, g_initial, partial, s_x, s_dy, s_initial, s_final, s_gx, s_ginitial,
    length, lines, channels, chunk, n_chunks, n_tasks,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Gradients of x, of the initial state and of the parameters; each output may be None.

    A program walks WIDTH - 1 steps beyond its chunk, because x_p is read by the outputs p .. p + WIDTH - 1, and stores
    the gradient of x_p when it stands at p + WIDTH - 1. ``partial`` [programs of a channel block, WIDTH + 1, D]
    receives the parameter gradients summed over the program's tasks.
    """
    blocks = tl.cdiv(channels, BD)
    rep = tl.program_id(0) // blocks
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_ok = d < channels
    taps = load_taps(weight, d, d_ok, WIDTH)
    bias_d = load_bias(bias, d, d_ok, BD)
    step_x = s_x[1].to(tl.int64)
    step_dy = s_dy[1].to(tl.int64)
    step_gx = s_gx[1].to(tl.int64)
    sums = (tl.zeros([BD], tl.float32),) * (WIDTH + 1)
    for task in range(rep, n_tasks, tl.num_programs(0) // blocks):
        c, b, w = sequence(task, n_chunks, lines)
        t0 = c * chunk
        t1 = tl.minimum(t0 + chunk, length)
        x_at = x + b * s_x[0] + w * s_x[2] + d
        dy_at = dy + b * s_dy[0] + w * s_dy[2] + d
        state_at = None if initial is None else initial + b * s_initial[0] + w * s_initial[2] + d
        final_at = None if g_final is None else g_final + b * s_final[0] + w * s_final[2] + d
        window = load_history(x_at, step_x, state_at, s_initial[1], t0, d_ok, BD, WIDTH)
        slopes = (tl.zeros([BD], tl.float32),) * WIDTH
        end = tl.minimum(t1 + WIDTH - 1, length)
        x_rows = load_rows(x_at, step_x, t0, end, d_ok, U)
        dy_rows = load_rows(dy_at, step_dy, t0, end, d_ok, U)
        for t in range(t0, t1 + WIDTH - 1, U):
            x_now = x_rows
            dy_now = dy_rows
            x_rows = load_rows(x_at, step_x, t + U, end, d_ok, U)
            dy_rows = load_rows(dy_at, step_dy, t + U, end, d_ok, U)
            for u in tl.static_range(U):
                window = window[1:] + (x_now[u].to(tl.float32),)
                slope = dy_now[u].to(tl.float32)
                if SILU:
                    before = dot(taps, window, bias_d, WIDTH)
                    s = sigmoid(before)
                    slope *= s * (1.0 + before * (1.0 - s))
                slopes = slopes[1:] + (slope,)
                if partial is not None:
                    sums = add_products(sums, tl.where(t + u < t1, slope, 0.0), window, WIDTH)
                p = t + u - (WIDTH - 1)
                out = input_gradient(taps, slopes, final_at, s_final[1], p, length, d_ok, BD, WIDTH)
                if gx is not None:
                    g_at = gx + b * s_gx[0] + w * s_gx[2] + d
                    tl.store(g_at + p * step_gx, out.to(gx.dtype.element_ty), mask=d_ok & (p >= t0) & (p < t1))
                if g_initial is not None:
                    g_at = g_initial + b * s_ginitial[0] + w * s_ginitial[2] + d + (p + WIDTH - 1) * s_ginitial[1]
                    tl.store(g_at, out.to(g_initial.dtype.element_ty), mask=d_ok & (p < 0) & (c == 0))
    if partial is not None:
        for j in tl.static_range(WIDTH + 1):
            row = rep.to(tl.int64) * (WIDTH + 1) + j
            tl.store(partial + row * channels + d, sums[j], mask=d_ok)
