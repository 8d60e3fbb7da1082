"""Four changed lines of a script like Transformers' run_clm.py, as docs/sft.md shows them, give the same numbers."""

import json

import pytest

from ring_hf.data import build_byte_tokenizer
from tests.hf.models import llama
from tests.repository.documents import BLOCKS
from tests.support.harness import ROOT, launch_forked

SCRIPT = ROOT / "tests" / "trainer" / "clm_client.py"
SETTINGS = {
    "block_size": 64,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": "true",
    "use_cpu": "true",
}


def apply_diff(diff, text):
    """Return the text with the changed lines of a diff; each other line of it leads on to the next such line."""
    lines, result, num_changes = text.splitlines(), [], 0
    for line in diff.splitlines():
        sign, content = line[:1], line[1:]
        if sign == "+":
            result.append(content)
            num_changes += 1
            continue
        if line.strip() in ("", "..."):
            continue
        assert content in lines, f"{content!r} does not stand in the script, or before an earlier line of the diff"
        index = lines.index(content)
        result += lines[:index] + ([content] if sign != "-" else [])
        lines = lines[index + 1 :]
    return "\n".join(result + lines), num_changes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The metrics of the script as it is in one process, and with the changed lines in two."""
    folder = tmp_path_factory.mktemp("clm")
    llama("sdpa", vocab_size=258, max_position_embeddings=64).save_pretrained(folder / "model")
    build_byte_tokenizer().save(str(folder / "tokenizer.json"))
    (diff,) = (
        b.content for b in BLOCKS if b.page == "docs/sft.md" and b.language == "diff" and "_collator" in b.content
    )
    changed, num_changes = apply_diff(diff, SCRIPT.read_text())
    assert num_changes == 4
    (folder / "changed.py").write_text(changed)
    results = []
    for script, size in ((SCRIPT, 1), (folder / "changed.py", 2)):
        output = folder / str(size)
        arguments = {"model_name_or_path": folder / "model", "tokenizer_file": folder / "tokenizer.json", **SETTINGS}
        options = [str(word) for key, value in arguments.items() for word in (f"--{key}", value)]
        launch_forked([str(script), *options, "--output_dir", str(output)], size)
        names = ("before_results.json", "all_results.json", "trainer_state.json")
        results.append({name: json.loads((output / name).read_text()) for name in names})
    return results


def test_a_script_like_run_clm_evaluates_to_the_same_numbers(runs):
    for name, prefix in (("before_results.json", "before"), ("all_results.json", "eval")):
        alone, shared = (run[name] for run in runs)
        assert alone[f"{prefix}_accuracy"] == shared[f"{prefix}_accuracy"] > 0
        print(f"{prefix}: loss {alone[f'{prefix}_loss']!r} in one process, {shared[f'{prefix}_loss']!r} in two")
        assert shared[f"{prefix}_loss"] == pytest.approx(alone[f"{prefix}_loss"], rel=1e-6)
    assert runs[0]["all_results.json"]["perplexity"] == pytest.approx(
        runs[1]["all_results.json"]["perplexity"], rel=1e-5
    )


def test_a_script_like_run_clm_trains_on_the_same_losses(runs):
    logs = [[log for log in run["trainer_state.json"]["log_history"] if "grad_norm" in log] for run in runs]
    assert len(logs[0]) == len(logs[1]) == 6
    for alone, shared in zip(*logs, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_a_diff_that_does_not_fit_the_script_is_noticed():
    with pytest.raises(AssertionError, match="'no such line' does not stand in the script"):
        apply_diff(" no such line\n+new\n", SCRIPT.read_text())
