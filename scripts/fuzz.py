"""Thousands of random attention problems against dense attention in fp64, all in one process.

Each case draws a layout, a mask (causal or full, window, prefix, chunks), documents, padding, batch rows, ranks, a
split into ring and Ulysses, a transport, an inner ring, heads, softcap, sinks, a kernel, overlap on or off. The real
plans, kernels, merges, exchanges and gradients run, every rank as a thread (`tests/threads.py`); output, lse and all
gradients must agree to 1e-10 with dense attention under a mask written from its definition. Prints the seed, the cases
by kind and the worst difference; exits with 1 and the smallest failing case that Hypothesis finds.

    python scripts/fuzz.py                      # 10,000 cases, 5 to 10 minutes on one core
    python scripts/fuzz.py --cases 500 --seed 7
"""

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.geometry import (
    LAYOUTS,
    TRANSPORTS,
    AttentionSpec,
    Mask,
    RingOptions,
    ShardedSequence,
    head_split,
    length_multiple,
)
from ring_hf.parallel import ring_attention
from ring_hf.parallel.sharding import cut, join
from tests.dense import dense_attention, dense_mask, with_gradients
from tests.harness import poison_empty
from tests.threads import threads_as_ranks

BAR = 1e-10
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 2), (9, 3), (5, 5))
MOST_RANKS, MOST_TOKENS = 8, 48


@dataclass(frozen=True)
class Case:
    """One attention problem and one way to solve it."""

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
        """What this case is one of, for the table at the end."""
        s, mask = self.sequence, self.mask
        named = {
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
        return kinds + [kind for kind, true in named.items() if true]


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """Any problem of at most `MOST_TOKENS` tokens (or the fewest the ranks need) on at most `MOST_RANKS` ranks."""
    layout, ulysses = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from((1, 1, 1, 2, 3, 4)))
    num_ranks = ulysses * draw(
        st.sampled_from([n for n in (2, 3, 4, 5, 6, 7, 8, 4, 6, 1) if n * ulysses <= MOST_RANKS])
    )
    unit = length_multiple(layout, num_ranks, ulysses)
    length = unit * draw(st.integers(1, max(1, MOST_TOKENS // unit)))
    rows = draw(st.integers(1, 2))
    documents = num_tokens = prefixes = chunk = None
    if draw(st.booleans()):
        edges = st.lists(st.integers(1, length), max_size=6)
        documents = tuple(tuple(sorted({0, length, *draw(edges)})) for _ in range(rows))
    if draw(st.integers(0, 2)) == 0:
        num_tokens = tuple(draw(st.integers(0, length)) for _ in range(rows))
    causal = draw(st.integers(0, 2)) > 0
    window = draw(st.none() | st.integers(1, length))
    softener = draw(st.sampled_from((None, None, "prefix", "chunk")))
    if softener == "prefix" and causal:
        bounds = documents or ((0, length),) * rows
        prefixes = tuple(tuple(draw(st.integers(0, b - a)) for a, b in itertools.pairwise(row)) for row in bounds)
    elif softener == "chunk":
        chunk = draw(st.integers(1, length))
    sequence = ShardedSequence(layout, length, num_ranks, documents, num_tokens, prefixes, ulysses)
    inner = [n for n in range(2, sequence.ring_size) if sequence.ring_size % n == 0]
    fitting = [name for name in ("auto", *TRANSPORTS) if inner or name != "double_ring"]
    transport = draw(st.sampled_from(fitting + ["double_ring"] * (2 if inner else 0)))  # few rings allow it
    may_be_inner = transport == "double_ring" or (inner and transport == "auto" and draw(st.booleans()))
    heads = draw(st.sampled_from(HEADS))
    most = max(share.num_q for share in head_split(*heads, ulysses)) if ulysses > 1 else 1
    return Case(
        sequence,
        Mask(causal, window, chunk),
        rows,
        heads,
        draw(st.sampled_from(((4, 4), (3, 3), (4, 2)))),
        draw(st.sampled_from((None, None, None, 2.0))),
        draw(st.integers(0, 3)) == 0,
        draw(st.sampled_from(("auto", "auto", "reference"))),
        transport,
        draw(st.sampled_from(inner)) if may_be_inner else 1,
        draw(st.integers(0, 3)) > 0,
        draw(st.integers(1, most)),
    )


def worst_difference(case: Case, run: Callable[..., list[Any]]) -> float:
    """Largest difference over out, lse and all gradients between the ranks together and dense attention."""
    s, (heads, kv_heads), (dim, v_dim) = case.sequence, case.heads, case.head_dims
    generator = torch.Generator().manual_seed(5)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim), (heads, v_dim))
    q, k, v, dout = (
        torch.randn(case.rows, s.length, number, width, generator=generator, dtype=torch.float64).transpose(1, 2)
        for number, width in shapes
    )
    sinks = (torch.randn(heads, generator=generator, dtype=torch.float64),) if case.sinks else ()
    seen = dense_mask(s, case.mask, case.rows)
    scale = 0.7  # not 1 / sqrt(D)

    def dense(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dense_attention(*tensors, seen_BSS=seen, scale=scale, softcap=case.softcap)

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

        mine = [cut(x, shard, dim=2) for x in (q, k, v)]
        return with_gradients(attend, *mine, *sinks, dout=cut(dout, shard, dim=2))

    want = with_gradients(dense, q, k, v, *sinks, dout=dout)
    ranks = run(s.num_ranks, of_rank)
    shards = [s.segments(rank) for rank in range(s.num_ranks)]
    worst = 0.0
    for number, expected in enumerate(want):
        parts = [result[number] for result in ranks]
        got = sum(parts) if expected.ndim == 1 else join(parts, shards, dim=2)  # sinks: every rank has a share
        assert got.shape == expected.shape
        apart = torch.where(got == expected, 0.0, (got - expected).abs())  # -inf where nothing is seen
        worst = max(worst, apart.max().item()) if not apart.isnan().any() else float("nan")
        if not worst <= BAR:
            return worst
    return worst


def fuzz(number: int, start: int | None, advance: Callable[[Case, float], None] = lambda case, worst: None) -> None:
    """Runs `number` cases from a seed (None: always the same cases); raises `AssertionError` with the smallest."""

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, help="repeat the cases of an earlier run")
    arguments = parser.parse_args()
    start = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {start}", flush=True)
    torch.set_num_threads(1)
    poison_empty()
    counts: Counter[str] = Counter()
    worst, begin = 0.0, time.perf_counter()
    progress = tqdm(total=arguments.cases, desc="cases", disable=None)

    def advance(case: Case, apart: float) -> None:
        nonlocal worst
        counts.update(["all", *case.kinds])
        worst = max(worst, apart)
        progress.update()

    try:
        fuzz(arguments.cases, start, advance)
    except Exception as error:
        progress.close()
        print(f"FAILED after {counts['all']} cases: {type(error).__name__}: {error}")
        print("\n".join(getattr(error, "__notes__", [])))
        return 1
    progress.close()
    for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        print(f"{count:7,}  {kind}")
    seconds = time.perf_counter() - begin
    print(f"{counts['all']:,} cases in {seconds:.0f} s, worst difference {worst:.2e} (bar {BAR:.0e}), seed {start}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
