"""Refusals of `memory.apply`, by message: which model, which setting, the way out. A refused model is unchanged."""

import copy
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ring_hf.hf.checks.argument_rules import check_memory, first_error
from ring_hf.hf.checks.model_rules import MODEL_RULES
from ring_hf.memory import MemoryConfig, applied_to, apply, declare_mlp, selective_checkpoint
from ring_hf.memory.mlp_lookup import find_mlps
from tests.memory.models import batch, model_of, relative_difference, step

CONFIGS = {
    "attention": ({"attention": "keep"}, "attention='keep' is not known. Choose one of save, recompute, none"),
    "offload": ({"offload": "disk"}, "offload='disk' is not known. Choose one of None, attention, layers, all"),
    "nothing to move": (
        {"attention": "none", "offload": "layers"},
        "offload='layers' moves tensors that attention='none' does not keep apart. Set attention='save' or 'recomp",
    ),
    "nothing saved": (
        {"attention": "recompute", "offload": "attention"},
        "offload='attention' moves tensors that attention='recompute' does not",
    ),
    "block of nothing": ({"ffn_block": 0}, 'ffn_block=0 must be a number of tokens, "auto" or None'),
    "block of words": ({"loss_block": "big"}, "loss_block='big' must be a number of tokens"),
    "block of truth": ({"loss_block": True}, "loss_block=True must be a number of tokens"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_refuses(name):
    settings, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**settings)


def enable_checkpointing(model):
    """Call the method of Transformers by the name that the installed release has for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def already_on():
    model = model_of("llama")
    enable_checkpointing(model)
    return model


def dropping():
    model = model_of("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.1))
    return model


def dropping_without_a_module():
    model = model_of("starcoder2")
    model.model.layers[0].mlp.residual_dropout = 0.1
    return model


def another_loss():
    model = model_of("llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    return model


def nearly_the_loss(wrapped):
    """Transformers' loss and a little more, under its name."""
    model = model_of("llama")
    plain = model.loss_function

    def ForCausalLMLoss(logits, *args, **more):
        return plain(logits, *args, **more) + 1e-4 * logits.logsumexp(-1).square().mean()

    model.loss_function = functools.wraps(plain)(ForCausalLMLoss) if wrapped else ForCausalLMLoss
    return model


def trained_scale():
    """Logits times a parameter, which no block can do alone."""
    model = model_of("cohere")
    model.logit_scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    return model


def mixing(strength=1.0):
    """A feed-forward layer whose rows depend on each other, as with a capacity, or a norm over the batch."""
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = Mean(strength)
    return model


class Mean(torch.nn.Module):
    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, x):
        return torch.nn.functional.silu(x - self.strength * x.mean(1, keepdim=True))


class Capacity(torch.nn.Module):
    """Experts that keep the first few of the tokens that chose them."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.compute = functools.partial(type(experts).forward, experts)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        first = torch.nn.functional.one_hot(top_k_index, 4).sum(1).cumsum(0) <= 6
        return self.compute(hidden_states, top_k_index, top_k_weights * first.gather(1, top_k_index))


def with_capacity():
    model = model_of("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = Capacity(layer.mlp.experts)
    return model


def replaced_forward():
    model = model_of("llama")
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    return model


def without_weights():
    with torch.device("meta"):
        return model_of("llama")


NO_OPTIONS = {"attention": "none", "ffn_block": None, "loss_block": None}
MODELS = {
    "checkpointing": (already_on, {"attention": "save"}, "has activation checkpointing .* on already"),
    "no layers": (
        lambda: model_of("ctrl"),
        {"attention": "recompute"},
        "has no decoder layers that can be checkpointed",
    ),
    "eager": (
        lambda: model_of("llama", "eager"),
        {"attention": "save"},
        "attn_implementation='eager': it is no operator",
    ),
    "dropout": (dropping, {"ffn_block": 7}, r"layers.1.mlp.act_fn.1 .p=0.1. drops values at random, and blocks"),
    "functional dropout": (
        dropping_without_a_module,
        {"ffn_block": 7},
        "layers.0.mlp.*residual_dropout=0.1 drops values at random",
    ),
    "mixing rows": (mixing, {"ffn_block": 7}, "has no feed-forward layer that is a module of its own"),
    "mixing rows a little": (lambda: mixing(1e-12), {"ffn_block": 7}, "is known to treat each token by itself"),
    "capacity": (
        with_capacity,
        {"ffn_block": 7},
        "2 feed-forward parts of MixtralForCausalLM, for example model.layers.0",
    ),
    "loss": (another_loss, {"loss_block": 7}, "and not the causal language modelling loss, which is the only one"),
    "loss in a wrapper": (lambda: nearly_the_loss(True), {"loss_block": 7}, "and not the causal language modelling"),
    "loss by name only": (lambda: nearly_the_loss(False), {"loss_block": 7}, "changes the logits between its head"),
    "scale": (trained_scale, {"loss_block": 7}, "changes the logits between its head and its loss in a way that"),
    "forward": (replaced_forward, {"ffn_block": 7}, "The forward of 1 modules was replaced .model.layers.0.mlp"),
    "meta": (without_weights, {"ffn_block": 7}, "are on the meta device, so nothing can be tried"),
    "no model": (lambda: torch.nn.Linear(1, 1), {}, "Linear holds no Transformers model"),
    "compiled": (lambda: _compiled(), {"ffn_block": 7}, "The model is compiled"),
}


def _compiled():
    model = model_of("llama")
    model.compile()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused_and_unchanged(name):
    build, settings, message = MODELS[name]
    model = build()
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    hooks = {path: len(module._forward_hooks) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        apply(model, **{**NO_OPTIONS, "loss_block": 5, **settings})
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert {path: len(module._forward_hooks) for path, module in model.named_modules()} == hooks


def test_experts_with_a_capacity_are_refused_and_cannot_be_declared():
    with pytest.raises(ValueError, match="experts with a capacity"):
        find_mlps(with_capacity())
    with pytest.raises(ValueError, match=r"Capacity cannot be computed over blocks .*depends on other tokens"):
        declare_mlp(with_capacity(), Capacity)
    assert len(find_mlps(model_of("mixtral"))) == 2


def test_the_same_call_twice_changes_nothing_and_another_one_is_refused():
    model, plain = model_of("llama"), model_of("llama")
    config = MemoryConfig(ffn_block=7, loss_block=7)
    first = apply(model, config)
    hooks = len(model._forward_hooks)
    assert apply(model, config) is first is applied_to(model) and len(model._forward_hooks) == hooks
    assert "2 feed-forward parts in blocks of 7 tokens" in str(first) and "attention save" in str(first)
    with pytest.raises(ValueError, match=r"memory.apply was called with .*ffn_block=7.*and now with .*ffn_block=9"):
        apply(model, ffn_block=9)
    with pytest.raises(ValueError, match="were both given"):
        apply(model, config, ffn_block=9)
    assert relative_difference(step(model, batch()), step(plain, batch())) <= 1e-10
    assert list(model.state_dict()) == list(plain.state_dict())


def test_no_option_is_no_change():
    model = model_of("llama")
    apply(model, **NO_OPTIONS)
    assert applied_to(model) is None and not model._forward_pre_hooks


def test_copies_of_a_model_have_their_own_options():
    model = model_of("llama")
    apply(model, ffn_block=7, loss_block=7, attention="none")
    twin = copy.deepcopy(model)
    expected = step(model_of("llama"), batch())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
    assert relative_difference(step(twin, batch()), expected) <= 1e-10


def test_checkpointing_that_is_switched_on_again_is_refused():
    model = model_of("llama")
    apply(model, attention="save", ffn_block=None, loss_block=None)
    off, on = (
        SimpleNamespace(gradient_checkpointing=value, activation_checkpointing=value) for value in (False, True)
    )
    assert check_memory(off, model) is None and check_memory(on, model_of("llama")) is None
    assert "activation_checkpointing=True" in check_memory(on, model) and "'save'" in check_memory(on, model)
    enable_checkpointing(model)  # as the Trainer does when it is not asked first
    with pytest.raises(ValueError, match="its layers did not ask what to save: checkpointing was switched on again"):
        step(model, batch())


def test_attention_without_an_operator_is_refused_when_it_runs():
    model = model_of("llama", "sdpa")
    apply(model, attention="save", ffn_block=None, loss_block=None)
    kernels = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with kernels, pytest.raises(ValueError, match="no attention operator ran in the 2 layers of LlamaForCausalLM"):
        step(model, batch())


def test_attention_dropout_that_would_not_be_drawn_again_is_refused():
    @torch.library.custom_op("ring_hf_tests::attention", mutates_args=())
    def attention(q: torch.Tensor, dropout_p: float) -> torch.Tensor:
        return q.clone()

    q = torch.randn(1, 2, 8, 4)
    with (
        mock.patch.object(selective_checkpoint, "SAVED_OPS", {"ring_hf_tests::attention"}),
        selective_checkpoint.CachingMode(selective_checkpoint.SavedResults(selective_checkpoint.keep_on_device)),
    ):
        attention(q, 0.0)
        for call in (lambda: attention(q, 0.5), lambda: attention(q, dropout_p=0.5)):
            with pytest.raises(ValueError, match=r"attention='save' with attention dropout 0\.5"):
                call()


def test_sharded_parameters_are_refused():
    model = model_of("llama")
    apply(model, attention="none", ffn_block=7, loss_block=7)
    for module in (model.lm_head, model.model.layers[0].mlp):
        weight = next(module.parameters())
        weight.full_tensor = True  # as a DTensor has one
        with pytest.raises(ValueError, match=f"Parameters of {type(module).__name__} are shards .of FSDP"):
            step(model, batch())
        del weight.full_tensor
    step(model, batch())


def test_dropout_that_comes_later_is_refused_in_training():
    model = model_of("llama")
    apply(model, attention="none", ffn_block=7, loss_block=None)
    get_peft_model(model, LoraConfig(lora_dropout=0.1, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"LlamaMLP.up_proj.lora_dropout.default .p=0.1. drops values at random"):
        step(model, batch())
    model.eval()
    assert model(**batch(), use_cache=False).loss > 0


@pytest.mark.parametrize("first", ["apply", "peft"])
def test_lora_of_experts_is_exact_before_and_refused_after(first):
    """PEFT adds it to the weights of experts while their forward pass runs, and only then."""
    settings = LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    model = model_of("mixtral")
    if first == "apply":
        apply(model, attention="none", ffn_block=7, loss_block=None)
        get_peft_model(model, settings, autocast_adapter_dtype=False)
        with pytest.raises(ValueError, match=r"is changed for this pass alone .a parametrization or a hook, as PEFT"):
            step(model, batch())
        return
    get_peft_model(model, settings, autocast_adapter_dtype=False)
    expected = step(model, batch())
    apply(model, attention="none", ffn_block=7, loss_block=None)
    assert relative_difference(step(model, batch()), expected) <= 1e-10
    assert any("lora" in name and gradient.abs().max() > 0 for name, gradient in expected[1].items())


def test_a_hook_that_changes_a_part_for_one_pass_is_refused():
    model = model_of("llama")
    apply(model, attention="none", ffn_block=7, loss_block=None)
    handle = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="Linear in LlamaMLP is changed for this pass alone"):
        step(model, batch())
    handle.remove()
    step(model, batch())


LENGTHS = {
    "logits_to_keep": ({"logits_to_keep": 31}, "62 tokens have logits, but 80 have labels"),
    "shift_labels": (
        {"shift_labels": torch.ones(2, 39, dtype=torch.long)},
        "80 tokens have logits, but 78 have labels",
    ),
    "loss_weights": ({"loss_weights": torch.ones(2, 44)}, "80 tokens have logits, but 88 have loss_weights"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_labels_and_weights_of_other_tokens_are_refused(name):
    more, message = LENGTHS[name]
    model = model_of("llama")
    apply(model, attention="none", ffn_block=None, loss_block=7)
    with pytest.raises(ValueError, match=message):
        model(**batch(), **more, use_cache=False)


def test_weights_beside_a_loss_outside_the_model_are_refused():
    model, inputs = model_of("llama"), batch()
    apply(model, attention="none", ffn_block=None, loss_block=7)
    with pytest.raises(ValueError, match="has loss_weights but its labels were taken out before the forward pass"):
        model(input_ids=inputs["input_ids"], loss_weights=torch.ones(2, 40), use_cache=False)


def test_second_derivatives_are_refused():
    for options in ({"ffn_block": 7, "loss_block": None}, {"ffn_block": None, "loss_block": 7}):
        model = model_of("llama")
        apply(model, attention="none", **options)
        with pytest.raises(ValueError, match=r"create_graph=True: what memory.apply computes in blocks has no second"):
            loss = model(**batch(), use_cache=False).loss
            torch.autograd.grad(loss, model.model.embed_tokens.weight, create_graph=True)


def test_a_second_backward_pass_of_a_loss_in_blocks_is_refused():
    model = model_of("llama")
    apply(model, attention="none", ffn_block=None, loss_block=7)
    loss = model(**batch(), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="The gradients of a loss in blocks were used already"):
        loss.backward()


def test_the_rules_of_context_parallelism_know_the_loss_in_blocks():
    model = model_of("llama")
    del model._loss_function  # Transformers' own again
    apply(model, loss_block=7)
    assert first_error(MODEL_RULES, model) is None
