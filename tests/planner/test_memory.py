"""Memory: the tensors that a layer really saves, published formulas, and properties of every job."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import ring_hf  # noqa: F401  registers the attention backends
from ring_hf import memory
from ring_hf.costmodel.devices import GIB
from ring_hf.geometry import RingOptions
from ring_hf.memory import MemoryConfig
from ring_hf.memory.selective_checkpoint import CachingMode, SavedResults
from ring_hf.parallel import ring_attention
from ring_hf.planner import TrainingJob, find_max_length, read_model
from ring_hf.planner.memory_estimate import (
    RUNTIME,
    MemoryEstimate,
    attention_bytes,
    estimate_memory,
    layer_bytes,
    mlp_bytes,
    norm_bytes,
    saved_bytes,
    trained_parameters,
)
from ring_hf.planner.model_config import parse_config
from ring_hf.verify.thread_ranks import threads_as_ranks
from tests.planner.live import LiveTensorTracker

LLAMA, QWEN = read_model("Llama-3.1-8B"), read_model("Qwen3-8B")
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL |= {"attn_logit_softcapping": None}  # the reference kernel, which serves it here, copies its result
SMALL |= {"head_dim": 32, "intermediate_size": 352, "vocab_size": 512}
TOKENS = 256


def layer_of(kind):
    """Return a function that runs one decoder layer in bf16, and all tensors that exist without it."""
    config = AutoConfig.for_model(kind, **SMALL, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring_zigzag").to(torch.bfloat16).model
    x = torch.ones(1, TOKENS, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(TOKENS)[None]
    angles = model.rotary_emb(x, positions)

    def run():
        out = model.layers[0](x, position_embeddings=angles, attention_mask=None, position_ids=positions)
        return out[0] if isinstance(out, tuple) else out

    return run, [*model.parameters(), x, *angles]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2"])
def test_a_layer_keeps_the_tensors_that_autograd_saves(kind):
    run, existing = layer_of(kind)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in existing:
        saved.pop(tensor.untyped_storage()._cdata, None)
    measured = sum(size for size, _ in saved.values()) / TOKENS
    model = parse_config({**SMALL, "model_type": kind}, kind, "")
    predicted = layer_bytes(TrainingJob(model, TOKENS, devices=1, checkpoint="none"), 0)
    statistics = 64  # one number per norm and token
    print(f"{kind}: {measured:.1f} bytes per token saved, {predicted:.1f} predicted")
    assert predicted <= measured <= predicted + statistics + 0.01 * predicted


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_backward_of_a_layer_peaks_in_its_mlp(kind):
    run, existing = layer_of(kind)
    with LiveTensorTracker(*existing) as live:
        out = run()
        gradient = torch.ones_like(out)
        live.peak = live.now
        out.backward(gradient)
    model = parse_config({**SMALL, "model_type": kind}, kind, "")
    job = TrainingJob(model, TOKENS, devices=1, checkpoint="none")
    predicted = layer_bytes(job, 0) + mlp_bytes(job, 0)[1] + 2 * 2 * SMALL["hidden_size"]
    predicted += 2 * SMALL["intermediate_size"] * SMALL["hidden_size"] / TOKENS  # the gradient of down_proj
    print(f"{kind}: {live.peak / TOKENS:.1f} bytes per token at the peak, {predicted:.1f} predicted")
    assert live.peak / TOKENS == pytest.approx(predicted, rel=0.01)


ATTENTION = {"none": "none", "full": "recompute", "save-attention": "save"}


@pytest.mark.parametrize("checkpoint", ATTENTION)
def test_layers_keep_after_the_forward_what_their_checkpoint_needs(checkpoint):
    """Compares models of 2 and 4 layers: the difference is the tensors that two layers keep."""
    allocated = []
    for num_layers in (2, 4):
        values = {**SMALL, "num_hidden_layers": num_layers, "pad_token_id": 0}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **values), attn_implementation="ring_zigzag"
        ).to(torch.bfloat16)
        memory.apply(model, MemoryConfig(attention=ATTENTION[checkpoint]))
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        with LiveTensorTracker(*model.parameters(), tokens) as live:
            out = model(input_ids=tokens, use_cache=False)
            allocated.append(live.now)
        del out
    measured = (allocated[1] - allocated[0]) / 2
    model = parse_config({**SMALL, "model_type": "llama"}, "", "")
    job = TrainingJob(model, TOKENS, devices=1, checkpoint=checkpoint)
    items = [item for item in estimate_memory(job).items if item.name in ("layer inputs", "saved attention")]
    predicted = sum(item.num_bytes for item in items) / SMALL["num_hidden_layers"]
    predicted += layer_bytes(job, 0) * TOKENS if checkpoint == "none" else 0
    print(f"{checkpoint}: {measured / TOKENS:.1f} bytes per token and layer, {predicted / TOKENS:.1f} predicted")
    assert measured == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize("head_chunks", [1, 2])
def test_saved_exchanges_of_heads_are_counted(head_chunks):
    model = parse_config({**SMALL, "model_type": "llama"}, "", "")
    job = TrainingJob(model, 4 * TOKENS, devices=4, ulysses=2, checkpoint="save-attention", head_chunks=head_chunks)

    def run_rank(rank, group):
        shapes = [(1, heads, TOKENS, model.head_dim) for heads in (model.heads, model.kv_heads, model.kv_heads)]
        q, k, v = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        saved_sizes = []

        def save(tensor):
            saved_sizes.append(tensor.untyped_storage().nbytes())
            return lambda: tensor

        with CachingMode(SavedResults(save)):
            settings = {"sequence": job.make_sequence(), "group": group, "return_lse": head_chunks == 1}
            ring_attention(q, k, v, options=RingOptions("ring", head_chunks=head_chunks), **settings)
        return sum(saved_sizes)

    with threads_as_ranks() as run:
        assert set(run(4, run_rank)) == {saved_bytes(job) * TOKENS}


def test_the_loss_allocates_twelve_bytes_per_logit():
    tokens, vocab = 64, 4096
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**SMALL, "vocab_size": vocab}, pad_token_id=0)
    ).to(torch.bfloat16)
    hidden = torch.ones(1, tokens, SMALL["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.long)
    with LiveTensorTracker(*model.parameters(), hidden, labels) as live:
        model.loss_function(model.lm_head(hidden), labels, vocab).backward()
    measured = live.peak / tokens / vocab
    items = estimate_memory(TrainingJob(LLAMA, 8192, loss_block=64)).items
    (logits,) = [item for item in items if item.name.startswith("logits")]
    assert logits.num_bytes == 12 * LLAMA.vocab * 64
    print(f"{measured:.2f} bytes per logit")
    assert measured == pytest.approx(12, rel=0.02)


@pytest.mark.parametrize(
    ("ffn_block", "loss_block", "batch_size"), [(0, 0, 1), (0, 256, 1), (256, 256, 1), (256, 256, 3)]
)
@pytest.mark.parametrize("checkpoint", ATTENTION)
def test_a_whole_step_stays_below_the_plan_and_close_to_it(checkpoint, ffn_block, loss_block, batch_size):
    """Forward and backward with options of `ring_hf.memory`, without an optimizer and kernel workspaces.

    The plan counts all gradients in every phase; here the first step has none yet in its loss.
    """
    length, sizes = 1024, {**SMALL, "num_hidden_layers": 4, "intermediate_size": 704, "vocab_size": 2048}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **sizes, pad_token_id=0), attn_implementation="ring_zigzag"
    ).to(torch.bfloat16)
    blocks = {"ffn_block": ffn_block or None, "loss_block": loss_block or None}
    memory.apply(model, MemoryConfig(attention=ATTENTION[checkpoint], **blocks))
    tokens = torch.zeros(batch_size, length, dtype=torch.long)
    with LiveTensorTracker(*model.parameters(), tokens) as live:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    job = TrainingJob(
        parse_config({**sizes, "model_type": "llama"}, "", ""),
        length,
        devices=1,
        batch_size=batch_size,
        checkpoint=checkpoint,
        ffn_block=ffn_block,
        loss_block=loss_block,
        precision="bf16",
    )
    absent = ("weights", "optimizer states", "kernel workspace")
    plan = MemoryEstimate(tuple(item for item in estimate_memory(job).items if item.name not in absent))
    ratio = live.peak / plan.allocated
    print(f"{live.peak / 1e6:.2f} of {plan.allocated / 1e6:.2f} MB ({ratio:.3f}), {plan.peak_phase}")
    assert 0.75 * plan.allocated <= live.peak <= plan.allocated


def item_bytes(job, name, phase=""):
    (item,) = [item for item in estimate_memory(job).items if item.name == name and item.phase == phase]
    return item.num_bytes


class PublishedSizes(NamedTuple):
    """GiB that a rank needs for layer inputs, saved attention, and the MLP of one layer."""

    inputs: float
    attention: float
    mlp: float


@pytest.mark.parametrize(
    ("length", "devices", "published"),
    [
        (2**17, 8, PublishedSizes(4.0, 4.1, 1.3)),
        (2**20, 8, PublishedSizes(32.0, 32.5, 10.5)),
        (2**20, 32, PublishedSizes(8.0, 8.1, 2.6)),
        (3_800_000, 8, PublishedSizes(116, 118, 38)),
    ],
)
def test_items_are_those_of_the_closed_formulas(length, devices, published):
    """2 c h L; L (2 c d_q + 4 c H); 6 c ff: three tensors of MLP width."""
    job = TrainingJob(LLAMA, length, devices=devices, checkpoint="save-attention", fused=True)
    c = job.tokens_per_rank
    inputs, attention = item_bytes(job, "layer inputs"), item_bytes(job, "saved attention")
    assert inputs == 2 * c * 4096 * 32
    assert attention == 32 * (2 * c * 4096 + 4 * c * 32)
    sizes = [num_bytes / GIB for num_bytes in (inputs, attention, mlp_bytes(job, 0)[0] * c)]
    assert sizes == pytest.approx(published, rel=0.03)


def test_states_are_those_of_zero():
    names = ("weights", "gradients", "optimizer states")
    P = LLAMA.parameters

    def states(**settings):
        items = estimate_memory(TrainingJob(LLAMA, 8192, **settings)).items
        return [item.num_bytes for item in items if item.name in names]

    assert states(zero=0) == [4 * P, 4 * P, 8 * P]
    assert states(precision="bf16") == [2 * P, 2 * P, 4 * P]
    assert states(zero=1) == [2 * P, 4 * P, 12 * P / 8]  # DeepSpeed: bf16 weights, fp32 master weights
    assert states(zero=2) == [2 * P, P / 2, 12 * P / 8]
    assert states(zero=3) == [P / 2, P / 2, P]
    eighteen = sum(states(zero=3, precision="bf16-master"))
    assert eighteen == 18 * P / 8 and eighteen / GIB == pytest.approx(16.8, rel=0.01)


def test_adapters_are_two_thin_matrices_per_projection():
    h, q, kv, ff = 4096, 4096, 1024, 14336
    projections = [(h, q), (h, kv), (h, kv), (q, h), (h, ff), (h, ff), (ff, h)]
    assert (
        trained_parameters(LLAMA, 16) == 16 * 32 * sum(a + b for a, b in projections) == 41_943_040
    )  # as PEFT counts
    estimate = estimate_memory(TrainingJob(LLAMA, 8192, devices=1, lora=16))
    sizes = {item.name: item.num_bytes for item in estimate.items}
    assert sizes["frozen weights"] == 2 * LLAMA.parameters and sizes["optimizer states"] == 8 * 41_943_040


EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160},
    "qwen3_moe": {"num_local_experts": 4, "moe_intermediate_size": 96},
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_adapters_of_experts_are_as_many_as_those_of_peft(kind):
    config = AutoConfig.for_model(kind, **SMALL, **EXPERTS[kind], num_experts_per_tok=2, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = [name for name, weight in model.named_parameters() if weight.ndim == 3]
    assert len(experts) == 2 * SMALL["num_hidden_layers"]
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    names += [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")] if kind == "qwen2_moe" else []
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names, target_parameters=experts))
    num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained_parameters(parse_config({**config.to_dict(), "model_type": kind}, "", ""), 4) == num_trained


def test_offload_moves_items_to_the_host_except_those_in_flight():
    job = TrainingJob(QWEN, 2**20, zero=3, loss_block=2048)
    offloaded = job.replace(offload=("layers", "optimizer"))
    resident = job.replace(precision="bf16-master")  # that of DeepSpeed, which can offload the optimizer alone
    moved = sum(item_bytes(resident, name) for name in ("layer inputs", "optimizer states", "gradients"))
    before, after = estimate_memory(resident), estimate_memory(offloaded)
    assert after.host == moved
    assert before.allocated - after.allocated == pytest.approx(moved - 2 * 2 * offloaded.tokens_per_rank * 4096)


@pytest.mark.parametrize("precision", ["fp32", "bf16-master"])
def test_offloaded_weights_leave_two_layers_also_on_one_device(precision):
    settings = {"devices": 1, "zero": 3, "precision": precision, "offload": ("optimizer", "weights")}
    items = estimate_memory(TrainingJob(LLAMA, 8192, **settings)).items
    assert {item.name: item.num_bytes for item in items if not item.phase and not item.on_host} == {
        "fetched weights": 2 * (2 * LLAMA.largest_layer_parameters + LLAMA.non_layer_parameters),
        "layer inputs": 2 * 8192 * 4096 * 32,
    }


def test_blocks_are_tokens_of_the_whole_batch():
    """As in `ring_hf.memory`, which flattens the batch."""
    blocks = {"ffn_block": 1024, "loss_block": 512}
    batch_of_1, batch_of_3 = (TrainingJob(LLAMA, 2**16, batch_size=size, **blocks) for size in (1, 3))
    for name, phase in (("MLP intermediates", "MLP backward"), ("logits and their gradients", "loss")):
        assert item_bytes(batch_of_1, name, phase) == item_bytes(batch_of_3, name, phase)
    assert item_bytes(batch_of_3, "layer inputs") == 3 * item_bytes(batch_of_1, "layer inputs")


def test_the_total_is_persistent_bytes_the_peak_phase_and_overhead():
    estimate = estimate_memory(TrainingJob(QWEN, 2**20))
    assert estimate.peak_phase == "loss"
    persistent = sum(item.num_bytes for item in estimate.items if not item.phase)
    assert estimate.allocated == persistent + max(estimate.phases.values())
    assert RUNTIME < estimate.overhead < RUNTIME + 0.05 * estimate.allocated
    assert estimate.total == estimate.allocated + estimate.overhead


JOBS = st.builds(
    dict,
    devices=st.sampled_from((1, 2, 8, 16)),
    zero=st.sampled_from((0, 1, 2, 3)),
    checkpoint=st.sampled_from(("none", "full", "save-attention")),
    layout=st.sampled_from(("zigzag", "contiguous", "striped")),
    ffn_block=st.sampled_from((0, 1024)),
    loss_block=st.sampled_from((0, 1024)),
    fused=st.booleans(),
    batch_size=st.integers(1, 2),
)


@settings(max_examples=30, deadline=None)
@given(JOBS, st.integers(4, 64), st.sampled_from(("Llama-3.1-8B", "gpt-oss-20b", "gemma-2-2b", "DeepSeek-V3")))
def test_memory_grows_with_the_length_and_shrinks_with_every_option(job_settings, thousands, name):
    job = TrainingJob(read_model(name), 4096 * thousands, **job_settings)
    total = estimate_memory(job).total
    assert total < estimate_memory(job.replace(length=2 * job.length)).total
    assert estimate_memory(job.replace(ffn_block=512)).total <= total * (1 + 1e-9)
    assert estimate_memory(job.replace(fused=True)).total <= total * (1 + 1e-9)
    sharded, whole = (estimate_memory(job.replace(zero=zero)).allocated for zero in (3, 0))
    assert sharded <= whole * 1.2
    checkpoints = ("full", "save-attention", "none")
    persistent = [estimate_memory(job.replace(checkpoint=checkpoint)).persistent for checkpoint in checkpoints]
    assert persistent == sorted(persistent)
    if job.devices > 1:
        assert estimate_memory(job.replace(devices=2 * job.devices, cp=0)).total <= total * (1 + 1e-9)


@pytest.mark.parametrize(
    "job_settings",
    [{"zero": 3}, {"zero": 3, "offload": ("layers",), "loss_block": 512}, {"lora": 8}, {"devices": 1, "lora": 8}],
)
def test_the_longest_sequence_fits_and_the_next_does_not(job_settings):
    job = TrainingJob(LLAMA, 8192, **job_settings)
    max_length = find_max_length(job)
    assert max_length % job.length_multiple == 0
    next_length = max_length + job.length_multiple
    totals = [estimate_memory(job.replace(length=length)).total for length in (max_length, next_length)]
    assert totals[0] <= job.device_spec.memory < totals[1]


def test_negative_groups_are_refused():
    for name in ("cp", "ulysses"):
        with pytest.raises(ValueError, match=f"--{name} -2 does not divide"):
            TrainingJob(LLAMA, 8192, **{name: -2})


def test_nothing_fits_where_the_states_do_not():
    assert find_max_length(TrainingJob(read_model("Llama-3.1-405B"), 8192)) == 0


def test_norms_and_attention_count_their_tensors():
    job = TrainingJob(LLAMA, 8192)
    assert sum(norm_bytes(job)) == 2 * (4 + 2 + 2) * 4096  # a copy in fp32, its rounding, the result
    assert attention_bytes(job) == 2 * (4096 + 2 * 1024 + 4096) + 4 * 32
    assert attention_bytes(job.replace(model=QWEN)) - attention_bytes(job) == 6 * (4096 + 1024)  # norms of q and k
    assert sum(norm_bytes(job.replace(fused=True))) == 3 * 2 * 4096
