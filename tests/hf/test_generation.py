"""Generation over a sharded cache gives the tokens and logits of one process, for every kind of attention layer."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import DynamicCache, set_seed

from ring_hf.hf import ContextParallelCache, context
from ring_hf.parallel import register_group
from ring_hf.verify.model_families import tiny
from tests.hf.models import context_of
from tests.support.harness import run_distributed

FAMILIES = ("llama", "mistral", "gemma3_text", "gemma2", "gpt_oss", "deepseek_v3")
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 20}


@dataclass(frozen=True)
class Result:
    """What `generate` returned: tokens `[B, N]` and the logits of the new ones `[N, B, V]`."""

    tokens: torch.Tensor
    logits: torch.Tensor


def prompt(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, cache: Any, ids: torch.Tensor, **settings: Any) -> Result:
    set_seed(3)
    output = model.generate(
        ids,
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=0,
        **{"max_new_tokens": 12, "do_sample": False, "renormalize_logits": False, **settings},
    )
    return Result(output.sequences, torch.stack(output.logits))


def activate_context(rank: int, size: int) -> None:
    """Let this process share sequences with all processes of its group."""
    group = register_group(dist.group.WORLD)
    context.activate(replace(context_of(size, rank), group=group))


def both(rank: int, size: int, model: Any, ids: torch.Tensor, min_sharded: int, **settings: Any) -> tuple[Any, Any]:
    """Return the result over a sharded cache, and that of this process alone."""
    activate_context(rank, size)
    try:
        shared = generate(model, ContextParallelCache(model, min_sharded), ids, **settings)
    finally:
        context.reset()
    with context.whole_sequences():
        alone = generate(model, DynamicCache(config=model.config), ids, **settings)
    return shared, alone


def compare(rank: int, size: int, name: str, lengths: tuple[int, ...], settings: dict[str, Any]) -> list[float]:
    """Return the largest difference of logits for prompts of each length; the tokens must be equal."""
    torch.set_default_dtype(torch.float64)
    try:
        model = tiny(name, "ring_zigzag").eval()
        differences = []
        for length in lengths:
            shared, alone = both(rank, size, model, prompt(length), 8, **settings)
            assert torch.equal(shared.tokens, alone.tokens), (length, shared.tokens, alone.tokens)
            differences.append((shared.logits - alone.logits).abs().max().item())
        return differences
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [2, 3])
def test_tokens_and_logits_are_those_of_one_process(name, size):
    """A prompt that is sharded and padded, one that every rank computes."""
    for differences in run_distributed(size, compare, name, (41, 5), {}):
        assert max(differences) < 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_of_a_prompt_give_what_the_whole_one_gives(name):
    """Every chunk but the first is sharded with earlier keys; the last one is short, and every rank computes it."""
    for differences in run_distributed(2, compare, name, (41,), {"prefill_chunk_size": 12}):
        assert max(differences) < 1e-10
