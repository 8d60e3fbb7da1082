"""Any-to-any sequences: text with interleaved vision codes, which an image tokenizer has computed before.

The form of the Large World Model (Liu et al. 2024, section 4): a frame is 256 codes of a codebook of 8,192, then the
code 8192 (another frame follows) or 8193 (the end of the image or video); the text `<vision>` stands before the first
frame and `</vision>` behind the last. A row lists texts and codes in order:

    {"content": ["<vision>", 17, 4095, ..., 8193, "</vision>", {"text": "What is this? ", "loss": false}, "A dog."]}

A code is the token `offset + code` of the model, behind the words of the tokenizer. `add_vision_vocabulary` gives the
embeddings these rows. The modalities are told apart by that: a token from `offset` on is vision.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from .bad_rows import RowError
from .files import excerpt
from .tokens import LABELS

CODEBOOK, CODES_PER_FRAME = 8192, 256
END_OF_FRAME, END_OF_VISION = 8192, 8193
VISION_VOCABULARY = 8448  # rows of the embeddings: the codes, rounded up to a multiple of 256 as in LWM
START, STOP = "<vision>", "</vision>"
VISION_OPTIONS = {"text_weight": 1.0, "vision_weight": 1.0, "offset": None}
OFFSET_KEY = "vision_offset"  # in the model's configuration
_IGNORED = -100


def tokenize_vision_codes(row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `input_ids`, `labels` and `loss_weights` of a row of texts and vision codes.

    Args:
        row: `content`, a list of texts, of codes, and of `{"text": ..., "loss": false}` for text without a loss.
        tokenizer: a Transformers tokenizer; the end-of-text token, if it has one, closes the row.
        options: `text_weight` and `vision_weight`, what the loss of a token counts (0: no loss); `offset`, the token
            of code 0, by default the number of tokens of the tokenizer.

    Raises:
        ValueError: if a weight is negative.
        RowError: if a code is out of range, a frame is incomplete, or the delimiters are not in pairs.
    """
    offset = vision_offset(tokenizer, options.get("offset"))
    weights = {name: float(options.get(f"{name}_weight", 1.0)) for name in ("text", "vision")}
    if min(weights.values()) < 0 or not any(weights.values()):
        raise ValueError(f"text_weight={weights['text']}, vision_weight={weights['vision']}: give numbers from 0 on.")
    content = row.get("content")
    if not isinstance(content, list) or not content:
        raise RowError("wrong type", f"'content' holds {excerpt(content)} and no list of texts and vision codes.")
    check_codes(content)
    input_ids: list[int] = []
    is_counted: list[bool] = []
    text = ""

    def flush(counts: bool = True) -> None:
        nonlocal text
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        input_ids.extend(ids)
        is_counted.extend([counts] * len(ids))
        text = ""

    for item in content:
        if isinstance(item, str):
            text += item
        elif isinstance(item, dict):
            flush()
            text = item["text"]
            flush(item.get("loss", True))
        else:
            flush()
            input_ids.append(offset + item)
            is_counted.append(True)
    flush()
    if tokenizer.eos_token_id is not None:
        input_ids.append(tokenizer.eos_token_id)
        is_counted.append(True)
    tokens = np.array(input_ids)
    loss_weights = np.where(tokens >= offset, weights["vision"], weights["text"]) * np.array(is_counted)
    if not loss_weights[1:].any():
        raise RowError("without a loss", f"none of its {len(tokens)} tokens has a loss. Remove the row.")
    return {
        "input_ids": tokens,
        "labels": np.where(loss_weights > 0, tokens, _IGNORED),
        "loss_weights": loss_weights.astype(np.float32),
    }


def check_codes(content: list[Any]) -> None:
    """Raise `RowError` unless the codes of a row are whole frames between delimiters."""
    num_codes, num_images, is_open, has_ended = 0, 0, False, False
    for position, item in enumerate(content):
        location = f"item {position + 1} of 'content'"
        if isinstance(item, dict):
            if not isinstance(item.get("text"), str) or not isinstance(item.get("loss", True), bool):
                raise RowError("wrong type", f'{location} is {excerpt(item)}. Write {{"text": "...", "loss": false}}.')
            item = item["text"]
        if isinstance(item, str):
            if is_open and not has_ended:
                raise RowError(
                    "incomplete frame",
                    f"{location} is the text {excerpt(item)} after {num_codes} codes of a frame of image "
                    f"{num_images}. A frame has {CODES_PER_FRAME}, then {END_OF_FRAME} or, at last, {END_OF_VISION}.",
                )
            if is_open and not item.startswith(STOP):
                raise RowError("unbalanced delimiters", f"{location} is {excerpt(item)}, but {STOP} is missing.")
            rest = item.removeprefix(STOP) if is_open else item
            is_open = rest.endswith(START)
            if STOP in rest or START in rest.removesuffix(START):
                raise RowError(
                    "unbalanced delimiters",
                    f"{location} is {excerpt(item)}. {START} ends the text before codes, and {STOP} begins the text "
                    "behind them.",
                )
            num_images += is_open
            num_codes, has_ended = 0, False
            continue
        if type(item) is not int:
            raise RowError("wrong type", f"{location} is {excerpt(item)}, neither a text nor a code.")
        if not is_open:
            raise RowError("unbalanced delimiters", f"{location} is the code {item} outside {START} and {STOP}.")
        if has_ended:
            raise RowError("unbalanced delimiters", f"{location} is a code behind {END_OF_VISION}; {STOP} is missing.")
        if item in (END_OF_FRAME, END_OF_VISION):
            if num_codes != CODES_PER_FRAME:
                raise RowError(
                    "incomplete frame",
                    f"{location} ends a frame of image {num_images} after {num_codes} codes, not {CODES_PER_FRAME}.",
                )
            num_codes, has_ended = 0, item == END_OF_VISION
        elif not 0 <= item < CODEBOOK:
            raise RowError("code out of range", f"{location} is the code {item}; codes go from 0 to {CODEBOOK - 1:,}.")
        else:
            num_codes += 1
            if num_codes > CODES_PER_FRAME:
                raise RowError(
                    "incomplete frame",
                    f"{location} is code {num_codes} of a frame of image {num_images}; after {CODES_PER_FRAME} comes "
                    f"{END_OF_FRAME} or {END_OF_VISION}.",
                )
    if is_open:
        raise RowError("unbalanced delimiters", f"the row ends inside {START}. Close it with {STOP}.")


def vision_offset(tokenizer: Any, offset: int | None = None) -> int:
    """Return the token of code 0: `offset`, by default the first one behind the words of the tokenizer.

    Raises:
        ValueError: if codes would be words, too.
    """
    if offset is None:
        return len(tokenizer)
    if offset < len(tokenizer):
        raise ValueError(f"offset={offset} would give vision codes the tokens of words; there are {len(tokenizer)}.")
    return offset


def add_vision_vocabulary(model: Any, tokenizer: Any, offset: int | None = None) -> int:
    """Give a model embeddings (and logits) of vision codes, and note `vision_offset` in its configuration.

    Args:
        model: a Transformers model. One that has the rows, because it was trained with them, stays as it is.
        tokenizer: its tokenizer.
        offset (`int`, *optional*): the token of code 0. Default: the first one behind the words.

    Returns:
        The offset.

    Raises:
        ValueError: if the model was trained with another offset.
    """
    import torch  # which the other functions, and so the command line, do without

    offset = vision_offset(tokenizer, offset)
    before = getattr(model.config, OFFSET_KEY, None)
    if before is not None and before != offset:
        raise ValueError(
            f"the model was trained with vision codes from token {before} on, but they would begin at {offset} with "
            f"this tokenizer. Use the tokenizer it was trained with, or set offset={before}."
        )
    num_rows = model.get_input_embeddings().weight.shape[0]
    if num_rows < offset + VISION_VOCABULARY:
        # The numbers it draws depend on the weights, which under FSDP2 only one process of a machine may have read.
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(offset + VISION_VOCABULARY)
    setattr(model.config, OFFSET_KEY, offset)
    return offset


def split_modalities(tokens: Dataset, offset: int, num_proc: int | None = None) -> dict[str, Dataset]:
    """Return the same sequences twice, with the loss of text and with that of vision codes.

    As the `eval_dataset` of a Trainer they give `eval_text_loss` and `eval_vision_loss`.

    Args:
        tokens (`Dataset`): rows with `labels`, also packed ones.
        offset (`int`): the token of code 0.
        num_proc (`int`, *optional*): worker processes.

    Raises:
        ValueError: if a modality has no target.
    """
    datasets = {}
    for name in ("text", "vision"):
        masked = tokens.map(
            _keep_modality,
            fn_kwargs={"offset": offset, "is_vision": name == "vision"},
            features=tokens.features,
            num_proc=num_proc,
            desc=f"Losses of {name}",
        )
        kept = masked.filter(lambda row: any(label != _IGNORED for label in row[LABELS][1:]), num_proc=num_proc)
        if len(kept) == 0:
            raise ValueError(f"no row has a loss of {name}, so it cannot be evaluated. Hold out rows that have one.")
        datasets[name] = kept
    return datasets


def _keep_modality(row: dict[str, Any], offset: int, is_vision: bool) -> dict[str, Any]:
    labels = np.asarray(row[LABELS])
    return {LABELS: np.where((labels >= offset) == is_vision, labels, _IGNORED)}
