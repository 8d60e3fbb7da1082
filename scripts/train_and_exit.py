"""A plain Trainer script for `soak_exit.py`: it trains a tiny Llama for two steps, saves it and ends.

It keeps everything at the top level, as short scripts do, so the Trainer, DDP's wrapper and the device mesh are alive
when the interpreter shuts down. RING_HF_WITHOUT_SHUTDOWN=1 removes ring_hf's exit hook.

    torchrun --nproc_per_node 2 scripts/train_and_exit.py OUTPUT_FOLDER [ULYSSES_SIZE]
"""

import atexit
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ring_hf
from ring_hf.parallel import shutdown

output_folder, ulysses_size = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1
if os.environ.get("RING_HF_WITHOUT_SHUTDOWN") == "1":
    atexit.unregister(shutdown.run_shutdown)

torch.set_num_threads(1)
set_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
config._attn_implementation = "ring_zigzag"
model = LlamaForCausalLM(config)
rows = [{"input_ids": torch.randint(128, (64,)).tolist()} for _ in range(2)]
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=output_folder,
        max_steps=2,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        parallelism_config=ring_hf.ContextParallelConfig(
            context_parallel_size=int(os.environ["WORLD_SIZE"]), ulysses_size=ulysses_size
        ),
    ),
    train_dataset=[{**row, "labels": row["input_ids"]} for row in rows],
    data_collator=ring_hf.ContextParallelCollator(model),
)
trainer.train()
trainer.save_model()
