"""The default inner collator: pads examples on the right, or packs them into one row.

Both produce a plain, unsharded batch that a single process can train on. Any other collator (Transformers'
`DataCollatorForLanguageModeling`, `DataCollatorWithFlattening`, ...) can replace it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..batch_metadata import IGNORE_INDEX

# Padding values by key; input_ids are padded with the pad token.
PADDING_VALUES = {
    "labels": IGNORE_INDEX,
    "shift_labels": IGNORE_INDEX,
    "attention_mask": 0,
    "position_ids": 0,
    "loss_weights": 0.0,
}


class PadOrPackCollator:
    """Collates examples, which are mappings of input_ids and optionally of the keys of `PADDING_VALUES`.

    Every value is a list or 1D tensor with one number per token. The labels default to the tokens themselves, as in
    causal language modelling. With `packing`, all examples are concatenated into one row, positions restart at each of
    them, and the first label of each is ignored, so that no document is predicted from the one before it. An example
    without tokens adds nothing to a packed row.

    Args:
        packing: concatenate the examples into one row instead of padding them.
        pad_token_id: of `input_ids`.
    """

    def __init__(self, packing: bool = False, pad_token_id: int = 0):
        self.packing = packing
        self.pad_token_id = pad_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return tensors [rows, tokens] by key: int64, and fp32 for loss_weights.

        Raises:
            ValueError: if no example has a token, or an example cannot be collated with the others.
        """
        examples = [self._example(index, feature) for index, feature in enumerate(features)]
        if not any(len(example["input_ids"]) for example in examples):
            raise ValueError(
                f"None of the {len(examples)} examples of the batch contains a token. Drop empty examples from the "
                "dataset."
            )
        if any(example.keys() != examples[0].keys() for example in examples):
            raise ValueError(
                f"The examples of a batch have different keys: {sorted({tuple(e) for e in examples})}. Give all of "
                "them the same columns."
            )
        return self._pack(examples) if self.packing else self._pad(examples)

    def _example(self, index: int, feature: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        unknown_keys = sorted(set(feature) - {"input_ids", *PADDING_VALUES})
        if unknown_keys:
            raise ValueError(
                f"The default collator does not know {', '.join(unknown_keys)}. Remove these columns, or pass a "
                "collator that knows them as inner=."
            )
        if "input_ids" not in feature:
            raise ValueError(f"An example has no input_ids, only {sorted(feature)}. Tokenise the dataset first.")
        example = {key: _tensor(index, key, value) for key, value in feature.items()}
        lengths = {key: len(value) for key, value in example.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"The columns of an example differ in length: {lengths}. Each must have one value per token."
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
            value = PADDING_VALUES.get(key, self.pad_token_id)
            rows = torch.full((len(examples), length), value, dtype=_dtype(key))
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
                    "An example contains padding (zeros in attention_mask), but packing=True. Pack unpadded examples."
                )
            if "position_ids" not in example:
                example["position_ids"] = torch.arange(len(example["input_ids"]))
            if "labels" in example:
                example["labels"] = example["labels"].clone()
                example["labels"][0] = IGNORE_INDEX
        return {key: torch.cat([example[key] for example in examples])[None] for key in examples[0]}


def _tensor(index: int, key: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value, dtype=_dtype(key)).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Example {index} of the batch: {key} must be a list of numbers, one per token, but is {str(value)[:60]} "
            f"({error}). Tokenise the dataset, and drop or repair rows without values."
        ) from None


def _dtype(key: str) -> torch.dtype:
    return torch.float32 if key == "loss_weights" else torch.long
