"""Item 1: ranks that share a sequence draw different rows, or augment them differently, after the first batch."""

import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, SubsetRandomSampler, WeightedRandomSampler
from transformers import Trainer, TrainerCallback

from ring_hf import ContextParallelCollator

from .setting import BATCH, LENGTH, VOCABULARY, Setting, examples

EPOCH = 5 * BATCH  # rows of an epoch: 20 steps are four epochs


class SampleText(TrainerCallback):
    """Samples text on rank 0 at the end of an epoch."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            training = model.training
            model.eval()
            model.generate(torch.tensor([[1, 2, 3]]), do_sample=True, max_new_tokens=4, pad_token_id=0)
            model.train(training)


class DrawAtStep(TrainerCallback):
    """Draws a random number on rank 0 after five steps, like a script that prints a random example."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        self.draw = draw

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step == 5:
            self.draw()


class AugmentedDataset(Dataset):
    """Rows whose inputs change at random each time they are read."""

    def __init__(self, change: Callable[[list[int]], list[int]], num_rows: int = EPOCH) -> None:
        self.rows, self.change = examples(num_rows, LENGTH), change

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {**row, "input_ids": self.change(row["input_ids"])}


def mask_tokens(tokens: list[int]) -> list[int]:
    """Replace a tenth of the tokens by a mask token."""
    return torch.where(torch.rand(len(tokens)) < 0.1, 0, torch.tensor(tokens)).tolist()


def rarely_mask_tokens(tokens: list[int]) -> list[int]:
    """Mask tokens in one row of twenty, so that the first batch may be the same on all ranks."""
    return mask_tokens(tokens) if torch.rand(()) < 0.05 else tokens


def swap_tokens_by_python(tokens: list[int]) -> list[int]:
    return [random.randrange(1, VOCABULARY) if random.random() < 0.1 else token for token in tokens]


def swap_tokens_by_numpy(tokens: list[int]) -> list[int]:
    noise = numpy.random.randint(1, VOCABULARY, len(tokens))
    return numpy.where(numpy.random.rand(len(tokens)) < 0.1, noise, tokens).tolist()


class MaskingCollator:
    """An inner collator that changes tokens."""

    def __init__(self, change: Callable[[list[int]], list[int]]) -> None:
        self.change = change

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([self.change(feature["input_ids"]) for feature in features]),
            "labels": torch.tensor([feature["labels"] for feature in features]),
        }


def _make_sampling_trainer(make: Callable[[Any], Any]) -> type[Trainer]:
    class SamplingTrainer(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return make(self.train_dataset)

    return SamplingTrainer


def grouped_by_length(setting: Setting, length: int | None = LENGTH) -> None:
    rows = examples(EPOCH, length)
    setting.train(rows=rows, callbacks=[SampleText()], train_sampling_strategy="group_by_length")


def grouped_rows_of_unequal_length(setting: Setting) -> None:
    grouped_by_length(setting, None)


def weighted_sampler(setting: Setting) -> None:
    weighted = _make_sampling_trainer(
        lambda rows: WeightedRandomSampler([1.0 + i % 3 for i in range(len(rows))], len(rows))
    )
    setting.train(rows=examples(EPOCH, LENGTH), trainer_class=weighted, callbacks=[SampleText()])


def subset_sampler(setting: Setting) -> None:
    """A sampler of three quarters of the rows, and a random number drawn on rank 0."""
    subset = _make_sampling_trainer(lambda rows: SubsetRandomSampler(range(len(rows) * 3 // 4)))
    draw = DrawAtStep(lambda: torch.randint(0, EPOCH, ()))
    setting.train(rows=examples(EPOCH, LENGTH), trainer_class=subset, callbacks=[draw])


def augmentation_in_rows_rare(setting: Setting) -> None:
    setting.train(rows=AugmentedDataset(rarely_mask_tokens), dataloader_num_workers=2)


def augmentation_in_rows(setting: Setting) -> None:
    setting.train(rows=AugmentedDataset(mask_tokens), dataloader_num_workers=2)


def augmentation_by_numpy_workers(setting: Setting) -> None:
    setting.train(rows=AugmentedDataset(swap_tokens_by_numpy), dataloader_num_workers=2)


def _train_with_collator(setting: Setting, change: Callable[[list[int]], list[int]], workers: int = 2) -> None:
    model = setting.llama()
    collator = ContextParallelCollator(model, inner=MaskingCollator(change))
    setting.train(model, examples(EPOCH, LENGTH), collator, dataloader_num_workers=workers)


def augmentation_in_collator_rare(setting: Setting) -> None:
    _train_with_collator(setting, rarely_mask_tokens)


def augmentation_in_collator(setting: Setting) -> None:
    _train_with_collator(setting, mask_tokens)


def augmentation_without_workers(setting: Setting) -> None:
    """All ranks draw the same numbers from equally seeded generators, which is exact."""
    setting.train(rows=AugmentedDataset(mask_tokens))


def python_generator(setting: Setting) -> None:
    draw = DrawAtStep(lambda: random.choice(["a", "b"]))
    setting.train(rows=AugmentedDataset(swap_tokens_by_python), callbacks=[draw])


def numpy_generator(setting: Setting) -> None:
    setting.train(rows=AugmentedDataset(swap_tokens_by_numpy), callbacks=[DrawAtStep(numpy.random.rand)])


def random_crops(setting: Setting) -> None:
    """Rows are truncated to a random length, so that shards later differ in shape."""

    class Crops(AugmentedDataset):
        def __getitem__(self, index: int) -> dict[str, list[int]]:
            length = int(torch.randint(LENGTH // 2, LENGTH, ()))
            return {key: value[:length] for key, value in self.rows[index].items()}

    setting.train(rows=Crops(mask_tokens), callbacks=[DrawAtStep(lambda: torch.rand(()))])


class Curriculum(TrainerCallback):
    """Adds noise from the second epoch on, from an unseeded generator."""

    def __init__(self, rows: AugmentedDataset) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.epoch >= 1:
            self.rows.change = self.noisy

    @staticmethod
    def noisy(tokens: list[int]) -> list[int]:
        noise = numpy.random.default_rng().integers(1, VOCABULARY, len(tokens)).tolist()
        return [noise[i] if i % 8 == 0 else token for i, token in enumerate(tokens)]


def generator_of_the_system(setting: Setting) -> None:
    rows = AugmentedDataset(list)
    setting.train(rows=rows, callbacks=[Curriculum(rows)])


class _Stream(IterableDataset):
    """A stream that shuffles rows in a buffer."""

    def __iter__(self) -> Any:
        rows = examples(EPOCH, LENGTH)
        while True:
            for start in range(0, EPOCH, 2 * BATCH):
                buffer = rows[start : start + 2 * BATCH]
                yield from (buffer[i] for i in torch.randperm(len(buffer)))


def shuffled_stream(setting: Setting) -> None:
    draw = DrawAtStep(lambda: torch.rand(()))
    setting.train(rows=_Stream(), callbacks=[draw], accelerator_config={"dispatch_batches": False})


class _HardestFirst(Sampler):
    """Rows in the order of the losses that this rank recorded for them."""

    def __init__(self, rows: list[dict[str, list[int]]], losses: dict[int, float]) -> None:
        self.rows, self.losses = rows, losses

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(sorted(range(len(self.rows)), key=lambda i: -self.losses.get(self.rows[i]["input_ids"][0], 0.0)))


def hardest_rows_first(setting: Setting) -> None:
    """From the second epoch on, rows are ordered by the losses of this rank's shards."""
    losses: dict[int, float] = {}

    class Mining(_make_sampling_trainer(lambda rows: _HardestFirst(rows, losses))):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            losses.update(dict.fromkeys(inputs["input_ids"][:, 0].tolist(), float(loss)))
            return loss

    setting.train(rows=examples(EPOCH, LENGTH), trainer_class=Mining)
