"""The flash-attn and CUDA adapters keep their contract with the kernels they call, on a CPU, in fp64.

Whole rings run through stand-ins with each version's signatures, results and faults (`tests/flash_stand_ins.py`), and
are judged against dense attention at 1e-10. What the CUDA kernels compute on a GPU is not tested here.
"""

import importlib.metadata
import inspect
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from ring_hf import kernels
from ring_hf.geometry import LAYOUTS, TRANSPORTS, Mask, Tile, WholeSequence, multiple, trim
from ring_hf.kernels import (
    FAMILIES,
    KERNELS,
    Tokens,
    candidates,
    choose,
    cuda_flash,
    flash_attn_2,
    flash_calls,
    reference,
)
from ring_hf.parallel import local_attention
from scripts import fuzz
from tests.flash_stand_ins import ADAPTERS, CALLS, PACKAGES, aten_backward, aten_forward, stand_in
from tests.threads import threads_as_ranks

# A mask, and whether documents are packed, and the tokens at the start of each document that all see each other.
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


@pytest.fixture(scope="module")
def run():
    with threads_as_ranks() as threads:
        yield threads


def problem(layout: str, mask: str, heads: str, transport: str = "ring", num_ranks: int = 3) -> fuzz.Case:
    """One of the matrix: about 40 tokens and two rows on `num_ranks` ranks."""
    rule, packed, prefix = MASKS[mask]
    length = multiple(layout, num_ranks, 1) * (7 if layout in ("zigzag", "balanced") else 13)
    bounds = ((0, 1, 6, length // 2 + 3, length - 1, length), (0, length // 3, length // 3 + 1, length))
    prefixes = tuple(tuple(min(prefix, b - a) for a, b in itertools.pairwise(row)) for row in bounds) if prefix else ()
    sequence = WholeSequence(layout, length, num_ranks, bounds if packed else None, None, prefixes or None)
    inner = 2 if transport == "double_ring" else 1
    return fuzz.Case(sequence, rule, 2, *HEADS[heads], None, False, "auto", transport, inner, True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_rings_match_dense_attention_through_every_adapter(adapter, layout, mask, run):
    with stand_in(adapter) as kernel:
        for heads in HEADS:
            case = replace(problem(layout, mask, heads), kernel=kernel)
            assert fuzz.worst_difference(case, run) <= fuzz.BAR, case


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_transport_works_with_every_adapter(adapter, transport, run):
    with stand_in(adapter) as kernel:
        for mask in ("causal", "packed-window"):
            case = replace(problem("zigzag", mask, "gqa", transport, num_ranks=4), kernel=kernel, sinks=True)
            assert fuzz.worst_difference(case, run) <= fuzz.BAR, case


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("adapter", PACKAGES)
def test_soft_capping_is_exact_in_every_version_of_flash_attn(adapter, mask, run):
    with stand_in(adapter) as kernel:
        for heads in HEADS:
            case = replace(problem("zigzag", mask, heads), kernel=kernel, softcap=0.5)
            assert fuzz.worst_difference(case, run) <= fuzz.BAR, case


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_random_problems_are_exact_through_every_adapter(adapter, run):
    checked = []
    with stand_in(adapter) as kernel:

        @settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
        @given(fuzz.cases())
        def check(case):
            softcap = None if adapter == "aten" else case.softcap
            checked.append(case)
            assert fuzz.worst_difference(replace(case, kernel=kernel, softcap=softcap), run) <= fuzz.BAR

        check()
    assert len(checked) >= 60


def worst_band(kernel, most: int) -> float:
    """Largest difference of out, lse, dq, dk and dv to the reference over all tiles of up to `most` x `most`."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, 2, most, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    lse, worst, number = torch.full((2, 2, most), 3.0, dtype=torch.float64), 0.0, 0
    for num_q, num_k in itertools.product(range(1, most + 1), repeat=2):
        los, his = (None, *range(1 - num_q, num_k)), (None, *range(1 - num_q, num_k))
        for lo, hi in itertools.product(los, his):
            if trim(num_q, num_k, lo, hi) != (0, num_q, 0, num_k, lo, hi):
                continue
            tiles, number = [Tile(0, 2, 0, num_q, 0, num_k, lo, hi)], number + 1
            found = []
            for module in (kernel, reference):
                state, sums = kernels.State(q, 8), [kernels.Sum(x, torch.float64) for x in (q, k, v)]
                for queries, *results in module.forward(q, k, v, tiles, 0.3):
                    state.add(queries, *results)
                for queries, keys, *grads in module.backward(dout, q, k, v, q, lse, tiles, 0.3):
                    for total, place, grad in zip(sums, (queries, keys, keys), grads, strict=True):
                        total.add(place, grad)
                found.append((state.out, state.lse.exp(), *(total.total for total in sums)))
            apart = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
            worst = max(worst, apart) if apart == apart else float("inf")
    assert number == {5: 155, 8: 876}[most]
    return worst


@pytest.mark.parametrize("large", [1, 100], ids=["dense", "alone-or-packed"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_band_becomes_calls_that_the_host_code_gets_right(adapter, large):
    with stand_in(adapter, large) as name:
        assert worst_band(KERNELS[name], 8 if adapter == "aten" and large == 1 else 5) <= 1e-12


def test_many_documents_are_one_call_and_large_tiles_are_their_own():
    bounds = (0, 3, 8, 15, 25, 64)
    q, k, v = (torch.randn(1, 2, 64, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with stand_in("2.8.3", large=30) as kernel:
        CALLS.clear()
        local_attention(q, k, v, documents=(bounds,), kernel=kernel)[0].sum().backward()
        assert (CALLS["dense"], CALLS["packed"]) == (1, 1)  # the stand-in counts forward


@pytest.mark.parametrize("version", PACKAGES)
def test_backward_is_deterministic_where_pytorch_was_told_to_be(version):
    q = torch.randn(1, 2, 20, 8, dtype=torch.float64, requires_grad=True)
    bounds = ((0, 3, 20),)
    with stand_in(version) as kernel:
        for asked, counted in ((False, 0), (True, 2)):
            CALLS.clear()
            torch.use_deterministic_algorithms(asked)
            try:
                local_attention(q, q, q, documents=bounds, kernel=kernel)[0].sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
            assert CALLS["deterministic"] == counted


def test_a_query_or_key_appears_once_in_a_call():
    tiles = [
        Tile(0, 2, 0, 4, 0, 4, None, None),
        Tile(0, 2, 4, 4, 4, 4, None, None),
        Tile(0, 1, 2, 4, 8, 4, None, None),
    ]
    found = list(flash_calls.calls(tiles, torch.device("cpu")))
    assert [len(call.documents.cu_q) - 1 if call.documents else None for call in found] == [4, None]
    tokens = found[0].queries
    assert isinstance(tokens, Tokens)
    pairs = list(zip(tokens.rows_T.tolist(), tokens.tokens_T.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) == 16


def test_rows_that_saw_nothing_come_back_with_lse_minus_infinity():
    q = torch.zeros(1, 1, 2, 8)

    def attend(q, k, v, call, scale, softcap):
        return torch.zeros_like(q), torch.tensor([[[torch.inf, 1.0]]])

    kernel = replace(KERNELS["cuda_flash"], attend=attend)
    ((_, _, lse),) = kernel.forward(q, q, q, [Tile(0, 1, 0, 2, 0, 2, None, 0)], 1.0)
    assert lse.tolist() == [[[-torch.inf, 1.0]]]


@pytest.mark.parametrize(
    "stand, real", [(aten_forward, cuda_flash._forward), (aten_backward, cuda_flash._backward)], ids=str
)
def test_pytorchs_schemas_are_those_that_were_read(stand, real):
    schema = [argument.name for argument in real._schema.arguments]
    assert schema == list(inspect.signature(stand).parameters), f"PyTorch {torch.__version__}: {real._schema}"
    assert len(real._schema.returns) == (5 if stand is aten_forward else 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_shapes_and_dtypes_are_right_for_pytorchs_own_operators(heads, dtype, monkeypatch):
    # Two Python methods ask for CUDA even of fake tensors; the operators behind them do not.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    index = torch.ops.aten.index.Tensor
    monkeypatch.setattr(Tokens, "of", lambda self, x: index(x.transpose(1, 2), [self.rows_T, self.tokens_T]))
    (num_heads, num_kv), (dim, v_dim) = HEADS[heads]
    flash_calls._grouped.cache_clear()
    with FakeTensorMode():
        q, k, v, dout, out = (
            torch.empty(2, 40, number, width, dtype=dtype, device="cuda").transpose(1, 2)
            for number, width in ((num_heads, dim), (num_kv, dim), *[(num_kv, v_dim)], *[(num_heads, v_dim)] * 2)
        )
        lse = torch.empty(2, num_heads, 40, device="cuda")
        for tiles in (
            [Tile(0, 2, 0, 40, 0, 40, None, 0)],
            [Tile(0, 2, 0, 5, 0, 5, None, 0), Tile(0, 1, 5, 9, 5, 9, None, 0)],
        ):
            for queries, one_out, one_lse in cuda_flash.KERNEL.forward(q, k, v, tiles, 0.3):
                assert one_out.shape == queries.of(out).shape and one_out.dtype == dtype
                assert one_lse.shape == queries.of(lse).shape and one_lse.dtype == torch.float32
            for queries, keys, *grads in cuda_flash.KERNEL.backward(dout, q, k, v, out, lse, tiles, 0.3):
                for place, grad, x in zip((queries, keys, keys), grads, (q, k, v), strict=True):
                    assert grad.shape == place.of(x).shape and grad.dtype == dtype and grad.device.type == "cuda"


@pytest.mark.parametrize("version", PACKAGES)
def test_stand_ins_take_what_the_adapter_passes(version):
    assert flash_attn_2.compare(PACKAGES[version], flash_attn_2.form_of(version)) == []


def test_an_installed_flash_attn_has_the_functions_that_were_read():
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn is not installed here")
    found = flash_attn_2.installed()
    assert not isinstance(found, str), found
    same = next(stand for stand in PACKAGES if flash_attn_2.form_of(stand) is flash_attn_2.form_of(version))
    for name in flash_attn_2.ARGUMENTS:
        read, have = (
            list(inspect.signature(getattr(getattr(module, name), "_init_fn", getattr(module, name))).parameters)
            for module in (PACKAGES[same], found[2])
        )
        assert have[: len(read)] == read, f"flash-attn {version}: {name} takes {have}, {same} took {read}"


@pytest.mark.parametrize("version", ["2.5.9", "2.6.1", "2.9.0", "3.0.0", "source"])
def test_unknown_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = flash_attn_2.installed.__wrapped__()
    assert f"flash-attn {version} is not one whose functions are known here; install flash-attn>=2.6.2" in reason


def test_a_version_whose_functions_changed_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.3")
    monkeypatch.setattr(flash_attn_2.importlib, "import_module", lambda name: PACKAGES["2.6.3"])
    reason = flash_attn_2.installed.__wrapped__()
    assert "flash-attn 2.8.3 differs from what was read: _flash_attn_forward takes no window_size_left" in reason
    assert "_flash_attn_forward wants window_size" in reason


def _half(dim=64, dtype=torch.bfloat16):
    return torch.zeros(1, 1, 1, dim, dtype=dtype)


UNFIT = {
    "device": ("DEVICE", "cuda", _half(), "the tensors are on cpu"),
    "dtype": ("DTYPES", (torch.bfloat16,), _half(dtype=torch.float32), "dtype torch.float32 is not one of"),
    "head dim": ("DTYPES", (torch.bfloat16,), _half(264), "head dim 264 is above 256"),
    "old device": ("capability", lambda device: (7, 5), _half(dtype=torch.float64), "capability 7.5 is below 8.0"),
    "no device": ("capability", lambda device: None, _half(dtype=torch.float64), "PyTorch finds no CUDA device"),
}


@pytest.mark.parametrize("adapter", ["aten", "2.8.3"])
@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_by_its_reason(name, adapter, monkeypatch):
    attribute, value, q, message = UNFIT[name]
    with stand_in(adapter) as kernel, monkeypatch.context() as patch:
        patch.setattr(flash_calls, attribute, value)
        with pytest.raises(ValueError, match=message):
            choose(kernel, q, q)


def test_a_version_is_refused_on_devices_newer_than_it(monkeypatch):
    q = _half(dtype=torch.float64)
    for version, fits in (("2.6.3", False), ("2.7.2.post1", False), ("2.8.3", True)):
        with stand_in(version), monkeypatch.context() as patch:
            patch.setattr(flash_calls, "capability", lambda device: (10, 0))
            reason = flash_attn_2.unfit(q, q, None)
            assert reason is None if fits else "is not for compute capability 10.0" in reason


def test_auto_takes_the_first_that_fits_and_says_once_why(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="ring_hf")
    monkeypatch.setattr(kernels, "_told", set())
    q = _half(dtype=torch.float64)
    with stand_in("2.8.3"):
        assert choose("auto", q, q) is KERNELS["flash_attn_2"]
    with stand_in("aten"):
        assert [choose("auto", q, q), choose("auto", q, q)] == [KERNELS["cuda_flash"]] * 2
        assert choose("auto", q, q, 2.0) is reference  # soft-capping: neither cuda_flash nor cpu
    said = [record.message for record in caplog.records]
    assert said[0] == "kernel flash_attn_2: the first choice" and len(said) == 3
    assert said[1].startswith("kernel cuda_flash: not flash_attn_2, as ")
    assert "not cuda_flash, as it has no soft-capping (softcap=2.0)" in said[2]


def test_a_family_stands_for_its_first_that_fits():
    q = _half(dtype=torch.float64)
    for adapter, family in (("2.8.3", "flash_attn"), ("aten", "cuda")):
        with stand_in(adapter) as kernel:
            assert choose(family, q, q) is choose(kernel, q, q)
            assert list(candidates(family, q, q)) == list(FAMILIES[family])
            with pytest.raises(ValueError, match=f"{family}' cannot .*{kernel}: head dim 264 is above"):
                choose(family, q.new_zeros(1, 1, 1, 264), q)
