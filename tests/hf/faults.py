"""Faulty training scripts, run by gloo processes, and the message that every rank must get.

`FAULTS` maps a name to a script that is expected to raise on *every* rank, even where only rank 1 is at fault. Workers
must survive, so `run_fault` returns the error instead of raising it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import ring_hf
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig, context, guard_model
from ring_hf.hf.collate.collator import PadOrPackCollator
from ring_hf.hf.trainer import fault_handling
from tests.hf.models import llama, rows


def arguments(config: Any = None, cls: type = TrainingArguments, **more: Any) -> Any:
    """Arguments of two training steps on CPUs; by default two ranks share each sequence."""
    return cls(
        output_dir="unused",
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        parallelism_config=config or ContextParallelConfig(context_parallel_size=2),
        **{"save_strategy": "no", **more},
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
    """An inner collator that drops examples, so that its rows are not those of the examples."""

    def __call__(self, features: list) -> dict[str, torch.Tensor]:
        return PadOrPackCollator()(features[:2])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows(*[16] * 8))


@dataclass(frozen=True)
class Fault:
    """A script with a fault.

    Attributes:
        run: the script, called with rank and world size.
        message: a part of the error message of every rank.
        num_ranks: numbers of processes; the script runs with each of them.
    """

    run: Callable[[int, int], None]
    message: str
    num_ranks: tuple[int, ...]


FAULTS: dict[str, Fault] = {}


def fault(message: str, num_ranks: tuple[int, ...] = (2,)) -> Callable[[Callable], Callable]:
    """Add a script to `FAULTS` under its name."""

    def add(script: Callable[[int, int], None]) -> Callable[[int, int], None]:
        FAULTS[script.__name__] = Fault(script, message, num_ranks)
        return script

    return add


@fault("rank 1: attention_mask has left padding", num_ranks=(2, 4))
def left_padding_on_rank_1(rank: int, world_size: int) -> None:
    model = llama()
    train(model, ContextParallelCollator(model, inner=LeftPadding() if rank == 1 else None))


@fault("The ranks disagree about the batch")
def short_rows_on_rank_1(rank: int, world_size: int) -> None:
    train(data=rows(3, 2, 3, 3) if rank == 1 else None)


@fault("The ranks disagree about the batch (hash of its tokens, labels and documents)")
def other_rows_on_rank_1(rank: int, world_size: int) -> None:
    train(data=rows(16, 20, 12, 16, seed=rank))


@fault("rank 1: The model attends with 'ring_zigzag', but the batch was sharded for layout 'striped'")
def other_layout_on_rank_1(rank: int, world_size: int) -> None:
    model = llama()
    train(model, ContextParallelCollator(llama("ring_striped") if rank == 1 else model))


@fault("did not come from ContextParallelCollator")
def plain_collator_on_rank_1(rank: int, world_size: int) -> None:
    model = llama()
    train(model, PadOrPackCollator() if rank == 1 else ContextParallelCollator(model))


@fault("The ranks disagree about the versions of the software (rank 0: ring_hf")
def other_version_on_rank_1(rank: int, world_size: int) -> None:
    with mock.patch.object(fault_handling, "__version__", f"0.{rank}.0"):
        train()


@fault("came up on rank 1, before the attention of layer 1 (counted from 0)")
def nan_on_rank_1(rank: int, world_size: int) -> None:
    model = llama()
    hook = lambda module, args, output: output * float("nan") if rank == 1 else output
    hook.__module__ = "torch"  # so that no trial step detects it first
    model.model.layers[0].mlp.register_forward_hook(hook)
    train(model)


@fault("The loss of the last backward pass is NaN or infinite on rank 0, 1. The keys of all")
def infinite_logits(rank: int, world_size: int) -> None:
    model = llama()

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("inf")

    hook.__module__ = "torch"
    model.lm_head.register_forward_hook(hook)
    train(model)


@fault("After optimizer step 1: The weights are NaN or infinite, so no checkpoint is written", num_ranks=(2, 4))
def saved_nan_on_rank_1(rank: int, world_size: int) -> None:
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if rank == 1:
                model.lm_head.weight.data[3, 5] = float("nan")

    more = {"save_strategy": "steps", "save_steps": 1}
    train(args=arguments(**more), callbacks=[Spoil()])


@fault("predict_with_generate=True with compute_metrics generates from evaluation batches")
def generating_trainer(rank: int, world_size: int) -> None:
    model = llama()
    config = ContextParallelConfig(context_parallel_size=2)
    args = arguments(config, Seq2SeqTrainingArguments, predict_with_generate=True)
    collator = ContextParallelCollator(model)
    Seq2SeqTrainer(model, args, data_collator=collator, compute_metrics=lambda prediction: {})


@fault("The model is compiled (model.compile() or torch.compile, for LlamaForCausalLM)")
def compiled_model(rank: int, world_size: int) -> None:
    model = llama()
    model.compile()
    train(model)


@fault("puts virtual tokens in front of the sequence")
def prompt_tuning(rank: int, world_size: int) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    train(get_peft_model(llama(), config))


@fault("'default' is an activated LoRA: it searches the tokens of a shard for its alora_invocation_tokens")
def activated_lora(rank: int, world_size: int) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    train(get_peft_model(llama(), config))


@fault("holds 2 Transformers models (student, teacher)")
def two_models_in_one(rank: int, world_size: int) -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = llama(), llama()

        def forward(self, **inputs: Any) -> Any:
            return self.student(**inputs)

    pair = Pair()
    train(pair, ContextParallelCollator(pair.student))


@fault("The ranks disagree about the model")
def other_dtype_on_rank_1(rank: int, world_size: int) -> None:
    model = llama().to(torch.bfloat16 if rank == 1 else torch.float32)
    first = next(iter(_loader(model)))
    guard_model(model)
    model.train()
    model(**first)


def _loader(model: Any) -> Any:
    trainer = Trainer(llama(), arguments(), train_dataset=rows(16, 16), data_collator=ContextParallelCollator(model))
    return trainer.get_train_dataloader()


@fault("BloomForCausalLM does not call its attention through Transformers' attention interface")
def ignored_backend(rank: int, world_size: int) -> None:
    bloom = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0)
    train(BloomForCausalLM._from_config(bloom, attn_implementation="ring_zigzag"))


@fault("has 2 layers, but called the attention function 1 times")
def sdpa_layer(rank: int, world_size: int) -> None:
    model = llama()
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    train(model)


@fault("label_smoothing_factor=0.1")
def label_smoothing(rank: int, world_size: int) -> None:
    train(args=arguments(label_smoothing_factor=0.1))


@fault("rank 1: label_smoothing_factor=0.1")
def label_smoothing_on_rank_1(rank: int, world_size: int) -> None:
    train(args=arguments(label_smoothing_factor=0.1 if rank == 1 else 0.0))


@fault("labels were removed before the forward pass")
def loss_outside_the_model(rank: int, world_size: int) -> None:
    train(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())


@fault('accelerator_config={"dispatch_batches": False}')
def dispatched_stream(rank: int, world_size: int) -> None:
    train(data=Stream())


@fault("no error")
def undispatched_stream_is_accepted(rank: int, world_size: int) -> None:
    train(data=Stream(), args=arguments(accelerator_config={"dispatch_batches": False}))
    raise ValueError("no error")


@fault("ulysses_size=2 deals 1 query heads to 2 ranks, but every rank needs at least one")
def more_ranks_than_heads(rank: int, world_size: int) -> None:
    model = llama("ulysses", num_attention_heads=1, num_key_value_heads=1)
    train(model, ContextParallelCollator(model))


@fault("exchanges heads among all context_parallel_size=2 ranks, but ulysses_size=1")
def ulysses_of_another_size(rank: int, world_size: int) -> None:
    config = ContextParallelConfig(context_parallel_size=2, ulysses_size=1)
    train(llama("ulysses"), args=arguments(config))


@fault("The ranks disagree about the parallel degrees")
def other_transport_on_rank_1(rank: int, world_size: int) -> None:
    config = ContextParallelConfig(context_parallel_size=2, transport="direct" if rank == 1 else "ring")
    train(args=arguments(config))


@fault("The ranks disagree about the memory options")
def other_memory_options_on_rank_1(rank: int, world_size: int) -> None:
    """Rank 1 would exchange keys and values again in the backward pass, and wait forever."""
    model = llama("ring_contiguous")
    ring_hf.memory.apply(model, attention="recompute" if rank else "save")
    train(model, ContextParallelCollator(model))


@fault("takes the ranks of a node as inner ring, but LOCAL_WORLD_SIZE is", num_ranks=(4,))
def double_ring_in_one_node(rank: int, world_size: int) -> None:
    train(args=arguments(ContextParallelConfig(context_parallel_size=4, transport="double_ring")))


@fault(
    "rank 1: The model attends with 'ring_contiguous', but the batch was sharded for layout 'contiguous', 2 ranks "
    "with ulysses_size=2"
)
def ulysses_collator_on_rank_1(rank: int, world_size: int) -> None:
    model = llama("ring_contiguous")
    train(model, ContextParallelCollator(llama("ulysses") if rank == 1 else model))


@fault("context_parallel_size=3 does not divide 2 processes. Set it to 1 or 2")
def wrong_world_size(rank: int, world_size: int) -> None:
    arguments(ContextParallelConfig(context_parallel_size=3))
    train(args=arguments(ContextParallelConfig(context_parallel_size=3)))


@fault("context_parallel_size=2 * dp_replicate_size=2 = 4, but 2 processes were started")
def wrong_product(rank: int, world_size: int) -> None:
    train(args=arguments(ContextParallelConfig(context_parallel_size=2, dp_replicate_size=2)))


@fault("An evaluation dataset without a length cannot be split exactly over 2 replicas", num_ranks=(4,))
def evaluated_stream(rank: int, world_size: int) -> None:
    model = llama()
    args = arguments(accelerator_config={"dispatch_batches": False})
    Trainer(model, args, data_collator=ContextParallelCollator(model)).evaluate(Stream())


@fault("Predictions of packed rows cannot be ordered over 2 data-parallel replicas", num_ranks=(4,))
def packed_predictions(rank: int, world_size: int) -> None:
    model = llama()
    collator = ContextParallelCollator(model, packing=True)
    Trainer(model, arguments(), data_collator=collator).predict(rows(16, 16, 16, 16))


@fault("differs between ranks that share a sequence")
def metric_of_a_shard(rank: int, world_size: int) -> None:
    model = llama()
    trainer = Trainer(model, arguments(), data_collator=ContextParallelCollator(model))
    for batch in trainer.get_eval_dataloader(rows(16, 16)):
        model.eval()
        model(**batch)
        trainer.accelerator.gather_for_metrics(batch["input_ids"].sum(dim=1))


def run_fault(rank: int, world_size: int, name: str) -> str:
    """Return the error message of this rank."""
    try:
        FAULTS[name].run(rank, world_size)
    except ValueError as error:
        return str(error)
    finally:
        context.reset()
    return "nothing was raised"
