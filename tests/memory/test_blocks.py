"""Token-wise functions over blocks: values, gradients, numbers of executions, and the hooks of parameters."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ring_hf.memory import apply, chunked_mlp
from ring_hf.memory.chunked import in_blocks, spans
from ring_hf.memory.mlp_lookup import find_mlps
from tests.memory.models import CountOperators, batch, model_of, relative_difference, step


def problem(num_tokens: int = 23):
    torch.manual_seed(0)
    shapes = ((num_tokens, 4), (num_tokens, 2), (4, 6), (6, 3))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def function(x, scale, up, down):
    hidden = (x @ up).sin()
    return hidden @ down * scale[:, :1], x.argmax(-1)


@pytest.mark.parametrize("block", [1, 2, 7, 22, 23, 50])
def test_values_and_gradients_are_those_of_all_tokens_at_once(block):
    x, scale, up, down = problem()
    weights = torch.randn(23, 3, dtype=torch.float64)
    expected, expected_indices = function(x, scale, up, down)
    actual, indices = in_blocks(lambda a, b: function(a, b, up, down), (x, scale), (up, down), block)
    assert torch.equal(indices, expected_indices) and (actual - expected).abs().max() <= 1e-14
    inputs = (x, scale, up, down)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(torch.autograd.grad((actual * weights).sum(), inputs), expected_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-13
    assert [stop - start for start, stop in spans(5, 2)] == [2, 2, 1]


@pytest.mark.parametrize("trained", [(0,), (2,), (3, 1), ()])
def test_only_what_is_trained_gets_a_gradient(trained):
    tensors = problem()
    for n, x in enumerate(tensors):
        x.requires_grad_(n in trained)
    x, scale, up, down = tensors
    actual, _ = in_blocks(lambda a, b: function(a, b, up, down), (x, scale), (up, down), 5)
    assert actual.requires_grad == bool(trained)
    if trained:
        actual.sum().backward()
        expected, _ = function(x, scale, up, down)
        expected_gradients = torch.autograd.grad(expected.sum(), [tensors[n] for n in trained])
        assert all(
            (tensors[n].grad - g).abs().max() <= 1e-13 for n, g in zip(trained, expected_gradients, strict=True)
        )
        assert all((x.grad is not None) == (n in trained) for n, x in enumerate(tensors))


def test_hooks_of_parameters_run_once():
    """DDP raises an error the second time."""
    x, scale, up, down = problem()
    shapes = []
    for parameter in (up, down):
        parameter.register_post_accumulate_grad_hook(lambda p: shapes.append(p.shape))
    in_blocks(lambda a, b: function(a, b, up, down), (x, scale), (up, down), 5)[0].sum().backward()
    assert sorted(shapes) == [(4, 6), (6, 3)]


def test_sums_over_blocks_are_in_fp32():
    """200 blocks of bf16 gradients: about as far from the truth as one product."""
    torch.manual_seed(0)
    x, w = torch.randn(800, 8), torch.randn(8, 8)
    truth = x.double().T @ torch.ones(800, 8, dtype=torch.double)
    half, weight = x.bfloat16(), w.bfloat16().requires_grad_()
    errors = []
    for block in (800, 4):
        weight.grad = None
        in_blocks(lambda a: (a @ weight,), (half,), (weight,), block)[0].sum().backward()
        errors.append((weight.grad.double() - truth).abs().max().item())
    naive = torch.zeros(8, 8, dtype=torch.bfloat16)
    for part in half.split(4):
        naive += part.T @ torch.ones(4, 8, dtype=torch.bfloat16)
    assert errors[1] <= 2 * errors[0] < (naive.double() - truth).abs().max().item() / 2


def test_checkpointing_around_blocks_stops_at_their_input():
    """Blocks run once in the forward pass and once in the backward pass: not again for the checkpoint around them."""
    x, scale, up, down = problem()

    def layer(x):
        return x + in_blocks(lambda a, b: function(a, b, up, down), (x.cos(), scale), (up, down), 23)[0].sum()

    with CountOperators() as count:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    # Forward, recomputed, and as the derivative of the other: a sine more if the checkpoint ran the blocks too.
    assert (count.calls["aten::sin"], count.calls["aten::cos"]) == (3, 3)


@pytest.mark.parametrize("shape", [(1, 13), (2, 40), (3, 7)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "cohere2_moe", "dbrx"])
def test_rows_of_any_number_and_length(name, shape):
    plain, model = model_of(name), model_of(name)
    apply(model, attention="none", ffn_block=5, loss_block=None)
    assert relative_difference(step(model, batch(*shape)), step(plain, batch(*shape))) <= 1e-10


def test_dense_layers_and_experts_behind_their_router_are_taken():
    names = {family: {mlp.name.split(".", 2)[2] for mlp in find_mlps(model_of(family))} for family in MLPS}
    assert names == MLPS


MLPS = {
    "llama": {"0.mlp", "1.mlp"},
    "mixtral": {"0.mlp.experts", "1.mlp.experts"},
    "qwen2_moe": {"0.mlp.experts", "1.mlp.experts", "0.mlp.shared_expert", "1.mlp.shared_expert"},
    "deepseek_v3": {"0.mlp", "1.mlp.experts", "1.mlp.shared_experts"},
    "gpt2": {"0.mlp", "1.mlp"},
}


def test_a_matrix_with_lora_is_no_feed_forward_layer():
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model_of("llama"), settings).get_base_model()
    assert {mlp.name.split(".", 2)[2] for mlp in find_mlps(model)} == {"0.mlp", "1.mlp"}


def automatic_block(model):
    return chunked_mlp.automatic_blocks(model, find_mlps(model)).popitem()[1]


def test_automatic_blocks_make_activations_as_large_as_weights(monkeypatch):
    monkeypatch.setattr(chunked_mlp, "SMALLEST", 1)
    dense = model_of("llama", hidden_size=64, intermediate_size=256)
    block = automatic_block(dense)
    # Weights 3 * 64 * 256; per token the input, and up to five intermediates (gate, its activation, up, product).
    assert 3 * 64 * 256 // (64 + 6 * 256) <= block <= 3 * 64 * 256 // (64 + 3 * 256)
    assert automatic_block(model_of("mixtral")) > 4 * 32 * 48 * 3 // (2 * (2 * 32 + 6 * 48))
    monkeypatch.undo()
    assert automatic_block(dense) == 1024
    plain, model = model_of("llama"), model_of("llama")
    apply(model, attention="none", ffn_block="auto", loss_block=None)
    assert type(model.model.layers[0].mlp) is type(plain.model.layers[0].mlp) and isinstance(model, nn.Module)
