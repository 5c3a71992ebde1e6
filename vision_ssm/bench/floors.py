"""The least time that a machine could take for a kernel, from what the shapes make unavoidable.

Bytes are counted as if every input were read once, every output written once and nothing else left the chip. A
state-step is one update of one state of one channel in one direction at one position. Counts of the selective scan:

- forward: one exponential a state-step and two an element for softplus; 8 instruction slots a state-step (argument of
  the decay, input, update, output, and what combining pieces of a sequence adds) and one an element for each rank of
  a low-rank delta;
- backward: one exponential a state-step and two an element, 20 slots a state-step (states once more, the adjoint,
  five gradients, sums over channels) and two an element and rank; it reads the inputs once more and the gradient of
  the output, and writes a gradient for every input.

Parameters (A, D, bias, weights) are too small to count. `docs/kernels.md` compares these floors with measured times.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

FORWARD_SLOTS, BACKWARD_SLOTS = 8, 20
SOFTPLUS_EXP2 = 2
SLOTS_PER_EXP2 = 8
"""A multiprocessor issues 128 lanes and finishes 16 exponentials a clock (compute capability 8.0 to 10.0)."""


@dataclass(frozen=True)
class Rates:
    """What a machine does a second: bytes copied, exponentials, instruction slots (lanes), matrix-product FLOP.

    A slot rate of None means that it is not known (on a CPU): slots then set no floor.
    """

    copy: float
    exp2: float
    slots: float | None
    matmul: float


H100 = Rates(copy=3.0e12, exp2=3.71e12, slots=2.96e13, matmul=6.0e14)
"""One H100 SXM at 1.755 GHz: 132 multiprocessors; measured copy bandwidth, 600 TFLOP/s in bfloat16."""


@dataclass(frozen=True)
class Cost:
    """What a pass cannot avoid."""

    bytes: float = 0.0
    exp2: float = 0.0
    slots: float = 0.0
    flops: float = 0.0

    def limits(self, rates: Rates) -> dict[str, float]:
        """Seconds that each resource takes on its own."""
        found = {"bytes": self.bytes / rates.copy, "exp2": self.exp2 / rates.exp2, "matmul": self.flops / rates.matmul}
        if rates.slots is not None:
            found["slots"] = self.slots / rates.slots
        return found

    def floor(self, rates: Rates) -> float:
        """Seconds of the slowest resource, all others hidden behind it."""
        return max(self.limits(rates).values())


@dataclass(frozen=True)
class Passes:
    """Cost of the forward and of the backward pass."""

    forward: Cost
    backward: Cost

    def floors(self, rates: Rates) -> tuple[float, float]:
        """Seconds of forward, and of forward + backward."""
        forward = self.forward.floor(rates)
        return forward, forward + self.backward.floor(rates)

    def as_dict(self) -> Mapping[str, Mapping[str, float]]:
        """For JSON."""
        return asdict(self)


def scan_cost(*, elements: int, states: int, rank: int, softplus: bool, read: int, written: int) -> Passes:
    """Cost of a selective scan (S6).

    Args:
        elements: positions times channels times directions.
        states: N.
        rank: rank of delta, 0 when delta is given for every channel.
        softplus: whether step sizes pass through a softplus.
        read: bytes of all inputs.
        written: bytes of the output.
    """
    steps = elements * states
    exp2 = steps + SOFTPLUS_EXP2 * softplus * elements
    return Passes(
        Cost(bytes=read + written, exp2=exp2, slots=FORWARD_SLOTS * steps + rank * elements),
        Cost(bytes=2 * read + written, exp2=exp2, slots=BACKWARD_SLOTS * steps + 2 * rank * elements),
    )


def with_projection(scan: Passes, *, pixels: int, inputs: int, outputs: int, size: int) -> Passes:
    """`scan` together with the linear map that forms its delta, B and C: `inputs` to `outputs` numbers a pixel.

    `size` is the bytes of a number. The map reads the input once more and writes what the scan then reads.
    """
    moved = pixels * (inputs + outputs) * size
    flops = 2.0 * pixels * inputs * outputs
    return Passes(
        Cost(scan.forward.bytes + moved, scan.forward.exp2, scan.forward.slots, scan.forward.flops + flops),
        Cost(scan.backward.bytes + 2 * moved, scan.backward.exp2, scan.backward.slots, scan.backward.flops + 2 * flops),
    )


def ssd_cost(
    *, tokens: int, heads: int, head_dim: int, groups: int, states: int, chunk: int, softplus: bool, size: int
) -> Passes:
    """Cost of the chunked scan of Mamba-2 (SSD), the causal half of each chunk counted once.

    Matrix products a token and head, in FLOP: C B' chunk * N (shared by the heads of a group), its product with x
    chunk * P, chunk states 2 N P, their outputs 2 N P. Backward: two products for each of them, and C B' and the chunk
    states once more. Exponentials: half a chunk for each token and head, two for softplus.
    """
    of_scores = chunk * states * groups / heads
    forward = of_scores + chunk * head_dim + 4 * states * head_dim
    backward = 2 * forward + of_scores + 2 * states * head_dim
    read = size * tokens * (heads * head_dim + heads + 2 * groups * states)
    written = size * tokens * heads * head_dim
    exp2 = tokens * heads * (chunk / 2 + SOFTPLUS_EXP2 * softplus)
    return Passes(
        Cost(bytes=read + written, exp2=exp2, flops=tokens * heads * forward),
        Cost(bytes=2 * read + written, exp2=exp2, flops=tokens * heads * backward),
    )


def convolution_cost(*, elements: int, width: int, silu: bool, size: int) -> Passes:
    """Cost of a depthwise causal convolution; with SiLU the sum is formed once more in the backward pass."""
    moved, exp2 = elements * size, SOFTPLUS_EXP2 * silu * elements
    return Passes(
        Cost(bytes=2 * moved, exp2=exp2, slots=width * elements),
        Cost(bytes=3 * moved, exp2=exp2, slots=(2 + silu) * width * elements),
    )
