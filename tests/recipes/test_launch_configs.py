"""`accelerate launch` of the recipe with every file of `configs/accelerate`, on CPU processes: the losses of one."""

import json
import os
import pydoc_data.topics
import sys

import pytest
from safetensors.torch import load_file

from tests.recipes.test_configs import LAUNCHES
from tests.support.harness import ROOT, launch_forked, run_command

SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
RUN = {"max_length": 128, "heldout_fraction": 0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
RUN |= {"max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1}
TWO = ["--num_processes", "2"]
# Of each file: what stands for its machines, the arguments of the recipe, and the engine that has to run.
CASES = {
    "cpu_2proc.yaml": ([], ["--context_parallel_size", "2"], "DDP"),
    "cpu_4proc.yaml": ([], ["--context_parallel_size", "4"], "DDP"),
    "ddp_2gpu.yaml": ([], ["--context_parallel_size", "2"], "DDP"),
    "ddp_8gpu.yaml": (TWO, ["--context_parallel_size", "2"], "DDP"),
    "fsdp2_8gpu.yaml": (TWO, ["--context_parallel_size", "2"], "FSDP2"),
    "hsdp_4x8gpu.yaml": (
        ["--num_processes", "4", "--num_machines", "1", "--machine_rank", "0"],
        ["--context_parallel_size", "2", "--dp_replicate_size", "2", "--per_device_train_batch_size", "1"],
        "FSDP2",
    ),
    "zero3_8gpu.yaml": (TWO, ["--context_parallel_size", "2"], "ZeRO-3"),
}
SAMPLE = ("fsdp2_8gpu.yaml", "zero3_8gpu.yaml")  # others differ from what test_finetune.py starts by little


def test_every_file_has_a_case():
    assert set(CASES) == set(LAUNCHES)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the recipe and returns the losses, the grad norms, and the file of the final model."""
    folder = tmp_path_factory.mktemp("launches")
    topics = pydoc_data.topics.topics
    (folder / "corpus.jsonl").write_text(
        "\n".join(json.dumps({"text": topics[name][:600]}) for name in sorted(topics))
    )
    (folder / "run.yaml").write_text(json.dumps(RUN))

    def start(launcher, name, *more, env=None):
        words = ["recipes/finetune.py", str(folder / "run.yaml"), "--data", str(folder / "corpus.jsonl")]
        words += ["--output_dir", str(folder / name), *more]
        if launcher:
            run_command([*launcher, *words], env)
        else:
            launch_forked(words)
        log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        steps = [row for row in log if "loss" in row]
        return [row["loss"] for row in steps], [row["grad_norm"] for row in steps], folder / name / "model.safetensors"

    start([], "init", "--model_config", json.dumps(SHAPE), "--tokenizer", "bytes", "--max_steps", "1")
    return start, folder


@pytest.fixture(scope="module")
def single_process(start):
    begin, folder = start
    return begin([], "one", "--model", str(folder / "init"))


@pytest.mark.parametrize("name", CASES if os.environ.get("RING_HF_ALL_CASES") else SAMPLE)
def test_the_recipe_gives_the_losses_of_one_process(start, single_process, name):
    begin, folder = start
    machines, arguments, engine = CASES[name]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCHES[name]), *machines]
    launcher += [str(ROOT / "tests/recipes/as_on_gpus.py")]
    env = {"ENGINE_FILE": str(folder / f"{name}.json")}
    losses, norms, model = begin(launcher, name, "--model", str(folder / "init"), *arguments, env=env)
    assert json.loads((folder / f"{name}.json").read_text())["engine"] == engine
    assert losses == pytest.approx(single_process[0], abs=1e-5) and len(losses) == 3
    assert norms == pytest.approx(single_process[1], rel=1e-4)
    ours, theirs = load_file(model), load_file(single_process[2])
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 1e-4
