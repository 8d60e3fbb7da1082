"""The trial step: which Trainers and models pass, which are refused, and that it has no side effects."""

import random

import numpy
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, Trainer

from ring_hf import memory
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig, context, guard_model
from ring_hf.hf.runtime import proven_classes
from ring_hf.hf.runtime.preserved_state import preserve_state
from ring_hf.hf.runtime.proven_classes import find_unproven_module, find_unproven_part
from tests.hf.faults import arguments
from tests.hf.models import llama, rows
from tests.support.harness import run_distributed


class OwnLossTrainer(Trainer):
    """Computes the loss from logits."""

    reduction, coefficient = "sum", 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        logits, labels = outputs.logits.float().flatten(0, 1), inputs["shift_labels"].flatten()
        loss = cross_entropy(logits, labels, reduction=self.reduction)
        if self.reduction == "sum":
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        loss = loss + self.coefficient * outputs.logits.float().logsumexp(-1).square().mean()
        return (loss, outputs) if return_outputs else loss


class MeanLossTrainer(OwnLossTrainer):
    reduction = "mean"


class ZLossTrainer(OwnLossTrainer):
    coefficient = 1e-3


class OwnBackwardTrainer(Trainer):
    """Runs a backward pass inside compute_loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        outputs.logits.logsumexp(-1).mean().backward(retain_graph=True)
        return (loss, outputs) if return_outputs else loss


class HarmlessForCausalLM(LlamaForCausalLM):
    """Computes the same as its base class."""


class LeakyForCausalLM(LlamaForCausalLM):
    """Multiplies the loss by a mean over tokens, which a shard does not know."""

    def forward(self, input_ids=None, **kwargs):
        embedded = self.model.embed_tokens(input_ids)
        output = super().forward(input_ids=input_ids, **kwargs)
        if output.loss is not None:
            output.loss = output.loss * (1 + embedded.mean())
        return output


def train(rank, world_size, trainer_class, dtype, settings, model_class=LlamaForCausalLM, memory_options=None):
    """Return "trained" or the error, and the state before each optimizer step."""
    model = model_class(llama().config).to(dtype)
    if memory_options is not None:
        memory.apply(model, **memory_options)
    config = ContextParallelConfig(context_parallel_size=2, **settings)
    data = rows(31, 22, 17, 30, 12, 25, 31, 8)
    trainer = trainer_class(model, arguments(config), train_dataset=data, data_collator=ContextParallelCollator(model))
    torch.manual_seed(5)
    states = []
    clip_grad_norm = trainer.accelerator.clip_grad_norm_

    def record_and_clip(*args, **kwargs):
        states.append(disturbable_state(trainer))
        return clip_grad_norm(*args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = record_and_clip
    try:
        trainer.train()
    except ValueError as error:
        return str(error), states
    finally:
        context.reset()
    return "trained", states


def disturbable_state(trainer):
    """Return random states and attributes of the Trainer that a trial step could change."""
    return (
        torch.get_rng_state().sum().item(),
        str(random.getstate())[:200],
        str(numpy.random.get_state()[1][:8]),
        sorted((name, value) for name, value in vars(trainer).items() if isinstance(value, int | float | str)),
    )


@pytest.mark.parametrize(
    ("trainer_class", "dtype"),
    [
        (OwnLossTrainer, torch.float32),
        (OwnLossTrainer, torch.bfloat16),
        (OwnLossTrainer, torch.float64),
        (Trainer, torch.bfloat16),
    ],
    ids=["own-fp32", "own-bf16", "own-fp64", "plain-bf16"],
)
def test_sum_of_losses_over_the_count_passes_the_trial(trainer_class, dtype):
    for message, _ in run_distributed(2, train, trainer_class, dtype, {"verify": True}):
        assert message == "trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "memory_options",
    [{"attention": "save", "ffn_block": 5}, {"attention": "recompute", "loss_block": 5}],
    ids=["save", "recompute"],
)
def test_memory_options_pass_the_trial(memory_options, dtype):
    for message, _ in run_distributed(2, train, Trainer, dtype, {"verify": True}, LlamaForCausalLM, memory_options):
        assert message == "trained"


@pytest.mark.parametrize(
    ("trainer_class", "dtype", "expected_message"),
    [
        (MeanLossTrainer, torch.float32, "does not match one process"),
        (MeanLossTrainer, torch.bfloat16, "does not match one process"),
        (ZLossTrainer, torch.float32, "does not match one process"),
        (ZLossTrainer, torch.bfloat16, "does not match one process"),
        (OwnBackwardTrainer, torch.float32, "runs a backward pass of its own"),
    ],
    ids=["means-fp32", "means-bf16", "z-loss-fp32", "z-loss-bf16", "own-backward"],
)
def test_a_loss_of_one_shard_is_refused_before_the_first_step(trainer_class, dtype, expected_message):
    result, other_result = run_distributed(2, train, trainer_class, dtype, {})
    assert result == other_result
    message, states = result
    assert expected_message in message and states == []
    assert (
        f"{trainer_class.__name__} is not Transformers' own Trainer" in message or trainer_class is OwnBackwardTrainer
    )


@pytest.mark.parametrize(
    "settings", [{"transport": "direct"}, {"transport": "allgather"}, {"ulysses_size": 2, "head_chunks": 2}], ids=str
)
def test_unknown_classes_are_tried_under_every_transport(settings):
    for message, _ in run_distributed(2, train, Trainer, torch.float32, settings, HarmlessForCausalLM):
        assert message == "trained"
    for message, _ in run_distributed(2, train, Trainer, torch.float32, settings, LeakyForCausalLM):
        assert "LeakyForCausalLM is not one of the classes that are proven by name" in message


def test_a_trial_step_leaves_no_trace():
    """Every optimizer step starts with the random states and counters of a run without a trial."""
    (message, states), _ = run_distributed(2, train, Trainer, torch.float32, {"verify": True})
    (message_without_trial, states_without_trial), _ = run_distributed(2, train, Trainer, torch.float32, {})
    assert message == message_without_trial == "trained" and states and states == states_without_trial


def test_preserved_restores_modes_buffers_checkpointing_and_counters():
    class Counter:
        def __init__(self, model):
            self.model, self.steps, self.metrics = model, 3, {"loss": [1.0]}

    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.register_buffer("count", torch.zeros(3))
    owner = Counter(model)
    metrics, flags = owner.metrics, [module.gradient_checkpointing for module in model.model.layers]
    with preserve_state(model, owner):
        assert not any(module.gradient_checkpointing for module in model.model.layers)
        model.eval()
        model.count += 1
        owner.steps += 1
        owner.metrics["loss"].append(2.0)
        owner.metrics["more"] = []
        torch.rand(1), random.random(), numpy.random.rand()
    assert model.training and model.model.layers[0].training and not model.count.any()
    assert owner.steps == 3 and owner.metrics is metrics and metrics == {"loss": [1.0]}
    assert [module.gradient_checkpointing for module in model.model.layers] == flags == [True, True]


def test_find_unproven_names_the_module():
    model = llama()
    guard_model(model)
    assert find_unproven_module(model) is None
    assert "HarmlessForCausalLM is not one of the classes" in find_unproven_module(HarmlessForCausalLM(model.config))
    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    assert "model.layers.1 has a hook" in find_unproven_module(model)
    hook.remove()
    model.model.layers[0].mlp.act_fn = IdentityModule()
    assert "model.layers.0.mlp.act_fn is a IdentityModule, which is not part of Transformers" in find_unproven_module(
        model
    )
    model = llama()
    model.model.forward = lambda *args, **kwargs: None
    assert "the forward of model was replaced" in find_unproven_module(model)


def test_nothing_is_proven_by_name_in_other_releases(monkeypatch):
    model = llama()
    guard_model(model)
    monkeypatch.setattr(proven_classes, "installed_release", lambda: "5.20")
    assert find_unproven_module(model) == "LlamaForCausalLM is not proven by name in Transformers 5.20"
    monkeypatch.setattr(proven_classes, "installed_release", lambda: "5.15")
    assert find_unproven_module(model) is None


class IdentityModule(torch.nn.Module):
    def forward(self, x):
        return x


def test_find_unproven_path_names_the_trainer():
    model = llama("sdpa")
    args = arguments(ContextParallelConfig(context_parallel_size=1))
    try:
        assert find_unproven_part(Trainer(model, args)) is None
        assert "OwnLossTrainer is not Transformers' own Trainer" in find_unproven_part(OwnLossTrainer(model, args))
        trainer = Trainer(model, args)
        trainer.compute_loss = lambda *args, **kwargs: None
        assert "the Trainer's compute_loss was replaced" in find_unproven_part(trainer)
    finally:
        context.reset()
