"""The keys of `recipes/sft.py` beside those that all recipes have and those of TRL's `SFTConfig`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from arguments import ModelArguments, SourceArguments, option, parse_mapping

from ring_hf.data.example_weights import check_weighting
from ring_hf.data.formats import find_format, with_options
from ring_hf.data.source_spec import MixtureSpec

OVERLONG = ("drop", "truncate")


@dataclass
class ConversationArguments(SourceArguments):
    """The conversations, and the held-out part of them."""

    data: list | str | None = option(
        None,
        "File, folder or glob of json, jsonl or parquet, or a dataset on the hub. A mixture: a list of mappings with "
        "source, format, weight, overlong, options and others, as in recipes/finetune.py.",
    )
    format: str = option(
        "messages",
        "Rows of a source: messages (with tools), prompt_completion, document_qa, tokens, or any other format.",
    )
    overlong: str = option("drop", "Examples of more than max_length tokens: drop, or truncate at the end.")
    loss_weighting: str = option(
        "tokens",
        "tokens: the loss is the mean over all trained tokens of a step. examples: the mean over examples of their "
        "mean losses, so that a short answer counts as much as a long one.",
    )
    max_heldout_examples: int | None = option(None, "Most held-out examples in an evaluation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise ValueError("data is missing. Name a file of conversations, or a dataset on the hub.")
        if self.overlong not in OVERLONG:
            raise ValueError(
                f"overlong={self.overlong!r}: choose one of {', '.join(OVERLONG)}. Spans of a conversation without "
                "its beginning would be trained out of context."
            )
        find_format(self.format)
        check_weighting(self.loss_weighting)

    @property
    def source_defaults(self) -> dict[str, Any]:
        return {**super().source_defaults, "overlong": self.overlong}

    def mixture_with(self, options: dict[str, Any]) -> MixtureSpec:
        """Return the sources to train on, with these options where their format has them."""
        mixture = self.mixture()
        return dataclasses.replace(mixture, sources=tuple(with_options(spec, options) for spec in mixture.sources))


@dataclass
class AdapterArguments:
    """Adapters of PEFT, by the names of TRL's ModelConfig."""

    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "Its scale is lora_alpha / lora_r.")
    lora_target_modules: list[str] = option(["all-linear"], "Modules that get an adapter, or all-linear.")
    lora_modules_to_save: list[str] = option(
        [], "Modules that are trained and saved whole beside the adapter, such as embed_tokens and lm_head."
    )
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = option(False, "DoRA: magnitude and direction of the weights are trained separately.")
    load_in_4bit: bool = option(False, "QLoRA: the frozen weights in 4 bits (bitsandbytes).")
    bnb_4bit_quant_type: str = option("nf4", "nf4 or fp4.")
    use_bnb_nested_quant: bool = option(False, "Quantise the constants of the quantisation, too.")
    merge_adapter: bool = option(
        False, "At the end, write the model with the adapter merged into it to output_dir/merged."
    )
    quantization_config: dict | str | None = option(
        None, "Instead of load_in_4bit: all settings of a BitsAndBytesConfig, as {load_in_8bit: true}."
    )

    def __post_init__(self) -> None:
        self.quantization_config = parse_mapping("quantization_config", self.quantization_config)
        dependents = {
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
            "load_in_4bit": self.load_in_4bit,
            "quantization_config": self.quantization_config,
            "lora_modules_to_save": self.lora_modules_to_save,
            "merge_adapter": self.merge_adapter,
        }
        if not self.use_peft and (given := [name for name, value in dependents.items() if value]):
            raise ValueError(f"{given[0]}={dependents[given[0]]} needs an adapter. Set use_peft: true.")
        if self.load_in_4bit and self.quantization_config:
            raise ValueError("load_in_4bit and quantization_config are both given. Leave one out.")
        if self.merge_adapter and self.is_quantized:
            raise ValueError(
                "merge_adapter=True would add the adapter to weights of few bits, which rounds it. Merge it into the "
                "unquantised model afterwards, with peft's merge_and_unload."
            )

    @property
    def is_quantized(self) -> bool:
        return self.load_in_4bit or bool(self.quantization_config)

    def check_model(self, model_args: ModelArguments) -> None:
        """Raise `ValueError` if an adapter alone could not be used without settings that only this run knows."""
        if not self.use_peft or self.merge_adapter:
            return
        changed = [name for name in ("rope_theta", "rope_parameters") if getattr(model_args, name) is not None]
        if changed:
            raise ValueError(
                f"{changed[0]}={getattr(model_args, changed[0])} with use_peft: an adapter is loaded into the model "
                "as it was, with its old RoPE. Set merge_adapter: true, or leave it out."
            )
        if model_args.model is None:
            raise ValueError("use_peft with model_config: an adapter needs a model to load it into. Set model.")
