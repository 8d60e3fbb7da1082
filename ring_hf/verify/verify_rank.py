"""One rank of `ring-hf verify --model`: loads model and rows, compares them with one process, and writes the result.

`accelerate launch` starts this module as a program: `-m ring_hf.verify.verify_rank OPTIONS.json RESULT.json`.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from ..data import DataArguments, load_sequences
from ..data.byte_level import load_tokenizer
from ..hf.pretrained import load_pretrained
from ..hf.trainer.parallelism_config import ContextParallelConfig
from .model_verification import ModelVerification
from .trainer_verification import default_arguments, is_refusal, verify_model

# Weights, gradients and optimizer states on all ranks; no limit below which a weight would stay whole.
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False},
}
ENGINE_ARGUMENTS: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": FSDP2, "zero3": {"deepspeed": ZERO3}}


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = verify_rank(options)
    except Exception as error:
        if not (isinstance(error, ValueError) and is_refusal(error)):
            get_error_handler().record_exception(error)  # its traceback, for the launcher's report
            raise
        result = ModelVerification("refused", str(error))
    if int(os.environ["RANK"]) == 0:
        Path(sys.argv[2]).write_text(json.dumps(result.to_json()))


def verify_rank(options: dict[str, Any]) -> ModelVerification:
    """Return the result; `options` are those of the command line, by name."""
    config = ContextParallelConfig(
        context_parallel_size=options["cp"], transport=options["transport"], ulysses_size=options["ulysses"]
    )
    model = _load_model(options)  # before DeepSpeed is known, which would shard it while it is loaded
    with tempfile.TemporaryDirectory() as folder:
        arguments = default_arguments(
            folder,
            options["rows"],
            use_cpu=options["device"] == "cpu",
            parallelism_config=config,
            **ENGINE_ARGUMENTS[options["engine"]],
        )
        rows = _random_rows(model, options) if options["data"] is None else _read_rows(options, arguments)
        return verify_model(
            model, rows, arguments, reference=options["reference"], past_refusals=options["past_refusals"]
        )


def _load_model(options: dict[str, Any]) -> Any:
    shared = {"trust_remote_code": options["trust_remote_code"]}
    config = load_pretrained(AutoConfig, "model", options["model"], **shared)
    config.use_cache = False
    return load_pretrained(
        AutoModelForCausalLM,
        "model",
        options["model"],
        config=config,
        attn_implementation=options["attn"],
        dtype=getattr(torch, options["dtype"]),
        **shared,
    )


def _read_rows(options: dict[str, Any], arguments: TrainingArguments) -> list[dict[str, Any]]:
    """Return the first rows of packed sequences of the files, as `recipes/finetune.py` packs them.

    Raises:
        ValueError: if the files hold fewer rows than are asked for.
    """
    sources = [{"source": path} for path in options["data"]]
    data_arguments = DataArguments(data=sources, max_length=options["length"], heldout_fraction=0)
    with arguments.main_process_first(desc="data"):  # the other processes read it from the cache
        sequences, _ = load_sequences(data_arguments, load_tokenizer(options["tokenizer"] or options["model"]))
    assert isinstance(sequences, Dataset)  # streaming is off
    if len(sequences) < options["rows"]:
        raise ValueError(
            f"{', '.join(options['data'])} make {len(sequences)} rows of {options['length']} tokens, and --rows "
            f"{options['rows']} were asked for. Name more files, or set a smaller --length or --rows."
        )
    return [dict(sequences[index]) for index in range(options["rows"])]


def _random_rows(model: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows of random tokens, each three tokens shorter than the one before, so that there is padding."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, rows = model.config.get_text_config().vocab_size, []
    for index in range(options["rows"]):
        length = max(2, options["length"] - 3 * index)
        tokens = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": tokens})
    return rows


if __name__ == "__main__":
    main()
