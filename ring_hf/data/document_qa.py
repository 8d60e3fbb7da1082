"""Questions about long documents: chunks of a document, then question-answer pairs about them in chat format.

This is the construction of the Large World Model (Liu et al. 2024, section 3.2): a document is cut into chunks of
about a thousand tokens, a model that knows short contexts writes questions and answers about each chunk, adjacent
chunks are joined to the length to train at, and the pairs of these chunks follow as a conversation, with a loss on the
answers alone. Here the pairs come from the user. `cut_into_chunks` writes the rows that are to be filled:

    {"document": "war-and-peace", "chunk": "Well, Prince, so Genoa and ...", "pairs": []}

and the format `document_qa` reads them, a file of one row per chunk with the chunks of a document in order:

    {"document": "war-and-peace", "chunk": "Well, ...", "pairs": [{"question": "Who speaks?", "answer": "Anna."}]}
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from .bad_rows import BAD_ROW_FEATURES, GOOD, RowError, bad_row, drop_bad_rows
from .conversations import tokenize_conversation
from .files import excerpt
from .tokens import COLUMNS

DOCUMENT_QA_COLUMNS = ("document", "chunk", "pairs")
DOCUMENT_QA_OPTIONS = {"max_length": None, "max_pairs": None, "chat_template": None}
TURN = 16  # tokens that a template may add to a question and its answer; only the first guess depends on it


@dataclass(frozen=True)
class Chunk:
    """A chunk of a document.

    Attributes:
        document: whose chunk it is.
        text: its text.
        pairs: questions and their answers.
        size: about the tokens of text and pairs.
        location: file and line, for messages.
    """

    document: str
    text: str
    pairs: tuple[tuple[str, str], ...]
    size: int
    location: str


def cut_into_chunks(documents: Dataset, tokenizer: Any, chunk_tokens: int = 1000) -> Dataset:
    """Cut documents into the rows that are to be filled with question-answer pairs.

    Args:
        documents (`Dataset`): the column `text`, and optionally `document`, a name; by default its number.
        tokenizer: a fast Transformers tokenizer.
        chunk_tokens (`int`): the most tokens in a chunk.

    Returns:
        The columns `document`, `chunk` and `pairs` (empty); write them with `Dataset.to_json`.

    Raises:
        ValueError: if `chunk_tokens` is below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1; LWM's chunks have 1,000 tokens.")

    def cut(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        names, chunks = [], []
        for name, text in zip(batch.get("document", indices), batch["text"], strict=True):
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = encoded["offset_mapping"]
            starts = sorted({0, *(offsets[i][0] for i in range(0, len(offsets), chunk_tokens))})
            parts = [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
            chunks += [text for text in parts if text]
            names += [str(name)] * len([text for text in parts if text])
        return {"document": names, "chunk": chunks, "pairs": [[] for _ in chunks]}

    return documents.map(
        cut,
        batched=True,
        batch_size=16,
        with_indices=True,
        remove_columns=documents.column_names,
        desc=f"Cutting chunks of {chunk_tokens:,} tokens",
    )


def tokenize_document_qa(rows: Any, tokenizer: Any, settings: Any) -> Dataset:
    """Return a tokenised dataset with one row for each run of adjacent chunks that fits `max_length` tokens.

    Args:
        rows (`Dataset`): the result of `load_rows`, one row for each chunk.
        tokenizer: a Transformers tokenizer, whose chat template marks the tokens of the assistant.
        settings (`FormatSettings`): options `max_length`, tokens of a row, which is required; `max_pairs`, the most
            pairs of a row, evenly spread over its chunks; `chat_template` as for conversations.

    Raises:
        ValueError: if rows are streamed, `max_length` is missing or a row cannot be used.
    """
    if not isinstance(rows, Dataset):
        raise ValueError(f"{settings.source}: format document_qa joins rows, so it cannot be streamed.")
    max_length = settings.options.get("max_length")
    if not isinstance(max_length, int) or max_length < 2:
        raise ValueError(
            f"options: max_length={max_length!r} must say how many tokens the chunks and their pairs are joined to, "
            "such as options: {max_length: 32768}."
        )
    try:
        sequences = Dataset.from_generator(
            _sequences,
            features=Features({**COLUMNS, **BAD_ROW_FEATURES}),
            gen_kwargs={"rows": rows, "tokenizer": tokenizer, "settings": settings},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # of `bad_row`, which is more precise
            raise error.__cause__ from None
        raise
    return drop_bad_rows(sequences, settings.source).remove_columns("loss_weights")


def _sequences(rows: Dataset, tokenizer: Any, settings: Any) -> Iterator[dict[str, Any]]:
    chunks: list[Chunk] = []
    earlier_documents: set[str] = set()
    for index in range(len(rows)):
        row, location = rows[index], f"{settings.source}, row {index + 1}"
        if "location" in row:  # of files
            row, location = json.loads(row["row"]), row["location"]
        try:
            chunk = _read_chunk(row, tokenizer, location)
            if chunk.document in earlier_documents and not (chunks and chunks[-1].document == chunk.document):
                raise RowError(
                    "out of order", f"document {chunk.document!r} goes on after another. Keep its chunks together."
                )
        except RowError as error:
            yield bad_row(error, location, settings.errors)
            continue
        if chunks and chunks[0].document != chunk.document:
            yield from _conversations(chunks, tokenizer, settings)
            chunks = []
        earlier_documents.add(chunk.document)
        chunks.append(chunk)
    yield from _conversations(chunks, tokenizer, settings)


def _read_chunk(row: Mapping[str, Any], tokenizer: Any, location: str) -> Chunk:
    document, text, pairs = row.get("document"), row.get("chunk"), row.get("pairs")
    if not isinstance(text, str) or not text:
        raise RowError("wrong type", f"'chunk' holds {excerpt(text)} and no text.")
    if not isinstance(document, str | int):
        raise RowError("wrong type", f"'document' holds {excerpt(document)} and no name.")
    texts: list[tuple[str, str]] = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        values = [pair.get(name) for name in ("question", "answer")] if isinstance(pair, dict) else []
        match values:
            case [str() as question, str() as answer] if question and answer:
                texts.append((question, answer))
            case _:
                raise RowError(
                    "wrong type",
                    f'\'pairs\' holds {excerpt(pair)}. Write a list of {{"question": "...", "answer": "..."}}.',
                )
    every_text = [text, *(value for pair in texts for value in pair)]
    lengths = [len(ids) for ids in tokenizer(every_text, add_special_tokens=False, verbose=False)["input_ids"]]
    return Chunk(str(document), text, tuple(texts), sum(lengths) + TURN * len(texts), location)


def _conversations(chunks: list[Chunk], tokenizer: Any, settings: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of one document, each of as many chunks as fit."""
    start, max_length = 0, settings.options["max_length"]
    while start < len(chunks):
        stop, size = start + 1, chunks[start].size
        while stop < len(chunks) and size + chunks[stop].size <= max_length:
            size += chunks[stop].size
            stop += 1
        try:
            columns, stop = _fit(chunks, start, stop, tokenizer, settings.options)
            yield {**columns, "loss_weights": None, **GOOD}
        except RowError as error:
            yield bad_row(error, chunks[start].location, settings.errors)
        start = stop


def _fit(
    chunks: list[Chunk], start: int, stop: int, tokenizer: Any, options: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Return the tokens of the chunks from `start` on, and where they end: at `stop`, or before if it is too far."""
    while True:
        columns = _tokenize_chunks(chunks[start:stop], tokenizer, options)
        num_tokens = len(columns["input_ids"])
        if num_tokens <= options["max_length"]:
            return columns, stop
        if stop - start == 1:
            raise RowError(
                "too long",
                f"the chunk and its pairs have {num_tokens:,} tokens, more than max_length={options['max_length']:,}. "
                "Cut smaller chunks, or raise max_length.",
            )
        stop -= 1


def _tokenize_chunks(chunks: list[Chunk], tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    pairs = [pair for chunk in chunks for pair in chunk.pairs]
    if not pairs:
        raise RowError(
            "without pairs",
            f"{len(chunks)} chunks of document {chunks[0].document!r} have no pair, so they have no loss. Fill in "
            "'pairs', or raise max_length so that more chunks are joined.",
        )
    max_pairs = options.get("max_pairs")
    if max_pairs is not None and len(pairs) > max_pairs:
        pairs = [pairs[i * len(pairs) // max_pairs] for i in range(max_pairs)]
    messages: list[dict[str, str]] = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    context = "".join(chunk.text for chunk in chunks)
    messages[0]["content"] = f"{context}\n\n{messages[0]['content']}"
    return tokenize_conversation({"messages": messages}, tokenizer, options)
