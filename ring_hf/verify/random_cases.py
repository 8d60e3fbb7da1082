"""Random attention problems against dense attention in fp64, every rank a thread: `scripts/fuzz.py` and tests.

Needs `hypothesis`, which only the development environment has.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ..geometry import (
    LAYOUTS,
    TRANSPORTS,
    AttentionSpec,
    Mask,
    RingOptions,
    ShardedSequence,
    head_split,
    length_multiple,
)
from ..parallel import ring_attention
from ..parallel.sharding import cut, join
from ..testing import dense_attention, dense_mask, forward_backward
from .thread_ranks import threads_as_ranks

BAR = 1e-10
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 2), (9, 3), (5, 5))
MAX_RANKS, MAX_TOKENS = 8, 48


@dataclass(frozen=True)
class Case:
    """One attention problem and the settings that solve it."""

    sequence: ShardedSequence
    mask: Mask
    rows: int
    heads: tuple[int, int]
    head_dims: tuple[int, int]
    softcap: float | None
    sinks: bool
    kernel: str
    transport: str
    inner: int
    overlap: bool
    head_chunks: int

    @property
    def kinds(self) -> list[str]:
        """Names of the kinds that this case belongs to, for statistics."""
        s, mask = self.sequence, self.mask
        properties = {
            "full mask": not mask.causal,
            "window": mask.window is not None,
            "chunks": mask.chunk is not None,
            "prefix": s.prefixes is not None and any(map(any, s.prefixes)),
            "packed documents": s.documents is not None,
            "padding": s.num_tokens is not None,
            "several rows": self.rows > 1,
            "grouped heads": self.heads[0] > self.heads[1],
            "other value head dim": self.head_dims[0] != self.head_dims[1],
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            "ulysses": s.ulysses > 1,
            "hybrid": s.ulysses > 1 and s.ring_size > 1,
            "heads in chunks": self.head_chunks > 1,
            "uneven heads": self.heads[0] % s.ulysses > 0,
            "no overlap": not self.overlap,
        }
        kinds = [
            f"layout {s.layout}",
            f"transport {self.transport}",
            f"ring of {s.ring_size}",
            f"kernel {self.kernel}",
        ]
        return kinds + [kind for kind, holds in properties.items() if holds]


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """Draw a problem of at most `MAX_TOKENS` tokens (or the fewest the ranks need) on at most `MAX_RANKS` ranks."""
    layout, ulysses = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from((1, 1, 1, 2, 3, 4)))
    num_ranks = ulysses * draw(
        st.sampled_from([n for n in (2, 3, 4, 5, 6, 7, 8, 4, 6, 1) if n * ulysses <= MAX_RANKS])
    )
    unit = length_multiple(layout, num_ranks, ulysses)
    length = unit * draw(st.integers(1, max(1, MAX_TOKENS // unit)))
    rows = draw(st.integers(1, 2))
    documents = num_tokens = prefixes = chunk = None
    if draw(st.booleans()):
        edges = st.lists(st.integers(1, length), max_size=6)
        documents = tuple(tuple(sorted({0, length, *draw(edges)})) for _ in range(rows))
    if draw(st.integers(0, 2)) == 0:
        num_tokens = tuple(draw(st.integers(0, length)) for _ in range(rows))
    causal = draw(st.integers(0, 2)) > 0
    window = draw(st.none() | st.integers(1, length))
    extra = draw(st.sampled_from((None, None, "prefix", "chunk")))
    if extra == "prefix" and causal:
        bounds = documents or ((0, length),) * rows
        prefixes = tuple(tuple(draw(st.integers(0, b - a)) for a, b in itertools.pairwise(row)) for row in bounds)
    elif extra == "chunk":
        chunk = draw(st.integers(1, length))
    sequence = ShardedSequence(layout, length, num_ranks, documents, num_tokens, prefixes, ulysses)
    inner = [n for n in range(2, sequence.ring_size) if sequence.ring_size % n == 0]
    valid = [name for name in ("auto", *TRANSPORTS) if inner or name != "double_ring"]
    transport = draw(st.sampled_from(valid + ["double_ring"] * (2 if inner else 0)))  # few rings allow it
    may_have_inner = transport == "double_ring" or (inner and transport == "auto" and draw(st.booleans()))
    heads = draw(st.sampled_from(HEADS))
    num_heads, num_kv_heads = heads
    most = max(share.num_q for share in head_split(num_heads, num_kv_heads, ulysses)) if ulysses > 1 else 1
    return Case(
        sequence,
        Mask(causal, window, chunk),
        rows,
        heads,
        head_dims=draw(st.sampled_from(((4, 4), (3, 3), (4, 2)))),
        softcap=draw(st.sampled_from((None, None, None, 2.0))),
        sinks=draw(st.integers(0, 3)) == 0,
        kernel=draw(st.sampled_from(("auto", "auto", "reference"))),
        transport=transport,
        inner=draw(st.sampled_from(inner)) if may_have_inner else 1,
        overlap=draw(st.integers(0, 3)) > 0,
        head_chunks=draw(st.integers(1, most)),
    )


def worst_difference(case: Case, run: Callable[..., list[Any]]) -> float:
    """Return the largest absolute difference of out, lse and all gradients between the ranks and dense attention.

    Args:
        run: `run(size, fn)` of `threads_as_ranks`.
    """
    s, (heads, kv_heads), (dim, v_dim) = case.sequence, case.heads, case.head_dims
    generator = torch.Generator().manual_seed(5)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim), (heads, v_dim))
    q, k, v, dout = (
        torch.randn(case.rows, s.length, number, width, generator=generator, dtype=torch.float64).transpose(1, 2)
        for number, width in shapes
    )
    sinks = (torch.randn(heads, generator=generator, dtype=torch.float64),) if case.sinks else ()
    visible = dense_mask(s, case.mask, case.rows)
    scale = 0.7  # not 1 / sqrt(D)

    def dense(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dense_attention(*tensors, visible_BSS=visible, scale=scale, softcap=case.softcap)

    def of_rank(rank: int, group: str) -> tuple[torch.Tensor, ...]:
        shard = s.segments(rank)

        def attend(q, k, v, sinks=None):
            return ring_attention(
                q,
                k,
                v,
                sequence=s,
                group=group if s.num_ranks > 1 else "",
                spec=AttentionSpec(**vars(case.mask), scale=scale, softcap=case.softcap),
                options=RingOptions(case.transport, case.inner, None, case.head_chunks, case.kernel, case.overlap),
                sinks=sinks,
            )

        own = [cut(x, shard, dim=2) for x in (q, k, v)]
        return forward_backward(attend, *own, *sinks, dout=cut(dout, shard, dim=2))

    want = forward_backward(dense, q, k, v, *sinks, dout=dout)
    ranks = run(s.num_ranks, of_rank)
    shards = [s.segments(rank) for rank in range(s.num_ranks)]
    worst = 0.0
    for number, expected in enumerate(want):
        parts = [result[number] for result in ranks]
        got = sum(parts) if expected.ndim == 1 else join(parts, shards, dim=2)  # sinks: every rank has a share
        assert got.shape == expected.shape
        difference = torch.where(got == expected, 0.0, (got - expected).abs())  # lse is -inf if no key is visible
        worst = max(worst, difference.max().item()) if not difference.isnan().any() else float("nan")
        if not worst <= BAR:
            return worst
    return worst


def fuzz(number: int, start: int | None, advance: Callable[[Case, float], None] = lambda case, worst: None) -> None:
    """Check `number` random cases.

    Args:
        start: seed; None for always the same cases.
        advance: is called with each case and its largest difference.

    Raises:
        AssertionError: with the smallest failing case.
    """

    with threads_as_ranks() as run:

        @settings(
            max_examples=number,
            derandomize=start is None,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(cases())
        def check(case: Case) -> None:
            worst = worst_difference(case, run)
            advance(case, worst)
            assert worst <= BAR, f"{case}\nis off by {worst:.3g}, more than {BAR:.0e}"

        (check if start is None else seed(start)(check))()
