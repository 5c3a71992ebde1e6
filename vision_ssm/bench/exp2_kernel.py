"""A Triton kernel that does nothing but exponentials, in registers: the machine's rate. Imported on GPUs only."""

# Triton's language is not typed Python:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, UNROLLED = 1024, 16


@triton.jit(do_not_specialize=["rounds"])
def exp2_kernel(out, rounds, BLOCK: tl.constexpr, UNROLLED: tl.constexpr, USE_PTX: tl.constexpr):
    """`rounds * UNROLLED` times x <- 2^-x for every number of the output, each thread with several chains."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = at.to(tl.float32) * 1e-9
    for _ in range(rounds):
        for _ in tl.static_range(UNROLLED):
            if USE_PTX:
                x = tl.inline_asm_elementwise(
                    "ex2.approx.ftz.f32 $0, $1;", "=f,f", [-x], dtype=tl.float32, is_pure=True, pack=1
                )
            else:
                x = tl.exp2(-x)
    tl.store(out + at, x)


def launch(out: Tensor, rounds: int) -> int:
    """Runs the kernel over `out`, whose size is a multiple of BLOCK; returns how many exponentials that takes."""
    grid = (out.numel() // BLOCK,)
    exp2_kernel[grid](out, rounds, BLOCK=BLOCK, UNROLLED=UNROLLED, USE_PTX=torch.version.hip is None, num_warps=4)
    return out.numel() * rounds * UNROLLED
