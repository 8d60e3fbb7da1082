"""`ring-hf doctor`: its report on a CPU, its advice for described machines, its options and errors."""

import json
import tomllib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from ring_hf.cli import main
from ring_hf.doctor import MachineReport, Query, advise, machine, render
from ring_hf.doctor.advice import RULES
from ring_hf.doctor.machine_report import (
    AlgorithmEstimate,
    AttentionGroup,
    AttentionTiming,
    Devices,
    EngineStatus,
    InstalledPackage,
    LinkTimings,
    OverlapEstimate,
)
from ring_hf.doctor.overlap_estimate import kernel_rates, measured_hardware, predict_overlap
from ring_hf.kernels import KERNELS
from tests.support.harness import ROOT

# A node of 8 H100 with NVLink, flash-attn installed, Llama 3 8B at 128K tokens: nothing to change.
GROUP = AttentionGroup(
    count=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    v_head_dim=128,
    window=None,
    chunk=None,
    softcap=None,
    sinks=False,
    kernel="flash_attn_2",
    rejections={"flash_attn_2": None, "reference": None},
)
WINDOWED = replace(GROUP, count=16, window=4096)
PACKAGES = tuple(
    machine.check_version(requirement, requirement.tested_version or {"flash-attn": "2.8.3"}.get(requirement.name))
    for requirement in machine.REQUIREMENTS
)
NODE = MachineReport(
    query=Query(model="Llama-3.1-8B", seq_length=2**17, num_ranks=8, layout="zigzag", dtype="bfloat16"),
    packages=PACKAGES,
    devices=Devices("cuda", ("NVIDIA H100",) * 8, 80 * 10**9, num_cores=64, capability=(9, 0), has_peer_access=True),
    model_type="llama",
    refusal=None,
    probed=True,
    attention_groups=(GROUP,),
    links=LinkTimings(8, "nccl", ((1, 2e-5), (2**28, 2**28 / 3.6e11))),
    timings=(
        AttentionTiming(4096, 1.37e11, 3e-4, 8e-4),
        AttentionTiming(16384, 2.2e12, 2.2e12 / 6e14, 2.5 * 2.2e12 / 5.6e14),
    ),
)
NODE = replace(NODE, overlap=predict_overlap(NODE))


def without_flash_attn(report=NODE, **group_changes):
    rejections = {"flash_attn_2": "not installed", "cuda_flash": None}
    group = replace(GROUP, kernel="cuda_flash", rejections=rejections, **group_changes)
    packages = [replace(package, version=None) if package.name == "flash-attn" else package for package in PACKAGES]
    return replace(report, attention_groups=(group,), packages=tuple(packages))


def with_version(name, version, report=NODE):
    requirement = next(requirement for requirement in machine.REQUIREMENTS if requirement.name == name)
    package = machine.check_version(requirement, version)
    return replace(report, packages=tuple(package if other.name == name else other for other in PACKAGES))


def with_overlap(report):
    return replace(report, overlap=predict_overlap(report))


@dataclass(frozen=True)
class AdviceCase:
    """A report, and the advice that one rule must give about it: parts of its action and reason."""

    report: MachineReport
    action: str
    reason: str
    blocks_training: bool = False


SLOW_LINKS = LinkTimings(8, "nccl", ((1, 2e-5), (2**28, 2**28 / 2e9)))
ENGINES = (EngineStatus("DDP", 150 * 10**9, None), EngineStatus("FSDP2", 19 * 10**9, None))
CASES = {
    "weights-do-not-fit": AdviceCase(
        replace(NODE, engines=ENGINES),
        "start with configs/accelerate/fsdp2_8gpu.yaml",
        "DDP holds 150 GB of weights, gradients and AdamW on a rank, of 80 GB; FSDP2 holds 19 GB",
    ),
    "weights-fit-nowhere": AdviceCase(
        replace(NODE, engines=(ENGINES[0], replace(ENGINES[1], state_bytes=10**11))),
        "use more ranks or adapters, or see ring-hf plan --fit",
        "DDP holds 150 GB",
    ),
    "weights-without-fsdp": AdviceCase(
        replace(NODE, engines=(*ENGINES[:1], EngineStatus("DeepSpeed ZeRO-3", 19 * 10**9, None))),
        "start with configs/accelerate/zero3_8gpu.yaml",
        "DeepSpeed ZeRO-3 holds 19 GB",
    ),
    "torch-too-old": AdviceCase(
        with_version("torch", "2.8.0"), "pip install 'torch>=2.9'", "torch 2.8.0", blocks_training=True
    ),
    "transformers-too-new": AdviceCase(
        with_version("transformers", "6.0.0"),
        "pip install 'transformers>=5.15,<6'",
        "transformers 6.0.0; ring_hf needs",
        blocks_training=True,
    ),
    "accelerate-missing": AdviceCase(
        with_version("accelerate", None),
        "pip install 'accelerate>=1.12'",
        "accelerate is missing",
        blocks_training=True,
    ),
    "untested": AdviceCase(
        with_version("torch", "2.15.0"),
        "if anything fails, pip install torch==2.14.1",
        "torch 2.15.0 is newer than the version that was tested",
    ),
    "model": AdviceCase(
        replace(NODE, refusal="Mamba carries a state."),
        "use another model",
        "Mamba carries a state.",
        blocks_training=True,
    ),
    "no-kernel": AdviceCase(
        replace(NODE, attention_groups=(replace(GROUP, kernel=None, rejections={"cpu": "dtype int8"}),)),
        "use another dtype or device",
        "(cpu: dtype int8)",
        blocks_training=True,
    ),
    "links": AdviceCase(
        replace(NODE, links=LinkTimings(8, "nccl", error="no answer in 120 s")),
        "fix the error that stopped the measurement",
        "no answer in 120 s",
        blocks_training=True,
    ),
    "processes-do-not-divide": AdviceCase(
        replace(NODE, environment={"WORLD_SIZE": "12"}),
        "start 8 or 16 processes, or set context_parallel_size to a divisor of 12",
        "context_parallel_size=8 does not divide 12 processes",
        blocks_training=True,
    ),
    "gpu-unused": AdviceCase(
        with_version(
            "torch", "2.13.0+cpu", replace(NODE, devices=Devices("cpu", ("x86_64",), 10**10, 8, has_unused_gpu=True))
        ),
        "install a CUDA build of PyTorch",
        "an NVIDIA driver is installed, but torch 2.13.0+cpu",
    ),
    "flash-attn-missing": AdviceCase(
        without_flash_attn(),
        "pip install flash-attn",
        "cuda_flash is used; flash-attn runs packed documents in one call",
    ),
    "flash-attn-missing-for-softcap": AdviceCase(
        without_flash_attn(softcap=50.0),
        "pip install flash-attn",
        "no kernel of PyTorch has soft-capping (50)",
    ),
    "flash-attn-unfit": AdviceCase(
        with_version("flash-attn", "2.6.1", without_flash_attn()),
        "install another version of flash-attn, or ignore it",
        "it is not used: not installed",
    ),
    "reference": AdviceCase(
        replace(NODE, attention_groups=(replace(GROUP, kernel="reference", rejections={"cpu": "dtype float16"}),)),
        "find a faster kernel",
        "would run on the eager reference, far too slow for 131,072 tokens: no other kernel fits",
    ),
    "no-peers": AdviceCase(
        replace(NODE, devices=replace(NODE.devices, has_peer_access=False)),
        "nvidia-smi topo -m",
        "keys and values go through host memory",
    ),
    "variables": AdviceCase(
        replace(NODE, environment={"NCCL_P2P_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "0"}),
        "unset NCCL_P2P_DISABLE, unless",
        "NCCL_P2P_DISABLE=1: GPUs exchange through host memory",
    ),
    "threads": AdviceCase(
        replace(NODE, devices=Devices("cpu", ("x86",), 1, 8), environment={"OMP_NUM_THREADS": "4"}),
        "set OMP_NUM_THREADS=1",
        "8 ranks of 4 threads share 8 cores",
    ),
    "contiguous": AdviceCase(
        replace(NODE, query=replace(NODE.query, layout="contiguous")),
        "use --layout zigzag",
        "the last of 8 ranks computes 1.88 times the mean",
    ),
    "slow-links": AdviceCase(
        # Three query heads cannot be exchanged by Ulysses, and a causal sequence needs all keys: no faster algorithm.
        with_overlap(replace(NODE, links=SLOW_LINKS, attention_groups=(replace(GROUP, num_heads=3, num_kv_heads=3),))),
        "use sequences of at least 5,376,0",
        "a ring needs 672,0",  # (1.2 / phi) F / B, the published condition
    ),
    "ulysses": AdviceCase(
        with_overlap(replace(NODE, links=SLOW_LINKS)),
        'load the model with attn_implementation="ulysses"',
        "instead of",
    ),
    "windows": AdviceCase(
        with_overlap(
            replace(NODE, links=SLOW_LINKS, attention_groups=(replace(WINDOWED, num_heads=3, num_kv_heads=3),))
        ),
        'leave transport="auto" (or set "direct")',
        "16 of 16 layers see a window or chunk only",
    ),
    "padding": AdviceCase(
        with_overlap(replace(NODE, query=replace(NODE.query, seq_length=2**17 - 5))),
        "use sequences of 131,072 tokens",
        "zigzag on 8 ranks pads 131,067 to 131,072",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_advice_names_an_action_and_its_reason(name):
    case = CASES[name]
    advice = advise(case.report)
    matching = [item for item in advice if case.action in item.action]
    assert matching, advice
    assert case.reason in matching[0].reason and matching[0].blocks_training == case.blocks_training, matching[0]
    line = f"{'must: ' if case.blocks_training else ''}{matching[0].action}"
    assert line[:60] in render(case.report, advice).replace("\n     ", " ")


def test_nothing_is_advised_where_nothing_is_wrong():
    assert advise(NODE) == []
    assert render(NODE, []).endswith("advice      nothing to change")


def test_every_rule_has_a_case():
    rules_with_advice = {rule for case in CASES.values() for rule in RULES if rule(case.report) is not None}
    assert rules_with_advice == set(RULES)


def test_advice_that_blocks_training_comes_first():
    report = without_flash_attn(replace(NODE, refusal="no", devices=replace(NODE.devices, has_peer_access=False)))
    assert [item.blocks_training for item in advise(report)] == [True, False, False]


def test_min_tokens_are_those_of_the_published_condition():
    overlap = NODE.overlap
    rates = kernel_rates(NODE.timings)
    assert (rates.forward, rates.backward) == (pytest.approx(6e14), pytest.approx(5.6e14))
    # c >= (e / 2 phi) (d_kv / d_q) (F / B), backward (e + 4) / 2 / 2.5 times as much: causal, so phi = 1/2.
    condition = 2 / (2 * 0.5) * (8 / 32) / 3.6e11
    assert overlap.min_tokens_forward == pytest.approx(condition * 6e14, abs=1)
    assert overlap.min_tokens_backward == pytest.approx(condition * 5.6e14 * 3 / 2.5, abs=1)
    names = [algorithm.name for algorithm in overlap.algorithms]
    assert overlap.ring.exposed < 0.02 and names == ["ring", "direct", "allgather", "ulysses"]


def test_links_between_nodes_are_assumed_until_they_are_measured():
    two_nodes = replace(NODE, query=replace(NODE.query, num_ranks=16))
    hardware, source = measured_hardware(two_nodes)
    assert hardware.node_bandwidth == pytest.approx(3.6e11) and hardware.network_bandwidth == 4.5e10
    assert source == "links inside a node measured, between nodes assumed as of the preset h100"
    links = LinkTimings(16, "nccl", ((1, 1e-5), (1000, 1e-4)))
    hardware, source = measured_hardware(replace(two_nodes, links=links, environment={"LOCAL_WORLD_SIZE": "8"}))
    assert hardware.network_bandwidth == 1e7 and source == "links measured"
    _, source = measured_hardware(replace(two_nodes, links=LinkTimings(1, "nccl")))
    assert source == "links assumed as of the preset h100"


def test_required_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    dependencies = " ".join([*project["dependencies"], *extras])
    pins = dict(
        line.split("==") for line in (ROOT / "constraints-newest.txt").read_text().splitlines() if "==" in line
    )
    for requirement in machine.REQUIREMENTS:
        if requirement.min_version != "0":
            limits = [f">={requirement.min_version}"]
            limits += [f"<{requirement.below_version}"] if requirement.below_version else []
            orders = (sorted(limits), sorted(limits)[::-1])
            assert any(f"{requirement.name}{','.join(order)}" in dependencies for order in orders), requirement
        assert requirement.tested_version == pins.get(requirement.name) or not requirement.is_required, requirement
    assert project["requires-python"] == f">={machine.PYTHON}"


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [("2.6.2", True), ("2.6.1", False), ("2.8.3.post1", True), ("2.9.0", False), ("3", False)],
)
def test_versions_compare_as_numbers(version, is_supported):
    requirement = next(requirement for requirement in machine.REQUIREMENTS if requirement.name == "flash-attn")
    assert machine.check_version(requirement, version).is_supported is is_supported
    assert machine.parse_version("2.13.0+cu128") == (2, 13, 0) > machine.parse_version("2.9.1")


def test_doctor_measures_two_processes_and_writes_its_report(tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "new" / "doctor.json"
    folder.mkdir()
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    sizes["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64, **sizes}))
    arguments = ["doctor", "--model", str(folder), "--seq", "1K", "--repeats", "2", "--timeout", "250"]
    assert main([*arguments, "--json", str(output)]) == 0
    text = capsys.readouterr().out
    for heading in ("versions", "device", "kernels", "links", "attention", "overlap", "advice"):
        assert f"\n{heading}" in text
    assert f"{folder}, 1,024 tokens on 2 ranks, zigzag, bfloat16" in text and torch.__version__ in text
    assert "llama, 3 layers: 4 query / 2 key heads of 16" in text and text.isascii()
    assert max(map(len, text.splitlines()[1:])) < 140
    record = json.loads(output.read_text())
    report = record["report"]
    (group,) = report["attention_groups"]
    assert list(group["rejections"]) == list(KERNELS) and group["kernel"] == "cpu"
    assert group["rejections"]["flash_attn_2"] == "the package flash-attn is not installed"
    links = report["links"]
    assert (links["num_processes"], links["backend"], links["error"]) == (2, "gloo", None)
    assert [size for size, _ in links["times"]] == [1, 2**16, 2**20, 2**24]
    assert all(0 < seconds < 60 for _, seconds in links["times"]) and len(report["timings"]) == 1
    assert {engine["name"]: engine["unavailable_reason"] for engine in report["engines"]} == {
        "DDP": None,
        "FSDP2": "Accelerate has no FSDP on CPUs",
        **{f"DeepSpeed ZeRO-{stage}": None for stage in (1, 2, 3)},
    }
    assert "engines     weights, gradients and fp32 AdamW states on each of 2 ranks" in text
    assert report["overlap"]["links_measured"] and report["overlap"]["tokens"] == 512
    assert isinstance(record["advice"], list)


def test_exit_code_is_one_where_training_would_be_refused(monkeypatch, capsys):
    monkeypatch.setattr("ring_hf.doctor.diagnose", lambda *_: replace(NODE, refusal="It carries a state."))
    assert main(["doctor"]) == 1
    assert "1. must: use another model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--model nowhere",
            "--model 'nowhere' is neither a folder, nor a file, nor a name in the built-in table",
        ),
        ("--ranks -1", "--ranks -1 must be at least 1"),
        ("--repeats 0", "--repeats 0 must be at least 1"),
        ("--timeout 0", "--timeout 0.0 must be at least 1"),
        ("--layout diagonal", "invalid choice: 'diagonal'"),
    ],
)
def test_doctor_refuses_in_one_line(arguments, message, capsys):
    try:
        code = main(["doctor", *arguments.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text


def test_gpus_are_counted_and_their_peer_access_is_checked(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    devices = machine.find_devices()
    assert (devices.kind, devices.names, devices.capability) == ("cuda", ("NVIDIA H100",) * 3, (9, 0))
    assert devices.has_peer_access is False
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.find_devices().has_peer_access is None


def test_gpus_are_described_on_one_line():
    text = render(NODE, [])
    assert "  heads divide evenly among 8 of 8 ranks (Ulysses)" in text
    three_heads = replace(NODE, attention_groups=(replace(GROUP, num_heads=3, num_kv_heads=3),))
    assert "among 1 of 8" in render(three_heads, [])
    assert "8 x NVIDIA H100, 80 GB of memory, compute capability 9.0, every GPU reaches every other one" in text
    assert isinstance(InstalledPackage("x", None, "", None, False), InstalledPackage)
    assert isinstance(NODE.overlap, OverlapEstimate)
    assert AlgorithmEstimate("ring", 1.0, 3.0, 0.5, 0.5).exposed == 0.25
