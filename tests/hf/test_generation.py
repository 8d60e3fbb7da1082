"""Generation over a sharded cache gives the tokens and logits of one process, for every kind of attention layer."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import DynamicCache, set_seed
from transformers.generation import BaseStreamer

from ring_hf.hf import ContextParallelCache, context, guard_model
from ring_hf.parallel import register_group
from ring_hf.verify.model_families import refused, tiny
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


@contextmanager
def in_fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def generate(model: Any, cache: Any, ids: torch.Tensor, seed: int = 3, **settings: Any) -> Result:
    set_seed(seed)
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
    differences = []
    with in_fp64():
        model = tiny(name, "ring_zigzag").eval()
        for length in lengths:
            shared, alone = both(rank, size, model, prompt(length), 8, **settings)
            assert torch.equal(shared.tokens, alone.tokens), (length, shared.tokens, alone.tokens)
            differences.append((shared.logits - alone.logits).abs().max().item())
    return differences


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


@pytest.mark.parametrize("attention", ["ring_striped", "ring_contiguous", "ring_balanced", "ulysses"])
def test_the_layout_of_training_does_not_matter(attention):
    for difference in run_distributed(2, compare_layout, attention):
        assert difference < 1e-10


def compare_layout(rank: int, size: int, attention: str) -> float:
    with in_fp64():
        shared, alone = both(rank, size, tiny("llama", attention).eval(), prompt(30), 8)
    assert torch.equal(shared.tokens, alone.tokens)
    return (shared.logits - alone.logits).abs().max().item()


def test_all_ranks_draw_the_tokens_of_the_first():
    (first, *others) = run_distributed(3, sample)
    assert all(torch.equal(first, tokens) for tokens in others)
    (alone,) = run_distributed(1, sample)
    assert torch.equal(first, alone)


def sample(rank: int, size: int) -> torch.Tensor:
    """Sample with random states that differ between ranks."""
    with in_fp64():
        model = tiny("llama", "ring_zigzag").eval()
        if size > 1:
            activate_context(rank, size)
        try:
            cache = ContextParallelCache(model, 8)
            return generate(model, cache, prompt(30), seed=3 + rank, max_new_tokens=40, **SAMPLING).tokens
        finally:
            context.reset()


def test_rows_may_be_padded_on_the_left():
    for differences in run_distributed(2, compare_padded):
        assert max(differences) < 1e-10


def compare_padded(rank: int, size: int) -> list[float]:
    """Rows with and without padding: sharded whole, sharded in chunks, computed by all ranks, with a window."""
    ids, mask = prompt(30, rows=3), torch.ones(3, 30, dtype=torch.long)
    mask[1, :7], mask[2, :3] = 0, 0
    differences = []
    with in_fp64():
        for name, settings in (("llama", {}), ("mistral", {"prefill_chunk_size": 11}), ("gpt_oss", {})):
            for min_sharded in (8, 1000):
                model = tiny(name, "ring_zigzag").eval()
                shared, alone = both(rank, size, model, ids, min_sharded, attention_mask=mask, **settings)
                assert torch.equal(shared.tokens, alone.tokens), (name, min_sharded)
                differences.append((shared.logits - alone.logits).abs().max().item())
    return differences


def test_a_conversation_goes_on_with_its_cache():
    for tokens, expected in run_distributed(2, converse):
        assert torch.equal(tokens, expected)


def converse(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two turns; the second brings few tokens first, then many."""

    def talk(cache: Any, model: Any) -> torch.Tensor:
        tokens = prompt(30)
        for new in (prompt(3, seed=1), prompt(25, seed=2), prompt(1, seed=4)):
            tokens = generate(model, cache, torch.cat([tokens, new], dim=1)).tokens
        return tokens

    with in_fp64():
        model = tiny("gemma3_text", "ring_zigzag").eval()
        activate_context(rank, size)
        try:
            shared = talk(ContextParallelCache(model, 8), model)
        finally:
            context.reset()
        with context.whole_sequences():
            return shared, talk(DynamicCache(config=model.config), model)


@dataclass(frozen=True)
class Usage:
    """Of one rank: tokens whose keys it keeps in the layers, bytes of the cache, and collectives per decoded token."""

    num_tokens: list[int]
    num_bytes: int
    collectives: Counter


def test_every_rank_keeps_its_share_and_a_token_takes_few_messages():
    size, length, new = 4, 120, 80
    usages = run_distributed(size, measure_usage, length, new)
    full = [usage.num_tokens[1] for usage in usages]  # a layer without a window
    assert sum(full) == length + new  # the last token enters with the pass whose messages are counted
    assert max(full) - min(full) <= 32
    window = usages[0].collectives["window"]
    assert sum(usage.num_tokens[0] for usage in usages) <= window
    for usage in usages:
        # A merge for each layer, and the logits.
        assert usage.collectives == Counter(all_gather=2, broadcast=1, window=window)
    (alone,) = {usage.num_bytes for usage in run_distributed(1, measure_usage, length, new)}
    assert max(usage.num_bytes for usage in usages) < 1.3 * alone / size


def measure_usage(rank: int, size: int, length: int, new: int) -> Usage:
    model = tiny("gemma3_text", "ring_zigzag", layer_types=["sliding_attention", "full_attention"]).float().eval()
    if size > 1:
        activate_context(rank, size)
    try:
        cache = ContextParallelCache(model, 8)
        generate(model, cache, prompt(length), max_new_tokens=new)
        if size == 1:
            keys = [x for layer in cache.layers for x in (layer.keys, layer.values)]
            return Usage([], sum(x.numel() * x.element_size() for x in keys), Counter())
        calls: Counter = Counter(window=model.config.sliding_window)
        with count_collectives(calls), torch.no_grad():
            model(input_ids=prompt(1), past_key_values=cache)
        return Usage([layer.keys.shape[2] for layer in cache.layers], cache.num_local_bytes, calls)
    finally:
        context.reset()


@contextmanager
def count_collectives(calls: Counter) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "broadcast", "all_reduce", "all_to_all_single", "all_gather_object"):
            patch.setattr(dist, name, counted(getattr(dist, name), name, calls))
        yield


def counted(function: Any, name: str, calls: Counter) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    return call


def test_samples_during_training_with_and_without_the_cache():
    for tokens in run_distributed(2, generate_guarded):
        assert torch.equal(tokens["whole prompts"], tokens["alone"])
        assert torch.equal(tokens["cache"], tokens["alone"])


def generate_guarded(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Generate with a model whose training batches are checked, as a callback of the Trainer does."""
    with in_fp64():
        model = tiny("llama", "ring_zigzag").eval()
        guard_model(model)
        shared, alone = both(rank, size, model, prompt(30), 8)
        activate_context(rank, size)
        try:
            whole = generate(model, None, prompt(30))
        finally:
            context.reset()
    return {"cache": shared.tokens, "alone": alone.tokens, "whole prompts": whole.tokens}


def test_tokens_are_streamed_as_they_are_drawn():
    for streamed, tokens in run_distributed(2, stream):
        assert torch.equal(streamed, tokens[0])


def stream(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.append(value.flatten())

        def end(self) -> None:
            self.values = [torch.cat(self.values)]

    model, streamer = tiny("llama", "ring_zigzag").float().eval(), Streamer()
    activate_context(rank, size)
    try:
        tokens = generate(model, ContextParallelCache(model, 8), prompt(30), streamer=streamer).tokens
    finally:
        context.reset()
    return streamer.values[0], tokens


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "does not support beam search"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, "does not support assisted or speculative decoding"),
    "padding on the right": ({"attention_mask": torch.tensor([[1] * 28 + [0] * 2])}, "padding on the left only"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states=True would return"),
    "no cache": ({"use_cache": False}, "use_cache=False: generate would pass the whole sequence"),
    "an implementation of a cache": ({"cache_implementation": "static"}, "Passing both `cache_implementation`"),
}


def test_refusals_name_the_reason_on_every_rank():
    for messages in run_distributed(2, refuse):
        for name, (_, message) in REFUSALS.items():
            assert message in messages[name], name
        assert "ranks disagree about input_ids" in messages["different prompts"]
        assert "is for generation" in messages["training"]
        assert "segment_ids: a ContextParallelCache shards input_ids only" in messages["segments"]
        assert "Make another one" in messages["another context"]
        assert "attend to its own keys only" in messages["decoder"]
        assert "The last pass over this ContextParallelCache failed" in messages["after a failure"]
        assert "attention inside chunks" in messages["llama4"]
        assert "layers of type" in messages["qwen3_next"]


def refuse(rank: int, size: int) -> dict[str, str]:
    model = tiny("llama", "ring_zigzag").float().eval()
    activate_context(rank, size)
    try:
        messages = {}
        for name, (settings, _) in REFUSALS.items():
            cache = ContextParallelCache(model, 8)
            messages[name] = message_of(partial(generate, model, cache, prompt(30), **settings))
        prompts = prompt(30, seed=rank)
        messages["different prompts"] = message_of(lambda: generate(model, ContextParallelCache(model, 8), prompts))
        cache = ContextParallelCache(model, 8)
        messages["training"] = message_of(lambda: model.train()(input_ids=prompts[:, :1], past_key_values=cache))
        model.eval()
        more = {"segment_ids": prompts[:, :1], "past_key_values": cache}
        messages["segments"] = message_of(lambda: model(input_ids=prompts[:, :1], **more))
        cache = ContextParallelCache(model, 8)
        with torch.no_grad():
            model(input_ids=prompt(30), past_key_values=cache)
            messages["decoder"] = message_of(lambda: model.model(input_ids=prompt(1), past_key_values=cache))
        messages["after a failure"] = message_of(partial(generate_after_failure, model))
        messages["llama4"] = message_of(lambda: ContextParallelCache(tiny("llama4_text", "ring_zigzag")))
        messages["qwen3_next"] = message_of(lambda: ContextParallelCache(refused("qwen3_next")))
        activate_context(rank, size)
        messages["another context"] = message_of(lambda: generate(model, cache, prompt(30)))
    finally:
        context.reset()
    return messages


def generate_after_failure(model: Any) -> None:
    """Use a cache again after a layer has failed in the middle of a pass."""
    cache = ContextParallelCache(model, 8)
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        model(input_ids=prompt(30), past_key_values=cache)
    hook.remove()
    model(input_ids=prompt(1), past_key_values=cache)


def fail(*args: Any) -> None:
    raise RuntimeError("out of memory")


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_one_process_gets_a_dynamic_cache():
    with in_fp64():
        model = tiny("llama", "ring_zigzag").eval()
        ours = generate(model, ContextParallelCache(model), prompt(30))
        assert torch.equal(ours.tokens, generate(model, DynamicCache(config=model.config), prompt(30)).tokens)
        model.generation_config.use_cache = False
        with pytest.raises(ValueError, match="use_cache=False: generate would pass the whole sequence"):
            ContextParallelCache(model)
