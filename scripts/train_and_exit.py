"""A plain Trainer script for `soak_exit.py`: a tiny Llama is trained for two steps, and the script ends.

It keeps everything at the top level, as short scripts do, so the Trainer, the engine's wrapper and the device mesh are
alive when the interpreter shuts down. RING_HF_WITHOUT_SHUTDOWN=1 removes ring_hf's exit hook.

    torchrun --nproc_per_node 2 scripts/train_and_exit.py OUTPUT_FOLDER [ULYSSES_SIZE] [ENGINE] [ENDING]

Endings: "save" saves the model, "end" does not, "raise" raises on the last rank after the second step, "interrupt"
trains until it is interrupted, "evaluate" evaluates after training, and "generate" generates without a Trainer.
"""

import atexit
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from cpu_engines import engine_settings
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ring_hf
from ring_hf.parallel import shutdown

output_folder, ulysses_size, engine, ending = (*sys.argv[1:], *["", "1", "DDP", "save"][len(sys.argv) - 1 :])
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
rows = [{"input_ids": torch.randint(128, (64,)).tolist()} for _ in range(2)]
rows = [{**row, "labels": row["input_ids"]} for row in rows]
parallelism = ring_hf.ContextParallelConfig(
    context_parallel_size=int(os.environ["WORLD_SIZE"]), ulysses_size=int(ulysses_size)
)


class RaiseOnLastRank(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == args.world_size - 1:
            raise RuntimeError("raised on the last rank")


if ending == "generate":
    accelerator = Accelerator(cpu=True, parallelism_config=parallelism)
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([rows[0]["input_ids"] * 4])
    cache = ring_hf.ContextParallelCache(model)
    tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(f"generated {tokens.shape[1]} tokens")
else:
    settings = engine_settings(engine)
    arguments = TrainingArguments(
        output_dir=output_folder,
        max_steps=100_000 if ending == "interrupt" else 2,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        parallelism_config=parallelism,
        **settings,
    )
    model = LlamaForCausalLM(config)  # under ZeRO-3, TrainingArguments come first
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=ring_hf.ContextParallelCollator(model),
        callbacks=[RaiseOnLastRank()] if ending == "raise" else None,
    )
    trainer.train()
    if ending == "evaluate":
        print(trainer.evaluate())
    if ending == "save":
        trainer.save_model()
