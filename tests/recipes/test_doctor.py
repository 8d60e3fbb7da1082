"""`ring-hf doctor`: what it finds on a CPU, what it advises on machines that it is told about, how it ends a hang."""

import json
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ring_hf.cli import main
from ring_hf.doctor import Diagnosis, Query, advise, machine, render
from ring_hf.doctor.advice import RULES
from ring_hf.doctor.facts import AlgorithmEstimate, AttentionGroup, Devices, EngineFact, Links, Overlap, Package, Speed
from ring_hf.doctor.overlap_estimate import machine_of, predict, rates
from ring_hf.kernels import KERNELS
from tests.harness import ROOT

# A node of 8 H100 with NVLink, flash-attn installed, Llama 3 8B at 128K tokens: nothing to change.
LAYERS = AttentionGroup(
    32, 32, 8, 128, 128, None, None, None, False, "flash_attn_2", {"flash_attn_2": None, "reference": None}
)
WINDOWED = replace(LAYERS, count=16, window=4096)
PACKAGES = tuple(
    machine.judge(wanted, wanted.tested or {"flash-attn": "2.8.3"}.get(wanted.name)) for wanted in machine.WANTED
)
NODE = Diagnosis(
    question=Query("Llama-3.1-8B", 2**17, 8, "zigzag", "bfloat16"),
    packages=PACKAGES,
    devices=Devices("cuda", ("NVIDIA H100",) * 8, 80 * 10**9, 64, (9, 0), True),
    model_type="llama",
    refused=None,
    probed=True,
    layers=(LAYERS,),
    links=Links(8, "nccl", ((1, 2e-5), (2**28, 2**28 / 3.6e11))),
    speeds=(Speed(4096, 1.37e11, 3e-4, 8e-4), Speed(16384, 2.2e12, 2.2e12 / 6e14, 2.5 * 2.2e12 / 5.6e14)),
)
NODE = replace(NODE, overlap=predict(NODE))


def without_flash(**more):
    layers = replace(
        LAYERS, kernel="cuda_flash", kernels={"flash_attn_2": "not installed", "cuda_flash": None}, **more
    )
    packages = [replace(one, found=None) if one.name == "flash-attn" else one for one in PACKAGES]
    return {"layers": (layers,), "packages": tuple(packages)}


def package(name, version):
    wanted = next(one for one in machine.WANTED if one.name == name)
    return {"packages": tuple(machine.judge(wanted, version) if one.name == name else one for one in PACKAGES)}


def predicted(facts):
    return replace(facts, overlap=predict(facts))


SLOW_LINKS = Links(8, "nccl", ((1, 2e-5), (2**28, 2**28 / 2e9)))
# What a rule is given, whether it refuses, what it says to do and why.
ENGINES = (EngineFact("DDP", 150 * 10**9, None), EngineFact("FSDP2", 19 * 10**9, None))
CASES = {
    "weights-do-not-fit": (
        replace(NODE, engines=ENGINES),
        False,
        "start with configs/accelerate/fsdp2_8gpu.yaml",
        "DDP holds 150 GB of weights, gradients and AdamW on a rank, of 80 GB; FSDP2 holds 19 GB",
    ),
    "weights-fit-nowhere": (
        replace(NODE, engines=(ENGINES[0], replace(ENGINES[1], held=10**11))),
        False,
        "take more ranks, adapters, or ring-hf plan --fit",
        "DDP holds 150 GB",
    ),
    "weights-without-fsdp": (
        replace(NODE, engines=(*ENGINES[:1], EngineFact("DeepSpeed ZeRO-3", 19 * 10**9, None))),
        False,
        "start with configs/accelerate/zero3_8gpu.yaml",
        "DeepSpeed ZeRO-3 holds 19 GB",
    ),
    "torch-too-old": (replace(NODE, **package("torch", "2.5.1")), True, "pip install 'torch>=2.6'", "torch 2.5.1"),
    "transformers-too-new": (
        replace(NODE, **package("transformers", "6.0.0")),
        True,
        "pip install 'transformers>=5.15,<6'",
        "transformers 6.0.0; ring_hf needs",
    ),
    "accelerate-missing": (
        replace(NODE, **package("accelerate", None)),
        True,
        "pip install 'accelerate>=1.12'",
        "accelerate is missing",
    ),
    "untested": (
        replace(NODE, **package("torch", "2.14.0")),
        False,
        "if anything fails, pip install torch==2.13.0",
        "torch 2.14.0 is newer than what the tests ran with",
    ),
    "model": (replace(NODE, refused="Mamba carries a state."), True, "use another model", "Mamba carries a state."),
    "no-kernel": (
        replace(NODE, layers=(replace(LAYERS, kernel=None, kernels={"cpu": "dtype int8"}),)),
        True,
        "use another dtype or device",
        "(cpu: dtype int8)",
    ),
    "links": (
        replace(NODE, links=Links(8, "nccl", error="no answer in 120 s")),
        True,
        "repair what the measurement ran into",
        "no answer in 120 s",
    ),
    "processes-do-not-divide": (
        replace(NODE, environment={"WORLD_SIZE": "12"}),
        True,
        "start 8 or 16 processes, or set context_parallel_size to a divisor of 12",
        "context_parallel_size=8 does not divide 12 processes",
    ),
    "gpu-unused": (
        replace(NODE, devices=Devices("cpu", ("x86_64",), 10**10, 8, unused=True), **package("torch", "2.13.0+cpu")),
        False,
        "install a CUDA build of PyTorch",
        "an NVIDIA driver is here, but torch 2.13.0+cpu",
    ),
    "flash-attn-missing": (
        replace(NODE, **without_flash()),
        False,
        "pip install flash-attn",
        "cuda_flash is used, which is PyTorch's; flash-attn runs packed documents in one call",
    ),
    "flash-attn-missing-for-softcap": (
        replace(NODE, **without_flash(softcap=50.0)),
        False,
        "pip install flash-attn",
        "no kernel of PyTorch knows soft-capping (50)",
    ),
    "flash-attn-unfit": (
        replace(NODE, layers=without_flash()["layers"], **package("flash-attn", "2.6.1")),
        False,
        "install another version of flash-attn, or leave it",
        "it is not used: not installed",
    ),
    "reference": (
        replace(NODE, layers=(replace(LAYERS, kernel="reference", kernels={"cpu": "dtype float16"}),)),
        False,
        "find a faster kernel",
        "would run on the eager reference, far too slow for 131,072 tokens: no other kernel fits",
    ),
    "no-peers": (
        replace(NODE, devices=replace(NODE.devices, peers=False)),
        False,
        "nvidia-smi topo -m",
        "keys and values go through host memory",
    ),
    "variables": (
        replace(NODE, environment={"NCCL_P2P_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "0"}),
        False,
        "unset NCCL_P2P_DISABLE, unless",
        "NCCL_P2P_DISABLE=1: GPUs exchange through host memory",
    ),
    "threads": (
        replace(NODE, devices=Devices("cpu", ("x86",), 1, 8), environment={"OMP_NUM_THREADS": "4"}),
        False,
        "set OMP_NUM_THREADS=1",
        "8 ranks of 4 threads share 8 cores",
    ),
    "contiguous": (
        replace(NODE, question=replace(NODE.question, layout="contiguous")),
        False,
        "take --layout zigzag",
        "the last of 8 ranks computes 1.88 times the mean",
    ),
    "slow-links": (
        # three query heads: no Ulysses, all of a causal sequence: nothing to fetch less of
        predicted(replace(NODE, links=SLOW_LINKS, layers=(replace(LAYERS, num_heads=3, num_kv_heads=3),))),
        False,
        "use sequences of at least 5,376,0",
        "a ring needs 672,0",  # (1.2 / phi) F / B, the published condition
    ),
    "ulysses": (
        predicted(replace(NODE, links=SLOW_LINKS)),
        False,
        'load the model with attn_implementation="ulysses"',
        "instead of",
    ),
    "windows": (
        predicted(replace(NODE, links=SLOW_LINKS, layers=(replace(WINDOWED, num_heads=3, num_kv_heads=3),))),
        False,
        'leave transport="auto" (or set "direct")',
        "16 of 16 layers see a window or chunk only",
    ),
    "padding": (
        predicted(replace(NODE, question=replace(NODE.question, sequence=2**17 - 5))),
        False,
        "take sequences of 131,072 tokens",
        "zigzag on 8 ranks pads 131,067 to 131,072",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_advice_names_what_to_do_and_why(name):
    facts, refuses, action, reason = CASES[name]
    found = [one for one in advise(facts) if action in one.action]
    assert found, advise(facts)
    assert reason in found[0].reason and found[0].refuses == refuses, found[0]
    assert f"{'must: ' if refuses else ''}{found[0].action}"[:60] in render(facts, advise(facts)).replace(
        "\n     ", " "
    )


def test_nothing_is_advised_where_nothing_is_wrong():
    assert advise(NODE) == []
    assert render(NODE, []).endswith("advice      nothing to change")


def test_every_rule_has_a_case():
    heard = {rule for facts, *_ in CASES.values() for rule in RULES if rule(facts) is not None}
    assert heard == set(RULES)


def test_what_refuses_training_comes_first():
    facts = replace(NODE, refused="no", devices=replace(NODE.devices, peers=False), **without_flash())
    assert [one.refuses for one in advise(facts)] == [True, False, False]


def test_least_tokens_are_those_of_the_published_condition():
    overlap = NODE.overlap
    flops, backward_flops, _ = rates(NODE.speeds)
    assert (flops, backward_flops) == (pytest.approx(6e14), pytest.approx(5.6e14))
    # c >= (e / 2 phi) (d_kv / d_q) (F / B), backward (e + 4) / 2 / 2.5 times as much: causal, so phi = 1/2.
    condition = 2 / (2 * 0.5) * (8 / 32) / 3.6e11
    assert overlap.least_forward == pytest.approx(condition * 6e14, abs=1)
    assert overlap.least_backward == pytest.approx(condition * 5.6e14 * 3 / 2.5, abs=1)
    assert overlap.ring.exposed < 0.02 and [way.name for way in overlap.ways] == [
        "ring",
        "direct",
        "allgather",
        "ulysses",
    ]


def test_links_between_nodes_are_assumed_until_they_are_measured():
    two = replace(NODE, question=replace(NODE.question, ranks=16))
    hardware, where = machine_of(two)
    assert hardware.node_bandwidth == pytest.approx(3.6e11) and hardware.network_bandwidth == 4.5e10
    assert where == "links inside a node measured, between nodes assumed as of the preset h100"
    launched = replace(two, links=Links(16, "nccl", ((1, 1e-5), (1000, 1e-4))), environment={"LOCAL_WORLD_SIZE": "8"})
    assert machine_of(launched)[0].network_bandwidth == 1e7 and machine_of(launched)[1] == "links measured"
    assert machine_of(replace(two, links=Links(1, "nccl")))[1] == "links assumed as of the preset h100"


def test_wanted_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    asked = " ".join([*project["dependencies"], *extras])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for wanted in machine.WANTED:
        if wanted.least != "0":
            limits = sorted([f">={wanted.least}", *([f"<{wanted.below}"] if wanted.below else [])])
            assert any(f"{wanted.name}{','.join(order)}" in asked for order in (limits, limits[::-1])), wanted
        assert wanted.tested == pins.get(wanted.name) or not wanted.required, wanted
    assert project["requires-python"] == f">={machine.PYTHON}"


@pytest.mark.parametrize(
    ("version", "fits"), [("2.6.2", True), ("2.6.1", False), ("2.8.3.post1", True), ("2.9.0", False), ("3", False)]
)
def test_versions_compare_as_numbers(version, fits):
    wanted = next(one for one in machine.WANTED if one.name == "flash-attn")
    assert machine.judge(wanted, version).fits is fits
    assert machine.numbers("2.13.0+cu128") == (2, 13, 0) > machine.numbers("2.9.1")


def test_doctor_measures_two_processes_and_writes_what_it_found(tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "new" / "doctor.json"
    folder.mkdir()
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    sizes["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64, **sizes}))
    words = ["doctor", "--model", str(folder), "--seq", "1K", "--repeats", "2", "--timeout", "250"]
    words += ["--json", str(output)]
    assert main(words) == 0
    said = capsys.readouterr().out
    for part in ("versions", "device", "kernels", "links", "attention", "overlap", "advice"):
        assert f"\n{part}" in said
    assert f"{folder}, 1,024 tokens on 2 ranks, zigzag, bfloat16" in said and torch.__version__ in said
    assert "llama, 3 layers: 4 query / 2 key heads of 16" in said and said.isascii()
    assert max(map(len, said.splitlines()[1:])) < 140
    found = json.loads(output.read_text())
    facts = found["facts"]
    (layers,) = facts["layers"]
    assert list(layers["kernels"]) == list(KERNELS) and layers["kernel"] == "cpu"
    assert layers["kernels"]["flash_attn_2"] == "the package flash-attn is not installed"
    links = facts["links"]
    assert (links["processes"], links["backend"], links["error"]) == (2, "gloo", None)
    assert [size for size, _ in links["times"]] == [1, 2**16, 2**20, 2**24]
    assert all(0 < seconds < 60 for _, seconds in links["times"]) and len(facts["speeds"]) == 1
    assert {one["name"]: one["missing"] for one in facts["engines"]} == {
        "DDP": None,
        "FSDP2": "Accelerate has no FSDP on CPUs",
        **{f"DeepSpeed ZeRO-{stage}": None for stage in (1, 2, 3)},
    }
    assert "engines     weights, gradients and fp32 AdamW on a rank of 2" in said
    assert facts["overlap"]["measured"] and facts["overlap"]["tokens"] == 512
    assert isinstance(found["advice"], list)


def test_exit_code_is_one_where_training_would_be_refused(monkeypatch, capsys):
    monkeypatch.setattr("ring_hf.doctor.diagnose", lambda *_: replace(NODE, refused="It carries a state."))
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
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_gpus_are_counted_and_asked_for_each_other(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    found = machine.devices()
    assert (found.kind, found.names, found.capability, found.peers) == ("cuda", ("NVIDIA H100",) * 3, (9, 0), False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.devices().peers is None


def test_cards_are_described_on_one_line():
    said = render(NODE, [])
    assert "  heads divide evenly among 8 of 8 ranks (Ulysses)" in said
    assert "among 1 of 8" in render(replace(NODE, layers=(replace(LAYERS, num_heads=3, num_kv_heads=3),)), [])
    assert "8 x NVIDIA H100, 80 GB of memory, compute capability 9.0, every GPU reaches every other one" in said
    assert isinstance(Package("x", None, "", None, False), Package) and isinstance(NODE.overlap, Overlap)
    assert AlgorithmEstimate("ring", 1.0, 3.0, 0.5, 0.5).exposed == 0.25
