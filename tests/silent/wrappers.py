"""Items 5 and 6: wrappers that bypass the model's hooks, and wrappers that read tokens or positions."""

import functools
from typing import Any

import torch
from peft import AdaptionPromptConfig, LoraConfig, XLoraConfig, get_peft_model

from . import losses
from .setting import BATCH, STEPS, VOCABULARY, Setting, examples

INVOCATION = [5, 9]  # tokens that activate an activated LoRA


def _train_and_evaluate(setting: Setting, model: Any) -> None:
    setting.train(model, eval_rows=examples(6, seed=2))


# Item 5


def adaption_prompt(setting: Setting) -> None:
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    _train_and_evaluate(setting, get_peft_model(setting.llama(), config))


def adalora_evaluated(setting: Setting) -> None:
    losses.adalora(setting, eval_rows=examples(6, seed=2))


class _Wrapper(torch.nn.Module):
    """A user's module around the model, with the attributes that the Trainer reads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model
        self.config = model.config

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return self.module(input_ids=input_ids, labels=labels, **kwargs)


class _CallsForward(_Wrapper):
    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        return self.module.forward(input_ids=input_ids, labels=labels, **kwargs)


class _CallsDecoder(_Wrapper):
    """Runs the decoder and the head itself, and computes the loss with the model's own function."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        states = self.module.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.module.lm_head(states)
        output = {"logits": logits}
        if labels is not None:
            loss = self.module.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY, **kwargs)
            output = {"loss": loss, **output}
        return output


def wrapper_that_calls_forward(setting: Setting) -> None:
    _train_and_evaluate(setting, _CallsForward(setting.llama()))


def wrapper_that_calls_the_decoder(setting: Setting) -> None:
    _train_and_evaluate(setting, _CallsDecoder(setting.llama()))


def wrapper_under_another_name(setting: Setting) -> None:
    """The model is in an attribute `backbone`."""

    class Named(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.backbone, self.config = model, model.config

        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            return self.backbone(input_ids=input_ids, labels=labels, **kwargs)

    _train_and_evaluate(setting, Named(setting.llama()))


def wrapper_that_does_no_harm(setting: Setting) -> None:
    _train_and_evaluate(setting, _Wrapper(setting.llama()))


def replaced_forward(setting: Setting) -> None:
    """A wrapper replaces `model.forward`, as profilers and patches do. The hooks still run."""
    model = setting.llama()
    forward = model.forward

    @functools.wraps(forward)
    def profiled(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = profiled
    _train_and_evaluate(setting, model)


def xlora(setting: Setting) -> None:
    """X-LoRA runs the model a second time, by `.forward`, to choose among its adapters."""
    folders = {}
    for name in ("0", "1"):  # X-LoRA looks its adapters up by number
        base = setting.llama()
        torch.manual_seed(1 + int(name))
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        folders[name] = str(setting.folder / name)
        get_peft_model(base, adapter).save_pretrained(folders[name])
    model = setting.llama()
    model.config.use_cache = False
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=folders)
    torch.manual_seed(3)
    _train_and_evaluate(setting, get_peft_model(model, config))


# Item 6


def activated_lora(setting: Setting) -> None:
    """aLoRA adapts only what follows the last invocation sequence of a row."""
    rows = examples(BATCH * STEPS)
    for i, row in enumerate(rows):
        start = 4 + (i * 5) % 14
        row["input_ids"][start : start + 2] = INVOCATION
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION
    )
    torch.manual_seed(0)
    setting.train(get_peft_model(setting.llama(), config), rows)


class _Gated(_Wrapper):
    """Adds a learned vector to the embeddings where `gate` returns True."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.vector = torch.nn.Parameter(torch.full((model.config.hidden_size,), 0.1))

    def gate(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        added = self.gate(input_ids)[..., None].float() * self.vector
        hook = self.module.model.embed_tokens.register_forward_hook(lambda module, args, output: output + added)
        try:
            return self.module(input_ids=input_ids, labels=labels, **kwargs)
        finally:
            hook.remove()


def prompt_of_first_tokens(setting: Setting) -> None:
    """A soft prompt on the first four tokens of a row."""

    class First(_Gated):
        def gate(self, input_ids: torch.Tensor) -> torch.Tensor:
            return (torch.arange(input_ids.shape[1]) < 4).expand_as(input_ids)

    setting.train(First(setting.llama()))


def after_a_separator(setting: Setting) -> None:
    """Changes the tokens after the first token 7."""

    class After(_Gated):
        def gate(self, input_ids: torch.Tensor) -> torch.Tensor:
            return (input_ids == 7).cumsum(1) > 0

    setting.train(After(setting.llama()))


def counts_of_tokens(setting: Setting) -> None:
    """Changes the tokens that occur more than twice in the row."""

    class Frequent(_Gated):
        def gate(self, input_ids: torch.Tensor) -> torch.Tensor:
            return (input_ids[:, :, None] == input_ids[:, None, :]).sum(-1) > 2

    setting.train(Frequent(setting.llama()))


def pairs_of_tokens(setting: Setting) -> None:
    """A hashed bigram embedding, in which a token depends on the one before it."""

    class Pairs(_Gated):
        def gate(self, input_ids: torch.Tensor) -> torch.Tensor:
            previous = torch.nn.functional.pad(input_ids[:, :-1], (1, 0))
            return (input_ids * 31 + previous * 17) % 5 == 0

    setting.train(Pairs(setting.llama()))


def mask_by_hook(setting: Setting) -> None:
    """A pre-hook on the model masks a tenth of the tokens, chosen by their position in the row."""

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        tokens = kwargs["input_ids"]
        is_hidden = torch.arange(tokens.shape[1]) % 10 == 3
        return args, {**kwargs, "input_ids": tokens.masked_fill(is_hidden, 0)}

    model = setting.llama()
    model.register_forward_pre_hook(hide, with_kwargs=True)
    setting.train(model)


def one_token_at_a_time(setting: Setting) -> None:
    """A gate that reads only the token itself, which a trial on a few tokens cannot distinguish."""

    class Even(_Gated):
        def gate(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids % 2 == 0

    setting.train(Even(setting.llama()))
