"""Training rows of `train_retrieval.py`: prompts of a retrieval task and their answers, packed into rows.

The prompts are those of `ring_hf.evaluation`, made from other seeds than those of an evaluation; only the answers are
learnt. Rows are made when they are asked for, the same on every process.
"""

import random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from ring_hf.data.byte_level import load_tokenizer
from ring_hf.evaluation.haystack import Filler
from ring_hf.evaluation.retrieval_tasks import make_example

IGNORE_INDEX = -100
TRAINING_SEED = 1_000_000  # of prompts: evaluations count theirs from 0
ANSWER_TOKENS = 16  # room for an answer and the end of the text


def build_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on a text and on the words of the needle; digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    filler = Filler(text[:100_000], load_tokenizer("bytes"))
    prompts = [make_example("needle", 400, 0.5, number, TRAINING_SEED, filler).prompt for number in range(300)]
    tokenizer.train_from_iterator([text, *prompts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class RetrievalRows(Dataset):
    """Rows of `length` tokens for every step of a curriculum.

    Args:
        task: a retrieval task whose fact has a depth.
        prompt_lengths: tokens of the prompts, for every row.
        length: tokens of a row; as many prompts are packed into it as fit.
        shortest: fewest tokens of a prompt.
    """

    def __init__(
        self, task: str, prompt_lengths: list[int], length: int, shortest: int, filler: Filler, tokenizer: Any
    ) -> None:
        self._task, self._prompt_lengths, self._length, self._shortest = task, prompt_lengths, length, shortest
        self._filler, self._tokenizer = filler, tokenizer

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return input_ids, labels and position_ids; positions begin again at 0 with every prompt."""
        rng = random.Random(index)
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        number = 0
        while self._length - len(ids) >= self._shortest + ANSWER_TOKENS:
            most = min(self._prompt_lengths[index], self._length - len(ids) - ANSWER_TOKENS)
            # Short prompts have any length, so that no position is special; long ones fill their row.
            num_tokens = most if most > self._length // 2 else rng.randint(self._shortest, max(self._shortest, most))
            number += 1
            example = make_example(self._task, num_tokens, rng.random(), number, TRAINING_SEED + index, self._filler)
            prompt = self._tokenizer.encode(example.prompt)
            answer = self._tokenizer.encode(" " + " and ".join(example.answers)) + [self._tokenizer.eos_token_id]
            answer = answer[: self._length - len(ids) - len(prompt)]
            ids += prompt + answer
            labels += [IGNORE_INDEX] * len(prompt) + answer
            positions += range(len(prompt) + len(answer))
        rest = self._length - len(ids)
        return {
            "input_ids": ids + [self._tokenizer.eos_token_id] * rest,
            "labels": labels + [IGNORE_INDEX] * rest,
            "position_ids": positions + list(range(rest)),
        }


def curriculum(steps: list[int], lengths: list[int], rows_per_step: int, seed: int = 0) -> list[int]:
    """Return the length of the prompts in every row: each stage takes one length, the last one mixes all.

    Args:
        steps: of each stage; one more than there are lengths below the longest.
        lengths: of prompts, ascending; the stages before the last one take those below the longest.
        rows_per_step: rows of a step, which have the same length of prompts.

    Raises:
        ValueError: if there are not as many stages as lengths.
    """
    if len(steps) != len(lengths):
        raise ValueError(f"steps={steps} and lengths={lengths}: give a number of steps for each length.")
    rng = random.Random(seed)
    stages = [[length] * count for length, count in zip(lengths[:-1], steps[:-1], strict=True)]
    stages.append([rng.choice([*lengths, lengths[-1]]) for _ in range(steps[-1])])  # the longest twice as often
    return [length for stage in stages for length in stage for _ in range(rows_per_step)]
