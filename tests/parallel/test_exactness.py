"""Shared attention equals dense attention in fp64: every layout x mask x packing x heads x ring size x dtype, every
transport, Ulysses split and double ring, and the maths of model families.

Tolerances: fp64 largest difference 1e-10; fp32 relative RMS 2e-6 forward and 1e-5 for gradients; bf16 at most twice
the error of one process running PyTorch's attention in bf16.
"""

import itertools

import pytest

from ring_hf.geometry import LAYOUTS
from tests.parallel.cases import TENSORS, Case, errors
from tests.support.harness import run_distributed


def _passes(dtype: str, name: str, apart: float, ratio: float, single: float) -> bool:
    if dtype == "float64":
        return apart <= 1e-10
    if dtype == "float32":
        return ratio <= (2e-6 if name in ("out", "lse") else 1e-5)
    return ratio <= 2 * single


def check_exact(cases: list[Case]) -> dict[str, float]:
    """Runs the cases in one ring; returns per tensor the worst difference (fp64), ratio (fp32) or multiple (bf16)."""
    worst: dict[str, float] = dict.fromkeys(TENSORS, 0.0)
    for per_case in zip(cases, *run_distributed(cases[0].num_ranks, errors, cases), strict=True):
        case, ranks = per_case[0], per_case[1:]
        for rank, (name, row) in ((r, item) for r, rank_results in enumerate(ranks) for item in rank_results.items()):
            assert _passes(case.dtype, name, *row), (
                f"{case}, rank {rank}: {name} is off by (max, rms, one process) {row}"
            )
            apart, ratio, single = row
            figure = ratio / single if case.dtype == "bfloat16" else apart if case.dtype == "float64" else ratio
            worst[name] = max(worst.get(name, 0.0), figure)
    return worst


def _print(what: str, dtype: str, worst: dict[str, float]) -> None:
    print(f"EXACT {what} {dtype} " + " ".join(f"{name}={figure:.2e}" for name, figure in worst.items()))


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
    _print(f"{layout} ranks={num_ranks}", dtype, worst)


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


# Everything a mask can be: causal or full, dense or packed, windows smaller and larger than a shard, prefixes, chunks.
MASKS = (
    {},
    {"packed": True},
    {"packed": True, "causal": False},
    {"window": 9},
    {"chunk": 11, "window": 7, "packed": True},
    {"prefix": True},
    {"causal": False},
    {"window": 30, "packed": True},
    {"prefix": True, "packed": True, "window": 20},
)
ALGORITHMS = [
    (4, {"transport": "ring"}),
    (4, {"transport": "allgather"}),
    (4, {"transport": "direct"}),
    (3, {"transport": "allgather"}),
    (3, {"transport": "direct"}),
    (4, {"transport": "double_ring", "inner": 2}),
    (6, {"transport": "double_ring", "inner": 3}),
    (6, {"transport": "double_ring", "inner": 2}),
    (4, {"ulysses": 2}),
    (4, {"ulysses": 4}),
    (2, {"ulysses": 2}),
    (4, {"ulysses": 2, "transport": "allgather"}),
    (6, {"ulysses": 2, "transport": "direct"}),
    (2, {"ulysses": 2, "head_chunks": 2}),
    (4, {"ulysses": 2, "head_chunks": 2}),
    (4, {"ulysses": 2, "head_chunks": 2, "transport": "allgather"}),
    (6, {"ulysses": 2, "head_chunks": 2, "transport": "direct"}),
]


def _named(algorithm: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in algorithm.items())


IDS = [f"{ranks}-{_named(algorithm)}" for ranks, algorithm in ALGORITHMS]


@pytest.mark.parametrize("num_ranks, algorithm", ALGORITHMS, ids=IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_algorithm_is_exact_in_every_layout(layout, num_ranks, algorithm):
    heads = {"heads": 8, "kv_heads": 4} if algorithm.get("ulysses") == 4 else {}
    # fp64 finds every mistake of a plan or a message; the others judge rounding, on the masks that merge most.
    for dtype, units, masks in (("float64", 5, MASKS), ("float32", 5, MASKS[-3:]), ("bfloat16", 5, MASKS[-3:])):
        cases = [Case(layout, num_ranks, dtype, units=units, **mask, **algorithm, **heads) for mask in masks]
        _print(f"{_named(algorithm)} {layout} ranks={num_ranks}", dtype, check_exact(cases))


@pytest.mark.parametrize("ulysses", [2, 4])
@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (8, 2), (9, 3), (8, 1), (8, 8)])
def test_ulysses_is_exact_for_any_number_of_heads(heads, kv_heads, ulysses):
    for dtype in ("float64", "bfloat16"):
        cases = [
            Case("zigzag", 4, dtype, heads=heads, kv_heads=kv_heads, ulysses=ulysses, packed=packed)
            for packed in (False, True)
        ]
        _print(f"ulysses={ulysses} of 4, heads={heads}/{kv_heads}", dtype, check_exact(cases))


@pytest.mark.parametrize("num_ranks, ulysses", [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 4), (8, 2), (8, 1), (9, 3), (9, 1), (5, 5)])
def test_heads_in_chunks_are_exact_for_any_number_of_heads(heads, kv_heads, num_ranks, ulysses):
    most = -(-heads // ulysses) if kv_heads != 3 or ulysses == 2 else 3  # of the busiest rank
    for dtype in ("float64", "bfloat16"):
        cases = [
            Case(
                "zigzag",
                num_ranks,
                dtype,
                heads=heads,
                kv_heads=kv_heads,
                ulysses=ulysses,
                head_chunks=count,
                packed=packed,
                with_sinks=packed and dtype == "float64",
            )
            for count in sorted({2, most - 1, most} - {1})
            for packed in (False, True)
        ]
        _print(f"ulysses={ulysses} of {num_ranks} in chunks, heads={heads}/{kv_heads}", dtype, check_exact(cases))


MATHS = {
    "softcap": {"softcap": 0.5},
    "sinks": {"with_sinks": True},
    "mla": {"v_dim": 4},
    "wide-values": {"v_dim": 12},
    "softcap-sinks-mla": {"softcap": 0.5, "with_sinks": True, "v_dim": 4},
    "reference-mla": {"kernel": "reference", "v_dim": 4},
}


@pytest.mark.parametrize("name", MATHS)
def test_maths_of_model_families_is_exact(name):
    algorithms: tuple[dict, ...] = (
        {"transport": "ring"},
        {"transport": "allgather"},
        {"transport": "direct"},
        {"ulysses": 2, "heads": 6, "kv_heads": 3},
        {"ulysses": 2, "heads": 6, "kv_heads": 3, "head_chunks": 3},
    )
    for dtype in ("float64", "float32"):
        cases = [
            Case(layout, 4, dtype, **algorithm, **MATHS[name], **mask)
            for layout in ("zigzag", "striped")
            for algorithm in algorithms
            for mask in ({}, {"packed": True, "window": 9})
        ]
        _print(name, dtype, check_exact(cases))


@pytest.mark.parametrize(
    "transport, inner", [("allgather", 1), ("direct", 1), ("double_ring", 2), ("auto", 1), ("auto", 2)]
)
def test_without_overlap_every_transport_gives_the_same(transport, inner):
    check_exact(
        [
            Case("zigzag", 4, packed=packed, transport=transport, inner=inner, overlap=False, causal=causal)
            for packed in (False, True)
            for causal in (False, True)
        ]
    )
