"""Tokens over a sharded cache against one process: families x ranks x backends x prompts, 200 new tokens each.

Runs with RING_HF_ALL_CASES=1. In fp64 all tokens are equal and logits within 1e-10, greedy and sampled with one seed.
In fp32 a token may differ where two logits nearly tie, so logits are compared up to the first one that differs. A
table of the worst differences is printed at the end.
"""

import os
from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from ring_hf.hf import ContextParallelCache, context
from ring_hf.text import markdown_table
from ring_hf.verify.model_families import tiny
from tests.hf.double_precision import DoublePrecision
from tests.hf.test_generation import SAMPLING, Result, activate_context, generate, prompt
from tests.support.harness import run_distributed

pytestmark = pytest.mark.skipif("RING_HF_ALL_CASES" not in os.environ, reason="runs with RING_HF_ALL_CASES=1")

FAMILIES = {  # none has a window or a length that a prompt does not exceed
    "llama": {},
    "mistral": {"sliding_window": 100},
    "gemma3_text": {"sliding_window": 100},
    "gpt_oss": {"sliding_window": 100},
    "deepseek_v3": {},
}
LENGTHS = (100, 257, 1023, 2048, 4000)
BACKENDS = {  # the cache deals tokens alike for all of them, so that only one takes all prompts
    "ring_zigzag": LENGTHS,
    "ring_striped": (100, 4000),
    "ring_contiguous": (257, 2048),
    "ulysses": (1023, 4000),
}
NEW_TOKENS = 200
KINDS = {  # dtype, settings, prompts
    "fp64 greedy": (torch.float64, {}, LENGTHS),
    "fp64 sampled": (torch.float64, SAMPLING, (1023,)),
    "fp32 greedy": (torch.float32, {}, (257,)),
}
BARS = {"fp64 greedy": 1e-10, "fp64 sampled": 1e-10, "fp32 greedy": 1e-3}


@dataclass(frozen=True)
class Comparison:
    """With the generation of one process: equal tokens at the start, and the largest difference of their logits."""

    equal_tokens: int
    difference: float


_references: dict[str, dict[tuple[str, int], Result]] = {}
_comparisons: dict[tuple[str, str], list[Comparison]] = defaultdict(list)


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    """Print the table when all cases have run."""
    yield
    if not _comparisons:
        return
    rows = [["family", "kind", "generations", "all tokens equal", "worst logit difference"]]
    for (name, kind), comparisons in _comparisons.items():
        equal = sum(comparison.equal_tokens == NEW_TOKENS for comparison in comparisons)
        worst = max(comparison.difference for comparison in comparisons)
        rows.append([name, kind, str(len(comparisons)), str(equal), f"{worst:.1e}"])
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{markdown_table(rows)}")


def settings_of(kind):
    dtype, settings, lengths = KINDS[kind]
    return dtype, {**settings, "max_new_tokens": NEW_TOKENS}, lengths


def lengths_of(kind, attention):
    return BACKENDS[attention] if kind == "fp64 greedy" else KINDS[kind][2]


def build(name, attention, dtype):
    torch.set_default_dtype(dtype)
    return tiny(name, attention, max_position_embeddings=8192, **FAMILIES[name]).to(dtype).eval()


def generate_alone(rank, size, name):
    """Return the result of one process by kind and length."""
    results = {}
    try:
        for kind in KINDS:
            dtype, settings, lengths = settings_of(kind)
            model = build(name, "ring_zigzag", dtype)
            for length in lengths:
                with context.whole_sequences(), DoublePrecision():
                    cache = DynamicCache(config=model.config)
                    results[kind, length] = generate(model, cache, prompt(length), **settings)
    finally:
        torch.set_default_dtype(torch.float32)
    return results


def compare_backend(rank, size, name, attention, references):
    """Return the comparison of every kind and length on this rank."""
    results = {}
    try:
        for kind in KINDS:
            dtype, settings, _ = settings_of(kind)
            model = build(name, attention, dtype)
            activate_context(rank, size)
            for length in lengths_of(kind, attention):
                with DoublePrecision():
                    shared = generate(model, ContextParallelCache(model), prompt(length), **settings)
                results[kind, length] = comparison_of(shared, references[kind, length], length)
    finally:
        context.reset()
        torch.set_default_dtype(torch.float32)
    return results


def comparison_of(shared, alone, length):
    assert shared.tokens.shape == alone.tokens.shape == (1, length + NEW_TOKENS)
    is_equal = (shared.tokens == alone.tokens)[0, length:].tolist()
    equal = next((index for index, same in enumerate(is_equal) if not same), NEW_TOKENS)
    compared = slice(min(equal + 1, NEW_TOKENS))  # the logits from which the first other token was chosen, too
    return Comparison(equal, (shared.logits[compared] - alone.logits[compared]).abs().max().item())


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_every_backend_are_those_of_one_process(name, size, attention):
    if name not in _references:
        (_references[name],) = run_distributed(1, generate_alone, name, timeout=600)
    for results in run_distributed(size, compare_backend, name, attention, _references[name], timeout=600):
        assert len(results) == sum(len(lengths_of(kind, attention)) for kind in KINDS)
        for (kind, length), comparison in results.items():
            _comparisons[name, kind].append(comparison)
            assert comparison.difference < BARS[kind], (kind, length, comparison)
            if kind.startswith("fp64"):
                assert comparison.equal_tokens == NEW_TOKENS, (kind, length, comparison)
