"""Training on every engine with an unmodified Trainer follows one process that holds whole weights and sequences.

Each run reports the engine that trained: on a CPU, Accelerate would run DDP instead of FSDP, with the right numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from ring_hf.verify.model_families import model_class
from tests.engines.cases import (
    ALL_CASES,
    AT_LOADING,
    CASES,
    MEMORY_OPTIONS,
    family_of,
    reference_cases,
    without_context_parallelism,
)
from tests.engines.jobs import BATCHES, COUNTED, EVALUATED, EVALUATIONS, HALF, REFUSED_AT_LOADING, RESUMES
from tests.trainer.cases import FP32_AT_THE_RATE_OF_BF16, Case
from tests.trainer.compare import MAX_LOSS, assert_same_run, compare_runs

EXACT = [case for case in CASES if not case.run.bf16 and case.run.broken is None]
BROKEN = [case for case in CASES if case.run.broken is not None]
IN_BF16 = [case for case in CASES if case.run.bf16 and not case.run.lora]


class EngineState(NamedTuple):
    """The expected `state_of` of an engine.

    Attributes:
        distributed_type: Accelerate's name of the engine.
        model_class: the class around the model.
        parameter_class: the class of its parameters.
        local_numel: returns how many elements of the largest parameter (67 x 32) the first rank holds outside of the
            forward pass; None where that is not known.
    """

    distributed_type: str
    model_class: str
    parameter_class: str
    local_numel: Callable[[Case], int] | None


def _rows_per_shard(num_shards):
    return -(-67 // num_shards)


EXPECTED = {
    "FSDP1": EngineState("DistributedType.FSDP", "FullyShardedDataParallel", "Parameter", None),
    "FSDP2": EngineState(
        "DistributedType.FSDP",
        "FSDPLlamaForCausalLM",
        "DTensor",
        lambda run: _rows_per_shard(run.cp * run.dp) * 32,
    ),
    AT_LOADING: EngineState(
        "DistributedType.MULTI_CPU",
        "FSDPLlamaForCausalLM",
        "DTensor",
        lambda run: _rows_per_shard(run.cp * run.dp) * 32,
    ),
    "HSDP": EngineState(
        "DistributedType.FSDP", "FSDPLlamaForCausalLM", "DTensor", lambda run: _rows_per_shard(run.cp) * 32
    ),
    "ZeRO-1": EngineState("DistributedType.DEEPSPEED", "DeepSpeedEngine", "Parameter", lambda run: 67 * 32),
    "ZeRO-2": EngineState("DistributedType.DEEPSPEED", "DeepSpeedEngine", "Parameter", lambda run: 67 * 32),
    "ZeRO-3": EngineState("DistributedType.DEEPSPEED", "DeepSpeedEngine", "Parameter", lambda run: 0),
}

pytestmark = pytest.mark.timeout(900)  # the first test of a launch waits for it


def run_of(launches, case):
    return launches.results(family_of(case.engine), case.run.cp * case.run.dp)[case.name]


def test_the_cases_cover_what_is_claimed():
    assert {case.engine for case in EXACT} == set(EXPECTED)
    assert len({case.name for case in ALL_CASES}) == len(ALL_CASES) >= 45 and len(CASES) in (31, len(ALL_CASES))
    for engine in ("FSDP2", "ZeRO-3"):
        runs = [case.run for case in ALL_CASES if case.engine == engine and not case.run.bf16 and not case.run.broken]
        assert {(run.cp, run.dp) for run in runs} == {(2, 1), (2, 2)}
        assert "hole" in {run.data for run in runs}
        assert {case.memory_options for case in EXACT if case.engine == engine} == {"", *MEMORY_OPTIONS}
        assert any(case.tied for case in EXACT if case.engine == engine) and any(run.lora for run in runs)
    assert len(reference_cases()) - 1 == len({case.reference().name for case in CASES})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_requested_engine_ran(engine_launches, case):
    run = run_of(engine_launches, case)
    expected = EXPECTED[case.engine]
    class_name, parameter_classes, local_numel = expected.model_class, [expected.parameter_class], expected.local_numel
    if case.run.lora:
        class_name = class_name.replace("Llama", "PeftModel")
    if case.run.model != "llama":
        class_name = class_name.replace("LlamaForCausalLM", model_class(CONFIG_MAPPING[case.run.model]).__name__)
        local_numel = None
    if case.engine == AT_LOADING and case.run.lora:  # adapters that are added later are whole on every rank
        class_name, parameter_classes = "PeftModelForCausalLM", ["DTensor", "Parameter"]
    if case.quantized and case.engine.startswith("ZeRO"):
        parameter_classes = ["Parameter", "Params4bit"]
    assert run["distributed_type"] == expected.distributed_type
    assert (run["class"], run["parameters"]) == (class_name, parameter_classes)
    assert run["on host"] == case.on_host
    assert run["engine"] == ("FSDP2" if case.engine == "HSDP" else case.engine)
    assert local_numel is None or run["largest local parameter"] == local_numel(case.run)
    assert run["zero stage"] == (int(case.engine[-1]) if case.engine.startswith("ZeRO") else None)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_training_follows_one_process(engine_launches, case):
    assert_same_run(
        case.name, run_of(engine_launches, case), engine_launches.results("FSDP", 1)[case.reference().name]
    )


@pytest.mark.parametrize("case", IN_BF16, ids=lambda case: case.name)
def test_bf16_is_no_further_from_fp32_than_without_context_parallelism(engine_launches, case):
    truth = engine_launches.results("FSDP", 1)[f"DDP-{FP32_AT_THE_RATE_OF_BF16.name}"]
    ours, _ = compare_runs(f"{case.name} and one process in fp32", run_of(engine_launches, case), truth)
    if case.engine.startswith("ZeRO"):
        plain = without_context_parallelism(case.engine, case.run.cp * case.run.dp)
        name, other = f"{plain.name} and one process in fp32", run_of(engine_launches, plain)
    else:
        name, other = "one process in bf16 and in fp32", engine_launches.results("FSDP", 1)[case.reference().name]
    theirs, _ = compare_runs(name, other, truth)
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_a_deliberate_mistake_shows(engine_launches, case):
    reference = engine_launches.results("FSDP", 1)[case.reference().name]
    loss, grad_norm = compare_runs(case.name, run_of(engine_launches, case), reference)
    assert loss > 1e-3 and grad_norm > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_trial_steps_tell_right_losses_from_wrong_ones_on_sharded_weights(engine_launches, engine, dtype):
    trials = engine_launches.results(family_of(engine), 2)[f"trials on {engine}"]
    assert trials[f"sum over shards {dtype}"] == "trained"
    assert "does not match one process" in trials[f"mean of shards {dtype}"]
    assert "runs a backward pass of its own" in trials[f"backward of its own {dtype}"]


@pytest.mark.parametrize("name", REFUSED_AT_LOADING)
def test_a_model_that_was_sharded_otherwise_at_loading_is_refused(engine_launches, name):
    message = engine_launches.results(family_of(AT_LOADING), 2)["refusals at loading"][name]
    assert REFUSED_AT_LOADING[name][2] in message


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_collectives_depend_on_no_block_and_no_label(engine_launches, engine):
    """Otherwise, ranks with different numbers of blocks or labels would wait for each other."""
    counts = engine_launches.results(family_of(engine), 2)[f"collectives of {engine}"]
    in_blocks = [counts[name] for name in COUNTED if "blocks" in name]
    assert len(in_blocks) == 4 and all(other == in_blocks[0] for other in in_blocks)
    assert counts["plain"]["_reduce_scatter_base_"] == in_blocks[0]["_reduce_scatter_base_"] > 0
    gathered = {name: counts[name]["_allgather_base_"] for name in ("plain", "saved", "uneven, blocks of 5")}
    print(engine, gathered)
    # FSDP2 gathers a decoder layer for its backward pass anyway; ZeRO-3 gathers again what is recomputed.
    assert gathered["uneven, blocks of 5"] <= gathered["saved"] and gathered["plain"] <= gathered["saved"]
    assert engine != "FSDP2" or len(set(gathered.values())) == 1


@pytest.mark.parametrize(("engine", "world_size"), sorted(EVALUATIONS))
def test_evaluation_equals_one_process(engine_launches, engine, world_size):
    ours = engine_launches.results(family_of(engine), world_size)[f"evaluation on {engine}"]
    assert ours.pop("ran")["engine"] == engine and ours.pop("seconds")
    reference = engine_launches.results("FSDP", 1)["evaluation on DDP"]
    assert len(ours) == len(BATCHES) * (len(EVALUATED) + 1)
    worst = max(
        abs(value - reference[key][name]) / max(1.0, abs(reference[key][name]))
        for key, values in ours.items()
        for name, value in values.items()
    )
    print(f"evaluation on {engine}, {world_size} processes: worst difference {worst:.1e}")
    assert worst <= MAX_LOSS


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_a_loop_without_a_trainer_follows_one_process(engine_launches, engine):
    run = engine_launches.results(family_of(engine), 2)[f"loop on {engine}"]
    assert run["class"] == EXPECTED[engine].model_class
    expected = engine_launches.results("FSDP", 1)["loop on DDP"]["loss"]
    worst = max(abs(loss - want) for loss, want in zip(run["loss"], expected, strict=True))
    print(f"loop on {engine}: {len(expected)} steps, worst loss {worst:.1e}")
    assert worst <= MAX_LOSS


def runs_of(launches, case):
    """Return the whole run of a case, and the run resumed from its middle, possibly with more processes."""
    sizes = [cp * dp for cp, dp in (case.before, case.after)]
    whole, resumed = (launches.results(family_of(case.engine), size)[case.name] for size in sizes)
    return whole["whole"], resumed["resumed"]


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_resuming_equals_an_uninterrupted_run(engine_launches, case):
    whole, resumed = runs_of(engine_launches, case)
    assert whole["engine"] == resumed["engine"] == case.engine
    second_half, resumed_half = ({key: run[key][-HALF:] for key in ("loss", "grad_norm")} for run in (whole, resumed))
    assert len(whole["loss"]) == 2 * HALF
    assert_same_run(case.name, resumed_half, second_half)


@pytest.mark.parametrize("case", [case for case in RESUMES if not case.sharded], ids=lambda case: case.name)
def test_saved_models_load_in_plain_transformers(engine_launches, case):
    runs_of(engine_launches, case)
    models = []
    for kind, (cp, dp) in (("whole", case.before), ("resumed", case.after)):
        folder = engine_launches.path(family_of(case.engine), cp * dp) / case.name / f"final {kind}"
        assert (folder / "model.safetensors").exists()
        models.append(LlamaForCausalLM.from_pretrained(folder).state_dict())
    reference = LlamaForCausalLM.from_pretrained(engine_launches.path("FSDP", 1) / "final").state_dict()
    for state in models:
        assert state.keys() == reference.keys()
        worst = max(float((weight - reference[name]).abs().max()) for name, weight in state.items())
        print(f"{case.name}: largest difference of a weight {worst:.1e}")
        assert worst <= 1e-4  # of weights that one step moves by 3e-4: Adam divides by gradients that are nearly zero
