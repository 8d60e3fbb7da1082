"""Memory: what a layer really saves, the published formulas, and what must hold for every job."""

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
from ring_hf.planner import Job, longest, read_model
from ring_hf.planner.memory_estimate import (
    RUNTIME,
    Memory,
    attention_bytes,
    layer_bytes,
    memory_of,
    mlp_bytes,
    norm_bytes,
    saved_bytes,
    trained_parameters,
)
from ring_hf.planner.model_config import parse
from tests.planner.live import Live
from tests.threads import threads_as_ranks

LLAMA, QWEN = read_model("Llama-3.1-8B"), read_model("Qwen3-8B")
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL |= {"attn_logit_softcapping": None}  # the reference kernel, which serves it here, copies its result
SMALL |= {"head_dim": 32, "intermediate_size": 352, "vocab_size": 512}
TOKENS = 256


def layer_of(kind):
    """One decoder layer in bf16, its inputs, and everything that is there without it."""
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
def test_a_layer_keeps_what_autograd_saves_of_it(kind):
    run, known = layer_of(kind)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    for tensor in known:
        saved.pop(tensor.untyped_storage()._cdata, None)
    found = sum(size for size, _ in saved.values()) / TOKENS
    said = layer_bytes(Job(parse({**SMALL, "model_type": kind}, kind, ""), TOKENS, devices=1, checkpoint="none"), 0)
    statistics = 64  # one number a norm and token
    print(f"{kind}: {found:.1f} bytes a token saved, {said:.1f} said")
    assert said <= found <= said + statistics + 0.01 * said


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_worst_moment_of_a_layers_backward_is_that_of_its_mlp(kind):
    run, known = layer_of(kind)
    with Live(*known) as live:
        out = run()
        gradient = torch.ones_like(out)
        live.peak = live.now
        out.backward(gradient)
    job = Job(parse({**SMALL, "model_type": kind}, kind, ""), TOKENS, devices=1, checkpoint="none")
    said = layer_bytes(job, 0) + mlp_bytes(job, 0)[1] + 2 * 2 * SMALL["hidden_size"]
    weights = 2 * SMALL["intermediate_size"] * SMALL["hidden_size"] / TOKENS  # the gradient of down_proj
    print(f"{kind}: {live.peak / TOKENS:.1f} bytes a token at the peak, {said + weights:.1f} said")
    assert live.peak / TOKENS == pytest.approx(said + weights, rel=0.01)


LEVERS = {"none": "none", "full": "recompute", "save-attention": "save"}


@pytest.mark.parametrize("checkpoint", LEVERS)
def test_layers_hold_after_the_forward_what_their_checkpointing_keeps(checkpoint):
    """Two layers more, from the inputs to what `ring_hf.memory` saves."""
    held = []
    for layers in (2, 4):
        values = {**SMALL, "num_hidden_layers": layers, "pad_token_id": 0}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **values), attn_implementation="ring_zigzag"
        ).to(torch.bfloat16)
        memory.apply(model, MemoryConfig(attention=LEVERS[checkpoint]))
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        with Live(*model.parameters(), tokens) as live:
            out = model(input_ids=tokens, use_cache=False)
            held.append(live.now)
        del out
    job = Job(parse({**SMALL, "model_type": "llama"}, "", ""), TOKENS, devices=1, checkpoint=checkpoint)
    always = [item for item in memory_of(job).items if item.name in ("layer inputs", "saved attention")]
    said = sum(item.num_bytes for item in always) / SMALL["num_hidden_layers"]
    said += layer_bytes(job, 0) * TOKENS if checkpoint == "none" else 0
    found = (held[1] - held[0]) / 2
    print(f"{checkpoint}: {found / TOKENS:.1f} bytes a token and layer held, {said / TOKENS:.1f} said")
    assert found == pytest.approx(said, rel=0.01)


@pytest.mark.parametrize("head_chunks", [1, 2])
def test_saved_exchanges_of_heads_are_counted(head_chunks):
    model = parse({**SMALL, "model_type": "llama"}, "", "")
    job = Job(model, 4 * TOKENS, devices=4, ulysses=2, checkpoint="save-attention", head_chunks=head_chunks)

    def one(rank, group):
        shapes = [(1, heads, TOKENS, model.head_dim) for heads in (model.heads, model.kv_heads, model.kv_heads)]
        q, k, v = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        kept = []

        def keep(tensor):
            kept.append(tensor.untyped_storage().nbytes())
            return lambda: tensor

        with CachingMode(SavedResults(keep)):
            settings = {"sequence": job.sequence(), "group": group, "return_lse": head_chunks == 1}
            ring_attention(q, k, v, options=RingOptions("ring", head_chunks=head_chunks), **settings)
        return sum(kept)

    with threads_as_ranks() as run:
        assert set(run(4, one)) == {saved_bytes(job) * TOKENS}


def test_the_loss_holds_twelve_bytes_a_logit():
    tokens, vocab = 64, 4096
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**SMALL, "vocab_size": vocab}, pad_token_id=0)
    ).to(torch.bfloat16)
    hidden = torch.ones(1, tokens, SMALL["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.long)
    with Live(*model.parameters(), hidden, labels) as live:
        model.loss_function(model.lm_head(hidden), labels, vocab).backward()
    found = live.peak / tokens / vocab
    (item,) = [i for i in memory_of(Job(LLAMA, 8192, loss_block=64)).items if i.name.startswith("logits")]
    assert item.num_bytes == 12 * LLAMA.vocab * 64
    print(f"{found:.2f} bytes a logit")
    assert found == pytest.approx(12, rel=0.02)


@pytest.mark.parametrize(("ffn_block", "loss_block", "rows"), [(0, 0, 1), (0, 256, 1), (256, 256, 1), (256, 256, 3)])
@pytest.mark.parametrize("checkpoint", LEVERS)
def test_a_whole_step_stays_below_the_plan_and_close_to_it(checkpoint, ffn_block, loss_block, rows):
    """Forward and backward with the levers of `ring_hf.memory`, without an optimizer, kernels without a workspace.

    The plan counts all gradients at every moment; here the first step has none yet when its loss is taken.
    """
    length, sizes = 1024, {**SMALL, "num_hidden_layers": 4, "intermediate_size": 704, "vocab_size": 2048}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **sizes, pad_token_id=0), attn_implementation="ring_zigzag"
    ).to(torch.bfloat16)
    blocks = {"ffn_block": ffn_block or None, "loss_block": loss_block or None}
    memory.apply(model, MemoryConfig(attention=LEVERS[checkpoint], **blocks))
    tokens = torch.zeros(rows, length, dtype=torch.long)
    with Live(*model.parameters(), tokens) as live:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    job = Job(parse({**sizes, "model_type": "llama"}, "", ""), length, devices=1, rows=rows, checkpoint=checkpoint)
    job = job.but(ffn_block=ffn_block, loss_block=loss_block, zero=0, precision="bf16")
    absent = ("weights", "optimizer states", "kernel workspace")
    said = Memory(tuple(item for item in memory_of(job).items if item.name not in absent))
    print(f"{live.peak / 1e6:.2f} of {said.allocated / 1e6:.2f} MB ({live.peak / said.allocated:.3f}), {said.worst}")
    assert 0.75 * said.allocated <= live.peak <= said.allocated


def per_layer(job, name, moment=""):
    (item,) = [item for item in memory_of(job).items if item.name == name and item.moment == moment]
    return item.num_bytes


@pytest.mark.parametrize(
    ("length", "devices", "hidden_gib", "saved_gib", "mlp_gib"),
    [
        (2**17, 8, 4.0, 4.1, 1.3),
        (2**20, 8, 32.0, 32.5, 10.5),
        (2**20, 32, 8.0, 8.1, 2.6),
        (3_800_000, 8, 116, 118, 38),
    ],
)
def test_items_are_those_of_the_closed_formulas(length, devices, hidden_gib, saved_gib, mlp_gib):
    """2 c h L; L (2 c d_q + 4 c H); 6 c ff: three tensors of MLP width."""
    job = Job(LLAMA, length, devices=devices, checkpoint="save-attention", fused=True)
    c = job.tokens
    assert per_layer(job, "layer inputs") == 2 * c * 4096 * 32
    assert per_layer(job, "saved attention") == 32 * (2 * c * 4096 + 4 * c * 32)
    for found, gib in (
        (per_layer(job, "layer inputs"), hidden_gib),
        (per_layer(job, "saved attention"), saved_gib),
        (mlp_bytes(job, 0)[0] * c, mlp_gib),
    ):
        assert found / GIB == pytest.approx(gib, rel=0.03)


def test_states_are_those_of_zero():
    states = ("weights", "gradients", "optimizer states")
    P = LLAMA.parameters

    def found(**more):
        return [item.num_bytes for item in memory_of(Job(LLAMA, 8192, **more)).items if item.name in states]

    assert found(zero=0) == [4 * P, 4 * P, 8 * P]
    assert found(precision="bf16") == [2 * P, 2 * P, 4 * P]
    assert found(zero=1) == [2 * P, 4 * P, 12 * P / 8]  # DeepSpeed: bf16 weights, fp32 master weights
    assert found(zero=2) == [2 * P, P / 2, 12 * P / 8]
    assert found(zero=3) == [P / 2, P / 2, P]
    eighteen = sum(found(zero=3, precision="bf16-master"))
    assert eighteen == 18 * P / 8 and eighteen / GIB == pytest.approx(16.8, rel=0.01)


def test_adapters_are_two_thin_matrices_beside_each_projection():
    h, q, kv, ff = 4096, 4096, 1024, 14336
    beside = [(h, q), (h, kv), (h, kv), (q, h), (h, ff), (h, ff), (ff, h)]
    assert trained_parameters(LLAMA, 16) == 16 * 32 * sum(a + b for a, b in beside) == 41_943_040  # as PEFT counts
    found = memory_of(Job(LLAMA, 8192, devices=1, lora=16))
    names = {item.name: item.num_bytes for item in found.items}
    assert names["frozen weights"] == 2 * LLAMA.parameters and names["optimizer states"] == 8 * 41_943_040


EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160},
    "qwen3_moe": {"num_local_experts": 4, "moe_intermediate_size": 96},
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_adapters_of_experts_are_as_many_as_peft_makes(kind):
    config = AutoConfig.for_model(kind, **SMALL, **EXPERTS[kind], num_experts_per_tok=2, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = [name for name, weight in model.named_parameters() if weight.ndim == 3]
    assert len(experts) == 2 * SMALL["num_hidden_layers"]
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    names += [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")] if kind == "qwen2_moe" else []
    model = get_peft_model(model, LoraConfig(r=4, target_modules=names, target_parameters=experts))
    found = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained_parameters(parse({**config.to_dict(), "model_type": kind}, "", ""), 4) == found


def test_offload_moves_items_to_the_host_and_leaves_what_is_on_its_way():
    on = Job(QWEN, 2**20, zero=3, loss_block=2048)
    off = on.but(offload=("layers", "optimizer"))
    on = on.but(precision="bf16-master")  # as DeepSpeed, which offloads the optimizer alone, has it
    a, b = memory_of(on), memory_of(off)
    moved = per_layer(on, "layer inputs") + per_layer(on, "optimizer states") + per_layer(on, "gradients")
    assert b.host == moved
    assert a.allocated - b.allocated == pytest.approx(moved - 2 * 2 * off.tokens * 4096)


@pytest.mark.parametrize("precision", ["fp32", "bf16-master"])
def test_offloaded_weights_leave_two_layers_on_one_device_too(precision):
    found = memory_of(Job(LLAMA, 8192, devices=1, zero=3, precision=precision, offload=("optimizer", "weights")))
    names = {item.name: item.num_bytes for item in found.items if not item.moment and not item.on_host}
    assert names == {
        "fetched weights": 2 * (2 * LLAMA.largest_layer + LLAMA.outside_parameters),
        "layer inputs": 2 * 8192 * 4096 * 32,
    }


def test_blocks_are_tokens_of_all_rows():
    """As in `ring_hf.memory`, which flattens rows."""
    blocks = {"ffn_block": 1024, "loss_block": 512}
    one, three = (Job(LLAMA, 2**16, rows=rows, **blocks) for rows in (1, 3))
    for name, moment in (("MLP intermediates", "MLP backward"), ("logits and their gradients", "loss")):
        assert per_layer(one, name, moment) == per_layer(three, name, moment)
    assert per_layer(three, "layer inputs") == 3 * per_layer(one, "layer inputs")


def test_the_total_is_everything_once_and_the_worst_moment():
    found = memory_of(Job(QWEN, 2**20))
    assert found.worst == "loss"
    always = sum(item.num_bytes for item in found.items if not item.moment)
    assert found.allocated == always + max(found.moments.values())
    assert RUNTIME < found.allowance < RUNTIME + 0.05 * found.allocated
    assert found.total == found.allocated + found.allowance


JOBS = st.builds(
    dict,
    devices=st.sampled_from((1, 2, 8, 16)),
    zero=st.sampled_from((0, 1, 2, 3)),
    checkpoint=st.sampled_from(("none", "full", "save-attention")),
    layout=st.sampled_from(("zigzag", "contiguous", "striped")),
    ffn_block=st.sampled_from((0, 1024)),
    loss_block=st.sampled_from((0, 1024)),
    fused=st.booleans(),
    rows=st.integers(1, 2),
)


@settings(max_examples=30, deadline=None)
@given(JOBS, st.integers(4, 64), st.sampled_from(("Llama-3.1-8B", "gpt-oss-20b", "gemma-2-2b", "DeepSeek-V3")))
def test_memory_grows_with_the_length_and_shrinks_with_every_lever(settings_of, thousands, name):
    job = Job(read_model(name), 4096 * thousands, **settings_of)
    total = memory_of(job).total
    assert total < memory_of(job.but(length=2 * job.length)).total
    assert memory_of(job.but(ffn_block=512)).total <= total * (1 + 1e-9)
    assert memory_of(job.but(fused=True)).total <= total * (1 + 1e-9)
    assert memory_of(job.but(zero=3)).allocated <= memory_of(job.but(zero=0)).allocated * 1.2
    kept = [memory_of(job.but(checkpoint=kind)).always for kind in ("full", "save-attention", "none")]
    assert kept == sorted(kept)
    if job.devices > 1:
        assert memory_of(job.but(devices=2 * job.devices, cp=0)).total <= total * (1 + 1e-9)


@pytest.mark.parametrize(
    "more",
    [{"zero": 3}, {"zero": 3, "offload": ("layers",), "loss_block": 512}, {"lora": 8}, {"devices": 1, "lora": 8}],
)
def test_the_longest_fits_and_the_next_does_not(more):
    job = Job(LLAMA, 8192, **more)
    found = longest(job)
    assert found % job.multiple == 0
    room = job.device_facts.memory
    assert memory_of(job.but(length=found)).total <= room < memory_of(job.but(length=found + job.multiple)).total


def test_negative_groups_are_refused():
    for name in ("cp", "ulysses"):
        with pytest.raises(ValueError, match=f"--{name} -2 does not divide"):
            Job(LLAMA, 8192, **{name: -2})


def test_nothing_fits_where_the_states_do_not():
    assert longest(Job(read_model("Llama-3.1-405B"), 8192)) == 0


def test_norms_and_attention_count_their_tensors():
    job = Job(LLAMA, 8192)
    assert sum(norm_bytes(job)) == 2 * (4 + 2 + 2) * 4096  # a copy in fp32, its rounding, the result
    assert attention_bytes(job) == 2 * (4096 + 2 * 1024 + 4096) + 4 * 32
    assert attention_bytes(job.but(model=QWEN)) - attention_bytes(job) == 6 * (4096 + 1024)  # q and k normed
    assert sum(norm_bytes(job.but(fused=True))) == 3 * 2 * 4096
