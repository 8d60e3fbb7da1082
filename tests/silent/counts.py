"""Item 3: targets that are not counted over all ranks, in the Trainer and in custom training loops."""

from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Trainer

import ring_hf
from ring_hf import ContextParallelCollator
from ring_hf.verify.model_families import tiny

from .setting import BATCH, LEARNING_RATE, STEPS, VOCABULARY, Setting, examples


def gemma4(setting: Setting) -> None:
    """A model to which the Trainer passes no count: `accepts_loss_kwargs = False`."""
    setting.train(tiny("gemma4", setting.attention).float())


class ForgetfulLlamaForCausalLM(LlamaForCausalLM):
    accepts_loss_kwargs = False


def model_that_takes_no_count(setting: Setting) -> None:
    setting.train(setting.llama(ForgetfulLlamaForCausalLM))


def model_that_takes_no_count_accumulated(setting: Setting) -> None:
    setting.train(
        setting.llama(ForgetfulLlamaForCausalLM),
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
    )


def first_token_is_a_target(setting: Setting) -> None:
    """GPT-2 has no `loss_type`: in one process, the Trainer counts its labels unshifted, including the first of a row,
    which no token predicts."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config._attn_implementation = setting.attention
    rows = [{"input_ids": row["input_ids"]} for row in examples(BATCH * STEPS)]
    setting.train(GPT2LMHeadModel(config), rows)


def override_without_count(setting: Setting) -> None:
    """An override of `compute_loss` that does not pass `num_items_in_batch` on."""

    class WithoutCount(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, return_outputs)

    setting.train(trainer_class=WithoutCount)


def batches_without_count(setting: Setting) -> None:
    """An override of `get_batch_samples` that does not count."""

    class WithoutCount(Trainer):
        def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
            return super().get_batch_samples(epoch_iterator, num_batches, device)[0], None

    setting.train(trainer_class=WithoutCount)


def count_of_its_own_batch(setting: Setting) -> None:
    """An override that counts the targets of its own batch, which is a shard."""

    class OwnCount(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
            outputs = model(**inputs, num_items_in_batch=(targets != -100).sum())
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    setting.train(trainer_class=OwnCount)


def loop(setting: Setting, guard: bool = True, accumulation: int = 1, counted: str | None = None) -> None:
    """A training loop as in the documentation of Accelerate.

    Args:
        counted: "on this rank" or "over all ranks" for a loop that counts targets; None for one that does not.
    """
    accelerator = Accelerator(cpu=True, parallelism_config=setting.config(), gradient_accumulation_steps=accumulation)
    model = setting.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    loader = _loader(model, BATCH // accumulation)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if guard:
        ring_hf.guard_model(model)
    model.train()
    losses = []
    setting.record.start()
    for batch in loader:
        with accelerator.accumulate(model):
            if counted is not None:
                batch["num_items_in_batch"] = _count(batch, accelerator if counted == "over all ranks" else None)
            loss = model(**batch).loss
            if counted == "over all ranks":
                loss = loss * accelerator.num_processes  # DDP divides the sum of gradients by it
            accelerator.backward(loss)
            losses.append(accelerator.gather(loss.detach()[None]).mean())
            if accelerator.sync_gradients:
                setting.record.grad_norm.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                setting.record.loss.append(float(torch.stack(losses).mean()))
                losses.clear()
            optimizer.step()
            optimizer.zero_grad()
    setting.record.stop()


def _loader(model: Any, batch_size: int) -> DataLoader:
    return DataLoader(examples(BATCH * STEPS), batch_size=batch_size, collate_fn=ContextParallelCollator(model))


def _count(batch: dict[str, Any], accelerator: Accelerator | None) -> torch.Tensor:
    targets = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]
    count = (targets != -100).sum()
    return count if accelerator is None else accelerator.gather(count[None]).sum()


def loop_with_guard(setting: Setting) -> None:
    loop(setting)


def loop_without_guard(setting: Setting) -> None:
    loop(setting, guard=False)


def loop_with_guard_accumulated(setting: Setting) -> None:
    loop(setting, accumulation=2)


def loop_without_guard_accumulated(setting: Setting) -> None:
    loop(setting, guard=False, accumulation=2)


def loop_with_count_of_a_shard(setting: Setting) -> None:
    loop(setting, counted="on this rank")


def loop_with_count_of_all(setting: Setting) -> None:
    """The loop of a careful user, which is exact."""
    loop(setting, counted="over all ranks")


def loop_of_plain_pytorch(setting: Setting) -> None:
    """Accelerate only starts the processes. The loop uses PyTorch's DDP and a plain `backward`."""
    accelerator = Accelerator(cpu=True, parallelism_config=setting.config())
    model = setting.llama()
    loader = _loader(model, BATCH)
    model = model if accelerator.num_processes == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    setting.record.start()
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        setting.record.grad_norm.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        setting.record.loss.append(float(accelerator.gather(loss.detach()[None]).mean()))
        optimizer.step()
        optimizer.zero_grad()
    setting.record.stop()


def loop_that_evaluates(setting: Setting, guard: bool = True) -> None:
    """Evaluation by hand: the mean of the losses of all batches."""
    accelerator = Accelerator(cpu=True, parallelism_config=setting.config())
    model = setting.llama()
    model, loader = accelerator.prepare(model, _loader(model, BATCH))
    if guard:
        ring_hf.guard_model(model)
    model.eval()
    setting.record.start()
    with torch.no_grad():
        losses = [accelerator.gather_for_metrics(model(**batch).loss[None]).mean() for batch in loader]
    setting.record.eval_loss.append(float(torch.stack(losses).mean()))
    setting.record.stop()


def loop_that_evaluates_without_guard(setting: Setting) -> None:
    loop_that_evaluates(setting, guard=False)
