"""Items 9 and 11: whole sequences during training, and Trainers or models that are refused late or hang."""

from collections.abc import Callable
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from .setting import Setting, examples

PROMPT = [[1, 2, 3, 4, 5]]


def generate(model: Any) -> list[int]:
    return model.generate(torch.tensor(PROMPT), do_sample=False, max_new_tokens=8, pad_token_id=0)[0].tolist()


class CallAtEvent(TrainerCallback):
    """Calls a function with the model at an event of a step, on rank 0 or on all ranks."""

    def __init__(self, event: str, call: Callable[[Any], Any], everywhere: bool = False, step: int = 0) -> None:
        def run(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if (everywhere or state.is_world_process_zero) and state.global_step == step:
                call(model)

        setattr(self, event, run)


# Item 9


def generate_at_the_start_on_rank_0(setting: Setting) -> None:
    model = setting.llama().train()
    setting.train(model, callbacks=[CallAtEvent("on_train_begin", generate)])


def generate_at_the_start(setting: Setting) -> None:
    model = setting.llama().train()
    setting.train(model, callbacks=[CallAtEvent("on_train_begin", generate, everywhere=True)])


def generate_at_step_5_on_rank_0(setting: Setting) -> None:
    setting.train(callbacks=[CallAtEvent("on_step_end", generate, step=5)])


def logits_at_the_start_on_rank_0(setting: Setting) -> None:
    """A forward pass without labels, to look at the first logits."""
    model = setting.llama().train()
    setting.train(
        model, callbacks=[CallAtEvent("on_train_begin", lambda model: model(input_ids=torch.tensor(PROMPT)))]
    )


def logits_at_step_5_on_rank_0(setting: Setting) -> None:
    sum_logits = lambda model: model(torch.tensor(PROMPT)).logits.sum()  # with gradients enabled
    setting.train(callbacks=[CallAtEvent("on_step_end", sum_logits, step=5)])


def perplexity_at_step_5_on_rank_0(setting: Setting) -> None:
    """A held-out loss of a whole row, in evaluation mode."""

    def perplexity(model: Any) -> None:
        model.eval()
        with torch.no_grad():
            tokens = torch.tensor([examples(1, 40, seed=9)[0]["input_ids"]])
            setting.record.outputs.append(float(model(input_ids=tokens, labels=tokens).loss))
        model.train()

    setting.train(callbacks=[CallAtEvent("on_step_end", perplexity, step=5)])


def train_then_generate(setting: Setting) -> None:
    trainer = setting.train()
    setting.record.outputs = generate(trainer.model)


def train_then_logits(setting: Setting) -> None:
    """Logits of a whole row on every rank, still in training mode."""
    trainer = setting.train()
    logits = trainer.model(input_ids=torch.tensor(PROMPT)).logits
    setting.record.outputs = [float(logits.sum()), float(logits.square().sum())]


# Item 11


def sft_evaluated(setting: Setting) -> None:
    from .trl_trainers import sft

    setting.run(sft(setting, setting.llama(vocab_size=260), evaluate=True))


def sft_trained(setting: Setting) -> None:
    from .trl_trainers import sft

    setting.run(sft(setting, setting.llama(vocab_size=260)))


def sft_packed(setting: Setting) -> None:
    """TRL's own padding-free packing, which replaces the collator."""
    from .trl_trainers import sft

    setting.run(sft(setting, setting.llama(vocab_size=260), packing=True, max_length=64))


def dpo_trained(setting: Setting) -> None:
    from .trl_trainers import dpo

    setting.run(dpo(setting, setting.llama(vocab_size=260), setting.llama(vocab_size=260)))


def _train_seq2seq(setting: Setting, trainer_kwargs: dict[str, Any]) -> None:
    setting.train(
        trainer_kwargs=trainer_kwargs,
        trainer_class=Seq2SeqTrainer,
        eval_rows=examples(6, seed=2),
        arguments_class=Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=60,
    )


def generated_predictions(setting: Setting) -> None:
    """`predict_with_generate` with metrics: whole rows are generated from shards."""

    def lengths(prediction: Any) -> dict[str, float]:
        return {"length": float(prediction.predictions.shape[1])}

    _train_seq2seq(setting, {"compute_metrics": lengths})


def generated_predictions_without_metrics(setting: Setting) -> None:
    """Without metrics, the Trainer generates nothing."""
    _train_seq2seq(setting, {})


def compiled_in_place(setting: Setting) -> None:
    model = setting.llama()
    model.compile()
    setting.train(model)


def compiled_layers(setting: Setting) -> None:
    """Every decoder layer is compiled separately, as regional compilation recommends."""
    model = setting.llama()
    for layer in model.model.layers:
        layer.compile()
    setting.train(model)


def compiled_copy(setting: Setting) -> None:
    setting.train(torch.compile(setting.llama()), remove_unused_columns=False)


def prompt_tuning(setting: Setting) -> None:
    _train_prompted(setting, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def p_tuning(setting: Setting) -> None:
    _train_prompted(setting, PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16))


def prefix_tuning(setting: Setting) -> None:
    _train_prompted(setting, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def _train_prompted(setting: Setting, config: Any) -> None:
    torch.manual_seed(0)
    setting.train(get_peft_model(setting.llama(), config))
