"""Prompts of an exact number of tokens: facts hidden in filler text, at a depth, and a question about them.

Filler is cut to the tokens that the rest of a prompt leaves, so that a prompt never exceeds its budget and falls short
of it by a few tokens only. A fact goes where a sentence ends, at or before its depth, as in the protocol of LWM (Liu
et al. 2024, arXiv 2402.08268; `scripts/eval_needle.py` there).
"""

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s")
_MAX_SHRINKS = 8  # rounds in which a prompt that is too long loses filler


class Tokenizer(Protocol):
    """What is needed of a tokenizer of Transformers."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...


@dataclass(frozen=True)
class Example:
    """A prompt and what its answer must contain.

    Attributes:
        prompt: text with at most the tokens it was made for.
        answers: each is right if the generated text contains it.
        max_new_tokens: tokens in which a model can give all answers.
    """

    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int

    def score(self, output: str) -> float:
        """Return the fraction of the answers that a generated text contains, whatever their case."""
        text = output.lower()
        return sum(answer.lower() in text for answer in self.answers) / len(self.answers)


class Filler:
    """Text of which prompts take a part, with its tokens.

    Args:
        text: of any length; it is repeated if a prompt needs more.
        tokenizer: of the models that are measured.

    Raises:
        ValueError: if the text has no tokens.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(text, add_special_tokens=False)
        if not self._ids:
            raise ValueError("The filler text is empty. Give a text, or leave it out for the built-in one.")

    def count(self, text: str) -> int:
        """Return the number of tokens of a prompt, special tokens included."""
        return len(self._tokenizer.encode(text))

    def take(self, num_tokens: int, start: int = 0) -> str:
        """Return `num_tokens` tokens of the text, from token `start` on; the text is read in a circle."""
        size = len(self._ids)
        start %= size
        ids = self._ids[start : start + num_tokens]
        while len(ids) < num_tokens:
            ids = ids + self._ids[: num_tokens - len(ids)]
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def insert_at_sentences(text: str, inserts: Sequence[tuple[float, str]]) -> str:
    """Return a text with sentences inserted, each after the last end of a sentence at or before its depth.

    Args:
        text: the filler.
        inserts: pairs of depth (0 is the beginning, 1 the end) and sentence; equal depths keep their order.
    """
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    insertions = [(ends[bisect_right(ends, depth * len(text)) - 1], sentence) for depth, sentence in inserts]
    parts, last = [], 0
    for position, sentence in sorted(insertions, key=lambda insertion: insertion[0]):
        parts += [text[last:position], sentence]
        last = position
    return "".join([*parts, text[last:]])


def fit_prompt(
    num_tokens: int, filler: Filler, rng: random.Random, assemble: Callable[[str], str], purpose: str
) -> str:
    """Return the prompt that `assemble` makes of as much filler as fits into `num_tokens` tokens.

    Args:
        num_tokens: the budget, special tokens of the tokenizer included.
        filler: where the filler is from; it begins at a random token.
        rng: of this example.
        assemble: makes the prompt from the filler.
        purpose: names the task in an error.

    Raises:
        ValueError: if the prompt without filler is longer than the budget, or no amount of filler comes close to it.
    """
    fixed = filler.count(assemble(""))
    if fixed > num_tokens:
        raise ValueError(f"{purpose} needs {fixed} tokens without any filler, more than the length {num_tokens}.")
    start, size = rng.randrange(1 << 30), num_tokens - fixed
    for _ in range(_MAX_SHRINKS):
        prompt = assemble(filler.take(size, start))
        excess = filler.count(prompt) - num_tokens
        if excess <= 0:
            return prompt
        size -= excess + 1
        if size < 0:
            break
    raise ValueError(
        f"{purpose}: no prompt of about {num_tokens} tokens was reached in {_MAX_SHRINKS} attempts, because the "
        "tokenizer makes other tokens of the filler each time. Give another filler text."
    )


def fit_items(num_tokens: int, filler: Filler, assemble: Callable[[int], str], least: int, purpose: str) -> str:
    """Return the prompt of as many items (lines, pairs, words) as fit into `num_tokens` tokens, by bisection.

    Args:
        assemble: makes the prompt with a number of items; more items never make it shorter.
        least: the fewest items with which the task makes sense.

    Raises:
        ValueError: if not even `least` items fit.
    """
    smallest = filler.count(assemble(least))
    if smallest > num_tokens:
        raise ValueError(f"{purpose} needs {smallest} tokens for {least} items, more than the length {num_tokens}.")
    low, high = least, least * 2
    while filler.count(assemble(high)) <= num_tokens:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if filler.count(assemble(middle)) <= num_tokens else (low, middle)
    return assemble(low)
