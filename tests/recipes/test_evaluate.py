"""The evaluation recipe: processes that share each sequence measure what one does; an interrupted run continues."""

import json

import pytest
import torch
from arguments import ModelArguments
from evaluation_arguments import EvaluationArguments
from loading import load_model, load_tokenizer
from transformers import LlamaConfig

from tests.support.harness import launch_forked

SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
TASKS = ["--tasks", "needle", "lines", "perplexity", "perplexity_by_position"]
GRID = ["--lengths", "500", "700", "--num_depths", "2", "--rounds", "1", "--short_context_length", "256"]
NUM_CELLS = 2 * 2 * 2
TEXT = " ".join(f"This is sentence {number * 7919 % 1000} of a story that goes on." for number in range(500))
NUM_EXCERPTS = 3  # of 700 bytes in the last tenth of the text


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


def evaluate(models, text, folder, num_processes, *more):
    named = [f"{name}={model}" for name, model in zip("ab", models, strict=False)]
    command = ["recipes/evaluate.py", "--models", *named, *TASKS, *GRID, "--text", text, "--dtype", "float64"]
    return launch_forked([*command, "--output_dir", str(folder), *more], num_processes)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def alone(models, text, tmp_path_factory):
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    evaluate(models[:1], text, folder, 1)
    return folder


def test_processes_that_share_a_sequence_measure_what_one_does(models, text, alone, tmp_path):
    output = evaluate(models, text, tmp_path, 2, "--prefill_chunk_size", "300", "--short_context_margin", "-1")
    of_two, of_one = records(tmp_path / "a.jsonl"), records(alone / "a.jsonl")
    assert of_two == of_one and len(of_one) == NUM_CELLS
    assert len({record["text"] for record in of_one}) > 1
    of_two, of_one = (records(folder / "a.perplexity.jsonl") for folder in (tmp_path, alone))
    assert len(of_one) == len(of_two) == NUM_EXCERPTS * len((256, 500, 700))
    for shared, single in zip(of_two, of_one, strict=True):
        assert shared.pop("sums") == pytest.approx(single.pop("sums"), rel=1e-12)
        assert shared == single and sum(single["counts"]) == 699
    for name in ("retrieval.png", "perplexity.png", "perplexity_by_position.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert set(json.loads((tmp_path / "retrieval.json").read_text())["scores"]) == {"a", "b"}
    numbers = json.loads((tmp_path / "perplexity.json").read_text())
    assert [row["length"] for row in numbers["results"]["b"]["lengths"]] == [256, 500, 700]
    check = numbers["short_context"]["b"]
    assert check["length"] == 256 and check["is_worse"] and numbers["short_context"]["a"]["change"] is None
    for name in ("retrieval.md", "perplexity.md"):
        report = (tmp_path / name).read_text()
        assert "short context (256) |" in report and "%, worse) |" in report
        assert "Warning: b predicts short text worse than a" in report
    assert "| needle | " in output and "| loss after so many tokens " in output and "Warning: b predicts" in output


def test_an_interrupted_run_continues_and_keeps_its_answers(models, text, alone):
    paths = [alone / "a.jsonl", alone / "a.perplexity.jsonl"]
    contents = [path.read_text().splitlines(keepends=True) for path in paths]
    for path, lines in zip(paths, contents, strict=True):
        path.write_text("".join(lines[:4]) + lines[4][:20])
    evaluate(models[:1], text, alone, 1)
    assert [path.read_text().splitlines(keepends=True) for path in paths] == contents
    with pytest.raises(AssertionError, match="holds results of other settings"):
        evaluate(models[1:], text, alone, 1)  # another model under the same name


def test_models_of_one_name_are_refused():
    assert EvaluationArguments(["runs/a", "b=runs/a"]).named_models() == {"a": "runs/a", "b": "runs/a"}
    for args, message in (
        (EvaluationArguments(["runs/a", "other/a"]), "are both named 'a'"),
        (EvaluationArguments(), "models is empty"),
        (EvaluationArguments(["a"], reference="b"), "reference='b' is none of the models"),
    ):
        with pytest.raises(ValueError, match=message):
            args.named_models()


def test_the_short_length_is_that_of_the_first_model(tmp_path):
    for settings, length in (
        ({"max_position_embeddings": 1024}, 1024),
        ({"max_position_embeddings": 131072}, 2048),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4,
                              "original_max_position_embeddings": 640}}, 640),
    ):  # fmt: skip
        LlamaConfig(**settings).save_pretrained(tmp_path)
        assert EvaluationArguments().short_length(str(tmp_path)) == length
    assert EvaluationArguments(short_context_length=0).perplexity(0) is None
    lengths = EvaluationArguments(tasks=["perplexity", "needle"], lengths=[4096, 1024]).perplexity(512).lengths
    assert lengths == (512, 1024, 4096)
    assert EvaluationArguments(tasks=["perplexity_by_position"]).perplexity(0).lengths == (4096,)
    with pytest.raises(ValueError, match="short_context is a task and short_context_length=0"):
        EvaluationArguments(tasks=["short_context"], short_context_length=0).short_length("")


def test_defaults_are_those_of_the_protocol():
    args = EvaluationArguments()
    assert (args.tasks, args.num_depths, args.rounds) == (["needle"], 10, 3)
