"""Item 2: the loss that is trained is not the one that the model computed."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import MixtralConfig, MixtralForCausalLM, Trainer

from ring_hf import ContextParallelCollator

from .setting import SIZES, VOCABULARY, Setting, examples

Term = Callable[[Any, Any], torch.Tensor]  # (outputs of the model, its inputs) -> loss


def make_trainer_with_loss(loss_of: Term) -> type[Trainer]:
    """Return a Trainer whose `compute_loss` computes a loss from outputs and inputs of the model."""

    class OwnLoss(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs)
            loss = loss_of(outputs, inputs)
            return (loss, outputs) if return_outputs else loss

    return OwnLoss


def make_trainer_with_change(change: Callable[[Any, torch.Tensor, Any, Any], torch.Tensor]) -> type[Trainer]:
    """Return a Trainer that trains `change(model, loss, outputs, inputs)` instead of the model's loss."""

    class ChangedLoss(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = change(model, loss, outputs, inputs)
            return (loss, outputs) if return_outputs else loss

    return ChangedLoss


def _make_trainer_with_term(term: Term) -> type[Trainer]:
    return make_trainer_with_change(lambda model, loss, outputs, inputs: loss + term(outputs, inputs))


def _targets(outputs: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits ([targets, vocabulary]) and the labels ([targets]) that they predict, shifted as users do it."""
    return outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()


def weighted_cross_entropy(setting: Setting) -> None:
    weights = torch.linspace(0.5, 1.5, VOCABULARY)
    setting.train(
        trainer_class=make_trainer_with_loss(
            lambda outputs, inputs: cross_entropy(*_targets(outputs, inputs), weight=weights)
        )
    )


def focal_loss(setting: Setting) -> None:
    def focal(outputs: Any, inputs: Any) -> torch.Tensor:
        logits, labels = _targets(outputs, inputs)
        losses = cross_entropy(logits, labels, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses)[labels != -100].mean()

    setting.train(trainer_class=make_trainer_with_loss(focal))


def z_loss(setting: Setting) -> None:
    setting.train(
        trainer_class=_make_trainer_with_term(
            lambda outputs, inputs: 1e-2 * outputs.logits.logsumexp(-1).square().mean()
        )
    )


def entropy_bonus(setting: Setting) -> None:
    def entropy(outputs: Any, inputs: Any) -> torch.Tensor:
        logits, labels = _targets(outputs, inputs)
        entropies = torch.distributions.Categorical(logits=logits).entropy()
        return -0.1 * entropies[labels != -100].mean()

    setting.train(trainer_class=_make_trainer_with_term(entropy))


def repetition_penalty(setting: Setting) -> None:
    """Unlikelihood of the current token, which reads `input_ids` instead of labels."""

    def penalty(outputs: Any, inputs: Any) -> torch.Tensor:
        select_cases = outputs.logits.softmax(-1).gather(-1, inputs["input_ids"][..., None])
        return -torch.log1p(-select_cases.clamp(max=0.99)).mean()

    setting.train(trainer_class=_make_trainer_with_term(penalty))


def hidden_states_by_hook(setting: Setting) -> None:
    """A forward hook captures hidden states of a middle layer, and the loss pulls neighbours together."""
    model = setting.llama()
    captured: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda layer, args, output: captured.append(output))

    def smoothness(outputs: Any, inputs: Any) -> torch.Tensor:
        states = captured.pop()
        return 0.1 * (states[:, 1:] - states[:, :-1]).square().mean()

    setting.train(model, trainer_class=_make_trainer_with_term(smoothness))


def largest_activation_by_hook(setting: Setting) -> None:
    """A penalty on the largest activation of a feed-forward layer."""
    model = setting.llama()
    captured: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(lambda layer, args, output: captured.append(output))
    setting.train(
        model, trainer_class=_make_trainer_with_term(lambda outputs, inputs: captured.pop().abs().amax((1, 2)).mean())
    )


def flooding(setting: Setting) -> None:
    """Ishida et al. 2020: the loss is kept above a level, but every rank compares its own share with it."""
    level = 5.0
    setting.train(
        trainer_class=make_trainer_with_change(lambda model, loss, outputs, inputs: (loss - level).abs() + level)
    )


def clamped_loss(setting: Setting) -> None:
    setting.train(trainer_class=make_trainer_with_change(lambda model, loss, outputs, inputs: loss.clamp(max=5.5)))


def scaled_by_rows(setting: Setting) -> None:
    """The loss is multiplied by the number of distinct tokens in the batch."""
    setting.train(
        trainer_class=make_trainer_with_change(
            lambda model, loss, outputs, inputs: loss * len(inputs["input_ids"].unique()) / VOCABULARY
        )
    )


def distillation(setting: Setting) -> None:
    """Divergence from a frozen teacher with the same attention backend."""
    torch.manual_seed(1)
    teacher = type(setting.llama())(setting.llama().config).eval()

    def divergence(outputs: Any, inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            expected = teacher(**inputs).logits
        return kl_div(outputs.logits.log_softmax(-1), expected.softmax(-1), reduction="batchmean") / expected.shape[1]

    setting.train(trainer_class=_make_trainer_with_term(divergence))


def second_backward(setting: Setting) -> None:
    """A term of the logits with a separate `backward`."""

    class TwoBackwards(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            (1e-2 * outputs.logits.logsumexp(-1).square().mean()).backward(retain_graph=True)
            return (loss, outputs) if return_outputs else loss

    setting.train(trainer_class=TwoBackwards)


def clipped_gradient_by_hook(setting: Setting) -> None:
    """The gradient of a layer's output is clipped by its norm, the norm of a shard. The loss is the model's."""

    def clip(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (0.05 / gradient.norm()).clamp(max=1)

    def attach(layer: Any, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(clip)

    model = setting.llama()
    model.model.layers[0].register_forward_hook(attach)
    setting.train(model)


def own_training_step(setting: Setting) -> None:
    """A custom training step, with a loss that ignores easy tokens."""

    class HardTokens(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            model.train()
            inputs = self._prepare_inputs(inputs)
            logits, labels = _targets(model(**inputs), inputs)
            losses = cross_entropy(logits, labels, reduction="none")
            loss = losses[losses > losses.detach().median()].mean()
            self.accelerator.backward(loss)
            return loss.detach()

    setting.train(trainer_class=HardTokens)


def loss_function_of_the_trainer(setting: Setting) -> None:
    """`compute_loss_func`, for which the Trainer removes the labels from the batch."""

    def of_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return cross_entropy(*_targets(outputs, {"labels": labels}))

    setting.train(trainer_kwargs={"compute_loss_func": of_logits})


def weight_penalty(setting: Setting) -> None:
    """The model's loss plus a penalty on its weights, which does not depend on the sequence."""

    def change(model: Any, loss: torch.Tensor, outputs: Any, inputs: Any) -> torch.Tensor:
        return loss + 1e-3 * sum(weight.square().sum() for weight in model.parameters())

    setting.train(trainer_class=make_trainer_with_change(change))


def constant_factor(setting: Setting) -> None:
    setting.train(trainer_class=make_trainer_with_change(lambda model, loss, outputs, inputs: 0.5 * loss))


def adalora(setting: Setting, **changes: Any) -> None:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=100, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    setting.train(get_peft_model(setting.llama(), config), **changes)


def shadow(setting: Setting) -> None:
    """PEFT's ShadowPEFT adds another cross entropy, computed from `labels`."""
    from peft import ShadowConfig, get_peft_model

    config = ShadowConfig(task_type="CAUSAL_LM", auxiliary_loss_weight=0.5, shadow_dropout=0.0)
    setting.train(get_peft_model(setting.llama(), config))


def sft_experts(setting: Setting) -> None:
    """TRL's SFTTrainer itself adds the auxiliary loss of a mixture of experts."""
    from .trl_trainers import sft

    torch.manual_seed(0)
    config = MixtralConfig(
        **{**SIZES, "vocab_size": 260}, num_local_experts=4, router_aux_loss_coef=0.5, router_jitter_noise=0.0
    )
    config._attn_implementation = setting.attention
    setting.run(sft(setting, MixtralForCausalLM(config)))


def sft_dynamic_fine_tuning(setting: Setting) -> None:
    """TRL's SFTTrainer with `loss_type="dft"`, which weighs every token by its own probability."""
    from .trl_trainers import sft

    setting.run(sft(setting, setting.llama(vocab_size=260), loss_type="dft"))


def experts_in_trainer(setting: Setting) -> None:
    """The same auxiliary loss inside the model under the plain Trainer, which is exact."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True)
    config._attn_implementation = setting.attention
    model = MixtralForCausalLM(config)
    setting.train(model, examples(80), ContextParallelCollator(model))
