"""Every layout and every algorithm on one sequence, for up to 1,024 ranks in one process: who waits for whom, and what
travels. The real geometry, a model of the machine (`geometry.cost`); nothing is computed and nothing is sent."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..costmodel.devices import BACKWARD_FLOPS_RATIO, Hardware, Shape
from ..costmodel.pass_cost import Problem, pass_cost
from ..geometry import auto_ulysses, head_split
from .scenario import Scenario


@dataclass(frozen=True)
class Balance:
    """How evenly a layout deals the work.

    Attributes:
        imbalance: work of the busiest place over the mean; `2 - 1/N` for contiguous causal, 1 for zigzag.
        lockstep: the same if all ranks waited for the slowest after every step of a ring.
    """

    layout: str
    tokens: int
    imbalance: float
    lockstep: float


@dataclass(frozen=True)
class Row:
    """One algorithm on one layout; seconds and bytes are of one attention layer, bytes of one rank.

    Attributes:
        steps: blocks of keys and values that a rank works on one after the other.
        sent_in_a_step: the most that any rank sends while it computes one step of the forward pass.
        sent_forward, sent_backward: means over ranks, Ulysses' exchanges included.
        efficiency: time of evenly dealt work without anything else, over the predicted time.
        buffers: keys, values and their gradients of others, held at once in the backward pass.
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


def balance_of(layout: str, problem: Problem) -> Balance:
    size = problem.num_places
    total = sum(map(sum, problem.work))
    by_step = [max(pairs) for pairs, _ in problem.by_step(size, size)]
    busiest = max(map(sum, problem.work))
    return Balance(layout, problem.tokens * size, busiest * size / total, sum(by_step) * size / total)


def simulate(
    setting: Scenario,
    layouts: Sequence[str],
    shape: Shape,
    hardware: Hardware,
    inner: int | None = None,
    ulysses: Sequence[int] = (),
    advance: Callable[[str], None] = lambda task: None,
) -> tuple[list[Balance], list[Row]]:
    """All algorithms that the heads and the number of ranks allow.

    Args:
        inner: inner ring of the double ring, by default the ranks of a node (if that divides the ring).
        ulysses: splits for the hybrid, by default the largest that fits into a node.
        advance: called with the name of every piece of work before it starts, `num_tasks` times.

    Raises:
        ValueError: if a split does not divide the ranks or the heads.
    """
    balances, rows = [], []
    for layout in layouts:
        advance(layout)
        problem = Problem.of(setting.sequence(layout, 1), setting.mask, shape.num_rows)
        balances.append(balance_of(layout, problem))
        for name, transport, width in _transports(setting.num_ranks, hardware, inner):
            advance(f"{layout} {name}")
            rows.append(_row(layout, name, problem, shape, hardware, transport, width))
        for split in _splits(setting.num_ranks, shape, hardware, ulysses):
            advance(f"{layout} hybrid {split}")
            problem = Problem.of(setting.sequence(layout, split), setting.mask, shape.num_rows)
            name = f"hybrid, ring of {setting.num_ranks // split} x ulysses {split}"
            rows.append(_row(layout, name, problem, shape, hardware, "ring", 1))
    if _even(setting.num_ranks, shape):
        advance("ulysses")
        problem = Problem.of(setting.sequence("contiguous", setting.num_ranks), setting.mask, shape.num_rows)
        rows.append(_row("contiguous", "ulysses", problem, shape, hardware, "ring", 1))
    return balances, rows


def num_tasks(
    setting: Scenario,
    layouts: Sequence[str],
    shape: Shape,
    hardware: Hardware,
    inner: int | None = None,
    ulysses: Sequence[int] = (),
) -> int:
    """How often `simulate` calls `advance`."""
    transports = len(list(_transports(setting.num_ranks, hardware, inner)))
    splits = len(_splits(setting.num_ranks, shape, hardware, ulysses))
    return len(layouts) * (1 + transports + splits) + _even(setting.num_ranks, shape)


def _transports(num_ranks: int, hardware: Hardware, inner: int | None) -> Iterator[tuple[str, str, int]]:
    """`(name, transport, inner)`"""
    yield "ring", "ring", 1
    width = hardware.ranks_per_node if inner is None else inner
    if inner is not None and (num_ranks % inner or not 1 < inner < num_ranks):
        raise ValueError(
            f"--inner {inner} does not cut a ring of {num_ranks} into several equal rings of several ranks. Choose a "
            "divisor in between."
        )
    if 1 < width < num_ranks and num_ranks % width == 0:
        yield f"double ring of {width}", "double_ring", width
    yield "all-gather", "allgather", 1
    yield "direct", "direct", 1


def _splits(num_ranks: int, shape: Shape, hardware: Hardware, ulysses: Sequence[int]) -> list[int]:
    if not ulysses:
        auto = auto_ulysses(shape.num_heads, shape.num_kv_heads, num_ranks, hardware.ranks_per_node)
        return [auto] if 1 < auto < num_ranks else []
    for split in ulysses:
        if split < 1 or num_ranks % split or not _even(split, shape):
            raise ValueError(
                f"--ulysses {split} does not fit {num_ranks} ranks and {shape.num_heads} query heads: it must divide "
                "the ranks, and no rank may be left without a head."
            )
    return [split for split in ulysses if 1 < split < num_ranks]


def _even(split: int, shape: Shape) -> bool:
    """Whether every one of `split` ranks has a query head."""
    return split > 1 and all(share.num_q for share in head_split(shape.num_heads, shape.num_kv_heads, split))


def _row(
    layout: str, name: str, problem: Problem, shape: Shape, hardware: Hardware, transport: str, inner: int
) -> Row:
    forward, backward = (pass_cost(problem, shape, hardware, transport, inner, back) for back in (False, True))
    ranks = problem.num_places * problem.ulysses
    slow = hardware.full_precision if shape.bytes_per_element >= 4 else 1.0
    flops = 2 * shape.num_heads * (shape.head_dim + shape.v_head_dim) * sum(map(sum, problem.work)) / ranks * slow
    ideal = flops / hardware.flops + BACKWARD_FLOPS_RATIO * flops / hardware.backward_flops
    return Row(
        layout,
        name,
        problem.ulysses,
        inner,
        problem.num_steps(transport, inner),
        max(forward.sent),
        forward.mean_sent,
        backward.mean_sent,
        forward.exposed,
        backward.exposed,
        forward.total,
        backward.total,
        ideal / (forward.total + backward.total),
        backward.buffers,
    )
