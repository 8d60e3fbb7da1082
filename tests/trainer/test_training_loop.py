"""The loops of `docs/training_loop.md`, run as they stand there: cp 2 and dp 2 x cp 2 equal one process."""

import json
import re
import textwrap

import pytest

from tests.harness import ROOT, accelerate_launch
from tests.hf.models import llama, rows

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training_loop.md").read_text(), flags=re.DOTALL)
NUM_STEPS = 20
LENGTHS = (31, 18, 24, 9)  # uneven numbers of targets, in rows and in batches
# The documented script runs between these lines. One process takes the batches of two replicas one after the other and
# their mean, or together where targets are counted.
BEFORE = """
import json, sys
import torch
settings = json.load(open(sys.argv[1]))
name, size, examples, losses = settings["model"], settings["size"], settings["examples"], []
print_loss = losses.append
"""
AFTER = """
if accelerator.is_main_process:
    open(settings["result"], "w").write(json.dumps(losses))
"""
COUNTED_HEAD, COUNTED = BLOCKS[0].split("for batch in loader:")[0], BLOCKS[1]
ACCUMULATED = textwrap.dedent("""
    for number, batch in enumerate(loader):
        loss = model(**batch).loss / 2
        accelerator.backward(loss)
        losses.append(loss.item())
        if number % 2:
            losses[-2:] = [losses[-2] + losses[-1]]
            optimizer.step()
            optimizer.zero_grad()
""")


def run(tmp_path_factory, script, num_processes, size, batch_size=2):
    folder = tmp_path_factory.mktemp("loop")
    llama("sdpa").save_pretrained(folder / "model")
    path = folder / "loop.py"
    path.write_text(BEFORE + script.replace("batch_size=2", f"batch_size={batch_size}") + AFTER)
    settings = {"model": str(folder / "model"), "size": size, "result": str(folder / "losses.json")}
    settings["examples"] = rows(*LENGTHS * NUM_STEPS)[: 4 * NUM_STEPS]
    (folder / "settings.json").write_text(json.dumps(settings))
    accelerate_launch([str(path), str(folder / "settings.json")], num_processes)
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return {
        "plain": run(tmp_path_factory, BLOCKS[0], 1, 1),
        "accumulated": run(tmp_path_factory, COUNTED_HEAD + ACCUMULATED, 1, 1),
        "counted": run(tmp_path_factory, COUNTED_HEAD + COUNTED, 1, 1, batch_size=4),
    }


def test_there_are_two_loops_and_the_first_is_a_whole_script():
    assert len(BLOCKS) == 2 and BLOCKS[0].startswith("import torch") and BLOCKS[0].count("ring_hf.") == 2


CASES = {
    "cp 2": (BLOCKS[0], 2, 2, "plain"),
    "dp 2 x cp 2": (BLOCKS[0], 4, 2, "accumulated"),
    "dp 2 x cp 2, counted": (COUNTED_HEAD + COUNTED, 4, 2, "counted"),
}


@pytest.mark.parametrize("name", CASES)
def test_documented_loop_equals_one_process(tmp_path_factory, one_process, name):
    script, num_processes, size, reference = CASES[name]
    losses, want = run(tmp_path_factory, script, num_processes, size), one_process[reference]
    assert len(losses) == len(want) >= NUM_STEPS and abs(want[0] - want[-1]) > 0.01, "gradients matter"
    worst = max(abs(loss - wanted) / wanted for loss, wanted in zip(losses, want, strict=True))
    print(f"{name}: {len(losses)} steps, worst relative difference of the loss {worst:.1e}")
    assert worst <= 1e-5
