"""Faulty training scripts, run by gloo processes: each returns the error that its rank saw.

`FAULTS` maps a name to a function `(rank, world_size) -> None` that is expected to raise on *every* rank, also where
the comment says that only rank 1 is at fault. Workers must survive, so errors are returned, not raised.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import ring_hf
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig, context, guard_model
from ring_hf.hf.collate.collator import PadOrPackCollator
from tests.hf.models import llama, rows


def arguments(config: Any = None, kind: type = TrainingArguments, **more: Any) -> Any:
    return kind(
        output_dir="unused",
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        parallelism_config=config or ContextParallelConfig(context_parallel_size=2),
        **more,
    )


def train(model: Any = None, collator: Any = None, data: Any = None, args: Any = None, **more: Any) -> None:
    model = llama() if model is None else model
    collator = ContextParallelCollator(model) if collator is None else collator
    args = arguments() if args is None else args
    data = rows(16, 20, 12, 16) if data is None else data
    Trainer(model, args, data_collator=collator, train_dataset=data, **more).train()


class LeftPadding:
    """An inner collator that pads on the left."""

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        batch = PadOrPackCollator()(features)
        return {key: value.flip(1) for key, value in batch.items()}


class TwoRows:
    """An inner collator whose rows do not show which examples they hold."""

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        return PadOrPackCollator()(features[:2])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows(*[16] * 8))


def left_padding_on_rank_1(rank: int, world_size: int) -> None:
    model = llama()
    train(model, ContextParallelCollator(model, inner=LeftPadding() if rank == 1 else None))


def short_rows_on_rank_1(rank: int, world_size: int) -> None:
    train(data=rows(3, 2, 3, 3) if rank == 1 else None)


def other_rows_on_rank_1(rank: int, world_size: int) -> None:
    train(data=rows(16, 20, 12, 16, seed=rank))


def other_layout_on_rank_1(rank: int, world_size: int) -> None:
    model = llama()
    train(model, ContextParallelCollator(llama("ring_striped") if rank == 1 else model))


def plain_collator_on_rank_1(rank: int, world_size: int) -> None:
    model = llama()
    train(model, PadOrPackCollator() if rank == 1 else ContextParallelCollator(model))


def generating_trainer(rank: int, world_size: int) -> None:
    model = llama()
    config = ContextParallelConfig(context_parallel_size=2)
    args = arguments(config, Seq2SeqTrainingArguments, predict_with_generate=True)
    collator = ContextParallelCollator(model)
    Seq2SeqTrainer(model, args, data_collator=collator, compute_metrics=lambda prediction: {})


def compiled_model(rank: int, world_size: int) -> None:
    model = llama()
    model.compile()
    train(model)


def prompt_tuning(rank: int, world_size: int) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    train(get_peft_model(llama(), config))


def activated_lora(rank: int, world_size: int) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    train(get_peft_model(llama(), config))


def two_models_in_one(rank: int, world_size: int) -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = llama(), llama()

        def forward(self, **inputs: Any) -> Any:
            return self.student(**inputs)

    pair = Pair()
    train(pair, ContextParallelCollator(pair.student))


def other_dtype_on_rank_1(rank: int, world_size: int) -> None:
    model = llama().to(torch.bfloat16 if rank == 1 else torch.float32)
    first = next(iter(_loader(model)))
    guard_model(model)
    model.train()
    model(**first)


def _loader(model: Any) -> Any:
    trainer = Trainer(llama(), arguments(), train_dataset=rows(16, 16), data_collator=ContextParallelCollator(model))
    return trainer.get_train_dataloader()


def ignored_backend(rank: int, world_size: int) -> None:
    bloom = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
    train(BloomForCausalLM._from_config(bloom, attn_implementation="ring_zigzag"))


def sdpa_layer(rank: int, world_size: int) -> None:
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    train(model)


def label_smoothing(rank: int, world_size: int) -> None:
    train(args=arguments(label_smoothing_factor=0.1))


def label_smoothing_on_rank_1(rank: int, world_size: int) -> None:
    train(args=arguments(label_smoothing_factor=0.1 if rank == 1 else 0.0))


def own_loss(rank: int, world_size: int) -> None:
    train(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())


def dispatched_stream(rank: int, world_size: int) -> None:
    train(data=Stream())


def stream_is_fine_when_not_dispatched(rank: int, world_size: int) -> None:
    train(data=Stream(), args=arguments(accelerator_config={"dispatch_batches": False}))
    raise ValueError("no error")


def more_ranks_than_heads(rank: int, world_size: int) -> None:
    model = llama("ulysses", num_attention_heads=1, num_key_value_heads=1)
    train(model, ContextParallelCollator(model))


def ulysses_of_another_size(rank: int, world_size: int) -> None:
    config = ContextParallelConfig(context_parallel_size=2, ulysses_size=1)
    train(llama("ulysses"), args=arguments(config))


def other_transport_on_rank_1(rank: int, world_size: int) -> None:
    config = ContextParallelConfig(context_parallel_size=2, transport="direct" if rank == 1 else "ring")
    train(args=arguments(config))


def other_levers_on_rank_1(rank: int, world_size: int) -> None:
    """One would exchange again in the backward pass, and wait for ever."""
    model = llama("ring_contiguous")
    ring_hf.memory.apply(model, attention="recompute" if rank else "save")
    train(model, ContextParallelCollator(model))


def double_ring_in_one_node(rank: int, world_size: int) -> None:
    train(args=arguments(ContextParallelConfig(context_parallel_size=4, transport="double_ring")))


def ulysses_collator_on_rank_1(rank: int, world_size: int) -> None:
    model = llama("ring_contiguous")
    train(model, ContextParallelCollator(llama("ulysses") if rank == 1 else model))


def wrong_world_size(rank: int, world_size: int) -> None:
    arguments(ContextParallelConfig(context_parallel_size=3))
    train(args=arguments(ContextParallelConfig(context_parallel_size=3)))


def wrong_product(rank: int, world_size: int) -> None:
    train(args=arguments(ContextParallelConfig(context_parallel_size=2, dp_replicate_size=2)))


def evaluated_stream(rank: int, world_size: int) -> None:
    model = llama()
    args = arguments(accelerator_config={"dispatch_batches": False})
    Trainer(model, args, data_collator=ContextParallelCollator(model)).evaluate(Stream())


def packed_predictions(rank: int, world_size: int) -> None:
    model = llama()
    collator = ContextParallelCollator(model, packing=True)
    Trainer(model, arguments(), data_collator=collator).predict(rows(16, 16, 16, 16))


def shard_made_metric(rank: int, world_size: int) -> None:
    model = llama()
    trainer = Trainer(model, arguments(), data_collator=ContextParallelCollator(model))
    for batch in trainer.get_eval_dataloader(rows(16, 16)):
        model.eval()
        model(**batch)
        trainer.accelerator.gather_for_metrics(batch["input_ids"].sum(dim=1))


FAULTS: dict[str, Callable[[int, int], None]] = {
    fault.__name__: fault
    for fault in (
        left_padding_on_rank_1,
        short_rows_on_rank_1,
        other_rows_on_rank_1,
        other_layout_on_rank_1,
        plain_collator_on_rank_1,
        generating_trainer,
        compiled_model,
        prompt_tuning,
        activated_lora,
        two_models_in_one,
        other_dtype_on_rank_1,
        ignored_backend,
        sdpa_layer,
        label_smoothing,
        label_smoothing_on_rank_1,
        own_loss,
        dispatched_stream,
        stream_is_fine_when_not_dispatched,
        more_ranks_than_heads,
        ulysses_of_another_size,
        other_transport_on_rank_1,
        other_levers_on_rank_1,
        double_ring_in_one_node,
        ulysses_collator_on_rank_1,
        wrong_world_size,
        wrong_product,
        evaluated_stream,
        packed_predictions,
        shard_made_metric,
    )
}


def run_fault(rank: int, world_size: int, name: str) -> str:
    """The message that this rank got."""
    try:
        FAULTS[name](rank, world_size)
    except ValueError as error:
        return str(error)
    finally:
        context.reset()
    return "nothing was raised"
