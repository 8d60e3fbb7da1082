"""Item 4: model classes that are not proven by name, whose `forward` computes a loss or mixes tokens."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from .setting import VOCABULARY, Setting


def train(setting: Setting, model_class: type, **changes: Any) -> None:
    setting.train(setting.llama(model_class), **changes)


class MultiTokenLlamaForCausalLM(LlamaForCausalLM):
    """Also predicts the token after the next one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.second_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, labels=labels, output_hidden_states=True, **kwargs)
        if labels is not None:
            logits = self.second_head(outputs.hidden_states[-1][:, :-2])
            outputs.loss = outputs.loss + 0.5 * cross_entropy(logits.flatten(0, 1), labels[:, 2:].flatten())
        return outputs


class OwnLossLlamaForCausalLM(LlamaForCausalLM):
    """Computes its own cross entropy, without `shift_labels` and the number of targets."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            outputs.loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return outputs


class LaterTokensLlamaForCausalLM(LlamaForCausalLM):
    """Weighs targets by their position in the row."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            losses = cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
            weights = torch.linspace(0, 1, losses.shape[1]) * (labels[:, 1:] != -100)
            outputs.loss = (losses * weights).sum() / weights.sum()
        return outputs


class AnswersOnlyLlamaForCausalLM(LlamaForCausalLM):
    """Trains only on the tokens after the last token 7 of a row."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, **kwargs)
        if labels is not None:
            after = (input_ids == 7).flip(1).cumsum(1).flip(1) == 0
            targets = torch.where(after, labels, -100)
            outputs.loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        return outputs


class ContrastiveLlamaForCausalLM(LlamaForCausalLM):
    """Pulls neighbouring hidden states together."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, labels=labels, output_hidden_states=True, **kwargs)
        if labels is not None:
            states = outputs.hidden_states[-1]
            outputs.loss = outputs.loss - 0.5 * torch.cosine_similarity(states[:, 1:], states[:, :-1], dim=-1).mean()
        return outputs


class PooledLlamaForCausalLM(LlamaForCausalLM):
    """Has a second head on the mean hidden state of a row."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.pooled_head = torch.nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids=input_ids, labels=labels, output_hidden_states=True, **kwargs)
        if labels is not None:
            topic = input_ids[:, 0] % 2
            outputs.loss = outputs.loss + cross_entropy(self.pooled_head(outputs.hidden_states[-1].mean(1)), topic)
        return outputs


class TokenShiftLlamaForCausalLM(LlamaForCausalLM):
    """Mixes every embedding with that of the token before, as RWKV does."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        def mix(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, -1))

        hook = self.model.embed_tokens.register_forward_hook(mix)
        try:
            return super().forward(input_ids=input_ids, **kwargs)
        finally:
            hook.remove()


class CountingLlamaForCausalLM(LlamaForCausalLM):
    """Adds learned positions, counted from the start of its input."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.positions = torch.nn.Embedding(256, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        added = self.positions(torch.arange(input_ids.shape[1]))
        hook = self.model.embed_tokens.register_forward_hook(lambda module, args, output: output + added)
        try:
            return super().forward(input_ids=input_ids, **kwargs)
        finally:
            hook.remove()


class NoisyLlamaForCausalLM(LlamaForCausalLM):
    """Adds noise to its embeddings in training mode."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        def add_noise(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + 0.05 * torch.randn_like(output) if self.training else output

        hook = self.model.embed_tokens.register_forward_hook(add_noise)
        try:
            return super().forward(input_ids=input_ids, **kwargs)
        finally:
            hook.remove()


class ScaledLlamaForCausalLM(LlamaForCausalLM):
    """Scales its logits token by token, which is harmless."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        hook = self.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
        try:
            return super().forward(input_ids=input_ids, **kwargs)
        finally:
            hook.remove()


def multi_token_prediction(setting: Setting) -> None:
    train(setting, MultiTokenLlamaForCausalLM)


def own_cross_entropy(setting: Setting) -> None:
    train(setting, OwnLossLlamaForCausalLM)


def later_tokens_weigh_more(setting: Setting) -> None:
    train(setting, LaterTokensLlamaForCausalLM)


def answers_only(setting: Setting) -> None:
    train(setting, AnswersOnlyLlamaForCausalLM)


def contrastive_neighbours(setting: Setting) -> None:
    train(setting, ContrastiveLlamaForCausalLM)


def pooled_head(setting: Setting) -> None:
    train(setting, PooledLlamaForCausalLM)


def token_shift(setting: Setting) -> None:
    train(setting, TokenShiftLlamaForCausalLM)


def positions_of_its_own(setting: Setting) -> None:
    train(setting, CountingLlamaForCausalLM)


def noise_in_the_model(setting: Setting) -> None:
    train(setting, NoisyLlamaForCausalLM)


def harmless_subclass(setting: Setting) -> None:
    train(setting, ScaledLlamaForCausalLM)


def smoothed_labels_inside(setting: Setting) -> None:
    """A smoothed cross entropy that supports `shift_labels` replaces the model's loss function."""
    model = setting.llama()

    def smoothed(logits: torch.Tensor, labels: Any, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        targets = kwargs.get("shift_labels")
        logits, targets = (logits, targets) if targets is not None else (logits[:, :-1], labels[:, 1:])
        return cross_entropy(logits.reshape(-1, VOCABULARY), targets.flatten(), label_smoothing=0.1)

    model.loss_function = smoothed
    setting.train(model)
