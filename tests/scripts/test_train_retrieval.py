"""The rows that teach a model to retrieve hold prompts of an evaluation and ask for their answers only."""

import os
import subprocess
import sys

import pytest

from ring_hf.data.byte_level import load_tokenizer
from ring_hf.evaluation.haystack import Filler
from tests.support.harness import ROOT, load_script

ROWS = load_script("retrieval_rows")
TEXT = " ".join(f"This is sentence {number} of a story that goes on." for number in range(400))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


def test_rows_ask_for_the_answers_of_their_prompts(tokenizer):
    rows = ROWS.RetrievalRows("needle", [400, 400, 1200], 1240, 300, Filler(TEXT, tokenizer), tokenizer)
    for index, num_prompts in enumerate((3, 3, 1)):
        row = rows[index]
        assert {len(values) for values in row.values()} == {1240}
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        asked = 0
        for start, end in zip(starts, [*starts[1:], 1240], strict=True):
            labels = row["labels"][start:end]
            answer = [i for i, label in enumerate(labels) if label != ROWS.IGNORE_INDEX]
            if not answer:  # what is left of the row
                continue
            asked += 1
            ids = row["input_ids"][start:end]
            assert labels[answer[0] :] == ids[answer[0] :] and ids[-1] == tokenizer.eos_token_id
            number = tokenizer.decode(ids[answer[0] : -1]).strip()
            prompt = tokenizer.decode(ids[: answer[0]])
            assert len(number) == 7 and prompt.count(number) == 1 and prompt.endswith("ASSISTANT:")
        assert asked == num_prompts
        assert rows[index] == row
    assert rows[0] != rows[1] and len(rows) == 3


def test_a_curriculum_takes_a_length_at_a_time_then_all():
    lengths = ROWS.curriculum([2, 3, 40], [128, 512, 2048], 2)
    assert lengths[:10] == [128] * 4 + [512] * 6 and len(lengths) == 2 * 45
    assert set(lengths[10:]) == {128, 512, 2048}
    assert lengths[10::2] == lengths[11::2]  # the rows of a step have prompts of one length
    with pytest.raises(ValueError, match="give a number of steps for each length"):
        ROWS.curriculum([2, 3], [128, 512, 2048], 2)


def test_the_tokenizer_splits_digits_and_loses_nothing():
    tokenizer = ROWS.build_tokenizer(TEXT, 400)
    text = " The special magic Lima number is: 1234567\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(tokenizer) == 400
    assert sum(tokenizer.decode([token]).strip() in set("1234567") for token in ids) == 7


@pytest.mark.skipif("RING_HF_ALL_CASES" not in os.environ, reason="runs with RING_HF_ALL_CASES=1")
def test_a_model_that_has_not_learnt_fails_with_equal_cells(tmp_path):
    sizes = ["--lengths", "128", "256", "--steps", "2", "3", "--hidden", "32", "--depths", "2", "--rounds", "1"]
    command = [sys.executable, "scripts/train_retrieval.py", "--output", str(tmp_path), *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1 and "the mean is not above 95 %" in done.stderr, done.stderr[-3000:]
    report = (tmp_path / "retrieval.md").read_text()
    assert "of 4 prompts, scores of one process are equal in 4, texts in 4" in report
    assert (tmp_path / "grid-of-2" / "retrieval.png").exists() and (tmp_path / "grid-of-1" / "retrieval.png").exists()
