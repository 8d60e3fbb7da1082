"""The comparison of architectures sees mistakes: each fault switches off one thing that the backend does for a model.
And packed documents, for models whose mathematics could mix them up."""

import pytest

from ring_hf.hf import ContextParallelCollator, backend, router
from tests.harness import run_distributed
from tests.hf import test_architectures as bench
from tests.hf.architectures import ROUTER_LOSS

# What is switched off, a family that needs it, its settings, and the reference that shows it (0: eager, 1: local).
FAULTS = {
    "router logits of one shard": (router, "_whole", lambda logits, batch: logits, "mixtral", ROUTER_LOSS, (0, 1)),
    "places in the shard": (backend, "_by_place", lambda module, query, batch: query, "llama4_text", {}, (0, 1)),
    "full attention in all chunks": (backend, "_chunk", lambda module: None, "llama4_text", {}, (0,)),
    "a window told to nobody": (backend, "_window", lambda module: None, "qwen2_moe", {}, (0,)),
}
# gpt-oss is compared with itself only: Transformers lets its packed documents see each other.
PACKED = {"llama4_text": (0, 1), "gemma2": (0, 1), "deepseek_v3": (0, 1), "qwen2_moe": (0, 1), "gpt_oss": (1,)}


def faulty(rank, world_size, fault):
    module, name, replacement, family, settings, _ = FAULTS[fault]
    kept = getattr(module, name)
    setattr(module, name, replacement)
    try:
        return bench.compare(rank, world_size, [family], settings)[family]
    finally:
        setattr(module, name, kept)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault):
    results = run_distributed(2, faulty, fault, timeout=60)
    for reference in FAULTS[fault][-1]:
        assert results[reference][2] > 1e-2, f"{fault}: {results[reference]}"


def packed(rank, world_size):
    """`compare` with both examples in one row."""
    kept = bench.ContextParallelCollator, bench.LENGTHS
    features = bench.examples()
    bench.LENGTHS = (sum(bench.LENGTHS),)
    bench.ContextParallelCollator = lambda model: _Packing(model, features)
    try:
        return bench.compare(rank, world_size, list(PACKED), {})
    finally:
        bench.ContextParallelCollator, bench.LENGTHS = kept


class _Packing(ContextParallelCollator):
    def __init__(self, model, features):
        super().__init__(model, packing=True)
        self.packed = features

    def __call__(self, features):
        return super().__call__(self.packed)


def test_packed_documents_equal_one_process():
    results = run_distributed(2, packed, timeout=60)
    for family, references in PACKED.items():
        for reference in references:
            apart = results[reference][family]
            assert not isinstance(apart, str), f"{family}: {apart}"
            assert apart[0] < 1e-6 and apart[2] < 5e-6, f"{family}: {apart}"
