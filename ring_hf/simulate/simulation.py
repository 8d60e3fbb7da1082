"""Every layout and every algorithm on one sequence, for up to 1,024 ranks in one process: balance, waiting, bytes.

The geometry is that of a real run, the machine is the model of `costmodel`; no attention is computed, nothing is sent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..costmodel.devices import BACKWARD_FLOPS_RATIO, Hardware, Shape
from ..costmodel.pass_cost import WorkMatrices, estimate_pass
from ..geometry import auto_ulysses, check_inner_ring, head_split
from .scenario import Scenario


@dataclass(frozen=True)
class Balance:
    """How evenly a layout distributes the work.

    Attributes:
        tokens: length of the sequence, padding included.
        imbalance: work of the busiest ring rank over the mean; `2 - 1/N` for contiguous causal, 1 for zigzag.
        lockstep: the same if all ranks waited for the slowest after every step of a ring.
    """

    layout: str
    tokens: int
    imbalance: float
    lockstep: float


@dataclass(frozen=True)
class AlgorithmCost:
    """One algorithm on one layout; seconds and bytes are of one attention layer, bytes of one rank.

    Attributes:
        inner: ranks of an inner ring.
        steps: blocks of keys and values that a rank computes with, one after the other.
        sent_in_a_step: the most that any rank sends while it computes one step of the forward pass.
        sent_forward, sent_backward: means over ranks, Ulysses' exchanges included.
        exposed_forward, exposed_backward: seconds in which the last rank to finish does not compute.
        efficiency: time of evenly distributed work without anything else, over the predicted time.
        buffers: keys, values and their gradients of other ranks, held at once in the backward pass.
    """

    layout: str
    algorithm: str
    ulysses: int
    inner: int
    steps: int
    sent_in_a_step: float
    sent_forward: float
    sent_backward: float
    exposed_forward: float
    exposed_backward: float
    forward: float
    backward: float
    efficiency: float
    buffers: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_balance(layout: str, matrices: WorkMatrices) -> Balance:
    """Return the imbalance of a layout."""
    size = matrices.ring_size
    total = sum(map(sum, matrices.work))
    busiest = max(map(sum, matrices.work))
    busiest_by_step = [max(pairs) for pairs, _ in matrices.by_step(size, size)]
    num_tokens = matrices.ring_shard_length * size
    return Balance(layout, num_tokens, busiest * size / total, sum(busiest_by_step) * size / total)


def simulate(
    scenario: Scenario,
    layouts: Sequence[str],
    shape: Shape,
    hardware: Hardware,
    inner_ring_size: int | None = None,
    ulysses_sizes: Sequence[int] = (),
    advance: Callable[[str], None] = lambda task: None,
) -> tuple[list[Balance], list[AlgorithmCost]]:
    """Run all algorithms that the heads and the number of ranks allow.

    Args:
        inner_ring_size: inner ring of the double ring, by default the ranks of a node (if that divides the ring).
        ulysses_sizes: Ulysses ranks of the hybrids, by default the most that fit into a node.
        advance: called with the name of every task before it starts, `num_tasks` times.

    Raises:
        ValueError: if an inner ring or a Ulysses size does not divide the ranks or the heads.
    """
    num_ranks = scenario.num_ranks
    balances, costs = [], []
    for layout in layouts:
        advance(layout)
        matrices = WorkMatrices.exact(scenario.sequence(layout, 1), scenario.mask, shape.num_rows)
        balances.append(measure_balance(layout, matrices))
        for name, transport, inner in _transports(num_ranks, hardware, inner_ring_size):
            advance(f"{layout} {name}")
            costs.append(_algorithm_cost(layout, name, matrices, shape, hardware, transport, inner))
        for ulysses in _hybrid_sizes(num_ranks, shape, hardware, ulysses_sizes):
            advance(f"{layout} hybrid {ulysses}")
            matrices = WorkMatrices.exact(scenario.sequence(layout, ulysses), scenario.mask, shape.num_rows)
            name = f"hybrid, ring of {num_ranks // ulysses} x ulysses {ulysses}"
            costs.append(_algorithm_cost(layout, name, matrices, shape, hardware, "ring", 1))
    if _every_rank_has_heads(num_ranks, shape):
        advance("ulysses")
        matrices = WorkMatrices.exact(scenario.sequence("contiguous", num_ranks), scenario.mask, shape.num_rows)
        costs.append(_algorithm_cost("contiguous", "ulysses", matrices, shape, hardware, "ring", 1))
    return balances, costs


def num_tasks(
    scenario: Scenario,
    layouts: Sequence[str],
    shape: Shape,
    hardware: Hardware,
    inner_ring_size: int | None = None,
    ulysses_sizes: Sequence[int] = (),
) -> int:
    """Return how often `simulate` calls `advance`.

    Raises:
        ValueError: as `simulate` does.
    """
    num_transports = len(list(_transports(scenario.num_ranks, hardware, inner_ring_size)))
    num_hybrids = len(_hybrid_sizes(scenario.num_ranks, shape, hardware, ulysses_sizes))
    return len(layouts) * (1 + num_transports + num_hybrids) + _every_rank_has_heads(scenario.num_ranks, shape)


def _transports(num_ranks: int, hardware: Hardware, inner_ring_size: int | None) -> Iterator[tuple[str, str, int]]:
    """Yield `(name, transport, inner ring size)`."""
    yield "ring", "ring", 1
    inner = hardware.ranks_per_node if inner_ring_size is None else inner_ring_size
    if inner_ring_size is not None:
        check_inner_ring(inner, num_ranks, f"--inner {inner}")
    if 1 < inner < num_ranks and num_ranks % inner == 0:
        yield f"double ring of {inner}", "double_ring", inner
    yield "all-gather", "allgather", 1
    yield "direct", "direct", 1


def _hybrid_sizes(num_ranks: int, shape: Shape, hardware: Hardware, ulysses_sizes: Sequence[int]) -> list[int]:
    if not ulysses_sizes:
        auto = auto_ulysses(shape.num_heads, shape.num_kv_heads, num_ranks, hardware.ranks_per_node)
        return [auto] if 1 < auto < num_ranks else []
    for ulysses in ulysses_sizes:
        if ulysses < 1 or num_ranks % ulysses or not _every_rank_has_heads(ulysses, shape):
            raise ValueError(
                f"--ulysses {ulysses} does not fit {num_ranks} ranks and {shape.num_heads} query heads: it must "
                "divide the ranks, and every rank needs a head. Choose another divisor."
            )
    return [ulysses for ulysses in ulysses_sizes if 1 < ulysses < num_ranks]


def _every_rank_has_heads(ulysses: int, shape: Shape) -> bool:
    """Whether there are several Ulysses ranks and each of them has a query head."""
    return ulysses > 1 and all(share.num_q for share in head_split(shape.num_heads, shape.num_kv_heads, ulysses))


def _algorithm_cost(
    layout: str,
    name: str,
    matrices: WorkMatrices,
    shape: Shape,
    hardware: Hardware,
    transport: str,
    inner_ring_size: int,
) -> AlgorithmCost:
    forward = estimate_pass(matrices, shape, hardware, transport, inner_ring_size)
    backward = estimate_pass(matrices, shape, hardware, transport, inner_ring_size, backward=True)
    num_ranks = matrices.ring_size * matrices.ulysses
    slowdown = hardware.full_precision if shape.bytes_per_element >= 4 else 1.0
    pairs = sum(map(sum, matrices.work))
    flops = 2 * shape.num_heads * (shape.head_dim + shape.v_head_dim) * pairs / num_ranks * slowdown
    ideal = flops / hardware.flops + BACKWARD_FLOPS_RATIO * flops / hardware.backward_flops
    return AlgorithmCost(
        layout=layout,
        algorithm=name,
        ulysses=matrices.ulysses,
        inner=inner_ring_size,
        steps=matrices.num_steps(transport, inner_ring_size),
        sent_in_a_step=max(forward.max_sent),
        sent_forward=forward.mean_sent,
        sent_backward=backward.mean_sent,
        exposed_forward=forward.exposed,
        exposed_backward=backward.exposed,
        forward=forward.total,
        backward=backward.total,
        efficiency=ideal / (forward.total + backward.total),
        buffers=backward.buffer_bytes,
    )
