"""Triton kernels of SSD, backward. Shape legend and conventions: gpu_kernels.py. [T, T] tiles are transposed, (j, i).

Gradients of the summed log decays need no stored outputs: with W_ij the share of input j in the loss through output i,
the decay of position t lies in all W_ij with j < t <= i, in what the state before the chunk gives to the outputs from t
on, in what the inputs before t give to the state after the chunk, and in the path of the state through the chunk.
"""

# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..selective_scan.gpu_kernels import exp2, sigmoid
from .gpu_kernels import (
    GEOMETRY,
    decay_between,
    direction,
    in_reading_order,
    load_decays,
    load_rows,
    load_state,
    positions,
    slot,
    triangle,
)


@triton.jit
def transposed_decay(decay, T: tl.constexpr, backwards, strict, CT: tl.constexpr):
    """[j, i] decay from input j to output i, 0 where j is not read."""
    mask = triangle(T, backwards, strict, True)
    return exp2(tl.where(mask, decay_between(decay, 1, CT), float("-inf")))


@triton.jit(do_not_specialize=[*(g for g in GEOMETRY if g != "n_dirs"), "strict"])
def ssd_input_gradient_kernel(
    x, dy, bm, cm, steps, decays, skip, behind, earlier, gx, gstep, gdecay, ginput, s_x, s_dy, s_b, s_c, s_gx, s_part,
    lines, length, inner, n_chunks, dirs, K, strict,
    heads, groups, head_dim, n_states,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
    DIRS: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_DY: tl.constexpr, ALIGN_B: tl.constexpr, ALIGN_C: tl.constexpr,
):  # fmt: skip
    """Gradient of x, summed over DIRS directions, and the parts of the step sizes' gradient that need products with x.

    ``behind`` (S, K, E, Q, P, N): adjoint state after every chunk. gx is None where not needed, gstep, gdecay and
    ginput (blocks of P, S, K, E, Q, T) where no gradient reaches the step sizes: the gradient of the factor dt_j, the
    sums of W over j minus those over i without the diagonal, and what input j gives to the state behind.
    """
    blocks_p = tl.cdiv(head_dim, BP)
    pid = tl.program_id(0)
    pb = pid % blocks_p
    p = pb * BP + tl.arange(0, BP)
    pid = pid // blocks_p
    e = (pid % heads).to(tl.int64)
    pid = pid // heads
    c = pid % n_chunks
    s = (pid // n_chunks).to(tl.int64)
    g = e // (heads // groups)
    p_ok = p < head_dim
    i = tl.arange(0, T)
    t = c * T + i
    ok = t < length
    xt = load_rows(x + e * s_x[4], positions(s_x, s, lines, t, inner), p, ok, p_ok, ALIGN_X, CT)
    total = tl.zeros([T, BP], tl.float32)
    for d in tl.static_range(DIRS):
        k, backwards = direction(dirs, d)
        at = slot(s, k, e, c, K, heads, n_chunks)
        step, decay, end = load_decays(steps, decays, at, T, backwards, CT)
        rows_dy = positions(s_dy, s, lines, t, inner) + k * s_dy[5]
        dyt = load_rows(dy + e * s_dy[4], rows_dy, p, ok, p_ok, ALIGN_DY, CT)
        rows_b = positions(s_b, s, lines, t, inner) + g * s_b[4] + k * s_b[5]
        rows_c = positions(s_c, s, lines, t, inner) + g * s_c[4] + k * s_c[5]
        gu = tl.zeros([T, BP], tl.float32)
        products = tl.zeros([T, T], tl.float32)
        for block in tl.static_range(NB):
            n = block * BN + tl.arange(0, BN)
            n_ok = n < n_states
            b = load_rows(bm, rows_b, n, ok, n_ok, ALIGN_B, CT)
            ct = load_rows(cm, rows_c, n, ok, n_ok, ALIGN_C, CT)
            h = load_state(behind + at * head_dim * n_states, p, n, head_dim, n_states, CT)
            products = tl.dot(b, tl.trans(ct), products, input_precision=PREC)
            gu = tl.dot(b, tl.trans(h), gu, input_precision=PREC)
        gu = gu * exp2(end[1])[:, None]
        mixing = transposed_decay(decay, T, backwards, strict, CT) * products
        if gstep is not None:
            part = pb * s_part + at * T + i
            through = tl.sum(gu * xt, axis=1)
            v = tl.dot(xt, tl.trans(dyt), input_precision=PREC) * mixing
            others = tl.where(i[:, None] == i[None, :], 0.0, v)
            of_others = tl.sum(others, axis=1)
            tl.store(gstep + part, of_others + tl.sum(v - others, axis=1) + through)
            tl.store(ginput + part, through * step)
            if CT == tl.float32:  # noqa: SIM300
                shares = others.to(tl.float64) * step[:, None]  # most of them cancel
                tl.store(gdecay + part, tl.sum(shares, axis=0) - tl.sum(shares, axis=1))
            else:
                tl.store(gdecay + part, tl.sum(others * step[:, None], axis=0) - of_others * step)
        gu = tl.dot(mixing.to(CT), dyt, gu, input_precision=PREC)
        total += gu * step[:, None]
        if skip is not None:
            total += tl.load(skip + k * heads + e) * dyt.to(tl.float32)
    if gx is not None:
        out = positions(s_gx, s, lines, t, inner)[:, None] + (e * s_gx[4] + p)[None, :]
        live = ok[:, None] & p_ok[None, :]
        if earlier is not None:
            total += tl.load(earlier + out, mask=live, other=0.0)
        tl.store(gx + out, total.to(gx.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=[*GEOMETRY, "strict", "per_program"])
def ssd_projection_gradient_kernel(
    x, dy, bm, cm, steps, decays, states, behind, gb, gc, gout, gpath, gskip, s_x, s_dy, s_b, s_c, s_gb, s_part,
    lines, length, inner, n_chunks, dirs, n_dirs, K, strict, per_program,
    heads, groups, head_dim, n_states,
    T: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    ALIGN_X: tl.constexpr, ALIGN_DY: tl.constexpr, ALIGN_B: tl.constexpr, ALIGN_C: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C of one chunk, summed over ``per_program`` heads of one group, and what else needs states.

    gb, gc (shares, B, H, W, K, G, N). gout (blocks of N, blocks of P, S, K, E, Q, T): what the state before the chunk
    gives to the loss through output i; gpath (.., S, K, E, Q) through the state behind; gskip (blocks of P, S, K, E, Q)
    the sum of dy x. Each may be None where not needed.
    """
    blocks_n = tl.cdiv(n_states, BN)
    blocks_p = tl.cdiv(head_dim, BP)
    pid = tl.program_id(0)
    nb = pid % blocks_n
    n = nb * BN + tl.arange(0, BN)
    pid = pid // blocks_n
    first = (pid % (heads // per_program)) * per_program
    pid = pid // (heads // per_program)
    k, backwards = direction(dirs, pid % n_dirs)
    c = (pid // n_dirs) % n_chunks
    s = (pid // n_dirs // n_chunks).to(tl.int64)
    g = first // (heads // groups)
    share = (first % (heads // groups)) // per_program
    n_ok = n < n_states
    i = tl.arange(0, T)
    t = c * T + i
    ok = t < length
    rows_x = positions(s_x, s, lines, t, inner)
    rows_dy = positions(s_dy, s, lines, t, inner) + k * s_dy[5]
    rows_c = positions(s_c, s, lines, t, inner) + g * s_c[4] + k * s_c[5]
    pairs = tl.zeros([T, T], tl.float32)
    sum_b = tl.zeros([T, BN], tl.float32)
    sum_c = tl.zeros([T, BN], tl.float32)
    for item in tl.range(0, per_program * blocks_p, num_stages=STAGES):
        e = tl.cast(first + item // blocks_p, tl.int64)
        pb = item % blocks_p
        p = pb * BP + tl.arange(0, BP)
        p_ok = p < head_dim
        at = slot(s, k, e, c, K, heads, n_chunks)
        xt = load_rows(x + e * s_x[4], rows_x, p, ok, p_ok, ALIGN_X, CT)
        dyt = load_rows(dy + e * s_dy[4], rows_dy, p, ok, p_ok, ALIGN_DY, CT)
        h = load_state(states + at * head_dim * n_states, p, n, head_dim, n_states, CT)
        after = load_state(behind + at * head_dim * n_states, p, n, head_dim, n_states, CT)
        step, decay, end = load_decays(steps, decays, at, T, backwards, CT)
        part = (nb * blocks_p + pb) * s_part + at
        xdy = tl.dot(xt, tl.trans(dyt), input_precision=PREC)
        if gskip is not None:  # noqa: SIM102 (the first condition is decided at compile time)
            if nb == 0:
                tl.store(gskip + pb * s_part + at, tl.sum(tl.where(i[:, None] == i[None, :], xdy, 0.0)))
        pairs += xdy * transposed_decay(decay, T, backwards, strict, CT) * step[:, None]
        if gb is not None:
            weighted = (xt.to(tl.float32) * (step * exp2(end[1]))[:, None]).to(CT)
            sum_b = tl.dot(weighted, after, sum_b, input_precision=PREC)
        # decayed after the product: the gradient of A is a sum of these whose terms cancel, so a rounding less shows
        through = tl.dot(dyt, h, input_precision=PREC) * exp2(decay[0])[:, None]
        sum_c += through
        if gout is not None:
            cn = load_rows(cm, rows_c, n, ok, n_ok, ALIGN_C, CT)
            tl.store(gout + part * T + i, tl.sum(through * cn, axis=1))
            tl.store(gpath + part, tl.sum(h.to(tl.float32) * after.to(tl.float32)) * exp2(end[0]))
    rows = share * s_gb[6] + positions(s_gb, s, lines, t, inner) + g * s_gb[4] + k * s_gb[5]
    out = rows[:, None] + n[None, :]
    live = ok[:, None] & n_ok[None, :]
    mixed = pairs.to(CT)
    ct = load_rows(cm, rows_c, n, ok, n_ok, ALIGN_C, CT)
    if gb is not None:
        sum_b = tl.dot(mixed, ct, sum_b, input_precision=PREC)
        tl.store(gb + out, sum_b.to(gb.dtype.element_ty), mask=live)
    if gc is not None:
        bt = load_rows(bm, positions(s_b, s, lines, t, inner) + g * s_b[4] + k * s_b[5], n, ok, n_ok, ALIGN_B, CT)
        sum_c = tl.dot(tl.trans(mixed), bt, sum_c, input_precision=PREC)
        tl.store(gc + out, sum_c.to(gc.dtype.element_ty), mask=live)


@triton.jit
def sum_parts(ptr, offs, ok, parts, size):
    """Sum of ``parts`` partial arrays, each ``size`` numbers long."""
    total = tl.load(ptr + offs, mask=ok, other=0.0)
    for i in range(1, parts):
        total += tl.load(ptr + i * size + offs, mask=ok, other=0.0)
    return total


@triton.jit(do_not_specialize=[*GEOMETRY, "parts_p", "parts_np"])
def ssd_step_gradient_kernel(
    dt, a, bias, steps, gstep, gdecay, ginput, gout, gpath, gdt, ga, gbias, s_dt, s_gdt, s_part,
    lines, length, inner, n_chunks, dirs, n_dirs, K, parts_p, parts_np, heads,
    T: tl.constexpr, BE: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Gradients of dt as given and, summed over one chunk, of A and the bias: ga, gbias (S, Q, K, E)."""
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
    at = slot(s, k, e, c, K, heads, n_chunks)
    offs = at[None, :] * T + i[:, None]
    step = tl.load(steps + offs, mask=ok, other=0.0)
    before = sum_parts(ginput, offs, ok, parts_p, s_part * T)
    path = sum_parts(gpath, at, e_ok, parts_np, s_part)
    # Sums over later positions are taken from the end and come back in order through memory.
    turned = at[None, :] * T + (T - 1 - i)[:, None]
    later = sum_parts(gdecay, turned, e_ok[None, :], parts_p, s_part * T)
    later += sum_parts(gout, turned, e_ok[None, :], parts_np, s_part * T)
    tl.debug_barrier()
    tl.store(gdecay + turned, tl.cumsum(later.to(tl.float64), 0).to(gdecay.dtype.element_ty), mask=e_ok[None, :])
    tl.debug_barrier()
    earlier = (tl.cumsum(before.to(tl.float64), 0) - before).to(tl.float32)
    glog = tl.load(gdecay + offs, mask=ok, other=0.0).to(tl.float32) + earlier + path[None, :]
    glog = tl.where(ok, glog, 0.0)
    decay = tl.load(a + k * heads + e, mask=e_ok, other=0.0)
    g = sum_parts(gstep, offs, ok, parts_p, s_part * T) + glog * decay[None, :]
    row = (s * n_chunks + c) * (K * heads) + k * heads + e
    if ga is not None:
        tl.store(ga + row, tl.sum(glog * step, axis=0), mask=e_ok)
    if SOFTPLUS:
        rows = positions(s_dt, s, lines, t, inner) + k * s_dt[5]
        raw = tl.load(dt + (rows[:, None] + e[None, :] * s_dt[4]), mask=ok, other=0.0).to(tl.float32)
        if bias is not None:
            raw += tl.load(bias + k * heads + e, mask=e_ok, other=0.0)[None, :]
        g *= sigmoid(raw)
    g = tl.where(ok, g, 0.0)
    if gbias is not None:
        tl.store(gbias + row, tl.sum(g, axis=0), mask=e_ok)
    if gdt is not None:
        rows = positions(s_gdt, s, lines, t, inner) + k * s_gdt[5]
        tl.store(gdt + (rows[:, None] + e[None, :] * s_gdt[4]), g.to(gdt.dtype.element_ty), mask=ok)
