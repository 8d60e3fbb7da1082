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
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature

IGNORED = -100  # label of a token without a loss: the convention of PyTorch and Transformers
FEATURES = Features({name: SequenceFeature(Value("int32")) for name in ("input_ids", "position_ids", "labels")})


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


def pack_documents(tokens: Dataset, length: int, packing: str = "best_fit", mask_boundaries: bool = True) -> Dataset:
    """Pack tokenised documents into sequences with the columns `input_ids`, `position_ids` and `labels`.

    Args:
        tokens (`Dataset`): the result of `tokenize_documents`.
        length (`int`): the most tokens in a sequence.
        packing (`str`): `stream`, `best_fit` or `separate`.
        mask_boundaries (`bool`): give the first token of each span the label -100: it would be predicted from the
            last token of another document. (The labels are not shifted; the model or the collator does that.)

    Returns:
        Rows of int32 columns `[num_tokens]`, each of at most `length`.

    Raises:
        ValueError: if the packing is unknown, `length` is below 2, or there are no tokens.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing={packing!r} is unknown. Choose one of {', '.join(PACKINGS)}.")
    if length < 2:
        raise ValueError(f"length={length} leaves no token to predict. Use at least 2.")
    if not any(num_tokens(tokens)):
        raise ValueError(f"the {len(tokens)} documents hold no tokens. Check the data source and its text column.")
    settings = {"tokens": tokens, "length": length, "packing": packing}
    sequences = Dataset.from_generator(_spans_of_sequences, gen_kwargs=settings)
    return sequences.map(
        _assemble,
        batched=True,
        batch_size=max(1, 2**20 // length),  # about a million tokens in memory
        remove_columns=sequences.column_names,
        fn_kwargs={"tokens": tokens, "mask_boundaries": mask_boundaries},
        features=FEATURES,
        desc=f"Packing sequences of {length:,} tokens",
    ).with_format("numpy")


def num_tokens(tokens: Dataset) -> list[int]:
    """Return the length of each document, read from the offsets of the Arrow table and not from its tokens."""
    table = tokens.with_format("arrow")
    lengths = [
        np.asarray(batch["input_ids"].combine_chunks().value_lengths()) for batch in table.iter(batch_size=1024)
    ]
    return np.concatenate(lengths).tolist() if lengths else []


def _spans_of_sequences(tokens: Dataset, length: int, packing: str) -> Iterator[dict[str, list[list[int]]]]:
    for spans in PACKINGS[packing](num_tokens(tokens), length):
        yield {"spans": [[span.document, span.start, span.stop] for span in spans]}


def _assemble(
    batch: dict[str, list[list[list[int]]]], tokens: Dataset, mask_boundaries: bool
) -> dict[str, list[np.ndarray]]:
    documents = tokens.with_format("numpy")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES}
    last_document, row = -1, np.empty(0, np.int32)
    for spans in batch["spans"]:
        parts = []
        for document, start, stop in spans:
            if document != last_document:  # a book is cut into many spans: read it once
                last_document, row = document, np.asarray(documents[document]["input_ids"], dtype=np.int32)
            parts.append(row[start:stop])
        input_ids = np.concatenate(parts)
        position_ids = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
        columns["input_ids"].append(input_ids)
        columns["position_ids"].append(position_ids)
        columns["labels"].append(
            np.where(position_ids == 0, np.int32(IGNORED), input_ids) if mask_boundaries else input_ids
        )
    return columns
