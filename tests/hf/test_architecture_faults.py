"""The comparison of architectures sees mistakes: each fault switches off one thing that the library does for a model.
And packed documents, for models whose mathematics could mix them up."""

import pytest

from ring_hf.hf.attention import backend
from ring_hf.hf.checks import moe_aux_loss
from ring_hf.hf.trainer import counters, model_guard
from tests.harness import run_distributed
from tests.hf.architectures import ROUTER_LOSS
from tests.hf.family_comparison import Difference, Results, compare

# What is switched off, a family that needs it, its settings, and the references that show it (0: eager, 1: local).
FAULTS = {
    "router logits of one shard": (
        moe_aux_loss,
        "_whole",
        lambda logits, batch: logits,
        "mixtral",
        ROUTER_LOSS,
        (0, 1),
    ),
    "places in the shard": (
        backend,
        "_llama4_query_temperature",
        lambda module, query, batch: query,
        "llama4_text",
        {},
        (0, 1),
    ),
    "full attention in all chunks": (backend, "_chunk", lambda module: None, "llama4_text", {}, (0,)),
    "a window told to nobody": (backend, "_window", lambda module: None, "qwen2_moe", {}, (0,)),
    "targets of a shard counted alone": (model_guard, "_needs_count", lambda kwargs: False, "gemma4", {}, (0, 1)),
    "first labels not counted": (counters, "_correct_num_items", lambda trainer: None, "gpt2", {}, (0, 1)),
}
# gpt-oss is compared with itself only: Transformers lets its packed documents see each other.
PACKED = {
    "llama4_text": (0, 1),
    "gemma2": (0, 1),
    "deepseek_v3": (0, 1),
    "qwen2_moe": (0, 1),
    "gemma4": (0, 1),
    "gpt_oss": (1,),
}


def faulty(rank: int, world_size: int, fault: str) -> Difference | str:
    module, name, replacement, family, settings, _ = FAULTS[fault]
    kept = getattr(module, name)
    setattr(module, name, replacement)
    try:
        return compare(rank, world_size, [family], settings)[family]
    finally:
        setattr(module, name, kept)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault):
    results = run_distributed(2, faulty, fault, timeout=60)
    for reference in FAULTS[fault][-1]:
        difference = results[reference]
        assert isinstance(difference, Difference), f"{fault}: {difference}"
        assert difference.gradient > 1e-2, f"{fault}: {difference}"


def packed(rank: int, world_size: int) -> Results:
    """`compare` with both examples of each micro-batch in one row."""
    return compare(rank, world_size, list(PACKED), {}, packing=True)


def test_packed_documents_equal_one_process():
    results = run_distributed(2, packed, timeout=60)
    for family, references in PACKED.items():
        for reference in references:
            difference = results[reference][family]
            assert isinstance(difference, Difference), f"{family}: {difference}"
            assert difference.is_within((1e-6, 2e-6, 5e-6)), f"{family}: {difference}"
