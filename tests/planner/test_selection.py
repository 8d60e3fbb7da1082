"""The cheapest options that fit: nothing in them can be left out, and they are what the changed job says."""

import pytest

from ring_hf.cli import main
from ring_hf.costmodel.devices import HOST_MEMORY
from ring_hf.planner import Job, read_model
from ring_hf.planner.launch_command import gaps_of
from ring_hf.planner.memory_estimate import memory_of
from ring_hf.planner.million_tokens import compared_runs, million_table
from ring_hf.planner.selection import (
    OPTIONS,
    TABLE_MODELS,
    combinations,
    fits,
    select_options,
    selection_cell,
    selection_table,
    selection_text,
    with_options,
)
from ring_hf.planner.step_times import times_of
from tests.harness import ROOT

CASES = [(name, length, devices) for name in TABLE_MODELS for length in (2**15, 2**20) for devices in (1, 8)]


@pytest.mark.parametrize(("name", "length", "devices"), CASES)
def test_what_is_chosen_fits_and_none_of_it_can_be_left_out(name, length, devices):
    selection = select_options(Job(read_model(name), length, devices=devices))
    job = selection.job
    memory = memory_of(job)
    assert memory.total <= job.device_facts.memory
    assert memory.host * min(job.devices, job.per_node) <= HOST_MEMORY
    chosen = [step.option for step in selection.steps[1:]]
    assert with_options(job, tuple(chosen)) == job
    for place, option in enumerate(chosen):
        rest = (*chosen[:place], *chosen[place + 1 :])
        if not any(other.needs == option.code for other in rest):
            less = with_options(job, rest)
            assert not fits(less, memory_of(less)), option.name


def test_no_cheaper_combination_fits():
    """By the most costly option first: without it, nothing fits."""
    job = Job(read_model("Llama-3.1-8B"), 2**20)
    costly = select_options(job).steps[-1].option
    places = {option.code: place for place, option in enumerate(OPTIONS)}
    cheaper = [chosen for chosen in combinations(job) if all(places[o.code] < places[costly.code] for o in chosen)]
    assert len(cheaper) > 10
    for chosen in cheaper:
        candidate = with_options(job, chosen)
        assert not fits(candidate, memory_of(candidate))


def test_combinations_are_jobs_and_each_comes_once():
    for devices in (1, 8):
        job = Job(read_model("Llama-3.1-8B"), 2**15, devices=devices)
        chosen = list(combinations(job))
        assert len({with_options(job, options) for options in chosen}) == len(chosen) > 80
        assert chosen[0] == () and any(option.code == "fsdp" for options in chosen for option in options) == (
            devices > 1
        )


def test_more_devices_are_taken_if_no_option_is_enough():
    job = Job(read_model("Llama-3.1-8B"), 2**20, devices=1)
    selection = select_options(job)
    assert selection.job.devices == selection.job.cp == 4 and selection.closest > 0
    assert selection_cell(selection) == "takes 4"
    text = " ".join(selection_text(selection).split())
    assert text.startswith("On 1 x H100 80 GB, every combination of options takes") and "4 are enough:" in text
    apart = select_options(Job(read_model("Qwen3-32B"), 2**15, devices=2, cp=1))
    assert (apart.job.devices, apart.job.cp) == (2, 1)


def test_the_command_prints_what_each_option_saves_and_costs_and_how_to_run_it(capsys):
    assert main(["plan", "--model", "Qwen3-32B", "--seq", "1M", "--fit"]) == 0
    text = capsys.readouterr().out
    selection = select_options(Job(read_model("Qwen3-32B"), 2**20))
    assert text.startswith(selection_text(selection))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:] if line.startswith("|")]
    assert [row[0] for row in rows[: len(selection.steps)]][1:] == [step.option.name for step in selection.steps[1:]]
    for row, step, before in zip(rows[1:], selection.steps[1:], selection.steps, strict=False):
        assert row[1] == f"{step.memory.total / 2**30:,.1f}"
        assert row[4] == f"{times_of(step.job).step - before.seconds:+,.1f}"
    assert "\nfits: " in text and "\nto run it, as plan.yaml:\n" in text and "optim: adamw_torch_fused" in text


def test_published_runs_are_faster_with_saved_attention_and_fit_their_devices():
    runs = list(compared_runs())
    assert len(runs) == 4
    for run, saved in runs:
        job = run.build()
        assert times_of(saved).step < 0.85 * times_of(job).step < 0.9 * run.published["seconds"]
        assert memory_of(saved).total < saved.device_facts.memory and gaps_of(saved) == []
        assert memory_of(saved).allocated / 1e9 < run.published.get("GB", 80)


@pytest.mark.parametrize(("table", "make"), [("fit", selection_table), ("million", million_table)])
def test_the_page_has_the_tables_that_the_planner_makes(table, make):
    text = (ROOT / "docs" / "memory_options.md").read_text()
    begin, end = f"<!-- planned: --table {table} -->\n", "\n<!-- end planned -->"
    assert text.count(begin) == 1
    assert text.split(begin)[1].split(end)[0] == make()
