"""Runs TRL's SFTTrainer as it is, once for each case; rank 0 writes OUTPUT_FOLDER/results.json.

The script of a user: model, `SFTConfig` with a `ContextParallelConfig`, dataset, `train()`. Nothing in it shards a
batch. One process trains with `sdpa`.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import ring_hf
from ring_hf.data.byte_level import END_OF_TEXT, PADDING, build_byte_tokenizer

STEPS, ROWS, HELD_OUT = 10, 25, 7  # rows in batches of 4: the seventh step ends an epoch, with 1 of them
WORDS = ["ring", "sequence", "rank", "shard", "token", "query", "layer", "loss", "step", "key"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def sentence(seed: int, num_words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)] for i in range(num_words))


def texts(start: int, count: int) -> list[dict[str, Any]]:
    return [{"text": sentence(i, 3 + i * 5 % 11)} for i in range(start, start + count)]


def completions(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": sentence(i, 2 + i * 5 % 9) + ":", "completion": " " + sentence(i + 1, 1 + i * 3 % 7)}
        for i in range(start, start + count)
    ]


def conversations(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": role, "content": sentence(i + turn, 1 + (i + turn) * 5 % 6)}
                for turn, role in enumerate(["user", "assistant"] * (1 + i % 2))
            ]
        }
        for i in range(start, start + count)
    ]


@dataclass(frozen=True)
class SFTCase:
    """One training.

    Attributes:
        name: a key of the results.
        rows: makes rows `start` to `start + count` of the dataset.
        settings: of the `SFTConfig`.
        adapter: settings of a `LoraConfig`, or None.
        is_broken: whether the boundaries of documents are taken out before the batch is sharded.
    """

    name: str
    rows: Callable[[int, int], list[dict[str, Any]]] = texts
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    is_broken: bool = False


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
DORA = {**LORA, "use_dora": True}
PACKED = {"packing": True, "max_length": 96, "num_train_epochs": 10}
CASES = [
    SFTCase("no packing"),
    SFTCase("bfd", settings=PACKED),
    SFTCase("wrapped", settings={**PACKED, "packing_strategy": "wrapped"}),
    SFTCase("padding-free", settings={"padding_free": True, "max_length": None}),
    SFTCase("completion-only", completions),
    SFTCase("assistant-only", conversations, {"assistant_only_loss": True}),
    SFTCase("LoRA, assistant-only, bfd", conversations, {**PACKED, "assistant_only_loss": True}, LORA),
    SFTCase("DoRA, dft, accumulated", texts, {"loss_type": "dft", "gradient_accumulation_steps": 2}, DORA),
]
CONTROL = SFTCase("bfd without boundaries", settings=PACKED, is_broken=True)


def without_boundaries(inner: Any) -> Callable[[list], dict[str, Any]]:
    """Return a collator whose packed documents attend to each other, as under a mask that is only causal."""

    def collate(features: list) -> dict[str, Any]:
        return {key: value for key, value in inner(features).items() if key in ("input_ids", "labels")}

    return collate


def train(case: SFTCase, folder: Path, world_size: int) -> list[dict[str, float]]:
    """Train one case and return the numbers of all logs."""
    set_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT, pad_token=PADDING, chat_template=TEMPLATE
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.1,
            attn_implementation="ring_zigzag" if world_size > 1 else "sdpa",
            **sizes,
        )
    )
    settings = {"max_steps": STEPS, "learning_rate": 3e-3, "lr_scheduler_type": "constant", **case.settings}
    if world_size > 1:
        settings["parallelism_config"] = ring_hf.ContextParallelConfig(context_parallel_size=world_size)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(folder / case.name.replace(" ", "-")),
            per_device_train_batch_size=4 // accumulation,
            per_device_eval_batch_size=4,
            eval_strategy="steps",
            eval_steps=STEPS // 2,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(case.rows(0, ROWS)),
        eval_dataset=Dataset.from_list(case.rows(ROWS, HELD_OUT)),
        processing_class=tokenizer,
        peft_config=None if case.adapter is None else LoraConfig(**case.adapter),
    )
    if case.is_broken:
        inner = without_boundaries(trainer.data_collator.inner)
        trainer.data_collator = ring_hf.ContextParallelCollator(trainer.model, inner=inner)
    trainer.train()
    return trainer.state.log_history


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    names = sys.argv[2:]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cases = [*CASES, CONTROL] if world_size > 1 else CASES
    selected = [case for case in cases if not names or case.name in names]
    results = {case.name: train(case, folder, world_size) for case in selected}
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
