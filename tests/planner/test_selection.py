"""The cheapest memory options that fit: none of them can be left out, and tables show the changed jobs."""

import pytest

from ring_hf.cli import main
from ring_hf.costmodel.devices import HOST_MEMORY
from ring_hf.planner import TrainingJob, read_model
from ring_hf.planner.launch_command import list_unsupported_settings
from ring_hf.planner.memory_estimate import estimate_memory
from ring_hf.planner.million_tokens import iter_compared_runs
from ring_hf.planner.option_selection import (
    OPTIONS,
    TABLE_MODELS,
    fits_memory,
    format_selection,
    format_selection_cell,
    iter_combinations,
    select_options,
    with_options,
)
from ring_hf.planner.plan_command import TABLES
from ring_hf.planner.step_times import estimate_times
from tests.support.harness import ROOT

CASES = [(name, length, devices) for name in TABLE_MODELS for length in (2**15, 2**20) for devices in (1, 8)]


@pytest.mark.parametrize(("name", "length", "devices"), CASES)
def test_selected_options_fit_and_none_can_be_left_out(name, length, devices):
    selection = select_options(TrainingJob(read_model(name), length, devices=devices))
    job = selection.job
    memory = estimate_memory(job)
    assert memory.total <= job.device_spec.memory
    assert memory.host * min(job.devices, job.per_node) <= HOST_MEMORY
    options = [step.option for step in selection.steps[1:]]
    assert with_options(job, tuple(options)) == job
    for index, option in enumerate(options):
        others = (*options[:index], *options[index + 1 :])
        if not any(other.requires == option.code for other in others):
            candidate = with_options(job, others)
            assert not fits_memory(candidate, estimate_memory(candidate)), option.name


def test_no_cheaper_combination_fits():
    """Without the most costly selected option, nothing fits."""
    job = TrainingJob(read_model("Llama-3.1-8B"), 2**20)
    most_costly = select_options(job).steps[-1].option
    ranks = {option.code: rank for rank, option in enumerate(OPTIONS)}
    cheaper = [
        options
        for options in iter_combinations(job)
        if all(ranks[option.code] < ranks[most_costly.code] for option in options)
    ]
    assert len(cheaper) > 10
    for options in cheaper:
        candidate = with_options(job, options)
        assert not fits_memory(candidate, estimate_memory(candidate))


@pytest.mark.parametrize("devices", [1, 8])
def test_combinations_are_jobs_and_each_comes_once(devices):
    job = TrainingJob(read_model("Llama-3.1-8B"), 2**15, devices=devices)
    combinations = list(iter_combinations(job))
    assert len({with_options(job, options) for options in combinations}) == len(combinations) > 80
    codes = {option.code for options in combinations for option in options}
    assert combinations[0] == () and ("fsdp" in codes) == (devices > 1)


def test_more_devices_are_selected_if_no_combination_fits():
    job = TrainingJob(read_model("Llama-3.1-8B"), 2**20, devices=1)
    selection = select_options(job)
    assert selection.job.devices == selection.job.cp == 4 and selection.min_excess > 0
    assert format_selection_cell(selection) == "needs 4"
    text = " ".join(format_selection(selection).split())
    assert text.startswith("On 1 x H100 80 GB, every combination of options needs") and "4 are enough:" in text
    data_parallel = select_options(TrainingJob(read_model("Qwen3-32B"), 2**15, devices=2, cp=1))
    assert (data_parallel.job.devices, data_parallel.job.cp) == (2, 1)


def test_the_command_prints_savings_and_costs_and_the_launch(capsys):
    assert main(["plan", "--model", "Qwen3-32B", "--seq", "1M", "--fit"]) == 0
    text = capsys.readouterr().out
    selection = select_options(TrainingJob(read_model("Qwen3-32B"), 2**20))
    assert text.startswith(format_selection(selection))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:] if line.startswith("|")]
    assert [row[0] for row in rows[: len(selection.steps)]][1:] == [step.option.name for step in selection.steps[1:]]
    for row, step, previous in zip(rows[1:], selection.steps[1:], selection.steps, strict=False):
        assert row[1] == f"{step.memory.total / 2**30:,.1f}"
        assert row[4] == f"{estimate_times(step.job).step - previous.seconds:+,.1f}"
    assert (
        "\nfits: " in text
        and "\nto run this plan, save as plan.yaml:\n" in text
        and "optim: adamw_torch_fused" in text
    )


def test_published_runs_are_faster_with_saved_attention_and_fit():
    runs = list(iter_compared_runs())
    assert len(runs) == 4
    for run, saved in runs:
        job = run.build_job()
        assert estimate_times(saved).step < 0.85 * estimate_times(job).step < 0.9 * run.published["seconds"]
        assert estimate_memory(saved).total < saved.device_spec.memory and list_unsupported_settings(saved) == []
        assert estimate_memory(saved).allocated / 1e9 < run.published.get("GB", 80)


@pytest.mark.parametrize("table", ["fit", "million", "optimizers"])
def test_the_page_of_memory_options_has_the_planned_tables(table):
    text = (ROOT / "docs" / "memory_options.md").read_text()
    begin, end = f"<!-- planned: --table {table} -->\n", "\n<!-- end planned -->"
    assert text.count(begin) == 1
    assert text.split(begin)[1].split(end)[0] == TABLES[table]()
