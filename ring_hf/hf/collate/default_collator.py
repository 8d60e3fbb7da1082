"""The default inner collator: pads examples on the right, or packs them into one row.

Both return a plain, unsharded batch that a single process can train on as it is. Any other collator (Transformers'
`DataCollatorForLanguageModeling`, `DataCollatorWithFlattening`, ...) can take its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..batch_metadata import IGNORE_INDEX

# What missing tokens are filled with; input_ids take the pad token.
FILL = {
    "labels": IGNORE_INDEX,
    "shift_labels": IGNORE_INDEX,
    "attention_mask": 0,
    "position_ids": 0,
    "loss_weights": 0.0,
}


class PadOrPackCollator:
    """Collates lists of token ids (keys input_ids, labels, shift_labels, attention_mask, position_ids) and of
    loss_weights, one number per label.

    Labels default to the tokens themselves, as for causal language modelling. With `packing`, the examples follow each
    other in one row, positions restart at each of them, and the first label of each is ignored: no document is
    predicted from the one before it. An example without tokens adds neither token nor target to a packed row.
    """

    def __init__(self, packing: bool = False, pad_token_id: int = 0):
        self.packing = packing
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        examples = [self._example(number, feature) for number, feature in enumerate(features)]
        if not any(len(example["input_ids"]) for example in examples):
            raise ValueError(
                f"None of the {len(examples)} examples of the batch has a token. Drop empty examples from the dataset."
            )
        if any(example.keys() != examples[0].keys() for example in examples):
            raise ValueError(f"Examples of one batch have different keys: {sorted({tuple(e) for e in examples})}.")
        return self._pack(examples) if self.packing else self._pad(examples)

    def _example(self, number: int, feature: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        unknown = sorted(set(feature) - {"input_ids", *FILL})
        if unknown:
            raise ValueError(
                f"The default collator does not know {', '.join(unknown)}. Remove the columns, or pass the collator "
                "that knows them as inner=."
            )
        if "input_ids" not in feature:
            raise ValueError(f"An example has no input_ids, only {sorted(feature)}. Tokenise the dataset first.")
        example = {key: _tensor(number, key, value) for key, value in feature.items()}
        lengths = {key: len(value) for key, value in example.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"The parts of one example differ in length: {lengths}. All must have one value per token."
            )
        if "labels" not in example and "shift_labels" not in example:
            example["labels"] = example["input_ids"].clone()
        return example

    def _pad(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        if any(len(example["input_ids"]) < length for example in examples):
            for example in examples:
                example.setdefault("attention_mask", torch.ones_like(example["input_ids"]))
        batch = {}
        for key in examples[0]:
            fill = FILL.get(key, self.pad_token_id)
            rows = torch.full((len(examples), length), fill, dtype=_dtype(key))
            for row, example in zip(rows, examples, strict=True):
                row[: len(example[key])] = example[key]
            batch[key] = rows
        return batch

    def _pack(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        examples = [example for example in examples if len(example["input_ids"])]
        for example in examples:
            mask = example.pop("attention_mask", None)
            if mask is not None and not bool(mask.bool().all()):
                raise ValueError(
                    "An example to be packed carries padding (zeros in attention_mask). Pack unpadded examples."
                )
            if "position_ids" not in example:
                example["position_ids"] = torch.arange(len(example["input_ids"]))
            if "labels" in example:
                example["labels"] = example["labels"].clone()
                example["labels"][0] = IGNORE_INDEX
        return {key: torch.cat([example[key] for example in examples])[None] for key in examples[0]}


def _tensor(number: int, key: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value, dtype=_dtype(key)).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Example {number} of the batch: {key} is no list of numbers, one per token, but {str(value)[:60]} "
            f"({error}). Tokenise the dataset, and drop or repair rows without values."
        ) from None


def _dtype(key: str) -> torch.dtype:
    return torch.float32 if key == "loss_weights" else torch.long
