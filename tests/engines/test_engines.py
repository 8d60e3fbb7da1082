"""Training on every engine with an unmodified Trainer follows one process that holds whole weights and sequences.

Each run says what really trained: on a CPU, Accelerate would take DDP for FSDP and give the right numbers.
"""

import pytest
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from tests.engines.cases import (
    ALL_CASES,
    AT_LOADING,
    CASES,
    LEVERS,
    family_of,
    reference_cases,
    without_context_parallelism,
)
from tests.engines.jobs import BATCHES, COUNTED, EVALUATED, EVALUATIONS, HALF, REFUSED_AT_LOADING, RESUMES
from tests.hf.architectures import model_class
from tests.trainer.cases import FP32_AT_THE_RATE_OF_BF16
from tests.trainer.compare import MAX_LOSS, apart, assert_same_run

EXACT = [case for case in CASES if not case.run.bf16 and case.run.broken is None]
BROKEN = [case for case in CASES if case.run.broken is not None]
IN_BF16 = [case for case in CASES if case.run.bf16 and not case.run.lora]
# By engine: Accelerate's name, the class around the model, the class of parameters, the part of its largest parameter
# that a rank holds outside of the forward pass (of 67 rows, the first rank has those that are left over).
EXPECTED = {
    "FSDP1": ("DistributedType.FSDP", "FullyShardedDataParallel", "Parameter", None),
    "FSDP2": ("DistributedType.FSDP", "FSDPLlamaForCausalLM", "DTensor", lambda run: -(-67 // (run.cp * run.dp)) * 32),
    AT_LOADING: (
        "DistributedType.MULTI_CPU",
        "FSDPLlamaForCausalLM",
        "DTensor",
        lambda run: -(-67 // (run.cp * run.dp)) * 32,
    ),
    "HSDP": ("DistributedType.FSDP", "FSDPLlamaForCausalLM", "DTensor", lambda run: -(-67 // run.cp) * 32),
    "ZeRO-1": ("DistributedType.DEEPSPEED", "DeepSpeedEngine", "Parameter", lambda run: 67 * 32),
    "ZeRO-2": ("DistributedType.DEEPSPEED", "DeepSpeedEngine", "Parameter", lambda run: 67 * 32),
    "ZeRO-3": ("DistributedType.DEEPSPEED", "DeepSpeedEngine", "Parameter", lambda run: 0),
}

pytestmark = pytest.mark.timeout(900)  # the first test of a launch waits for it


def run_of(launches, case):
    return launches.of(family_of(case.engine), case.run.cp * case.run.dp)[case.name]


def test_the_cases_cover_what_is_claimed():
    assert {case.engine for case in EXACT} == set(EXPECTED)
    assert len({case.name for case in ALL_CASES}) == len(ALL_CASES) >= 45 and len(CASES) in (31, len(ALL_CASES))
    for engine in ("FSDP2", "ZeRO-3"):
        here = [case.run for case in ALL_CASES if case.engine == engine and not case.run.bf16 and not case.run.broken]
        assert {(run.cp, run.dp) for run in here} == {(2, 1), (2, 2)}
        assert "hole" in {run.data for run in here}
        assert {case.levers for case in EXACT if case.engine == engine} == {"", *LEVERS}
        assert any(case.tied for case in EXACT if case.engine == engine) and any(run.lora for run in here)
    assert len(reference_cases()) - 1 == len({case.reference().name for case in CASES})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_engine_that_was_asked_for_really_ran(engine_launches, case):
    run = run_of(engine_launches, case)
    distributed_type, kind, parameter, numel = EXPECTED[case.engine]
    kind = kind.replace("Llama", "PeftModel") if case.run.lora else kind
    if case.run.model != "llama":
        kind = kind.replace("LlamaForCausalLM", model_class(CONFIG_MAPPING[case.run.model]).__name__)
        numel = None
    kinds = [parameter]
    if case.engine == AT_LOADING and case.run.lora:  # adapters that come later are whole on every rank
        kind, kinds = "PeftModelForCausalLM", ["DTensor", "Parameter"]
    if case.quantized and case.engine.startswith("ZeRO"):
        kinds = ["Parameter", "Params4bit"]
    assert (run["distributed_type"], run["class"], run["parameters"]) == (distributed_type, kind, kinds)
    assert run["on host"] == case.on_host
    assert run["engine"] == ("FSDP2" if case.engine == "HSDP" else case.engine)
    assert numel is None or run["largest local parameter"] == numel(case.run)
    assert run["zero stage"] == (int(case.engine[-1]) if case.engine.startswith("ZeRO") else None)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_training_follows_one_process(engine_launches, case):
    assert_same_run(case.name, run_of(engine_launches, case), engine_launches.of("FSDP", 1)[case.reference().name])


@pytest.mark.parametrize("case", IN_BF16, ids=lambda case: case.name)
def test_bf16_is_no_further_from_fp32_than_without_context_parallelism(engine_launches, case):
    truth = engine_launches.of("FSDP", 1)[f"DDP-{FP32_AT_THE_RATE_OF_BF16.name}"]
    ours, _ = apart(f"{case.name} and one process in fp32", run_of(engine_launches, case), truth)
    if case.engine.startswith("ZeRO"):
        plain = without_context_parallelism(case.engine, case.run.cp * case.run.dp)
        name, other = f"{plain.name} and one process in fp32", run_of(engine_launches, plain)
    else:
        name, other = "one process in bf16 and in fp32", engine_launches.of("FSDP", 1)[case.reference().name]
    theirs, _ = apart(name, other, truth)
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_a_deliberate_mistake_shows(engine_launches, case):
    reference = engine_launches.of("FSDP", 1)[case.reference().name]
    loss, grad_norm = apart(case.name, run_of(engine_launches, case), reference)
    assert loss > 1e-3 and grad_norm > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_trial_steps_tell_right_losses_from_wrong_ones_on_shards_of_weights(engine_launches, engine, dtype):
    trials = engine_launches.of(family_of(engine), 2)[f"trials on {engine}"]
    assert trials[f"sum over shards {dtype}"] == "trained"
    assert "does not match one process" in trials[f"mean of shards {dtype}"]
    assert "runs a backward pass of its own" in trials[f"backward of its own {dtype}"]


@pytest.mark.parametrize("name", REFUSED_AT_LOADING)
def test_a_model_that_was_sharded_otherwise_while_it_was_loaded_is_refused(engine_launches, name):
    message = engine_launches.of(family_of(AT_LOADING), 2)["refusals at loading"][name]
    assert REFUSED_AT_LOADING[name][2] in message


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_collectives_depend_on_no_block_and_no_label(engine_launches, engine):
    """Ranks with other numbers of blocks or labels would wait for each other."""
    counts = engine_launches.of(family_of(engine), 2)[f"collectives of {engine}"]
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
    ours = engine_launches.of(family_of(engine), world_size)[f"evaluation on {engine}"]
    assert ours.pop("ran")["engine"] == engine and ours.pop("seconds")
    one = engine_launches.of("FSDP", 1)["evaluation on DDP"]
    assert len(ours) == len(BATCHES) * (len(EVALUATED) + 1)
    worst = max(
        abs(value - one[key][name]) / max(1.0, abs(one[key][name]))
        for key, values in ours.items()
        for name, value in values.items()
    )
    print(f"evaluation on {engine}, {world_size} processes: worst difference {worst:.1e}")
    assert worst <= MAX_LOSS


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_a_loop_without_a_trainer_follows_one_process(engine_launches, engine):
    run = engine_launches.of(family_of(engine), 2)[f"loop on {engine}"]
    assert run["class"] == EXPECTED[engine][1]
    one = engine_launches.of("FSDP", 1)["loop on DDP"]["loss"]
    worst = max(abs(loss - want) for loss, want in zip(run["loss"], one, strict=True))
    print(f"loop on {engine}: {len(one)} steps, worst loss {worst:.1e}")
    assert worst <= MAX_LOSS


def runs_of(launches, case):
    """The whole run of a case, and what went on from its middle, perhaps with more processes."""
    sizes = [cp * dp for cp, dp in (case.before, case.after)]
    whole, resumed = (launches.of(family_of(case.engine), size)[case.name] for size in sizes)
    return whole["whole"], resumed["resumed"]


@pytest.mark.parametrize("case", RESUMES, ids=lambda case: case.name)
def test_resuming_equals_an_uninterrupted_run(engine_launches, case):
    whole, resumed = runs_of(engine_launches, case)
    assert whole["engine"] == resumed["engine"] == case.engine
    rest, again = ({key: run[key][-HALF:] for key in ("loss", "grad_norm")} for run in (whole, resumed))
    assert len(whole["loss"]) == 2 * HALF
    assert_same_run(case.name, again, rest)


@pytest.mark.parametrize("case", [case for case in RESUMES if not case.sharded], ids=lambda case: case.name)
def test_saved_models_load_in_plain_transformers(engine_launches, case):
    runs_of(engine_launches, case)
    models = []
    for kind, (cp, dp) in (("whole", case.before), ("resumed", case.after)):
        folder = engine_launches.path(family_of(case.engine), cp * dp) / case.name / f"final {kind}"
        assert (folder / "model.safetensors").exists()
        models.append(LlamaForCausalLM.from_pretrained(folder).state_dict())
    one = LlamaForCausalLM.from_pretrained(engine_launches.path("FSDP", 1) / "final").state_dict()
    for state in models:
        assert state.keys() == one.keys()
        worst = max(float((weight - one[name]).abs().max()) for name, weight in state.items())
        print(f"{case.name}: largest difference of a weight {worst:.1e}")
        assert worst <= 1e-4  # of weights that one step moves by 3e-4: Adam divides by gradients that are nearly zero
