"""The adapters of FlashAttention call its functions correctly, on a CPU in fp64.

Whole rings run through stand-ins with the signatures, results and faults of each version
(`tests/support/flash_stand_ins.py`), and are compared with dense attention at 1e-10. The numbers of CUDA kernels on a
GPU are not tested. How packages are located is tested in `test_flash_packages.py`, how tiles become launches in
`test_flash_calls.py`.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ring_hf import kernels
from ring_hf.geometry import LAYOUTS, TRANSPORTS, Mask, ShardedSequence, Tile, length_multiple, trim
from ring_hf.kernels import reference
from ring_hf.parallel import local_attention
from ring_hf.verify import random_cases
from ring_hf.verify.thread_ranks import threads_as_ranks
from tests.support.flash_stand_ins import ADAPTERS, ADAPTERS_WITHOUT_SOFTCAP, CALLS, PACKAGES, kernel_named, stand_in

# A mask, whether documents are packed, and the number of tokens in the prefix of each document.
MASKS = {
    "causal": (Mask(), False, None),
    "packed": (Mask(), True, None),
    "window": (Mask(window=7), False, None),
    "packed-window": (Mask(window=5), True, None),
    "full": (Mask(causal=False), False, None),
    "packed-full": (Mask(causal=False), True, None),
    "chunks": (Mask(chunk=11, window=6), True, None),
    "prefix": (Mask(), True, 3),
}
HEADS = {"mha": ((3, 3), (8, 8)), "gqa": ((6, 2), (4, 4)), "mla": ((4, 4), (12, 5))}
ADAPTERS_WITH_SOFTCAP = tuple(adapter for adapter in ADAPTERS if adapter not in ADAPTERS_WITHOUT_SOFTCAP)
# All adapters run COMMON_MASKS in every layout, and some of each major version run all masks.
COMMON_MASKS = ("causal", "packed", "window")
ADAPTERS_WITH_ALL_MASKS = ("aten", "2.6.3", "2.8.3", "3-2025-09", "4-beta26")
MATRIX = [
    (adapter, layout, mask)
    for adapter, layout, mask in itertools.product(ADAPTERS, LAYOUTS, MASKS)
    if mask in COMMON_MASKS or adapter in ADAPTERS_WITH_ALL_MASKS
]


@pytest.fixture(scope="module")
def run():
    with threads_as_ranks() as threads:
        yield threads


def problem(layout: str, mask: str, heads: str, transport: str = "ring", num_ranks: int = 3) -> random_cases.Case:
    """Return a problem of the matrix: about 40 tokens and two rows on `num_ranks` ranks."""
    mask_rule, packed, prefix = MASKS[mask]
    length = length_multiple(layout, num_ranks, 1) * (7 if layout in ("zigzag", "balanced") else 13)
    bounds = ((0, 1, 6, length // 2 + 3, length - 1, length), (0, length // 3, length // 3 + 1, length))
    prefixes = tuple(tuple(min(prefix, b - a) for a, b in itertools.pairwise(row)) for row in bounds) if prefix else ()
    sequence = ShardedSequence(layout, length, num_ranks, bounds if packed else None, None, prefixes or None)
    num_heads, head_dims = HEADS[heads]
    return random_cases.Case(
        sequence=sequence,
        mask=mask_rule,
        rows=2,
        heads=num_heads,
        head_dims=head_dims,
        softcap=None,
        sinks=False,
        kernel="auto",
        transport=transport,
        inner=2 if transport == "double_ring" else 1,
        overlap=True,
        head_chunks=1,
    )


@pytest.mark.parametrize("adapter, layout, mask", MATRIX)
def test_rings_match_dense_attention_through_every_adapter(adapter, layout, mask, run):
    with stand_in(adapter) as kernel:
        for heads in HEADS:
            case = replace(problem(layout, mask, heads), kernel=kernel)
            assert random_cases.worst_difference(case, run) <= random_cases.BAR, case


def test_the_matrix_is_complete_and_has_804_rings():
    assert len(set(MATRIX)) * len(HEADS) == 804
    print("\nrings, each with", ", ".join(HEADS))
    for adapter in ADAPTERS:
        pairs = {(layout, mask) for name, layout, mask in MATRIX if name == adapter}
        assert pairs >= set(itertools.product(LAYOUTS, COMMON_MASKS)), adapter
        num_masks = len({mask for _, mask in pairs})
        print(f"{adapter:36}{len(LAYOUTS)} layouts x {num_masks} masks x {len(HEADS)} heads")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_transport_works_with_every_adapter_and_sinks(adapter, transport, run):
    with stand_in(adapter) as kernel:
        for mask in ("causal", "packed-window") if adapter in ADAPTERS_WITH_ALL_MASKS else ("packed-window",):
            case = replace(problem("zigzag", mask, "gqa", transport, num_ranks=4), kernel=kernel, sinks=True)
            assert random_cases.worst_difference(case, run) <= random_cases.BAR, case


@pytest.mark.parametrize("mask", COMMON_MASKS)
@pytest.mark.parametrize("adapter", ADAPTERS_WITH_SOFTCAP)
def test_soft_capping_is_exact_through_every_adapter_that_has_it(adapter, mask, run):
    with stand_in(adapter) as kernel:
        for heads in HEADS:
            case = replace(problem("zigzag", mask, heads), kernel=kernel, softcap=0.5)
            assert random_cases.worst_difference(case, run) <= random_cases.BAR, case


@pytest.mark.parametrize("adapter", ADAPTERS_WITHOUT_SOFTCAP)
def test_soft_capping_is_refused_if_backward_has_none(adapter):
    q = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    with stand_in(adapter) as kernel, pytest.raises(ValueError, match=r"has no soft-capping \(softcap=2.0\)"):
        kernels.choose(kernel, q, q, 2.0)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_random_problems_are_exact_through_every_adapter(adapter, run):
    checked = []
    num_examples = 60 if adapter in ADAPTERS_WITH_ALL_MASKS else 12
    with stand_in(adapter) as kernel:

        @settings(
            max_examples=num_examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=HealthCheck,
        )
        @given(random_cases.cases())
        def check(case):
            softcap = None if adapter in ADAPTERS_WITHOUT_SOFTCAP else case.softcap
            checked.append(case)
            served = replace(case, kernel=kernel, softcap=softcap)
            assert random_cases.worst_difference(served, run) <= random_cases.BAR

        check()
    assert len(checked) >= num_examples


def _tile_results(kernel, tile, q, k, v, dout, lse):
    """Return `out, exp(lse), dq, dk, dv` of one tile; backward gets q as `out`, and a constant lse."""
    output = kernels.OutLseAccumulator(q, q.shape[-1])
    for queries, tile_out, tile_lse in kernel.forward(q, k, v, [tile], 0.3):
        output.merge(queries, tile_out, tile_lse)
    dq, dk, dv = (kernels.GradAccumulator(x, torch.float64) for x in (q, k, v))
    for queries, keys, tile_dq, tile_dk, tile_dv in kernel.backward(dout, q, k, v, q, lse, [tile], 0.3):
        dq.add(queries, tile_dq)
        dk.add(keys, tile_dk)
        dv.add(keys, tile_dv)
    return output.out, output.lse.exp(), dq.total, dk.total, dv.total


def max_band_difference(kernel, max_length: int) -> float:
    """Return the largest difference to the reference over all tiles of up to `max_length` queries and keys."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, 2, max_length, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    lse = torch.full((2, 2, max_length), 3.0, dtype=torch.float64)
    max_difference, num_tiles = 0.0, 0
    for num_q, num_k in itertools.product(range(1, max_length + 1), repeat=2):
        bounds = (None, *range(1 - num_q, num_k))
        for lo, hi in itertools.product(bounds, repeat=2):
            if trim(num_q, num_k, lo, hi) != (0, num_q, 0, num_k, lo, hi):
                continue
            num_tiles += 1
            tile = Tile(0, 2, 0, num_q, 0, num_k, lo, hi)
            got, want = (_tile_results(module, tile, q, k, v, dout, lse) for module in (kernel, reference))
            # Unlike Python's max, that of a tensor is NaN if any difference is.
            difference = torch.stack([(a - b).abs().max() for a, b in zip(got, want, strict=True)]).max().item()
            max_difference = float("inf") if math.isnan(difference) else max(max_difference, difference)
    assert num_tiles == {5: 155, 8: 876}[max_length]
    return max_difference


@pytest.mark.parametrize("large", [1, 100], ids=["dense", "alone-or-packed"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_band_is_exact_despite_the_faults_of_host_code(adapter, large):
    with stand_in(adapter, large) as name:
        max_length = 8 if adapter == "aten" and large == 1 else 5
        assert max_band_difference(kernel_named(name), max_length) <= 1e-12


# Head dims of queries and of values -> those that the functions get, by major version (and on Blackwell).
HEAD_DIMS = {
    (132, 100): {"2": (136, 136), "3": (136, 104), "4": (136, 104), "4 on 10.0": (192, 128)},
    (64, 40): {"2": (64, 64), "3": (64, 64), "4": (64, 40), "4 on 10.0": (64, 40)},
    (192, 128): {"2": (192, 192), "3": (192, 128), "4": (192, 128), "4 on 10.0": (192, 128)},
    (100, 132): {"2": (136, 136), "3": (136, 136), "4": (104, 136), "4 on 10.0": (256, 256)},
}


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("version", ["2", "3", "4", "4 on 10.0"])
def test_head_dims_are_padded_only_where_a_version_needs_it(version, dims):
    adapter = {"2": "2.8.3", "3": "3-2025-09", "4": "4-beta26"}[version[0]]
    capability = (10, 0) if version.endswith("10.0") else (9, 0)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, 2, 9, dim, generator=generator, dtype=torch.float64).requires_grad_()
        for dim in (dims[0], *dims)
    )
    results = []
    with stand_in(adapter, capability=capability) as kernel:
        CALLS.clear()
        for name in (kernel, "reference"):
            out, lse = local_attention(q, k, v, kernel=name)
            results.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert CALLS[HEAD_DIMS[dims][version]] == 2, CALLS  # forward and backward
    assert max((a - b).abs().max().item() for a, b in zip(*results, strict=True)) <= 1e-12


@pytest.mark.parametrize("adapter", PACKAGES)
def test_backward_is_deterministic_if_pytorch_is(adapter):
    q = torch.randn(1, 2, 20, 8, dtype=torch.float64, requires_grad=True)
    bounds = ((0, 3, 20),)
    with stand_in(adapter) as kernel:
        for deterministic, num_calls in ((False, 0), (True, 2)):
            CALLS.clear()
            torch.use_deterministic_algorithms(deterministic)
            try:
                local_attention(q, q, q, documents=bounds, kernel=kernel)[0].sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
            assert CALLS["deterministic"] == num_calls
