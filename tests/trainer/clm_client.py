"""A script with the structure of Transformers' example run_clm.py: arguments of three dataclasses, blocks of grouped
texts, `default_data_collator`, token accuracy, perplexity.

It knows nothing of ring_hf. A test changes the lines that docs/sft.md says.
"""

import math
import pydoc_data.topics
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field()


@dataclass
class DataTrainingArguments:
    tokenizer_file: str = field()
    block_size: int = field(default=64)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    texts = [pydoc_data.topics.topics[name][:400] for name in sorted(pydoc_data.topics.topics)]
    raw_datasets = DatasetDict(
        train=Dataset.from_dict({"text": texts[:40]}), validation=Dataset.from_dict({"text": texts[40:47]})
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=data_args.tokenizer_file)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype="float32",
    )

    def tokenize_function(examples):
        return tokenizer(examples["text"])

    def group_texts(examples):
        concatenated = {k: list(chain(*examples[k])) for k in examples}
        total_length = len(concatenated["input_ids"]) // data_args.block_size * data_args.block_size
        result = {
            k: [t[i : i + data_args.block_size] for i in range(0, total_length, data_args.block_size)]
            for k, t in concatenated.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    tokenized_datasets = raw_datasets.map(tokenize_function, batched=True, remove_columns=["text"])
    lm_datasets = tokenized_datasets.map(group_texts, batched=True)

    def preprocess_logits_for_metrics(logits, labels):
        return logits.argmax(dim=-1)

    def compute_metrics(eval_preds):
        preds, labels = eval_preds
        return {"accuracy": float(np.mean(preds[:, :-1].reshape(-1) == labels[:, 1:].reshape(-1)))}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=lm_datasets["train"],
        eval_dataset=lm_datasets["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    trainer.save_metrics("before", trainer.evaluate(metric_key_prefix="before"), combined=False)
    train_result = trainer.train()
    trainer.save_metrics("train", train_result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
