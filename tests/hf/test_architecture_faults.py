"""The comparison of architectures detects errors: each fault disables one thing that the library does for a model.

Also packed documents, for model families whose attention could mix them up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest

from ring_hf.hf.attention import backend, shard_errors
from ring_hf.hf.checks import moe_aux_loss
from ring_hf.hf.trainer import counters, model_guard
from ring_hf.verify.model_families import ROUTER_LOSS
from tests.hf.family_comparison import Difference, Results, compare
from tests.support.harness import run_distributed

# The references of `compare`, by rank.
EAGER, LOCAL = 0, 1


@dataclass(frozen=True)
class Fault:
    """A replaced function, and a comparison that must detect it.

    Attributes:
        module: that uses the function.
        name: of the function.
        replacement: the function without its effect.
        family: a family that needs the function.
        config: fields of its config.
        references: that differ from the faulty result.
    """

    module: Any
    name: str
    replacement: Callable
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    references: tuple[int, ...] = (EAGER, LOCAL)


FAULTS = {
    "router logits of one shard": Fault(
        moe_aux_loss, "_gather_sequence", lambda logits, metadata: logits, "mixtral", config=ROUTER_LOSS
    ),
    "positions in the shard": Fault(
        backend, "_llama4_query_temperature", lambda module, query, batch: query, "llama4_text"
    ),
    "full attention in all chunks": Fault(
        backend, "layer_chunk", lambda module: None, "llama4_text", references=(EAGER,)
    ),
    "window ignored": Fault(backend, "layer_window", lambda module: None, "qwen2_moe", references=(EAGER,)),
    "targets counted per shard": Fault(model_guard, "_needs_count", lambda kwargs: False, "gemma4"),
    "first labels not counted": Fault(counters, "_correct_num_items", lambda trainer: None, "gpt2"),
}
# gpt-oss is compared with the ring backend only: Transformers lets its packed documents attend to each other.
PACKED = {
    "llama4_text": (EAGER, LOCAL),
    "gemma2": (EAGER, LOCAL),
    "deepseek_v3": (EAGER, LOCAL),
    "qwen2_moe": (EAGER, LOCAL),
    "gemma4": (EAGER, LOCAL),
    "gpt_oss": (LOCAL,),
}


def compare_with_fault(rank: int, world_size: int, fault_name: str) -> Difference | str:
    fault = FAULTS[fault_name]
    with mock.patch.object(fault.module, fault.name, fault.replacement):
        return compare(rank, world_size, [fault.family], fault.config)[fault.family]


@pytest.mark.parametrize("fault_name", FAULTS)
def test_comparison_detects_each_fault(fault_name):
    results = run_distributed(2, compare_with_fault, fault_name, timeout=60)
    for reference in FAULTS[fault_name].references:
        difference = results[reference]
        assert isinstance(difference, Difference), f"{fault_name}: {difference}"
        assert difference.gradient > 1e-2, f"{fault_name}: {difference}"


def compare_packed(rank: int, world_size: int) -> Results:
    """Run `compare` with both examples of each micro-batch in one row."""
    return compare(rank, world_size, list(PACKED), {}, packing=True)


def test_packed_documents_equal_one_process():
    results = run_distributed(2, compare_packed, timeout=60)
    for family, references in PACKED.items():
        for reference in references:
            difference = results[reference][family]
            if family == "llama4_text" and not backend.chunks_begin_with_documents():
                assert shard_errors.CHUNKS_OF_PACKED_ROWS in difference
                continue
            assert isinstance(difference, Difference), f"{family}: {difference}"
            assert difference.is_within((1e-6, 2e-6, 5e-6)), f"{family}: {difference}"


def compare_packed_in_older_releases(rank: int, world_size: int) -> Results:
    with mock.patch.object(backend, "chunks_begin_with_documents", lambda: False):
        return compare(rank, world_size, ["llama4_text", "gemma2"], {}, packing=True)


def test_chunks_of_packed_documents_are_refused_before_5_23():
    for result in run_distributed(2, compare_packed_in_older_releases, timeout=60):
        assert shard_errors.CHUNKS_OF_PACKED_ROWS in result["llama4_text"]
        assert isinstance(result["gemma2"], Difference)
