"""A recipe that is refused ends with the message: once, last in the launcher's report, and with exit code 1."""

import json
import re
import subprocess
import sys
import textwrap

import pytest
import refusals
from arguments import ModelArguments

from ring_hf.memory import MemoryConfig
from tests.support.harness import ROOT, accelerate_launch

RUN = """
model_config: {model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}
tokenizer: bytes
max_length: 64
max_steps: 1
context_parallel_size: 2
"""


def command(folder):
    """A run whose data is an empty file, and the beginning of its refusal."""
    path = folder / "empty.txt"
    path.touch()
    (folder / "run.yaml").write_text(RUN)
    words = ["recipes/finetune.py", str(folder / "run.yaml"), "--data", str(path), "--output_dir", str(folder)]
    return words, f"finetune.py: There is no text in {path}. Empty (0 bytes): {path}."


def test_one_process_ends_with_the_message_alone(tmp_path):
    words, message = command(tmp_path)
    words += ["--context_parallel_size", "1"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and done.stderr.rstrip().splitlines()[-1].startswith(message)


@pytest.mark.parametrize("ranks", ["the first rank", "both ranks"])
def test_the_launchers_report_closes_with_the_message_which_one_rank_prints(tmp_path, ranks):
    words, message = command(tmp_path)
    if ranks == "both ranks":
        words, message = [*words, "--max_lenght", "9"], "finetune.py: unknown in the command line: 'max_lenght'"
    with pytest.raises(AssertionError) as failure:
        accelerate_launch(words, 2)
    before, report = str(failure.value).split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")
    assert before.count(message) == 1 and before.count("Traceback") == 1  # of the launcher
    *_, cause, border = report.rstrip().splitlines()
    assert message in cause and set(border) == {"="}
    assert report.count(message) == 1 and re.search(r"exitcode  : 1 ", report) and "Traceback" not in report


def script(folder, body):
    """A script that a recipe could be: its folder counts as ours."""
    path = folder / "script.py"
    lines = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "recipes")!r})
        import refusals
        refusals.OWN_FOLDERS = (*refusals.OWN_FOLDERS, Path(__file__).resolve().parent)
        refusals.PATIENCE = 0.1

        def main():
            {body}

        refusals.run(main)
    """
    path.write_text(textwrap.dedent(lines))
    return path


def ended(path, tmp_path, **environment):
    report = tmp_path / "error.json"
    report.unlink(missing_ok=True)
    environment = {"PYTHONPATH": str(ROOT), "TORCHELASTIC_ERROR_FILE": str(report), **environment}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False)
    return done, json.loads(report.read_text())["message"] if report.exists() else None


@pytest.mark.parametrize(("rank", "prefix"), [("0", ""), ("3", "rank 3: ")])
def test_every_rank_ends_and_reports(tmp_path, rank, prefix):
    path = script(tmp_path, 'raise ValueError("max_length=1: too short.")')
    done, report = ended(path, tmp_path, RANK=rank)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip() == report == f"{prefix}script.py: max_length=1: too short."


@pytest.mark.parametrize("body", ["a, b = (1, 2, 3)", 'raise RuntimeError("no refusal")'])
def test_whatever_else_fails_keeps_its_traceback_also_in_the_report(tmp_path, body):
    done, report = ended(script(tmp_path, body), tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and body in done.stderr
    assert "Traceback" in report["extraInfo"]["py_callstack"]


def test_refusals_are_raised_by_the_package_or_a_recipe():
    for refuse in (lambda: MemoryConfig("some"), lambda: ModelArguments(model=None)):
        with pytest.raises(ValueError) as refusal:
            refuse()
        assert refusals.is_refusal(refusal.value)
    for fail in (lambda: int("x"), lambda: json.loads("{")):
        with pytest.raises(Exception) as failure:
            fail()
        assert not refusals.is_refusal(failure.value)
