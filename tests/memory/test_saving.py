"""Saved attention: how often operators run per layer and step, in one process and in two, with the gradients of a
plain model."""

import copy
import functools
from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from ring_hf.geometry import RingOptions, ShardedSequence
from ring_hf.hf.attention import announcements
from ring_hf.hf.batch_metadata import ContextParallelMetadata
from ring_hf.memory import apply
from ring_hf.memory.selective_checkpoint import (
    SAVED_OPS,
    CachedMode,
    CachingMode,
    SavedResults,
    keep_on_device,
    name_of,
)
from ring_hf.parallel import cut
from ring_hf.parallel.transport import RingComm
from ring_hf.verify.thread_ranks import threads_as_ranks
from tests.hf.models import rank_of
from tests.memory.models import CountOperators, PeakBytes, batch, gradients, model_of, relative_difference, step

ATTENTION = {
    "ring_zigzag": ("ring_hf::ring_attention", "ring_hf::ring_attention_backward"),
    "sdpa": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}
# Attention forward and backward, per layer and step.
EXECUTIONS = {"none": (1, 1), "recompute": (2, 1), "save": (1, 1)}
LAYERS = 2


def options_of(attention: str, **more):
    return {"attention": attention, "ffn_block": None, "loss_block": None, **more}


def count_operators(model, inputs) -> tuple[Counter, tuple]:
    with CountOperators() as count:
        result = step(model, inputs)
    return count.calls, result


@pytest.mark.parametrize("attention", EXECUTIONS)
@pytest.mark.parametrize("name, backend", [("llama", "sdpa"), ("gemma2", "ring_zigzag")])
def test_attention_of_one_process_runs_once_where_it_is_saved(name, backend, attention):
    model = model_of(name, backend)
    expected = step(copy.deepcopy(model), batch())
    apply(model, **options_of(attention))
    for _ in range(2):  # every step alike
        calls, actual = count_operators(model, batch())
        assert tuple(calls[op] for op in ATTENTION[backend]) == tuple(LAYERS * n for n in EXECUTIONS[attention])
        assert relative_difference(actual, expected) <= 1e-10


def run_two_ranks(
    layout: str, attention: str, offload: str | None = None, head_chunks: int = 1
) -> list[tuple[Counter, int, tuple]]:
    """One step of both ranks of two: operators, exchanges of the ring, and what the step comes to."""
    ulysses = 2 if layout == "ulysses" else 1
    models = [model_of("llama", f"ring_{layout}" if ulysses == 1 else layout) for _ in range(2)]
    for model in models:
        apply(model, **options_of(attention, offload=offload))
    whole = batch()
    sequence = ShardedSequence("contiguous" if ulysses > 1 else layout, 40, 2, ulysses=ulysses)
    whole["shift_labels"] = torch.nn.functional.pad(whole["labels"], (0, 1), value=-100)[:, 1:]
    whole["position_ids"] = torch.arange(40).expand(2, -1)
    posts: Counter[int] = Counter()
    original = RingComm.isend_irecv

    def isend_irecv(self, send, *more, **named):
        posts[self.rank] += send is not None
        return original(self, send, *more, **named)

    def run(rank: int, group: str) -> tuple[Counter, int, tuple]:
        options = RingOptions("ring", ulysses_size=ulysses, head_chunks=head_chunks)
        description = ContextParallelMetadata(sequence, group, rank, options, 40, None, "")
        inputs = {key: cut(value, sequence.segments(rank), 1) for key, value in whole.items()}
        announcements.register(models[rank])
        announcements.announce(models[rank], description)
        calls, result = count_operators(models[rank], {**inputs, "context_parallel": description})
        return calls, posts[rank], result

    with rank_of(2, 0), threads_as_ranks() as start, mock.patch.object(RingComm, "isend_irecv", isend_irecv):
        return start(2, run)


def sum_over_ranks(results) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the whole sequence: the sum over ranks."""
    first, second = (result for _, _, result in results)
    return first[0] + second[0], {name: first[1][name] + second[1][name] for name in first[1]}


@pytest.mark.parametrize("layout", ["zigzag", "ulysses"])
def test_attention_and_exchanges_of_two_ranks_run_once_if_saved(layout):
    expected = step(model_of("llama"), batch())
    exchanges = {}
    for attention, executions in EXECUTIONS.items():
        results = run_two_ranks(layout, attention)
        assert relative_difference(sum_over_ranks(results), expected) <= 1e-9
        for calls, posts, _ in results:
            assert tuple(calls[op] for op in ATTENTION["ring_zigzag"]) == tuple(LAYERS * n for n in executions)
            exchanges.setdefault(attention, set()).add(posts + calls["ring_hf::all_to_all"])
    # Per layer: of the ring, keys and values forward, the same and their gradients backward; of Ulysses, there and
    # back each way.
    forward, backward = {"zigzag": (1, 2), "ulysses": (2, 2)}[layout]
    assert exchanges["none"] == exchanges["save"] == {LAYERS * (forward + backward)}
    assert exchanges["recompute"] == {LAYERS * (2 * forward + backward)}


CHUNKED = "ring_hf::chunked_ulysses", "ring_hf::chunked_ulysses_backward"


@pytest.mark.parametrize("attention", EXECUTIONS)
def test_chunks_of_heads_run_once_where_their_result_is_saved(attention):
    results, before = run_two_ranks("ulysses", attention, head_chunks=2), run_two_ranks("ulysses", attention)
    assert relative_difference(sum_over_ranks(results), step(model_of("llama"), batch())) <= 1e-9
    for (calls, _, _), (plain, _, _) in zip(results, before, strict=True):
        assert tuple(calls[op] for op in CHUNKED) == tuple(LAYERS * n for n in EXECUTIONS[attention])
        assert tuple(calls[op] for op in CHUNKED) == tuple(plain[op] for op in ATTENTION["ring_zigzag"])
        assert calls["ring_hf::all_to_all"] == calls["ring_hf::ring_attention"] == 0  # all inside the one operator


@pytest.mark.parametrize("offload", ["attention", "layers", "all"])
def test_offloading_changes_no_number_and_no_count(offload):
    for layout, chunks, operator in (("zigzag", 1, "ring_hf::ring_attention"), ("ulysses", 2, CHUNKED[0])):
        with mock.patch("ring_hf.memory.offload.SMALLEST", 0):
            results = run_two_ranks(layout, "save", offload, chunks)
        assert relative_difference(sum_over_ranks(results), step(model_of("llama"), batch())) <= 1e-9
        assert all(calls[operator] == LAYERS for calls, _, _ in results)


def layer(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q.sin(), k, v).cos() * q


def test_the_modes_agree_with_pytorchs_selective_checkpointing():
    inputs = [torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if name_of(op) in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    def ours():
        results = SavedResults(keep_on_device)
        return CachingMode(results), CachedMode(results)

    results = []
    for contexts in (ours, functools.partial(create_selective_checkpoint_contexts, policy)):
        with CountOperators() as count:
            out = checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)
            grads = torch.autograd.grad(out.sum(), inputs)
        results.append((grads, {name: n for name, n in count.calls.items() if name != "aten::detach"}))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_a_second_backward_pass_and_changes_in_place_are_refused():
    model = model_of("llama")
    apply(model, **options_of("save"))
    loss = model(**batch(), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="was used already: a step with saved attention"):
        loss.backward()
    x = torch.ones(3)
    read = keep_on_device(x)
    x += 1
    with pytest.raises(ValueError, match="was changed in place after it was saved"):
        read()


def test_a_model_with_lora_saves_as_well_and_generates_as_before():
    from peft import LoraConfig, get_peft_model

    def adapted(first: bool):
        model = model_of("llama")
        torch.manual_seed(1)
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj", "lm_head"], task_type="CAUSAL_LM")
        if first:
            apply(model, attention="save", ffn_block=7, loss_block=9)
        model = get_peft_model(model, settings, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        return model

    expected = step(adapted(False), batch())
    tokens = {"input_ids": batch()["input_ids"], "max_new_tokens": 4, "do_sample": False}
    generated = adapted(False).eval().generate(**tokens)
    for first in (True, False):  # before and after PEFT
        model = adapted(first)
        if not first:
            apply(model, attention="save", ffn_block=7, loss_block=9)
        calls, actual = count_operators(model, batch())
        assert calls[ATTENTION["sdpa"][0]] == LAYERS
        assert relative_difference(actual, expected) <= 1e-10
        assert torch.equal(model.eval().generate(**tokens), generated)


def test_gradients_accumulate_and_the_cache_is_off_only_in_training():
    inputs = [batch(seed=seed) for seed in (0, 1)]
    model, plain = model_of("llama"), model_of("llama")
    apply(model, attention="save", ffn_block=7, loss_block=9)
    for each in (model, plain):
        for micro_batch in inputs:
            each(**micro_batch, num_items_in_batch=142, use_cache=False).loss.backward()
    assert relative_difference((torch.ones(()), gradients(model)), (torch.ones(()), gradients(plain))) <= 1e-10
    tokens = inputs[0]["input_ids"]
    assert model.eval()(input_ids=tokens, use_cache=True).past_key_values.get_seq_length() == tokens.shape[1]
    assert model.train()(input_ids=tokens, use_cache=True).past_key_values is None


@pytest.mark.parametrize("attention", ["recompute", "save"])
def test_the_feed_forward_layer_runs_twice_and_not_three_times(attention):
    """FLOPs of a step under checkpointing, whole and in blocks: PyTorch stops recomputing a layer at the input of its
    feed-forward layer, so recomputing that by blocks costs nothing more."""
    flops = {}
    for block in (None, 7):
        model = model_of("llama")
        apply(model, attention=attention, ffn_block=block, loss_block=None)
        with FlopCounterMode(display=False) as counter:
            step(model, batch())
        flops[block] = counter.get_total_flops()
    # Only a product with down_proj is added per layer, where PyTorch stops recomputing one layer earlier.
    assert flops[7] == flops[None] + LAYERS * 2 * (2 * 40) * 48 * 32


LONG = {"intermediate_size": 256, "vocab_size": 1024, "num_hidden_layers": 3, "max_position_embeddings": 512}


def test_peak_of_live_tensors_falls_with_every_option():
    """Bytes of all tensors alive at once in a step, parameters apart: 512 tokens, 32 wide, 1,024 words, 3 layers."""
    peaks = {}
    for name, settings in {
        "none": {},
        "recompute": {"attention": "recompute"},
        "save": {"attention": "save"},
        "ffn": {"ffn_block": 128},
        "loss": {"loss_block": 64},
        "recompute, ffn, loss": {"attention": "recompute", "ffn_block": 128, "loss_block": 64},
        "all": {"attention": "save", "ffn_block": 128, "loss_block": 64},
    }.items():
        model = model_of("llama", **LONG)
        inputs = batch(1, 512)
        apply(model, **{"attention": "none", "ffn_block": None, "loss_block": None, **settings})
        with PeakBytes() as count:
            step(model, inputs)
        peaks[name] = count.peak / (512 * 32 * 8)  # in hidden states of all tokens
    print({name: round(peak, 1) for name, peak in peaks.items()})
    assert peaks["recompute"] < 0.75 * peaks["none"]
    assert peaks["ffn"] < 0.8 * peaks["none"]
    assert peaks["loss"] < 0.6 * peaks["none"]
    # Per layer the result of attention, and its log-sum-exp for 4 heads.
    assert peaks["save"] - peaks["recompute"] <= 3 * (1 + 4 / 32) + 0.1
    assert peaks["all"] - peaks["recompute, ffn, loss"] <= 3 * (1 + 4 / 32) + 0.1
    assert peaks["all"] < peaks["none"] / 7
