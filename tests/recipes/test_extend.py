"""Stages by one command: each starts where the last one ended, on two processes as on one, and after a kill."""

import json
import math
import os
import pydoc_data.topics
import shutil
import sys
from pathlib import Path

import extend
import pytest
import torch
import yaml
from extend import OutputReader, parse_command_line
from processes import Interrupted
from stage_files import find_differences
from stages import read_stages
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.harness import ROOT, launch_forked, run_command

STAGES = """
launch: accelerate launch --config_file configs/accelerate/cpu_2proc.yaml
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, max_position_embeddings: 32}
tokenizer: bytes
context_parallel_size: 2
heldout_fraction: 0.2
max_heldout_sequences: 2
packing: stream
per_device_train_batch_size: 2
tokens_per_batch: 512
learning_rate: 2.0e-3
lr_scheduler_type: linear
logging_steps: 1
save_steps: 2
perplexity_lengths: [32, 128]
perplexity_windows: 2
peak_tflops: 0.1
stages:
- {name: short, max_length: 64, rope: {rope_theta: 50000}, budget: {steps: 4}}
- {max_length: 128, rope: {rope_type: yarn}, budget: {tokens: 3K}, optimizer_state: keep, lr_scheduler_type: constant}
- name: back
  max_length: 128
  budget: {steps: 6}
  eval_strategy: steps
  eval_steps: 2
  until_short_perplexity_within: 9.0
"""


def start_forked(command, log, environment, report):
    """In place of `processes.run_child`: forked processes spend no time on imports."""
    num_processes = 2 if "accelerate.commands.launch" in command else 1
    log.write_text(launch_forked(command[-2:], num_processes))
    report()
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus, the stages, and all results in `run`."""
    folder = tmp_path_factory.mktemp("extend")
    topics = pydoc_data.topics.topics
    rows = [json.dumps({"text": topics[name][:600]}) for name in sorted(topics)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    (folder / "stages.yaml").write_text(STAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(extend, "run_child", start_forked)
        run(folder, patch, "run")
    return folder


def run(folder, patch, name, *words):
    output = ["--data", str(folder / "corpus.jsonl"), "--output_dir", str(folder / name)]
    patch.setattr(sys, "argv", ["extend.py", str(folder / "stages.yaml"), *output, *words])
    extend.main()


@pytest.fixture
def rerun(folder, monkeypatch):
    """Runs the command again, in another folder of results, with words of the command line."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(extend, "run_child", start_forked)
    return lambda name, *words: run(folder, monkeypatch, name, *words)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses_of(path):
    return [(row["step"], row["loss"]) for row in rows_of(path) if "loss" in row]


def test_the_record_says_what_is_finished_and_why(folder):
    finished = json.loads((folder / "run" / "stages.json").read_text())["finished"]
    assert [(row["name"], row["steps"], row["tokens"]) for row in finished] == [
        ("short", 4, 2048),
        ("128", 6, 3072),
        ("back", 2, 1024),
    ]
    assert [row["ended_by"] for row in finished[:2]] == ["budget", "budget"]
    assert finished[2]["ended_by"].startswith("perplexity ")


def test_one_log_has_the_rows_of_all_stages(folder):
    rows = [row for row in rows_of(folder / "run" / "log.jsonl") if "loss" in row]
    assert [row["stage"] for row in rows] == ["short"] * 4 + ["128"] * 6 + ["back"] * 2
    assert [row["tokens"] for row in rows] == [512 * step for step in range(1, 13)]
    for row in rows:
        keys = {"stage", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory_gb"}
        assert set(row) == keys
        assert min(row["tokens_per_second"], row["peak_memory_gb"], row["grad_norm"]) > 0
        # mfu = rate * FLOPs of a token / (2 devices * 1e11): 3 * 2 FLOPs for each weight of a matrix, and attention.
        weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 258
        pairs = (row["stage"] == "short" and 65 / 2) or 129 / 2
        flops = 6 * weights + 3 * 2 * pairs * 4 * 32
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 2e11, abs=2e-4)


def test_the_report_shows_perplexity_before_and_after_each_stage(folder):
    report = (folder / "run" / "stages.md").read_text()
    assert (folder / "run" / "stages.png").read_bytes().startswith(b"\x89PNG")
    table = [line for line in report.splitlines() if line.startswith(("| before", "| after"))]
    assert [line.split("|")[1].strip() for line in table] == ["before", "after short", "after 128", "after back"]
    measured = json.loads((folder / "run" / "stage-02-128" / "perplexity.json").read_text())
    for row in measured:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert f" {row['perplexity']:.3f} " in table[2]
    before, after = (float(line.split("|")[2]) for line in (table[0], table[3]))
    assert 200 < before < 300 and after < before  # untrained at first: each of 258 tokens is as likely


def test_yarn_starts_from_the_length_of_the_base(folder):
    """Not from the 64 tokens of the first stage, whose configuration the second one loads."""
    for name in ("stage-02-128", "stage-03-back"):
        config = AutoConfig.from_pretrained(folder / "run" / name)
        assert config.max_position_embeddings == 128
        assert config.rope_parameters == {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    assert AutoConfig.from_pretrained(folder / "run" / "stage-01-short").rope_parameters["rope_theta"] == 50000.0


def test_the_optimizer_state_is_kept_or_fresh(folder):
    """The number of updates that AdamW has seen, and the learning rate of the next one."""
    expected = {"stage-01-short/checkpoint-4": 4, "stage-02-128/checkpoint-6": 10, "stage-03-back/checkpoint-2": 2}
    for path, num_updates in expected.items():
        state = torch.load(folder / "run" / path / "optimizer.pt", weights_only=True)
        assert {int(values["step"]) for values in state["state"].values()} == {num_updates}
    rates = [row["lr"] for row in rows_of(folder / "run" / "stage-02-128" / "log.jsonl") if "lr" in row]
    assert rates == [2e-3] * 6  # the first stage ended at 0


def test_a_stage_with_a_kept_state_is_that_of_one_process(folder):
    values = yaml.safe_load((folder / "run" / "stage-02-128" / "run.yaml").read_text())
    assert values["optimizer_from"].endswith("stage-01-short/checkpoint-4")
    output = folder / "one"
    values |= {"context_parallel_size": 1, "output_dir": str(output), "save_strategy": "no", "disable_tqdm": True}
    (folder / "one.yaml").write_text(yaml.safe_dump(values))
    launch_forked(["recipes/finetune.py", str(folder / "one.yaml")])
    ours, theirs = (losses_of(path / "log.jsonl") for path in (folder / "run" / "stage-02-128", output))
    assert [step for step, _ in ours] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], abs=1e-5)
    measured = [
        json.loads((path / "perplexity.json").read_text()) for path in (folder / "run" / "stage-02-128", output)
    ]
    assert [row["loss"] for row in measured[0]] == pytest.approx([row["loss"] for row in measured[1]], abs=1e-5)
    fresh = {**values, "optimizer_from": None, "max_steps": 2, "perplexity_lengths": []}
    fresh["output_dir"] = str(folder / "fresh")
    (folder / "fresh.yaml").write_text(yaml.safe_dump(fresh))
    launch_forked(["recipes/finetune.py", str(folder / "fresh.yaml")])
    assert abs(losses_of(folder / "fresh" / "log.jsonl")[1][1] - ours[1][1]) > 1e-4  # the state matters


def killed(folder, name, step):
    """Copy the results as a kill in the second stage leaves them: a checkpoint, and a later one that is cut off."""
    shutil.copytree(folder / "run", folder / name)
    shutil.rmtree(folder / name / "stage-03-back")
    stage = folder / name / "stage-02-128"
    for path in stage.iterdir():
        if path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
        elif path.name in ("model.safetensors", "trainer_state.json", "perplexity.json"):
            path.unlink()
    torn = stage / f"checkpoint-{step + 2}"
    shutil.copytree(stage / f"checkpoint-{step}", torn)
    (torn / "optimizer.pt").write_bytes((torn / "optimizer.pt").read_bytes()[:1000])
    moved = yaml.safe_load((stage / "run.yaml").read_text())
    text = json.dumps(moved).replace(str(folder / "run"), str(folder / name))
    (stage / "run.yaml").write_text(yaml.safe_dump(json.loads(text)))
    first = folder / name / "stage-01-short" / "run.yaml"
    first.write_text(first.read_text().replace(str(folder / "run"), str(folder / name)))


@pytest.mark.parametrize("step", [4, 6])
def test_the_same_command_goes_on_after_a_kill(folder, rerun, step):
    """In the middle of a stage, and after its last step but before its model was written."""
    name = f"killed-{step}"
    killed(folder, name, step)
    rerun(name)
    for stage in ("stage-02-128", "stage-03-back"):
        ours, theirs = (losses_of(folder / path / stage / "log.jsonl") for path in (name, "run"))
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], abs=1e-6)
    stages = json.loads((folder / name / "stages.json").read_text())["finished"]
    assert [row["steps"] for row in stages] == [4, 6, 2]


def test_a_finished_run_starts_nothing(folder, rerun, monkeypatch, capsys):
    monkeypatch.setattr(extend, "run_child", None)
    before = (folder / "run" / "stages.json").read_bytes()
    rerun("run")
    assert (folder / "run" / "stages.json").read_bytes() == before
    assert "| 3 back " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--learning_rate", "1.0e-3"],
            r"stage 1 \(short\) was finished with other values .*\n  learning_rate: 0.002 on disk, 0.001 in",
        ),
        (["--tokens_per_batch", "1K"], "tokens_per_batch: '512' on disk, '1024' in the YAML"),
        (
            ["--stages", "[{name: short, max_length: 64, budget: {steps: 4}}]"],
            "has stage-02-128, stage-03-back, wh",
        ),
    ],
)
def test_a_yaml_that_contradicts_the_disk_is_refused(rerun, words, message):
    with pytest.raises(ValueError, match=message):
        rerun("run", *words)


def test_what_changes_no_number_may_change(folder, rerun, monkeypatch):
    monkeypatch.setattr(extend, "run_child", None)
    rerun("run", "--save_total_limit", "1", "--run_name", "again")
    assert find_differences({"seed": 1, "run_name": "a"}, {"seed": 1, "run_name": "b"}) == []
    assert find_differences({"seed": 1}, {"seed": 2, "bf16": True}) == [("bf16", None, True), ("seed", 1, 2)]


def test_a_launch_that_fails_ends_with_its_last_lines(rerun, monkeypatch, tmp_path):
    def fail(command, log, environment, report):
        log.write_text("ring_hf: context parallelism: two ranks\nno memory\n")
        return 3

    monkeypatch.setattr(extend, "run_child", fail)
    with pytest.raises(
        SystemExit, match=r"no memory\n\nstage 0 \(base\) ended with exit status 3.*same command"
    ) as end:
        rerun("failed")
    assert isinstance(end.value.code, str)


def test_a_signal_ends_with_its_number(rerun, monkeypatch, capsys):
    def interrupt(*_):
        raise Interrupted(15)

    monkeypatch.setattr(extend, "run_child", interrupt)
    with pytest.raises(SystemExit) as end:
        rerun("interrupted")
    assert end.value.code == 143
    assert "SIGTERM ended stage 0 (base)" in capsys.readouterr().err


def test_only_the_first_machine_writes(folder, monkeypatch, tmp_path):
    values = yaml.safe_load(STAGES)
    values["launch"] += " --num_machines 2 --num_processes 4 --machine_rank ${A_RANK:-1} --main_process_ip localhost"
    values |= {
        "data": str(folder / "corpus.jsonl"),
        "output_dir": str(tmp_path / "shared"),
        "context_parallel_size": 4,
    }
    del values["perplexity_lengths"], values["stages"][2]
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(ROOT)
    commands = []

    def note(command, log, environment, report):
        commands.append((command, Path(command[-1]).read_text()))
        shutil.copytree(
            folder / "run" / f"stage-0{len(commands)}-{['short', '128'][len(commands) - 1]}", here(command)
        )
        return 0

    def here(command):
        return yaml.safe_load(Path(command[-1]).read_text())["output_dir"]

    monkeypatch.setattr(extend, "run_child", note)
    monkeypatch.setattr(sys, "argv", ["extend.py", str(path)])
    extend.main()
    assert [yaml.safe_load(text)["max_length"] for _, text in commands] == [64, 128]
    assert "--machine_rank" in commands[0][0] and "1" in commands[0][0]
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["stage-01-short", "stage-02-128"]
    monkeypatch.setenv("A_RANK", "0")
    shutil.rmtree(tmp_path / "shared")
    commands.clear()
    with pytest.raises(FileExistsError):  # the first machine has made the folder of the stage, with its run.yaml
        extend.main()
    assert (tmp_path / "shared" / "stage-01-short" / "run.yaml").is_file()


def test_the_result_is_a_plain_model_with_a_card(folder):
    path = folder / "run" / "stage-03-back"
    config = json.loads((path / "config.json").read_text())
    assert not [key for key, value in config.items() if "attn" in key or "ring" in str(value)]
    assert config["use_cache"] is True
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.config._attn_implementation == "sdpa"
    ids = tokenizer("The quick brown fox", return_tensors="pt")
    assert len(model.generate(**ids, max_new_tokens=3, do_sample=False)[0]) == len("The quick brown fox") + 3
    card = (path / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers" and "ring_hf" in head["tags"]
    for heading in ("Data", "RoPE", "Recipe", "Curves", "Held-out perplexity", "Stages", "Exactness"):
        assert f"\n## {heading}\n" in card
    assert "Stage 3 of 3." in card and "| 2 128 " in card and "shared by 2 processes" in card
    assert (path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_the_library_are_shown_once(tmp_path):
    shown = []
    path = tmp_path / "output.log"
    reader = OutputReader(path, shown.append)
    reader.read()
    path.write_text("ring_hf: a\nother\nring_hf: cut")
    reader.read()
    with path.open("a") as file:
        file.write(" off\n")
    reader.read()
    reader.read()
    assert shown == ["  ring_hf: a", "  ring_hf: cut off"]


def test_the_command_line_replaces_top_level_values(tmp_path):
    path = tmp_path / "stages.yaml"
    path.write_text("stages: []")
    words = [str(path), "--model", "a/b", "--bf16=true", "--rope", "{rope_theta: 5}", "--plan", "h200"]
    assert parse_command_line(words) == (str(path), {"model": "a/b", "bf16": True, "rope": {"rope_theta": 5}}, "h200")
    assert parse_command_line([str(path), "--plan"])[2] == "" and parse_command_line([str(path)])[2] is None
    for wrong, message in (
        (["a.yaml"], "is not a file"),
        ([str(path), "x"], "'x' is not"),
        ([str(path), "--a"], "no v"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_command_line(list(wrong))
    with pytest.raises(ValueError, match="has no list of stages"):
        read_stages(str(path), {})


ENGINES = {"FSDP2": "fsdp2_8gpu.yaml", "ZeRO-3": "zero3_8gpu.yaml"}


@pytest.mark.skipif(not os.environ.get("RING_HF_ALL_CASES"), reason="two launches of an engine; RING_HF_ALL_CASES=1")
@pytest.mark.parametrize("engine", ENGINES)
def test_sharded_engines_keep_an_optimizer_state(folder, engine, tmp_path):
    """Two stages with FSDP2 or ZeRO-3 on two processes, the second with the state of the first, as in one process."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
    launcher += [f"configs/accelerate/{ENGINES[engine]}", str(ROOT / "tests/recipes/as_on_gpus.py")]
    values = yaml.safe_load((folder / "run" / "stage-02-128" / "run.yaml").read_text())
    values |= {"perplexity_lengths": [], "max_steps": 4}
    for size, name in ((1, "one"), (2, engine)):
        first = {**values, "context_parallel_size": size, "optimizer_from": None, "output_dir": str(tmp_path / name)}
        second = {**first, "model": first["output_dir"], "output_dir": str(tmp_path / f"{name}-kept")}
        second["optimizer_from"] = f"{first['output_dir']}/checkpoint-4"
        for run_values in (first, second):
            (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values))
            command = ["recipes/finetune.py", str(tmp_path / "run.yaml")]
            if size == 1:
                launch_forked(command)
            else:
                run_command([*launcher, *command], {"ENGINE_FILE": str(tmp_path / "engine.json")})
    assert json.loads((tmp_path / "engine.json").read_text())["engine"] == engine
    for suffix in ("", "-kept"):
        ours, theirs = (losses_of(tmp_path / f"{name}{suffix}" / "log.jsonl") for name in (engine, "one"))
        assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], abs=1e-5)
