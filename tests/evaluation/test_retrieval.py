"""Prompts have the asked length and hide their facts at the asked depth; a grid continues where it stopped."""

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from ring_hf.data import build_byte_tokenizer
from ring_hf.evaluation import retrieval_tasks
from ring_hf.evaluation.grid_charts import plot_grids
from ring_hf.evaluation.haystack import Example, Filler, fit_prompt, insert_at_sentences
from ring_hf.evaluation.retrieval_grid import GridSpec, format_scores, read_grid, run_grid
from ring_hf.evaluation.retrieval_tasks import RETRIEVAL_TASKS, make_example

TEXT = " ".join(f"This is sentence {number} of a story that goes on." for number in range(400))
SPEC = GridSpec(("needle", "common_words"), (8000, 5000), num_depths=3, rounds=2)
ORIGIN = {"model": "a"}


@pytest.fixture(scope="module")
def filler():
    return Filler(TEXT, PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer()))


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_prompts_fill_their_length_and_hold_their_answers(filler, name):
    for num_tokens, depth in ((4000, 0.0), (9000, 0.5), (30000, 1.0)):
        example = make_example(name, num_tokens, depth, 0, 0, filler)
        assert 0.9 * num_tokens < filler.count(example.prompt) <= num_tokens
        assert all(answer in example.prompt for answer in example.answers)
        assert example.score(" and ".join(example.answers)) == 1.0
        assert example.score("I do not know.") == 0.0
        assert example == make_example(name, num_tokens, depth, 0, 0, filler)
        assert example.prompt != make_example(name, num_tokens, depth, 1, 0, filler).prompt


@pytest.mark.parametrize("name", [name for name, task in RETRIEVAL_TASKS.items() if task.has_depth])
def test_the_fact_lies_at_its_depth(filler, name):
    positions = []
    for depth in (0.0, 0.25, 0.75, 1.0):
        example = make_example(name, 20_000, depth, 0, 0, filler)
        marker = example.answers[0] if name != "variable_tracking" else f"VAR {example.answers[0]} ="
        positions.append(example.prompt.index(marker) / len(example.prompt))
    if name == "variable_tracking":  # the first of several depths: other links may lie before
        assert positions[0] < 0.05
        return
    assert positions == pytest.approx([0.0, 0.25, 0.75, 1.0], abs=0.06)


@pytest.mark.parametrize("name", RETRIEVAL_TASKS)
def test_a_length_below_the_least_is_refused(filler, name):
    with pytest.raises(ValueError, match=rf"{name} needs \d+ tokens .* more than the length 40"):
        make_example(name, 40, 0.5, 0, 0, filler)


def test_facts_of_aggregation_are_what_can_be_counted(filler):
    example = make_example("common_words", 30_000, 0.5, 0, 0, filler)
    counts = {word: len(re.findall(rf"\d\. {word}\b", example.prompt)) for word in example.answers}
    assert set(counts.values()) == {30}
    for num_tokens, number in ((1_600, 0), (1_600, 1), (30_000, 0)):
        example = make_example("frequent_words", num_tokens, 0.5, number, 0, filler)
        text = example.prompt.partition("USER: ")[2].partition("\n")[0]
        (_, first), (_, second), (_, third), (_, fourth) = Counter(text.split()).most_common(4)
        assert first > second > third > fourth
        assert tuple(word for word, _ in Counter(text.split()).most_common(3)) == example.answers


def test_lines_do_not_run_out_of_names(filler, monkeypatch):
    monkeypatch.setattr(retrieval_tasks, "ADJECTIVES", ["old", "new"])
    monkeypatch.setattr(retrieval_tasks, "NOUNS", ["oak", "elm"])
    example = make_example("lines", 4_000, 0.5, 0, 0, filler)
    names = re.findall(r"line (\S+):", example.prompt)
    assert len(names) == len(set(names)) > 60 and 3_900 < filler.count(example.prompt) <= 4_000


def test_filler_that_never_fits_is_an_error(filler):
    class Growing(Filler):
        def count(self, text):
            return 10 if "[]" in text else 10_000

    growing = Growing(TEXT, PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer()))
    with pytest.raises(ValueError, match="no prompt of about 200 tokens was reached"):
        fit_prompt(200, growing, random.Random(0), lambda text: f"[{text}]", "needle")


def test_sentences_are_inserted_where_others_end():
    text = "One. Two? Three!  Four"
    assert insert_at_sentences(text, [(0.6, "[x]")]) == "One. Two? [x]Three!  Four"
    assert insert_at_sentences(text, [(1.0, "[y]"), (0.0, "[x]")]) == "[x]One. Two? Three!  Four[y]"


def test_scores_count_each_answer_whatever_its_case():
    assert Example("", ("Lima", "42", "x"), 1).score("LIMA has 42") == pytest.approx(2 / 3)


def test_a_grid_that_was_killed_continues(filler, tmp_path):
    path, calls = tmp_path / "model.jsonl", []

    def generate(prompt, max_new_tokens):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(prompt)
        return prompt if len(calls) % 2 else "nothing"

    with pytest.raises(KeyboardInterrupt):
        run_grid(SPEC, generate, filler, path, done=read_grid(path, SPEC, ORIGIN))
    with path.open("a") as file:
        file.write('{"cell": {"task": "need')  # killed while it wrote
    done = read_grid(path, SPEC, ORIGIN)
    assert len(done.scores) == 5
    calls.append("the fault is over")
    result = run_grid(SPEC, generate, filler, path, done=done)
    total = len(list(SPEC.cells()))
    assert total == 2 * (3 * 2 + 2) == len(result.scores) == len(calls) - 1
    assert read_grid(path, SPEC, ORIGIN) == result
    assert all(json.loads(line) for line in path.read_text().splitlines())
    for spec, origin in ((replace(SPEC, rounds=1), ORIGIN), (SPEC, {**ORIGIN, "model": "another"})):
        with pytest.raises(ValueError, match="holds results of other settings"):
            read_grid(path, spec, origin)


def test_scores_are_means_over_depths_and_rounds(filler, tmp_path):
    result = run_grid(
        SPEC, lambda prompt, _: prompt, filler, tmp_path / "a.jsonl", done=read_grid(tmp_path / "a", SPEC, ORIGIN)
    )
    blind = replace(SPEC, tasks=("needle",))
    none = run_grid(blind, lambda *_: "", filler, tmp_path / "b.jsonl", done=read_grid(tmp_path / "b", blind, ORIGIN))
    results = {"reads": result, "blind": none}
    assert format_scores(results, (5000, 8000)) == [
        ["task", "model", "5,000", "8,000"],
        ["needle", "reads", "100", "100"],
        ["needle", "blind", "0", "0"],
        ["common_words", "reads", "100", "100"],
        ["common_words", "blind", "", ""],
    ]
    plot_grids(results, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("needles",)}, "choose one or more of needle"),
        ({"rounds": 0}, "at least 1"),
        ({"lengths": ()}, "length"),
    ],
)
def test_grids_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **changes)
