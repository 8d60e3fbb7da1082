"""The evaluation recipe: two processes that share each prompt answer as one does, and an interrupted run continues."""

import json

import pytest
import torch
from arguments import ModelArguments
from evaluate import EvaluationArguments, named_models
from loading import load_model, load_tokenizer

from tests.support.harness import launch_forked

SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
GRID = ["--tasks", "needle", "lines", "--lengths", "500", "700", "--num_depths", "2", "--rounds", "1"]
NUM_CELLS = 2 * 2 * 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two random models of one tokenizer."""
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        torch.manual_seed(seed)
        args = ModelArguments(model_config=SHAPE, tokenizer="bytes", attn_implementation="sdpa")
        tokenizer = load_tokenizer(args)
        load_model(args, tokenizer, 1024).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def evaluate(models, folder, num_processes, *more):
    named = [f"{name}={model}" for name, model in zip("ab", models, strict=False)]
    command = ["recipes/evaluate.py", "--models", *named, *GRID, "--dtype", "float64", "--output_dir", str(folder)]
    return launch_forked([*command, *more], num_processes)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    evaluate(models[:1], folder, 1)
    return folder


def test_processes_that_share_a_prompt_answer_as_one_does(models, alone, tmp_path):
    output = evaluate(models, tmp_path, 2, "--prefill_chunk_size", "300")
    of_two, of_one = records(tmp_path / "a.jsonl"), records(alone / "a.jsonl")
    assert of_two == of_one and len(of_one) == NUM_CELLS
    assert len({record["text"] for record in of_one}) > 1
    assert "| needle | " in output and (tmp_path / "retrieval.png").stat().st_size > 10_000
    assert set(json.loads((tmp_path / "retrieval.json").read_text())["scores"]) == {"a", "b"}


def test_an_interrupted_run_continues_and_keeps_its_answers(models, alone):
    path = alone / "a.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:4]) + whole[4][:20])
    evaluate(models[:1], alone, 1)
    assert path.read_text().splitlines(keepends=True) == whole
    with pytest.raises(AssertionError, match="holds results of other settings"):
        evaluate(models[1:], alone, 1)  # another model under the same name


def test_models_of_one_name_are_refused():
    assert named_models(["runs/a", "b=runs/a"]) == {"a": "runs/a", "b": "runs/a"}
    with pytest.raises(ValueError, match="are both named 'a'"):
        named_models(["runs/a", "other/a"])


def test_defaults_are_those_of_the_protocol():
    args = EvaluationArguments()
    assert (args.tasks, args.num_depths, args.rounds) == (["needle"], 10, 3)
