"""Synthetic tasks of retrieval, tracing and aggregation over a long context, by name.

Every example is made from a seed, a number of tokens and a depth, so all models and all ranks get the same ones. The
sources describe the tasks; the sentences are our own, except the needle and the question of LWM, which make results
comparable.

needle, multi_needle        LWM (Liu et al. 2024, arXiv 2402.08268): numbers of cities in text; one of one, two of four
key_value                   Lost in the Middle (Liu et al. 2023, arXiv 2307.03172): a value of a JSON object
lines                       Ring Attention (Liu et al. 2023, arXiv 2310.01889), LongEval: the number of a line
multi_key, multi_value, multi_query, variable_tracking, common_words, frequent_words
                            RULER (Hsieh et al. 2024, arXiv 2404.06654), with its default difficulty
"""

import itertools
import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from .haystack import Example, Filler, fit_items, fit_prompt, insert_at_sentences
from .word_lists import ADJECTIVES, CITIES, NOUNS

Make = Callable[[random.Random, int, float, Filler], Example]
# LWM's prompt ends with these instructions; 200 tokens are left for the answer.
INSTRUCTIONS = "Answer from the text above only, and as briefly as possible."


@dataclass(frozen=True)
class RetrievalTask:
    """One task of the registry.

    Attributes:
        make: returns the example of a random state, a number of tokens, a depth from 0 to 1 and filler text.
        has_depth: whether the depth matters; without it a grid has one row.
        measures: what a score says, for reports.
    """

    make: Make
    has_depth: bool
    measures: str


def _ask(context: str, question: str) -> str:
    return f"You are a helpful assistant. USER: {context}\n{question} {INSTRUCTIONS} ASSISTANT:"


def _needle_sentence(city: str, number: str) -> str:
    return f"\nThe special magic {city} number is: {number}\n"


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _make_needle(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
    city, (number,) = rng.choice(CITIES), _numbers(rng, 1)

    def assemble(text: str) -> str:
        context = insert_at_sentences(text, [(depth, _needle_sentence(city, number))])
        return _ask(context, f"What is the special magic {city} number?")

    return Example(fit_prompt(num_tokens, filler, rng, assemble, "needle"), (number,), 24)


def _make_multi_needle(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
    """Hide four needles, one of the two that are asked for at `depth`, the others anywhere."""
    cities, numbers = rng.sample(CITIES, 4), _numbers(rng, 4)
    depths = [depth, rng.random(), rng.random(), rng.random()]
    needles = [_needle_sentence(city, number) for city, number in zip(cities, numbers, strict=True)]

    def assemble(text: str) -> str:
        context = insert_at_sentences(text, list(zip(depths, needles, strict=True)))
        return _ask(context, f"What are the special magic {cities[0]} and {cities[1]} numbers?")

    return Example(fit_prompt(num_tokens, filler, rng, assemble, "multi_needle"), tuple(numbers[:2]), 48)


def _names(rng: random.Random, count: int) -> list[str]:
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]


def _make_ruler_needles(num_keys: int, num_values: int, num_queries: int, purpose: str) -> Make:
    """Return a task of RULER's needles: `num_values` numbers of each of `num_keys` names, `num_queries` asked for."""

    def make(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
        names, numbers = _names(rng, num_keys), _numbers(rng, num_keys * num_values)
        facts = [
            (names[key], numbers[key * num_values + value]) for key in range(num_keys) for value in range(num_values)
        ]
        depths = [depth if key == 0 else rng.random() for key in range(num_keys * num_values)]
        inserts = [
            (where, f" One of the special magic numbers for {name} is: {number}. ")
            for where, (name, number) in zip(depths, facts, strict=True)
        ]
        asked = names[:num_queries]
        answers = tuple(number for name, number in facts if name in asked)

        def assemble(text: str) -> str:
            context = insert_at_sentences(text, inserts)
            return _ask(context, f"What are all the special magic numbers for {', '.join(asked)}?")

        prompt = fit_prompt(num_tokens, filler, rng, assemble, purpose)
        return Example(prompt, answers, 16 + 12 * len(answers))

    return make


def _make_key_value(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
    key, value = (str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(2))
    seed = rng.getrandbits(64)

    def assemble(num_pairs: int) -> str:
        other = random.Random(seed)
        pairs = [[str(uuid.UUID(int=other.getrandbits(128))) for _ in range(2)] for _ in range(num_pairs - 1)]
        pairs.insert(round(depth * (num_pairs - 1)), [key, value])
        return _ask(json.dumps(dict(pairs), indent=1), f'What is the value of the key "{key}"?')

    return Example(fit_items(num_tokens, filler, assemble, 2, "key_value"), (value,), 64)


def _make_lines(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
    names = _names(rng, len(ADJECTIVES) * len(NOUNS))
    target, answer = names[0], str(rng.randrange(10_000, 100_000))
    seed = rng.getrandbits(64)

    def assemble(num_lines: int) -> str:
        other = random.Random(seed)
        lines = []
        for number in range(1, num_lines):
            lap, index = divmod(number, len(names))
            name = f"{names[index]}-{lap}" if lap else names[index]  # after the last name, each gets a number
            lines.append(f"line {name}: REGISTER_CONTENT is <{other.randrange(10_000, 100_000)}>")
        lines.insert(round(depth * len(lines)), f"line {target}: REGISTER_CONTENT is <{answer}>")
        return _ask("\n".join(lines), f"What is the REGISTER_CONTENT of line {target}?")

    return Example(fit_items(num_tokens, filler, assemble, 2, "lines"), (answer,), 24)


def _make_variable_tracking(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
    """Hide a chain of four assignments, in order; the names of all variables with its value are the answer."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names = ["".join(rng.choices(letters, k=5)) for _ in range(5)]
    value = str(rng.randrange(10_000, 100_000))
    statements = [f" VAR {names[0]} = {value}. "]
    statements += [f" VAR {name} = VAR {source}. " for source, name in itertools.pairwise(names)]
    depths = sorted([depth, *(rng.random() for _ in names[1:])])

    def assemble(text: str) -> str:
        context = insert_at_sentences(text, list(zip(depths, statements, strict=True)))
        return _ask(context, f"Find all variables that are assigned the value {value}, directly or by another one.")

    return Example(fit_prompt(num_tokens, filler, rng, assemble, "variable_tracking"), tuple(names), 48)


def _make_common_words(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
    """List words in random order: ten of them 30 times each, all others 3 times each."""
    words = rng.sample(NOUNS + ADJECTIVES, len(NOUNS + ADJECTIVES))
    common, others = words[:10], words[10:]
    seed = rng.getrandbits(64)

    def assemble(num_others: int) -> str:
        listed = common * 30 + [others[n % len(others)] + (str(n // len(others)) if n >= len(others) else "")
                                for n in range(num_others)] * 3  # fmt: skip
        random.Random(seed).shuffle(listed)
        text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return _ask(text, "What are the 10 most common words of this list?")

    return Example(fit_items(num_tokens, filler, assemble, 10, "common_words"), tuple(common), 120)


def _make_frequent_words(rng: random.Random, num_tokens: int, depth: float, filler: Filler) -> Example:
    """Shuffle coded words whose counts fall as 1 / rank^2 (Zipf, alpha 2); the three most frequent are the answer."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = list(dict.fromkeys("".join(rng.choices(letters, k=6)) for _ in range(500)))
    seed = rng.getrandbits(64)

    def assemble(scale: int) -> str:
        listed = [word for rank, word in enumerate(words, 1) for _ in range(scale // rank**2)]
        random.Random(seed).shuffle(listed)
        return _ask(" ".join(listed), "What are the three most frequent words of this coded text?")

    # With a scale of 100, the first four words stand 100, 25, 11 and 6 times: the answer is never a tie.
    return Example(fit_items(num_tokens, filler, assemble, 100, "frequent_words"), tuple(words[:3]), 48)


RETRIEVAL_TASKS: dict[str, RetrievalTask] = {
    "needle": RetrievalTask(_make_needle, True, "finds one fact in text"),
    "multi_needle": RetrievalTask(_make_multi_needle, True, "finds two of four facts in text"),
    "key_value": RetrievalTask(_make_key_value, True, "copies the value of a key among many like it"),
    "lines": RetrievalTask(_make_lines, True, "copies the number of a line among many like it"),
    "multi_key": RetrievalTask(_make_ruler_needles(4, 1, 1, "multi_key"), True, "is not misled by similar facts"),
    "multi_value": RetrievalTask(_make_ruler_needles(1, 4, 1, "multi_value"), True, "finds all facts about one name"),
    "multi_query": RetrievalTask(_make_ruler_needles(4, 1, 4, "multi_query"), True, "finds facts about four names"),
    "variable_tracking": RetrievalTask(_make_variable_tracking, True, "follows a chain of references"),
    "common_words": RetrievalTask(_make_common_words, False, "counts words over the whole context"),
    "frequent_words": RetrievalTask(_make_frequent_words, False, "ranks words over the whole context"),
}


def make_example(name: str, num_tokens: int, depth: float, round_number: int, seed: int, filler: Filler) -> Example:
    """Return one example of a task; the same for every model and rank.

    Args:
        name: a key of `RETRIEVAL_TASKS`.
        num_tokens: the most tokens of the prompt, special tokens included.
        depth: of the fact that is asked for, 0 at the beginning and 1 at the end.
        round_number: of several examples with this length and depth.
        seed: of the whole grid.

    Raises:
        ValueError: if there is no such task, or the length is too short for it.
    """
    if name not in RETRIEVAL_TASKS:
        raise ValueError(f"There is no task {name!r}. Choose from {', '.join(RETRIEVAL_TASKS)}.")
    rng = random.Random(f"{name} {num_tokens} {depth:.6f} {round_number} {seed}")
    return RETRIEVAL_TASKS[name].make(rng, num_tokens, depth, filler)
