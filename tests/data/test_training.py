"""Training on a stream and without a mask, as a user starts it: two processes give the losses of one."""

import importlib
import json
import pydoc_data.topics
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

import ring_hf
from ring_hf.data import pack_documents
from tests.support.harness import launch_forked

RUN = """
model_config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, max_position_embeddings: 128}
tokenizer: bytes
max_length: 128
stream_buffer: 6
heldout_fraction: 0
per_device_train_batch_size: 2
max_steps: 5
save_steps: 3
learning_rate: 1e-3
lr_scheduler_type: constant
logging_steps: 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    for name, texts in (
        ("long", [text[:700] for text in topics[:40]]),
        ("short", [text[:50] for text in topics[40:]]),
    ):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "run.yaml").write_text(
        RUN
        + f"""
data:
- {{source: {folder}/long.jsonl, weight: 0.7, length_weights: {{600: 1.5}}}}
- {{source: {folder}/short.jsonl, weight: 0.3, max_length: 40}}
"""
    )
    return folder


def train(folder, name, num_processes, *overrides):
    size = ["--context_parallel_size", str(num_processes)] if num_processes > 1 else []
    command = ["recipes/finetune.py", str(folder / "run.yaml"), "--output_dir", str(folder / name), *size, *overrides]
    launch_forked(command, num_processes)
    rows = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "loss" in row]


def compare(rows, others, tolerance=1e-5):
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=tolerance)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * tolerance)


def test_an_open_stream_gives_two_processes_the_losses_of_one(folder):
    """A stream of a mixture, without a mask between documents; then the second half again, from a checkpoint."""
    options = ["--streaming", "true", "--attend_across_documents", "true"]
    single = train(folder, "one", 1, *options, "--attn_implementation", "sdpa")
    assert len(single) == 5
    shared = train(folder, "two", 2, *options)
    compare(shared, single)
    shutil.copytree(folder / "two" / "checkpoint-3", folder / "again" / "checkpoint-3")
    again = train(folder, "again", 2, *options)
    compare(again, shared, tolerance=1e-7)  # the sequences of the first three steps are skipped


def test_documents_without_a_mask_are_one_document_to_the_model():
    """The loss of a row is that of its tokens without any positions; with the mask it is another."""
    tokens = Dataset.from_dict({"input_ids": [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]]})
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=11, initializer_range=0.5, **sizes)).eval()
    losses = []
    for across in (True, False):
        (row,) = pack_documents(tokens, 12, "stream", False, across)
        losses.append(model(**ring_hf.ContextParallelCollator(model)([row])).loss.item())
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
    assert losses[0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-4


def test_a_stream_needs_a_number_of_steps(tmp_path):
    prepare = importlib.import_module("training").prepare_for_streaming
    with pytest.raises(ValueError, match=r"streaming=True with max_steps=-1: a stream has no end. Set max_steps, or"):
        prepare(TrainingArguments(str(tmp_path), use_cpu=True))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=3)
    prepare(arguments)
    assert arguments.accelerator_config.dispatch_batches is False
