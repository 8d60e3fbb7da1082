"""Every file of stages: it resolves, its head has the numbers of its plan, and its stages take their first two steps,
with a small model, short sequences and the formats and shares of its mixture.

The default is the steps of the files in `SAMPLE`; `RING_HF_ALL_CASES=1` takes those of all files, in about a minute.
"""

import json
import os
import pydoc_data.topics
import re

import pytest
import stages
import yaml
from stage_plan import estimates, format_estimates, plan_model
from stages import read_stages
from transformers import AutoConfig

from ring_hf.data.vision_codes import CODES_PER_FRAME, END_OF_VISION
from tests.support.harness import ROOT, launch_forked
from tests.trainer.sft_script import TEMPLATE

FILES = {path.stem: path for path in sorted((ROOT / "configs" / "extend").glob("*.yaml"))}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {"olmo3": "olmo3", "trl-1m": "qwen3", "qwen25-1m-sft": "qwen2"}
LENGTHS = {"olmo3": 8192, "trl-1m": 40960, "lwm": 4096, "easycontext": 4096, "tiny": 256}
SAMPLE = ("tiny", "olmo3", "ultralong", "qwen25-1m-sft")
SHARE = 64  # tokens of the longest stage, scaled down
SHORTEST = {"text": 16, "messages": 128, "vision_codes": 320}  # tokens that a row of a format needs
# Keys that ask for another device, or for data and files that are not there.
LEFT_OUT = {"bf16", "kernel", "heldout_data", "perplexity_lengths", "model", "data", "ulysses_size", "card_notes"}
LEFT_OUT |= {"eval_strategy", "eval_steps", "save_steps", "max_heldout_sequences"}
LEFT_OUT |= {"tokenizer", "model_config", "overlong"}


def base_config(name):
    """Return the configuration that stands for the model of a file, which would be downloaded."""
    kind = KINDS.get(name, "llama")
    return AutoConfig.for_model(kind, **TINY, pad_token_id=0, max_position_embeddings=LENGTHS.get(name, 8192))


@pytest.fixture
def read(monkeypatch):
    """Reads a file of stages as the driver does, without its model."""
    monkeypatch.chdir(ROOT)

    def read(name):
        if name != "tiny":
            monkeypatch.setattr(stages, "base_config", lambda given: base_config(name))
        return read_stages(str(FILES[name]), {})

    return read


def head_of(name):
    lines = FILES[name].read_text().splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.removeprefix("#").strip() for line in comment)


def test_all_files_of_stages_are_found():
    expected = {"easycontext", "gradient", "lwm", "lwm-vision", "olmo3", "prolong", "qwen25-1m-sft", "tiny", "trl-1m"}
    assert set(FILES) == expected | {"ultralong"}


@pytest.mark.parametrize("name", FILES)
def test_the_head_has_the_command_and_the_numbers_of_the_plan(name, read):
    head = head_of(name)
    assert f"python recipes/extend.py configs/extend/{name}.yaml" in head
    for word in ("Hardware: ", "Memory: ", "Time: ", "Source: ", "Expect: "):
        assert head.count(word) == 1, word
    resolved, top = read(name)
    if name == "tiny":  # the planner knows no CPU
        return
    predictions = estimates(resolved, "h100", plan_model(top))
    assert all(prediction.gib < 0.9 * prediction.capacity for prediction in predictions)
    memory = ", ".join(f"{prediction.gib:.1f}" for prediction in predictions)
    hours = ", ".join(f"{prediction.hours:,.1f}" for prediction in predictions)
    steps = ", ".join(f"{prediction.step:,.1f}" for prediction in predictions)
    assert f"Memory: {memory} GiB of 79" in head
    assert f"Time: {hours} hours" in head and f"{steps} s a step" in head
    assert format_estimates(resolved, "", top).count("\n") == len(resolved) + 3


def test_the_numbers_are_those_of_the_sources(read):
    gradient, _ = read("gradient")
    assert [round(stage.num_tokens / 1e6, 1) for stage in gradient] == [62.9, 100.7, 419.4, 838.9, 184.5]
    prolong, _ = read("prolong")
    assert [stage.batch.num_tokens // stage.batch.max_length for stage in prolong] == [64, 16]
    lwm, _ = read("lwm")
    assert [stage.num_steps for stage in lwm] == [1200, 3000, 3000, 720, 450]
    assert [stage.rope["rope_theta"] for stage in lwm] == [1e6, 1e7, 1e7, 2.5e7, 5e7]
    assert [bool(stage.warnings) for stage in lwm] == [False, False, True, True, True]
    (olmo,), _ = read("olmo3")
    assert olmo.rope["full_attention"]["factor"] == 8 and olmo.rope["sliding_attention"]["rope_type"] == "default"
    assert olmo.num_tokens == pytest.approx(50e9, rel=1e-3)
    (trl,), top = read("trl-1m")
    (prediction,) = estimates([trl], "h100", plan_model(top))
    assert prediction.step == pytest.approx(364, rel=0.15) and prediction.gib * 2**30 == pytest.approx(
        56.2e9, rel=0.15
    )


def scale_sources(stage, folder, longest):
    """Return the sources of a stage, with files of few rows and short spans."""
    default = {"format": "messages" if stage.recipe == "sft" else "text"}
    given = stage.values["data"] if isinstance(stage.values["data"], list) else [{}]
    sources = [
        {**default, **{key: spec[key] for key in ("name", "format", "weight") if key in spec}} for spec in given
    ]
    for spec, source in zip(given, sources, strict=True):
        source["source"] = str(folder / f"{source['format']}.jsonl")
        if "max_length" in spec:
            source["max_length"] = max(8, spec["max_length"] * SHARE // longest)
    return sources


def scale(stage, name, folder, longest, previous):
    """Return the run of a stage for two processes on a CPU: two steps of short sequences."""
    values = {key: value for key, value in stage.values.items() if key not in LEFT_OUT and value is not None}
    sources = scale_sources(stage, folder, longest)
    length = max(max(SHORTEST[spec["format"]] for spec in sources), stage.batch.max_length * SHARE // longest)
    if stage.recipe == "sft":
        values["chat_template_path"] = str(folder / "chat.jinja")
    size = min(2, int(values.get("context_parallel_size") or 1))
    values |= {"max_length": length, "context_parallel_size": size, "max_steps": 2, "heldout_fraction": 0}
    values |= {"per_device_train_batch_size": 1, "disable_tqdm": True, "report_to": "none", "logging_steps": 1}
    values["tokens_per_batch"] = str(length * (2 // size) * min(2, stage.batch.accumulation))
    values |= {"data": sources, "output_dir": str(folder / name / stage.name)}
    if previous is None:
        config = {"model_type": KINDS.get(name, "llama"), **TINY, "max_position_embeddings": 64}
        values |= {"model_config": config, "tokenizer": "bytes"}
    else:
        values["model"] = str(previous)
    if "optimizer_from" in values:
        values["optimizer_from"] = str(previous / "checkpoint-2")
    return values


def write_rows(folder):
    texts = [pydoc_data.topics.topics[topic][:300] for topic in sorted(pydoc_data.topics.topics)]
    roles = [("user", 0, 20), ("assistant", 20, 60)]
    rows = {
        "text": [{"text": text} for text in texts],
        "messages": [
            {"messages": [{"role": role, "content": text[start:stop]} for role, start, stop in roles]}
            for text in texts
        ],
        "vision_codes": [
            {"content": ["<vision>", *range(i, i + CODES_PER_FRAME), END_OF_VISION, "</vision>", text[:20]]}
            for i, text in enumerate(texts)
        ],
    }
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, values)))
    (folder / "chat.jinja").write_text(TEMPLATE)


def test_stages_take_their_first_steps(read, tmp_path):
    write_rows(tmp_path)
    words, folders = [], {}
    names = list(FILES) if os.environ.get("RING_HF_ALL_CASES") else SAMPLE
    for name in names:
        resolved, _ = read(name)
        previous, longest = None, max(stage.batch.max_length for stage in resolved)
        keeps = {stage.index - 1 for stage in resolved if "optimizer_from" in stage.values}
        for stage in resolved:
            values = scale(stage, name, tmp_path, longest, previous)
            values["save_strategy"] = "steps" if stage.index in keeps else "no"
            path = tmp_path / f"{name}-{stage.name}.yaml"
            path.write_text(yaml.safe_dump(values))
            words.append(f"{stage.recipe}={path}")
            previous = folders[path.stem] = tmp_path / name / stage.name
    output = launch_forked([str(ROOT / "tests/recipes/run_in_turn.py"), *words], 2, timeout=550)
    assert len(re.findall(r"^finished ", output, re.MULTILINE)) == 2 * len(words)
    for folder in folders.values():
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2], folder
    assert len(folders) >= (29 if len(names) == len(FILES) else 7)
