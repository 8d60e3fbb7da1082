"""What leaves a run: the model and its card for the hub, and its log for a tracker, from the first process alone."""

import json
import pydoc_data.topics

import pytest

from tests.support.harness import launch_forked

RUN = """
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 2, max_position_embeddings: 64}
tokenizer: bytes
max_length: 64
min_length: 20
overlong: truncate
heldout_fraction: 0
per_device_train_batch_size: 1
max_steps: 2
logging_steps: 1
peak_tflops: 1.0e-3
save_strategy: "no"
report_to: trackio
push_to_hub: true
hub_model_id: extended
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, and what each of its two processes sent."""
    folder = tmp_path_factory.mktemp("hub")
    texts = [pydoc_data.topics.topics[name][:200] for name in sorted(pydoc_data.topics.topics)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "run.yaml").write_text(RUN + f"data: {folder}/texts.jsonl\noutput_dir: {folder}/run\n")
    script = ["tests/recipes/hub_run.py", str(folder), str(folder / "run.yaml"), "--context_parallel_size", "2"]
    launch_forked(script, 2)
    return folder / "run", *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))


def test_the_first_process_pushes_the_model_with_its_card(run):
    folder, first, second = run
    assert first["created"] == ["extended"] and second["created"] == second["uploads"] == []
    (upload,) = first["uploads"]
    assert upload["repo"] == "owner/extended" and "checkpoint-*" in upload["ignored"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "training.png"} <= set(upload["files"])
    card = (folder / "README.md").read_text()
    assert upload["files"]["README.md"] == len(card.encode()), "it changed after it was sent"
    for text in ("# extended", "pipeline_tag: text-generation", "## Exactness", "shared by 2 processes"):
        assert text in card
    data = card.split("## Data")[1].split("## RoPE")[0]
    assert "min_length: 20" in data and "overlong: truncate" in data and "texts.jsonl" in data
    assert "hub_token" not in card


def test_a_tracker_gets_throughput_utilization_and_memory(run):
    _, first, _ = run
    steps = [log for log in first["logs"] if "loss" in log]
    assert len(steps) == 2
    for log in steps:
        assert {"tokens_per_second", "mfu", "peak_memory_gb", "tokens_per_second_per_device"} <= set(log)
