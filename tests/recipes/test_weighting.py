"""Examples of equal weight and vision codes in the fine-tuning recipe: two processes give the numbers of one."""

import json
import random

import pytest
import yaml
from arguments import MemoryArguments
from datasets import Dataset
from transformers import TrainingArguments
from weighting import have_weights, settings_with_weights

from ring_hf.data import DataArguments
from ring_hf.data.sequences import check_whole_examples
from ring_hf.data.vision_codes import CODEBOOK, CODES_PER_FRAME, END_OF_VISION, VISION_VOCABULARY
from tests.support.harness import launch_forked
from tests.trainer.sft_script import completions

STEPS = 3
RUN = {
    "model_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "tokenizer": "bytes",
    "vision_vocabulary": True,
    "max_length": 640,
    "overlong": "drop",
    "loss_weighting": "examples",
    "heldout_fraction": 0.2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": STEPS,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder and the logs of one process and of two."""
    folder = tmp_path_factory.mktemp("weighting")
    generator = random.Random(0)
    images = []
    for i in range(30):
        codes = [generator.randrange(CODEBOOK) for _ in range(CODES_PER_FRAME)]
        images.append({"content": ["<vision>", *codes, END_OF_VISION, "</vision>", f" of {i * 12345 % 997}"]})
    for name, rows in (("images", images), ("answers", completions(0, 40))):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [
        {"source": f"{folder}/images.jsonl", "format": "vision_codes", "options": {"vision_weight": 0.1}},
        {"source": f"{folder}/answers.jsonl", "format": "prompt_completion"},
    ]
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "data": sources}))
    logs = []
    for size in (1, 2):
        options = ["--output_dir", str(folder / str(size)), "--context_parallel_size", str(size)]
        launch_forked(["recipes/finetune.py", str(folder / "run.yaml"), *options], size)
        logs.append(json.loads((folder / str(size) / "trainer_state.json").read_text())["log_history"])
    return folder, *logs


def test_weighted_sequences_and_modalities_equal_one_process(runs):
    _, alone, shared = runs
    losses = [log["loss"] for log in alone if "loss" in log]
    assert [log["loss"] for log in shared if "loss" in log] == pytest.approx(losses, rel=1e-5) and len(losses) == STEPS
    for name, count in {"eval_text_loss": 1, "eval_vision_loss": 1, "text_loss": STEPS, "vision_loss": STEPS}.items():
        expected, losses = ([log[name] for log in logs if name in log] for logs in (alone, shared))
        print(f"{name}: {expected!r} in one process, {losses!r} in two")
        assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == count
    rows = [json.loads(line) for line in (runs[0] / "2" / "log.jsonl").read_text().splitlines()]
    assert [row["vision_loss"] for row in rows if "loss" in row] == losses


def test_the_saved_model_has_the_vision_vocabulary(runs):
    config = json.loads((runs[0] / "2" / "config.json").read_text())
    assert config["vocab_size"] == 258 + VISION_VOCABULARY and config["vision_offset"] == 258


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "overlong=cut of data source 'builtin'"),
        ({"overlong": "truncate"}, "overlong=truncate of data source 'builtin'"),
        ({"overlong": "drop", "packing": "stream"}, "packing=stream"),
        ({"overlong": "drop", "streaming": True, "heldout_fraction": 0}, "streaming=True"),
    ],
)
def test_examples_that_may_be_cut_cannot_weigh_the_same(settings, reason):
    with pytest.raises(ValueError, match=f"loss_weighting=examples with {reason}: a document counts as a whole"):
        check_whole_examples(DataArguments(loss_weighting="examples", **settings))
    check_whole_examples(DataArguments(loss_weighting="tokens", **settings))
    check_whole_examples(DataArguments(loss_weighting="examples", overlong="drop"))


def test_weights_get_the_settings_they_need():
    rows = Dataset.from_dict({"input_ids": [[1]], "loss_weights": [[1.0]]})
    mixture = DataArguments().mixture()
    assert have_weights(rows, mixture) and not have_weights(rows.remove_columns("loss_weights"), mixture)
    stream = iter(rows)
    assert not have_weights(stream, mixture)
    assert have_weights(stream, DataArguments(data=[{"source": "a.jsonl", "format": "tokens"}]).mixture())
    training_args = TrainingArguments("unused", use_cpu=True, report_to=[])
    assert settings_with_weights(MemoryArguments(), training_args).loss_block == "auto"
    assert not training_args.remove_unused_columns
    assert settings_with_weights(MemoryArguments(loss_block="64"), training_args).loss_block == "64"
