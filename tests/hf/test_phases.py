"""The phases of a step, read from the stack of a real one."""

import ast
import importlib.util
import sys
import traceback
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ring_hf.hf.runtime.phases import PHASES, describe_position
from tests.hf.models import llama, rows


def position():
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return describe_position(frames[::-1])


class Positions(TrainerCallback):
    def __init__(self):
        self.of = {}

    def note(self, name):
        self.of.setdefault(name, position())

    def on_step_end(self, args, state, control, **kwargs):
        self.note("callback")


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    noted = Positions()
    model = llama("sdpa")

    def hook(module, args, output):
        noted.note("forward")
        output.register_hook(lambda gradient: noted.note("backward"))

    model.model.layers[0].mlp.register_forward_hook(hook)

    def collate(features):
        noted.note("collator")
        return {name: torch.tensor([row[name] for row in features]) for name in ("input_ids", "labels")}

    args = TrainingArguments(
        str(tmp_path_factory.mktemp("phases")),
        max_steps=1,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=rows(8, 8), data_collator=collate, callbacks=[noted])
    save = trainer._save_rng_state
    trainer._save_rng_state = lambda folder: (noted.note("saving"), save(folder))
    trainer.train()
    return noted.of


@pytest.mark.parametrize(
    ("name", "phases"),
    {
        "collator": "loading of the next batch, dataset and collator",
        "forward": "training step, forward pass",
        "backward": "training step, backward pass",
        "saving": "saving",
        "callback": "callbacks",
    }.items(),
)
def test_phases_are_those_of_the_stack(positions, name, phases):
    assert positions[name].startswith(f"{phases} (test_phases.py:"), positions[name]


def test_an_error_has_the_phase_of_its_traceback():
    def fail(module, args, output):
        raise RuntimeError

    model = llama("sdpa")
    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError) as raised:
        model(torch.ones(1, 4, dtype=torch.long))
    frames = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__)]
    assert describe_position(frames).startswith("forward pass (test_phases.py:")


def test_code_elsewhere_is_called_so():
    assert describe_position([]) == "code outside of a training step"


def packages_folder(package):
    spec = importlib.util.find_spec(package)
    return None if spec is None else Path(spec.origin).parents[1]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: f"{phase.file}:{','.join(phase.functions)}")
def test_installed_packages_have_the_functions_of_a_phase(phase):
    folder = packages_folder(phase.file.split("/")[0])
    if folder is None:
        pytest.skip("not installed")
    tree = ast.parse((folder / phase.file).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert names >= set(phase.functions)
