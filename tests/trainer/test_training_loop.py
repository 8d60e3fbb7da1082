"""Run the loops of `docs/training_loop.md` unchanged: cp 2 and dp 2 x cp 2 equal one process."""

import json
import re
import textwrap

import pytest

from tests.hf.models import llama, rows
from tests.support.harness import ROOT, accelerate_launch, launch_forked

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training_loop.md").read_text(), flags=re.DOTALL)
NUM_STEPS = 20
LENGTHS = (31, 18, 24, 9)  # uneven numbers of targets, in rows and in batches
# Runs documented scripts one after the other, and resets the state of Accelerate before each.
DRIVER = """
import json, sys
import torch
from accelerate.state import AcceleratorState, GradientState
settings = json.load(open(sys.argv[1]))
results = []
for script in settings["scripts"]:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    losses = []
    names = {"torch": torch, "name": settings["model"], "losses": losses}
    names |= {"size": settings["size"], "examples": settings["examples"]}
    exec(script, names | {"print_loss": losses.append})
    results.append(losses)
if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    open(settings["result"], "w").write(json.dumps(results))
"""
# One process accumulates the batches of two replicas and averages their losses. Where targets are counted, it takes
# both as one batch.
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


def run(tmp_path_factory, scripts, num_processes, size):
    """Return the losses of scripts by name, all run in one launch."""
    folder = tmp_path_factory.mktemp("loop")
    llama("sdpa").save_pretrained(folder / "model")
    (folder / "driver.py").write_text(DRIVER)
    settings = {"model": str(folder / "model"), "size": size, "result": str(folder / "losses.json")}
    settings["examples"] = rows(*LENGTHS * NUM_STEPS)[: 4 * NUM_STEPS]
    settings["scripts"] = list(scripts.values())
    (folder / "settings.json").write_text(json.dumps(settings))
    start = accelerate_launch if num_processes == 2 else launch_forked
    start([str(folder / "driver.py"), str(folder / "settings.json")], num_processes)
    return dict(zip(scripts, json.loads((folder / "losses.json").read_text()), strict=True))


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The losses by world size and script."""
    one_batch = (COUNTED_HEAD + COUNTED).replace("batch_size=2", "batch_size=4")
    references = {"plain": BLOCKS[0], "accumulated": COUNTED_HEAD + ACCUMULATED, "counted": one_batch}
    return {
        1: run(tmp_path_factory, references, 1, 1),
        2: run(tmp_path_factory, {"plain": BLOCKS[0]}, 2, 2),
        4: run(tmp_path_factory, {"plain": BLOCKS[0], "counted": COUNTED_HEAD + COUNTED}, 4, 2),
    }


def test_there_are_two_loops_and_the_first_is_a_whole_script():
    assert len(BLOCKS) == 2 and BLOCKS[0].startswith("import torch") and BLOCKS[0].count("ring_hf.") == 2


CASES = {
    "cp 2": (2, "plain", "plain"),
    "dp 2 x cp 2": (4, "plain", "accumulated"),
    "dp 2 x cp 2, counted": (4, "counted", "counted"),
}


@pytest.mark.parametrize("name", CASES)
def test_documented_loop_equals_one_process(losses, name):
    world_size, script, reference = CASES[name]
    got, want = losses[world_size][script], losses[1][reference]
    assert len(got) == len(want) >= NUM_STEPS and abs(want[0] - want[-1]) > 0.01, "gradients matter"
    worst = max(abs(loss - expected) / expected for loss, expected in zip(got, want, strict=True))
    print(f"{name}: {len(got)} steps, worst relative difference of the loss {worst:.1e}")
    assert worst <= 1e-5
