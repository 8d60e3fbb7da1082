"""Packing: cut documents into spans of at most `length` tokens and put the spans into sequences of at most `length`
tokens.

There are three packings, by name. Each puts every token of every document into exactly one sequence.

stream      Documents end to end in order, cut every `length` tokens. All sequences but the last are full; a document
            that meets the end of a sequence continues in the next one, without its earlier tokens.
best_fit    Only documents longer than `length` are cut; spans, longest first, go into the fullest sequence that has
            room (best-fit decreasing bin packing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
            Sequences may be shorter.
separate    One span per sequence.

In the packed dataset `position_ids` start again at 0 with each span, which is how Transformers tells documents apart.
With `attend_across_documents` they run through the whole sequence, so that the spans are one document to attention.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features

from .tokens import TOKENS, WEIGHTS, TokenRow, num_tokens, read_row

IGNORED = -100  # label of a token without a loss: the convention of PyTorch and Transformers
FEATURES = Features({"input_ids": TOKENS, "position_ids": TOKENS, "labels": TOKENS})


@dataclass(frozen=True)
class DocumentSpan:
    """Tokens `start` to `stop` of one document."""

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def pack_stream(num_tokens: Sequence[int], length: int) -> list[list[DocumentSpan]]:
    """Pack documents end to end, cut every `length` tokens.

    Args:
        num_tokens: of each document.
        length: the most tokens in a sequence.

    Returns:
        The spans of each sequence.
    """
    sequences: list[list[DocumentSpan]] = []
    room = 0
    for document, total in enumerate(num_tokens):
        start = 0
        while start < total:
            if room == 0:
                sequences.append([])
                room = length
            stop = min(total, start + room)
            sequences[-1].append(DocumentSpan(document, start, stop))
            room -= stop - start
            start = stop
    return sequences


def pack_separate(num_tokens: Sequence[int], length: int) -> list[list[DocumentSpan]]:
    """Pack one span per sequence; arguments and result as for `pack_stream`."""
    return [
        [DocumentSpan(document, start, min(total, start + length))]
        for document, total in enumerate(num_tokens)
        for start in range(0, total, length)
    ]


def pack_best_fit(num_tokens: Sequence[int], length: int) -> list[list[DocumentSpan]]:
    """Pack the longest span first, each into the fullest sequence that has room for it; see `pack_stream`."""
    spans = [span for (span,) in pack_separate(num_tokens, length)]
    sequences: list[list[DocumentSpan]] = []
    rooms: list[int] = []  # the distinct numbers of free tokens, sorted
    with_room: dict[int, list[int]] = {}  # number of free tokens -> the sequences that have it
    for span in sorted(spans, key=len, reverse=True):  # stable: equal lengths stay in order
        i = bisect.bisect_left(rooms, len(span))
        if i == len(rooms):
            sequence, room = len(sequences), length
            sequences.append([])
        else:
            room = rooms[i]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[i]
        sequences[sequence].append(span)
        room -= len(span)
        if room:
            if room not in with_room:
                bisect.insort(rooms, room)
            with_room.setdefault(room, []).append(sequence)
    return sequences


PACKINGS: dict[str, Callable[[Sequence[int], int], list[list[DocumentSpan]]]] = {
    "stream": pack_stream,
    "best_fit": pack_best_fit,
    "separate": pack_separate,
}


def pack_documents(
    tokens: Dataset,
    length: int,
    packing: str = "best_fit",
    mask_boundaries: bool = True,
    attend_across_documents: bool = False,
    spans: np.ndarray | None = None,
) -> Dataset:
    """Pack tokenised documents into sequences.

    Args:
        tokens (`Dataset`): a tokenised dataset: the column `input_ids`, and optionally `labels` (not shifted, -100
            where there is no loss; by default the tokens themselves) and `loss_weights` (by default 1).
        length (`int`): the most tokens in a sequence.
        packing (`str`): `stream`, `best_fit` or `separate`.
        mask_boundaries (`bool`): give the first token of each span the label -100: it would be predicted from the
            last token of another document. (The labels are not shifted; the model or the collator does that.)
        attend_across_documents (`bool`): let positions run through the whole sequence, so that the tokens of a
            document attend to the documents before it, too.
        spans (*optional*): rows `[document, start, stop]` to pack instead of every document once, such as
            `MixturePlan.spans`. A document of several spans is like several documents.

    Returns:
        Rows of the int32 columns `input_ids`, `position_ids` and `labels`, each `[num_tokens]` with at most `length`;
        and of the float32 column `loss_weights`, if the documents have it.

    Raises:
        ValueError: if the packing is unknown, `length` is below 2, or there are no tokens.
    """
    check_packing(packing, length)
    if spans is None and not any(num_tokens(tokens)):
        raise ValueError(f"the {len(tokens)} documents hold no tokens. Check the data source and its text column.")
    settings = {"tokens": tokens, "length": length, "packing": packing, "parts": spans}
    sequences = Dataset.from_generator(_spans_of_sequences, gen_kwargs=settings)
    features = Features(FEATURES)
    if WEIGHTS in tokens.column_names:
        features[WEIGHTS] = tokens.features[WEIGHTS]
    return sequences.map(
        _assemble_batch,
        batched=True,
        batch_size=max(1, 2**20 // length),  # about a million tokens in memory
        remove_columns=sequences.column_names,
        fn_kwargs={
            "tokens": tokens,
            "mask_boundaries": mask_boundaries,
            "attend_across_documents": attend_across_documents,
        },
        features=features,
        desc=f"Packing sequences of {length:,} tokens",
    ).with_format("numpy")


def check_packing(packing: str, length: int) -> None:
    """Raise `ValueError` if there is no packing of that name, or sequences of `length` tokens predict nothing."""
    if packing not in PACKINGS:
        raise ValueError(f"packing={packing!r} is unknown. Choose one of {', '.join(PACKINGS)}.")
    if length < 2:
        raise ValueError(f"length={length} leaves no token to predict. Use at least 2.")


def assemble_sequence(
    parts: Sequence[TokenRow], mask_boundaries: bool, attend_across_documents: bool
) -> dict[str, np.ndarray]:
    """Return the columns of one packed sequence; arguments as for `pack_documents`.

    Args:
        parts: the tokens of its spans, all with `loss_weights` or none.
    """
    input_ids = np.concatenate([part.input_ids for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    position_ids = np.concatenate([np.arange(len(part.input_ids), dtype=np.int32) for part in parts])
    columns = {
        "input_ids": input_ids,
        "position_ids": np.arange(len(input_ids), dtype=np.int32) if attend_across_documents else position_ids,
        "labels": np.where(position_ids == 0, np.int32(IGNORED), labels) if mask_boundaries else labels,
    }
    weights = [part.loss_weights for part in parts if part.loss_weights is not None]
    if weights:
        columns[WEIGHTS] = np.concatenate(weights)
    return columns


def pack_spans(spans: np.ndarray, length: int, packing: str) -> list[list[DocumentSpan]]:
    """Pack spans `[document, start, stop]`; see `pack_stream`."""
    documents, starts, stops = spans.T.tolist()
    sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
    return [
        [DocumentSpan(documents[p.document], starts[p.document] + p.start, starts[p.document] + p.stop) for p in parts]
        for parts in PACKINGS[packing](sizes, length)
    ]


def _spans_of_sequences(
    tokens: Dataset, length: int, packing: str, parts: np.ndarray | None
) -> Iterator[dict[str, list[list[int]]]]:
    sequences = PACKINGS[packing](num_tokens(tokens), length) if parts is None else pack_spans(parts, length, packing)
    for spans in sequences:
        yield {"spans": [[span.document, span.start, span.stop] for span in spans]}


def _assemble_batch(
    batch: dict[str, list[list[list[int]]]], tokens: Dataset, mask_boundaries: bool, attend_across_documents: bool
) -> dict[str, list[np.ndarray]]:
    documents = tokens.with_format("arrow")
    columns: dict[str, list[np.ndarray]] = {}
    last_document, row = -1, None
    for spans in batch["spans"]:
        parts = []
        for document, start, stop in spans:
            if row is None or document != last_document:  # a book is cut into many spans: read it once
                last_document, row = document, read_row(documents, document)
            parts.append(row[start:stop])
        for name, column in assemble_sequence(parts, mask_boundaries, attend_across_documents).items():
            columns.setdefault(name, []).append(column)
    return columns
