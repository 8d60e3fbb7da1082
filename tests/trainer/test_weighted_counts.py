"""With weights of `weigh_examples`, an example counts as it would alone: over packing, micro-batches and ranks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ring_hf import count_loss_weights, log_modality_losses
from ring_hf.hf.runtime.runtime_state import runtime_state
from ring_hf.hf.trainer.modality_losses import ModalityLosses
from tests.hf.models import llama
from tests.support.harness import launch_forked
from tests.trainer.weighted_script import ROWS_PER_STEP, STEPS, with_vision_codes


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The logs of the script: with one process, and of the same names with two."""
    results = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"weighted{world_size}")
        launch_forked(["tests/trainer/weighted_script.py", str(folder)], world_size)
        results[world_size] = json.loads((folder / "results.json").read_text())
    return results


def curves(log):
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == STEPS
    return [*losses, *(row["eval_loss"] for row in log if "eval_loss" in row)], [
        row["grad_norm"] for row in log if "grad_norm" in row
    ]


@pytest.mark.parametrize(("world_size", "name"), [(1, "examples"), (2, "examples"), (2, "data parallel")])
def test_packed_examples_count_as_they_would_one_by_one(logs, world_size, name):
    """Two micro-batches a step; two ranks share a sequence, or train on sequences of their own."""
    losses, norms = curves(logs[world_size][name])
    expected_losses, expected_norms = curves(logs[1]["one by one"])
    worst = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
    print(f"{world_size} processes, {name}: worst loss {worst:.1e}")
    assert losses == pytest.approx(expected_losses, rel=1e-5) and norms == pytest.approx(expected_norms, rel=1e-4)


def test_without_weights_long_answers_count_more(logs):
    losses, norms = curves(logs[1]["tokens"])
    expected_losses, expected_norms = curves(logs[1]["one by one"])
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses, expected_losses, strict=True))
    assert all(abs(a / b - 1) > 1e-2 for a, b in zip(norms, expected_norms, strict=True))


def test_examples_that_attend_to_each_other_equal_one_process(logs):
    losses, norms = curves(logs[2]["attending across examples"])
    expected_losses, expected_norms = curves(logs[1]["attending across examples"])
    assert losses == pytest.approx(expected_losses, rel=1e-5) and norms == pytest.approx(expected_norms, rel=1e-4)
    masked, _ = curves(logs[1]["examples"])
    assert abs(masked[0] - losses[0]) > 1e-3


def test_the_loss_of_each_modality_is_that_of_one_process(logs):
    losses, norms = curves(logs[2]["vision codes"])
    expected_losses, expected_norms = curves(logs[1]["vision codes"])
    assert losses == pytest.approx(expected_losses, rel=1e-5) and norms == pytest.approx(expected_norms, rel=1e-4)
    modalities = []
    for world_size in (1, 2):
        merged = {key: value for row in logs[world_size]["vision codes"] for key, value in row.items()}
        modalities.append([merged["eval_text_loss"], merged["eval_vision_loss"], merged["eval_loss"]])
    print(f"loss of text, of vision, weighted: {modalities[0]} in one process, {modalities[1]} in two")
    assert modalities[1] == pytest.approx(modalities[0], rel=1e-5)
    text, vision, weighted = modalities[0]
    assert abs(text - vision) > 0.1 and min(text, vision) < weighted < max(text, vision)


def test_training_logs_the_loss_of_each_modality(logs):
    """Of one process, they make up the loss by the weights of their targets, counted here; two processes log both."""
    sequences = with_vision_codes()
    for step in range(STEPS):
        rows = sequences.select(range(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP))
        labels = np.concatenate([row["labels"][1:] for row in rows])
        weights = np.concatenate([row["loss_weights"][1:] for row in rows]) * (labels != -100)
        share = weights[labels >= 258].sum() / weights.sum()
        alone, shared = (logs[size]["vision codes"][step] for size in (1, 2))
        mixed = share * alone["vision_loss"] + (1 - share) * alone["text_loss"]
        assert (
            alone["loss"] == pytest.approx(mixed, rel=1e-6) and abs(alone["vision_loss"] - alone["text_loss"]) > 0.01
        )
        for name in ("text_loss", "vision_loss"):
            print(f"step {step + 1}, {name}: {alone[name]!r} in one process, {shared[name]!r} in two")
            assert shared[name] == pytest.approx(alone[name], rel=1e-5)


def test_sums_are_by_modality_and_leave_out_a_trial_step(monkeypatch):
    losses = ModalityLosses(SimpleNamespace(accelerator=SimpleNamespace(device="cpu")), 258)
    batch = torch.tensor([1.0, 2.0, 4.0, 0.0]), torch.tensor([7, 300, 258, -100]), torch.tensor([1.0, 0.5, 0.5, 9.0])
    losses.observe(*batch)
    assert losses.sums.tolist() == [[1.0, 1.0], [3.0, 1.0]]
    losses.observe(*batch[:2], None)
    assert losses.sums.tolist() == [[2.0, 2.0], [9.0, 3.0]]
    monkeypatch.setattr(runtime_state, "captured_losses", [])
    losses.observe(*batch)
    assert losses.sums.tolist() == [[2.0, 2.0], [9.0, 3.0]]


def test_one_loss_for_all_tokens_has_no_modalities():
    with pytest.raises(ValueError, match="LlamaForCausalLM computes one loss for all tokens, so text and vision"):
        log_modality_losses(SimpleNamespace(model=llama()), 258)


def test_weights_that_a_trainer_would_lose_are_refused():
    arguments = SimpleNamespace(remove_unused_columns=True)
    with pytest.raises(ValueError, match="remove_unused_columns=True: the Trainer would drop the column loss_weights"):
        count_loss_weights(SimpleNamespace(args=arguments))
    arguments.remove_unused_columns = False
    with pytest.raises(ValueError, match="SimpleNamespace takes no num_items_in_batch, so its loss is a mean over"):
        count_loss_weights(SimpleNamespace(args=arguments, model_accepts_loss_kwargs=False, model=SimpleNamespace()))
    trainer = SimpleNamespace(args=arguments, model_accepts_loss_kwargs=True, _get_num_items_in_batch=len)
    count_loss_weights(trainer)
    with pytest.raises(ValueError, match="Some batches of an optimizer step have loss_weights and others do not"):
        trainer._get_num_items_in_batch([{"loss_weights": 1}, {}], "cpu")
