"""TRL's SFTTrainer, without a change of the script, in two processes that share every sequence and in one.

Every number of every log must be equal: losses, grad norms, entropy, token accuracy, numbers of tokens, evaluations.
"""

import json

import pytest
from datasets import Dataset
from transformers import DataCollatorWithFlattening, TrainingArguments
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as OwnCollator

import ring_hf
from ring_hf import ContextParallelCollator
from ring_hf.hf.checks.argument_rules import first_error
from ring_hf.hf.checks.trainer_rules import TRAINER_RULES
from ring_hf.hf.trainer.sft_trainer import check_sft_columns, shard_own_collator
from ring_hf.text import markdown_table
from tests.data.test_conversations import tokenizer
from tests.hf.models import llama
from tests.support.harness import launch_forked
from tests.trainer.sft_script import CASES, CONTROL, STEPS

EXACT = {"loss": 1e-5, "grad_norm": 1e-4, "entropy": 1e-5, "mean_token_accuracy": 0.0, "num_tokens": 0.0}
METRICS = {name: limit for key, limit in EXACT.items() for name in (key, f"eval_{key}") if name != "eval_grad_norm"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The logs of all cases by number of processes."""
    folder = tmp_path_factory.mktemp("sft")
    results = {}
    for world_size in (1, 2):
        output = folder / str(world_size)
        output.mkdir()
        launch_forked(["tests/trainer/sft_script.py", str(output)], world_size, timeout=560)
        results[world_size] = json.loads((output / "results.json").read_text())
    names = [case.name for case in CASES] + [CONTROL.name]
    table = [["", *METRICS]]
    for name in names:
        worst = worst_differences(results[2][name], results[1].get(name, results[1]["bfd"]))
        table.append([name, *(f"{worst[metric]:.1e}" for metric in METRICS)])
    print(f"\n{markdown_table(table)}")
    return results


def worst_differences(logs, reference):
    """Return the worst relative difference of each metric."""
    worst = dict.fromkeys(METRICS, float("nan"))
    for log, other in zip(logs, reference, strict=True):
        assert log.keys() - {"tokens_per_second_per_device", "peak_memory_gb"} == other.keys()
        for name in METRICS.keys() & other.keys():
            difference = abs(log[name] - other[name]) / max(abs(other[name]), 1e-12)
            worst[name] = max(difference, worst[name]) if worst[name] == worst[name] else difference
    return worst


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_number_of_an_sft_trainer_is_that_of_one_process(logs, case):
    run, reference = logs[2][case.name], logs[1][case.name]
    assert sum("loss" in log for log in reference) == STEPS and sum("eval_loss" in log for log in reference) == 2
    worst = worst_differences(run, reference)
    assert {name: value for name, value in worst.items() if not value <= METRICS[name]} == {}


def test_documents_that_attend_to_each_other_are_noticed(logs):
    worst = worst_differences(logs[2][CONTROL.name], logs[1]["bfd"])
    assert worst["loss"] > 1e-3 and worst["eval_loss"] > 1e-3 and worst["mean_token_accuracy"] > 1e-3
    assert max(log.get("eval_mean_token_accuracy", 0) for log in logs[1]["bfd"]) > 0.1


def trainer_with(**attributes):
    trainer = object.__new__(SFTTrainer)
    vars(trainer).update(attributes)
    return trainer


def test_only_a_collator_of_trl_itself_is_sharded_unasked():
    class OfTheUser(OwnCollator):
        pass

    model = llama()
    for collator in (OfTheUser(0), DataCollatorWithFlattening(), ContextParallelCollator(model)):
        trainer = trainer_with(data_collator=collator)
        shard_own_collator(trainer, model)
        assert trainer.data_collator is collator
    trainer, collator = trainer_with(data_collator=OwnCollator(0), _skip_prepare_dataset=True), OwnCollator(0)
    trainer._is_vision_dataset = False
    for _ in range(2):  # the second time, nothing is left to do
        shard_own_collator(trainer, model)
        assert trainer.data_collator.inner == collator
    with pytest.raises(ValueError, match="mask columns but no 'labels'"):  # TRL's own check of the same collator
        masked = Dataset.from_list([{"input_ids": [1, 2], "completion_mask": [0, 1]}])
        trainer._reject_skip_prepare_without_labels({"eval": masked}, trainer.data_collator)


def test_weights_that_the_loss_of_trl_ignores_are_refused():
    rows = Dataset.from_list([{"input_ids": [1, 2], "loss_weights": [0.0, 1.0]}])
    plain = rows.remove_columns("loss_weights")
    assert check_sft_columns(trainer_with(train_dataset=plain, eval_dataset={"a": plain})) is None
    message = check_sft_columns(trainer_with(train_dataset=plain, eval_dataset={"a": plain, "b": rows}))
    assert message.startswith("b has a column loss_weights, which the loss of SFTTrainer ignores. Train with Trans")
    assert "train_dataset has a column" in check_sft_columns(trainer_with(train_dataset=rows, eval_dataset=None))


def test_arguments_that_are_no_config_of_trl_are_refused(tmp_path):
    """SFTTrainer turns them into an SFTConfig through a dict, in which the configuration would be lost."""
    config = ring_hf.ContextParallelConfig(context_parallel_size=1)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], parallelism_config=config)
    rows = Dataset.from_list([{"input_ids": [1, 2]}])
    with pytest.raises(
        ValueError, match=r"became a dict, .*Pass the arguments .* \(an SFTConfig to SFTTrainer\) with"
    ):
        SFTTrainer(llama(), arguments, train_dataset=rows, processing_class=tokenizer())


def test_images_are_refused_when_the_trainer_is_made():
    message = first_error(TRAINER_RULES, trainer_with(_is_vision_dataset=True))
    assert message.startswith("The dataset of SFTTrainer has images, and only token ids can be sharded.")
