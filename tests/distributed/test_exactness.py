"""Ring attention equals dense attention in fp64: every layout x mask x packing x heads x ring size x dtype.

Tolerances: fp64 largest difference 1e-10; fp32 relative RMS 2e-6 forward and 1e-5 for gradients; bf16 at most twice
the error of one process running PyTorch's attention in bf16.
"""

import itertools

import pytest

from ring_hf.geometry import LAYOUTS
from tests.distributed.cases import TENSORS, Case, errors
from tests.harness import run_distributed


def _passes(dtype: str, name: str, apart: float, ratio: float, single: float) -> bool:
    if dtype == "float64":
        return apart <= 1e-10
    if dtype == "float32":
        return ratio <= (2e-6 if name in ("out", "lse") else 1e-5)
    return ratio <= 2 * single


def check_exact(cases: list[Case]) -> dict[str, float]:
    """Runs the cases in one ring; returns per tensor the worst difference (fp64), ratio (fp32) or multiple (bf16)."""
    worst = dict.fromkeys(TENSORS, 0.0)
    for per_case in zip(cases, *run_distributed(cases[0].num_ranks, errors, cases), strict=True):
        case, ranks = per_case[0], per_case[1:]
        for rank, (name, row) in ((r, item) for r, found in enumerate(ranks) for item in found.items()):
            assert _passes(case.dtype, name, *row), (
                f"{case}, rank {rank}: {name} is off by (max, rms, one process) {row}"
            )
            apart, ratio, single = row
            figure = ratio / single if case.dtype == "bfloat16" else apart if case.dtype == "float64" else ratio
            worst[name] = max(worst[name], figure)
    return worst


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ring_matches_dense_attention(layout, num_ranks, dtype):
    options = itertools.product((True, False), (False, True), (None, 9, 30), ((4, 4), (4, 2)))
    cases = [
        Case(layout, num_ranks, dtype, causal, packed, window, heads, kv_heads)
        for causal, packed, window, (heads, kv_heads) in options
    ]
    assert len(cases) == 24
    worst = check_exact(cases)
    print(f"EXACT {layout} ranks={num_ranks} {dtype} " + " ".join(f"{name}={worst[name]:.2e}" for name in TENSORS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_does_not_grow_with_the_ring(layout):
    for dtype in ("float32", "bfloat16"):
        check_exact([Case(layout, 6, dtype, units=5), Case(layout, 6, dtype, packed=True, units=5)])


@pytest.mark.parametrize("settings", [{"overlap": False}, {"kernel": "reference"}], ids=["no-overlap", "reference"])
def test_overlap_and_kernel_do_not_change_the_result(settings):
    for layout in LAYOUTS:
        check_exact([Case(layout, 3, packed=packed, **settings) for packed in (False, True)])


def test_a_ring_of_one_exchanges_nothing_and_is_exact():
    check_exact([Case(layout, 1, packed=packed, window=5, units=21) for layout in LAYOUTS for packed in (False, True)])


def test_one_token_per_chunk_is_exact():
    check_exact([Case("zigzag", 4, units=1, rows=1), Case("striped", 4, units=1, rows=1)])


def test_documents_around_the_chunk_size_are_exact():
    # Lengths 1, 2R-1, 2R and 2R+1, one over all ranks, several on one rank: where per-document zigzag codes go wrong.
    check_exact(
        [Case("zigzag", 4, packed=True, causal=causal, units=units) for units in (3, 4, 5) for causal in (True, False)]
    )
