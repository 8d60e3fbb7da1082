"""The fine-tuning recipe as a user starts it: one process and two give the same losses, an interrupted run goes on as
if it had not been, and what comes out needs nothing of ours.
"""

import importlib
import json
import pydoc_data.topics
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoTokenizer, TrainingArguments

from ring_hf.hf.pretrained import load_pretrained
from tests.support.harness import ROOT, launch_forked, run_command

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_2proc.yaml"]
RUN = """
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, max_position_embeddings: 32}
tokenizer: bytes
rope_theta: 50000.0
max_length: 128
heldout_fraction: 0.2
max_heldout_sequences: 3
per_device_train_batch_size: 2
per_device_eval_batch_size: 1
gradient_accumulation_steps: 2
max_steps: 8
save_steps: 4
learning_rate: 1e-3
lr_scheduler_type: constant
logging_steps: 1
eval_strategy: steps
eval_steps: 8
"""
MEMORY_OPTIONS = [
    "--memory_attention",
    "save",
    "--memory_offload",
    "all",
    "--ffn_block",
    "100",
    "--loss_block",
    "auto",
]
RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "ring_hf" for name in sys.modules)
assert model.config.use_cache and model.config._attn_implementation == "sdpa"
assert model.config.max_position_embeddings == 128 and model.config.rope_parameters["rope_theta"] == 5e4
ids = tokenizer("The quick brown fox", return_tensors="pt")
print(model(**ids, labels=ids["input_ids"]).loss.item(), len(model.generate(**ids, max_new_tokens=3)[0]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus, a run, and one directory of results for each way to start it."""
    folder = tmp_path_factory.mktemp("finetune")
    topics = pydoc_data.topics.topics
    rows = [json.dumps({"text": topics[name][:600]}) for name in sorted(topics)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "run.yaml").write_text(RUN)
    start(folder, [sys.executable], "one")
    done = start(folder, LAUNCH, "two", "--context_parallel_size", "2", "--verify_steps", "2", *MEMORY_OPTIONS)
    (folder / "two" / "output.txt").write_text(done.stderr)
    return folder


def command(folder, name, *overrides):
    output = ["--data", str(folder / "corpus.jsonl"), "--output_dir", str(folder / name)]
    return ["recipes/finetune.py", str(folder / "run.yaml"), *output, *overrides]


def start(folder, launcher, name, *overrides):
    return run_command([*launcher, *command(folder, name, *overrides)])


def fork(folder, num_processes, name, *overrides):
    size = ["--context_parallel_size", str(num_processes)] if num_processes > 1 else []
    return launch_forked(command(folder, name, *size, *overrides), num_processes)


def history(folder, name):
    return json.loads((folder / name / "trainer_state.json").read_text())["log_history"]


def compare(got, want, loss, grad_norm):
    """Every logged step: as many, the same numbers."""
    steps = [row for row in want if "loss" in row]
    assert [row["step"] for row in got if "loss" in row] == [row["step"] for row in steps]
    for mine, other in zip([row for row in got if "loss" in row], steps, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=loss)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=grad_norm)
    return len(steps)


def test_two_processes_give_the_losses_of_one(folder):
    first, second = history(folder, "one"), history(folder, "two")
    assert compare(second, first, loss=1e-5, grad_norm=1e-4) == 8
    evaluations = [[row["eval_loss"] for row in rows if "eval_loss" in row] for rows in (first, second)]
    assert len(evaluations[0]) == 1
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-5)


def test_verified_steps_are_reported_before_they_are_taken(folder):
    """`test_two_processes_give_the_losses_of_one` shows that they change no number."""
    output = (folder / "two" / "output.txt").read_text()
    assert "verified batch 1 of 2" in output and "verified batch 2 of 2" in output
    assert output.count("verdict: exact") == 2


def test_a_verification_alone_writes_its_verdict_and_trains_nothing(folder):
    fork(folder, 2, "verified", "--verify_steps", "2", "--verify_only", "true", "--verify_length", "48")
    result = json.loads((folder / "verified" / "verification.json").read_text())
    assert result["verdict"] == "exact" and result["setup"]["batches"] == "2"
    assert "48 tokens" in result["setup"]["batch"]
    assert {path.name for path in (folder / "verified").iterdir()} == {"log.jsonl", "verification.json"}


def test_training_reduces_the_loss(folder):
    losses = [row["loss"] for row in history(folder, "one") if "loss" in row]
    assert losses[-1] < losses[0] - 0.3


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(folder):
    shutil.copytree(folder / "two" / "checkpoint-4", folder / "again" / "checkpoint-4")
    fork(folder, 2, "again", *MEMORY_OPTIONS)
    assert compare(history(folder, "again"), history(folder, "two"), loss=1e-7, grad_norm=1e-6) == 8


def test_a_finished_run_is_not_trained_further(folder):
    before = (folder / "one" / "model.safetensors").read_bytes()
    output = fork(folder, 1, "one")
    assert "checkpoint-8 is the end of this run: nothing left to train" in output
    assert (folder / "one" / "model.safetensors").read_bytes() == before


def test_one_text_file_is_enough(folder):
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:8])
    (folder / "book.txt").write_text(text)
    data = ["--data", str(folder / "book.txt"), "--max_steps", "2", "--eval_steps", "2"]
    output = fork(folder, 1, "book", *data)
    assert "so the last 20 % of the text of each is held out instead" in output
    assert [row["eval_loss"] > 0 for row in history(folder, "book") if "eval_loss" in row] == [True]


def test_nothing_held_out_is_a_run_without_evaluation(folder):
    asked = ["--heldout_fraction", "0", "--eval_on_start", "true", "--max_steps", "2"]
    output = fork(folder, 2, "all", *asked)
    assert output.count("heldout_fraction=0: eval_strategy=steps is left out.") == 1
    rows = history(folder, "all")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2] and not any("eval_loss" in row for row in rows)
    assert (folder / "all" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy='best'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau'"),
    ],
)
def test_what_chooses_by_an_evaluation_needs_something_held_out(tmp_path, settings, name):
    settings = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, **settings}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=f"heldout_fraction=0 leaves nothing to evaluate on, which {re.escape(name)}"):
        importlib.import_module("training").disable_evaluation(arguments)


def test_the_result_is_a_plain_transformers_model(folder):
    done = run_command([sys.executable, "-c", RELOAD, str(folder / "two")])
    loss, length = done.stdout.split()
    assert 0 < float(loss) < 6
    assert int(length) == len("The quick brown fox") + 3


def test_perplexity_measures_models_and_earlier_results(folder):
    common = [
        "recipes/perplexity.py",
        "--data",
        str(folder / "corpus.jsonl"),
        "--lengths",
        "32",
        "64",
        "--max_windows",
        "4",
    ]
    first = [f"one={folder / 'one'}", "--output_dir", str(folder / "first")]
    launch_forked([*common, "--models", *first])
    both = [
        f"one={folder / 'first' / 'perplexity.json'}",
        f"two={folder / 'two'}",
        "--output_dir",
        str(folder / "both"),
    ]
    output = launch_forked([*common, "--models", *both, "--trained_lengths", "128", "128"])
    results = json.loads((folder / "both" / "perplexity.json").read_text())["results"]
    assert [row["length"] for row in results["one"]] == [32, 64]
    for mine, other in zip(results["one"], results["two"], strict=True):
        assert mine["num_tokens"] == other["num_tokens"] == 256 // mine["length"] * (mine["length"] - 1)
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert (folder / "both" / "perplexity.md").read_text().splitlines()[0] in output
    assert (folder / "both" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, "checkpoint-10"), ("none", None), ("some/checkpoint", "some/checkpoint")]
)
def test_the_checkpoint_to_go_on_from_is_the_last_or_the_one_asked_for(tmp_path, asked, expected):
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = '{"global_step": ' if step == 12 else '{"global_step": 10}'  # the last one was killed as it wrote
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    find = importlib.import_module("checkpoints").find_checkpoint
    checkpoint = find(SimpleNamespace(resume_from_checkpoint=asked, output_dir=str(tmp_path)))
    assert checkpoint == (str(tmp_path / expected) if expected and asked is None else expected)
    assert find(SimpleNamespace(resume_from_checkpoint=None, output_dir=str(tmp_path / "absent"))) is None


def run_here(monkeypatch, recipe, *argv):
    """In this process: a fresh one spends seconds on imports."""
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", *argv])
    importlib.import_module(recipe).main()


def test_mistakes_end_with_their_explanation(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown in the command line: 'modle' \(did you mean model"):
        run_here(monkeypatch, "finetune", str(ROOT / "configs" / "finetune.yaml"), "--modle", "x")
    with pytest.raises(ValueError, match="models is empty: nothing to measure"):
        run_here(monkeypatch, "perplexity")


def test_perplexity_needs_results_and_something_held_out(monkeypatch, tmp_path):
    path = tmp_path / "perplexity.json"
    with pytest.raises(ValueError, match=r"models: one=.*perplexity.json is no file here"):
        run_here(monkeypatch, "perplexity", "--models", f"one={path}")
    path.write_text(json.dumps({"results": {"two": []}}))
    with pytest.raises(ValueError, match=r"perplexity.json has no results of 'one', only of 'two'"):
        run_here(monkeypatch, "perplexity", "--models", f"one={path}")


def test_perplexity_of_nothing_is_refused(monkeypatch):
    words = ["--models", "one=any", "--heldout_fraction", "0"]
    with pytest.raises(ValueError, match=r"heldout_fraction=0.0 holds nothing out, so there is nothing to measure on"):
        run_here(monkeypatch, "perplexity", *words)


@pytest.mark.parametrize(("loader", "kind"), [(AutoConfig, "model"), (AutoTokenizer, "tokenizer")])
@pytest.mark.parametrize("name", ["runs/absent", "./absent", "/absent/model", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_message_of_the_hub(monkeypatch, loader, kind, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as refusal:
        load_pretrained(loader, kind, name)
    assert str(refusal.value).startswith(f"there is no folder {name!r} here (in ")
    assert f"If a hub id (`organisation/name`) was meant, its {kind} cannot be loaded: " in str(refusal.value)


@pytest.mark.parametrize(("loader", "kind"), [(AutoConfig, "model"), (AutoTokenizer, "tokenizer")])
def test_a_folder_without_model_or_tokenizer_says_what_it_holds(tmp_path, loader, kind):
    with pytest.raises(ValueError, match=rf"holds no {kind} \(.*\), but nothing. Name the folder that save_pre"):
        load_pretrained(loader, kind, str(tmp_path))
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match=rf"holds no {kind} \(.*\), but checkpoint-4/, notes.md. Name the folder"):
        load_pretrained(loader, kind, str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model_type"):
        load_pretrained(AutoConfig, "model", str(tmp_path))


def test_every_recipe_explains_itself(monkeypatch, capsys):
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if "__main__" in path.read_text())
    assert recipes == ["evaluate", "extend", "finetune", "perplexity", "quickstart", "sft"]
    for recipe in recipes:
        with pytest.raises(SystemExit) as stop:
            run_here(monkeypatch, recipe, "--help")
        assert stop.value.code == 0
        file, text = "stages.yaml" if recipe == "extend" else "[run.yaml]", capsys.readouterr().out
        assert f"{recipe}.py {file} [--key value ...]" in text
        # A command can be copied: it has lines of its own.
        commands = [line for line in text.splitlines() if f"recipes/{recipe}.py " in line]
        assert all(line.startswith(("    accelerate launch ", "    python ")) for line in commands), commands
