"""The loss over blocks of tokens: values and gradients of the loss over all of them, in fp64."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForCausalLMLoss as stock_loss

from ring_hf.memory import apply
from ring_hf.memory.chunked_loss import automatic_block, summed_loss
from ring_hf.memory.lazy_logits import LazyLogits
from tests.memory.models import CountOperators, PeakBytes, batch, gradients, model_of, relative_difference, step

BLOCKS = (1, 7, 16, 80, 1000)


def only_loss(model, block=7):
    apply(model, attention="none", ffn_block=None, loss_block=block)
    return model


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "phi"])
def test_any_block_gives_the_loss_of_all_tokens(name, block):
    """Soft caps (Gemma 2), scales (Cohere, Granite), a bias (Phi), tied embeddings (Gemma 2, Cohere)."""
    plain = model_of(name)
    for count in (71, None):  # a sum over the count of the step, and a mean
        assert (
            relative_difference(
                step(only_loss(copy.deepcopy(plain), block), batch(), count), step(plain, batch(), count)
            )
            <= 1e-10
        )


def test_the_head_is_used_by_its_block_and_never_for_all_tokens():
    model = only_loss(model_of("llama"))
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    step(model, batch())
    logits = [shape for shape in shapes if not isinstance(shape, LazyLogits)]
    assert max(shape[-2] for shape in logits if shape[-2] != 40) == 7 and (2, 40, 96) in logits  # that one is deferred
    with PeakBytes() as deferred:
        step(model, batch())
    with PeakBytes() as whole:
        step(model_of("llama"), batch())
    assert deferred.peak < whole.peak


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_labels_are_shifted_once(given):
    plain, inputs = model_of("llama"), batch()
    if given == "shift_labels":
        inputs["shift_labels"] = torch.roll(inputs["labels"], -1, dims=1)
    assert relative_difference(step(only_loss(copy.deepcopy(plain)), inputs), step(plain, inputs)) <= 1e-10


def test_a_rank_without_labels_has_loss_zero_and_gradients_that_are_zero():
    model, inputs = only_loss(model_of("llama")), batch()
    inputs["labels"].fill_(-100)
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, num_items_in_batch=71, use_cache=False).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in model.parameters())


def test_no_block_without_labels_is_computed():
    model, inputs = only_loss(model_of("llama"), block=10), batch()
    inputs["labels"][:, 11:] = -100  # targets of the first 10 tokens of each row
    expected = step(model_of("llama"), inputs)
    with CountOperators() as count:
        actual = step(model, inputs)
    assert relative_difference(actual, expected) <= 1e-10
    assert count.calls["aten::nll_loss_forward"] == 2  # blocks 0 and 4 of 8


@pytest.mark.parametrize("head", ["trained", "frozen", "tied"])
def test_heads_that_are_trained_frozen_or_tied(head):
    plain = model_of("llama", tie_word_embeddings=head == "tied")
    if head == "frozen":
        plain.lm_head.requires_grad_(False)
    actual = step(only_loss(copy.deepcopy(plain)), batch())
    assert relative_difference(actual, step(plain, batch())) <= 1e-10
    assert ("lm_head.weight" in actual[1]) == (head == "trained")


def test_gradients_add_up_over_micro_batches_with_one_count():
    plain = model_of("llama")
    model = only_loss(copy.deepcopy(plain))
    for each in (model, plain):
        for seed in (0, 1):
            each(**batch(seed=seed), num_items_in_batch=torch.tensor(142), use_cache=False).loss.backward()
    for name, gradient in gradients(plain).items():
        assert (gradients(model)[name] - gradient).abs().max() <= 1e-12, name


@pytest.mark.parametrize("block", [10, 1000], ids=["blocks", "one block"])
def test_weights_of_tokens_are_honoured(block):
    torch.manual_seed(0)
    plain, inputs, weights = model_of("llama"), batch(), torch.rand(2, 40, dtype=torch.float64)
    output = plain(**inputs, use_cache=False)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    losses = cross_entropy(output.logits.flatten(0, 1), shifted.flatten(), reduction="none")
    weights_of = torch.nn.functional.pad(weights, (0, 1))[:, 1:].flatten()
    total = (losses * weights_of).sum()
    for count, expected in ((71, total / 71), (None, total / (weights_of * (shifted.flatten() != -100)).sum())):
        plain.zero_grad()
        expected.backward(retain_graph=True)
        model = only_loss(copy.deepcopy(plain), block=block)
        assert (
            relative_difference(
                step(model, {**inputs, "loss_weights": weights}, count), (expected.detach(), gradients(plain))
            )
            <= 1e-10
        )


def test_logits_are_computed_when_they_are_used():
    plain = model_of("gemma2")
    model, inputs = only_loss(copy.deepcopy(plain)), batch()
    expected = plain(**inputs, use_cache=False).logits
    output = model(**inputs, use_cache=False)
    assert isinstance(output.logits, LazyLogits) and output.logits.shape == (2, 40, 96)
    assert output.logits.dtype == torch.float64 and output.logits.device.type == "cpu"
    assert torch.equal(output.logits + 0, expected)
    assert torch.equal(output.logits.detach(), expected.detach())
    assert torch.equal(output.logits[:, -1].argmax(-1), expected[:, -1].argmax(-1))
    (gradient,) = torch.autograd.grad(output.logits.logsumexp(-1).sum(), model.model.norm.weight)
    (expected_gradient,) = torch.autograd.grad(expected.logsumexp(-1).sum(), plain.model.norm.weight)
    assert (gradient - expected_gradient).abs().max() <= 1e-12
    for ask in ({}, {"labels": None}):  # without a loss, logits are plain tensors
        assert type(model(input_ids=inputs["input_ids"], **ask).logits) is torch.Tensor


def test_logits_changed_in_place_or_past_autograd_are_refused():
    logits = only_loss(model_of("llama"))(**batch(), use_cache=False).logits
    for change in (lambda: logits.mul_(2), lambda: logits.__setitem__((..., 0), 0.0), lambda: logits.clamp_(0)):
        with pytest.raises(ValueError, match="would change logits in place that are not computed yet"):
            change()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunctionSubclass():
                return x * 2

    with pytest.raises(ValueError, match="past where gradients are recorded"):
        Double.apply(logits)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_has_the_loss_of_all_tokens_too(training):
    plain = model_of("llama").train(training)
    model = only_loss(copy.deepcopy(plain))
    with torch.no_grad():
        expected, actual = (each(**batch(), use_cache=False) for each in (plain, model))
    assert (actual.loss - expected.loss).abs() <= 1e-12
    assert torch.equal(actual.logits.detach(), expected.logits)


def test_the_loss_of_transformers_agrees_to_its_own_precision():
    """It goes down to fp32 whatever the model's dtype."""
    plain = model_of("llama")
    plain.loss_function = stock_loss
    model = only_loss(copy.deepcopy(plain))
    assert relative_difference(step(model, batch()), step(plain, batch())) <= 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_no_worse_than_the_plain_loss_in_it(autocast):
    exact, inputs = step(model_of("llama"), batch()), batch()
    mean_errors = []
    for block in (None, 7):
        model = model_of("llama").float() if autocast else model_of("llama").bfloat16()
        apply(model, attention="none", ffn_block=block, loss_block=block)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs, num_items_in_batch=71, use_cache=False).loss
        loss.backward()
        actual = gradients(model)
        assert all(p.dtype == actual[name].dtype for name, p in model.named_parameters())
        errors = [((actual[name].double() - exact[1][name]).norm() / exact[1][name].norm()).item() for name in actual]
        mean_errors.append(sum(errors) / len(errors))
    assert 0 < mean_errors[1] <= 1.1 * mean_errors[0]


def test_the_count_of_the_step_is_not_rounded_to_half_precision():
    """1 / 71 in bf16 is 0.1 % off, which would be a factor of all gradients."""
    hidden, weight = torch.randn(200, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    labels = torch.randint(0, 96, (200,))
    actual, expected = [], []
    for results, dtype in ((actual, torch.bfloat16), (expected, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = summed_loss(lambda h, w=inputs[1]: h @ w.T, inputs[0], labels, None, inputs[1:], 50) / 71
        results += torch.autograd.grad(loss, inputs)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert abs((a.double() * b).sum() / b.square().sum() - 1) <= 4e-4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(mode):
    model = only_loss(model_of("llama"))
    with mode(), CountOperators() as count:
        loss = model(**batch(), use_cache=False).loss
    assert (loss - model_of("llama")(**batch(), use_cache=False).loss).abs() <= 1e-12
    assert not any("backward" in name for name in count.calls)


@pytest.mark.parametrize("block", [7, 1000])  # in blocks, and in one
def test_observers_get_the_loss_of_every_token_and_change_nothing(block):
    plain, inputs = model_of("llama"), batch()
    model, calls = copy.deepcopy(plain), []
    apply(model, loss_block=block).observers.append(lambda *tensors: calls.append(tensors))
    assert relative_difference(step(model, inputs), step(plain, inputs)) <= 1e-10
    ((losses, labels, weights),) = calls
    logits = plain(**inputs, use_cache=False).logits
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].flatten()
    expected = cross_entropy(logits.flatten(0, 1), shifted, reduction="none")
    assert labels.equal(shifted) and weights is None and (losses - expected).abs().max() <= 1e-12
    with torch.no_grad():
        model(**inputs, use_cache=False)
    assert len(calls) == 1


def test_automatic_blocks_have_as_many_logits_as_there_are_hidden_numbers():
    assert automatic_block(131_072, 4096, 128_256) == 8192  # 4186, to a power of two
    assert automatic_block(64, 32, 96) == 256
    plain, inputs = model_of("llama"), batch(2, 127)
    assert relative_difference(step(only_loss(copy.deepcopy(plain), "auto"), inputs), step(plain, inputs)) <= 1e-10


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)
def test_the_sum_is_that_of_pytorchs_own_linear_cross_entropy():
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (23, 11))
    labels = torch.randint(0, 11, (23,))
    labels[::3] = -100
    ours = summed_loss(lambda h: h @ weight.T, hidden, labels, None, [weight], 5)
    theirs = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert (ours - theirs).abs() <= 1e-12
    for a, b in zip(*(torch.autograd.grad(3 * x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        assert (a - b).abs().max() <= 1e-12
