"""Model, tokenizer and datasets of a run, from its arguments."""

from typing import Any

from arguments import DataArguments, ModelArguments, SourceArguments
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ring_hf.data import build_byte_tokenizer, load_documents, pack_documents, split_documents, tokenize_documents
from ring_hf.data.byte_level import END_OF_TEXT, PADDING


def load_tokenizer(args: ModelArguments) -> Any:
    """The tokenizer named by the arguments, else the model's; `bytes` is built here."""
    name = args.tokenizer or args.model
    if name is None:
        raise ValueError("a new model needs a tokenizer. Set tokenizer to a hub id, a folder, or `bytes`.")
    if name == "bytes":
        return PreTrainedTokenizerFast(
            tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT, pad_token=PADDING
        )
    return AutoTokenizer.from_pretrained(name, revision=args.model_revision if name == args.model else "main")


def load_model(args: ModelArguments, tokenizer: Any, max_length: int) -> Any:
    """Load or build the model with its positions set for `max_length` tokens."""
    if args.model is not None:
        config = AutoConfig.from_pretrained(args.model, revision=args.model_revision)
    else:
        assert isinstance(args.model_config, dict)
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        sizes = {"vocab_size": len(tokenizer), **special, **args.model_config}
        if "model_type" not in sizes:
            raise ValueError(
                f"model_config={args.model_config} has no model_type. Name the architecture: model_type: llama."
            )
        config = AutoConfig.for_model(**sizes)
    set_positions(config, args, max_length)
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation, "dtype": args.dtype}
    if args.model is None:
        return AutoModelForCausalLM.from_config(config, **options)
    return AutoModelForCausalLM.from_pretrained(args.model, revision=args.model_revision, config=config, **options)


def set_positions(config: Any, args: ModelArguments, max_length: int) -> None:
    """Set RoPE as asked, and let the configuration say that the model reaches `max_length` tokens.

    The order matters: scaled RoPE (yarn, llama3) remembers the length from before as the one it scales from.
    """
    if args.rope_theta is not None or args.rope_parameters is not None:
        current = getattr(config, "rope_parameters", None)
        if not current:
            raise ValueError(
                f"rope_theta={args.rope_theta}, rope_parameters={args.rope_parameters}: a {config.model_type} "
                "configuration has no RoPE to set. Leave both out."
            )
        if args.rope_theta is not None and "rope_theta" not in current:
            raise ValueError(
                f"rope_theta={args.rope_theta}: {config.model_type} has one RoPE per layer type "
                f"({', '.join(current)}). "
                "Set rope_parameters with all of them."
            )
        config.rope_parameters = args.rope_parameters or {**current, "rope_theta": args.rope_theta}
        config.standardize_rope_params()
        config.validate_rope()
    if getattr(config, "max_position_embeddings", max_length) < max_length:
        config.max_position_embeddings = max_length


def load_splits(args: SourceArguments) -> tuple[Dataset, Dataset]:
    """(training, held-out) documents."""
    documents = load_documents(args.data, args.text_column, args.data_split)
    if args.heldout_data is None:
        return split_documents(documents, args.heldout_fraction)
    return documents, load_documents(args.heldout_data, args.text_column, args.data_split)


def load_sequences(args: DataArguments, tokenizer: Any) -> tuple[Dataset, Dataset]:
    """(training, held-out) sequences of at most `max_length` tokens."""
    train, heldout = (
        pack_documents(
            tokenize_documents(documents, tokenizer, args.num_proc),
            args.max_length,
            args.packing,
            args.mask_boundaries,
        )
        for documents in load_splits(args)
    )
    if args.max_heldout_sequences is not None:
        heldout = heldout.select(range(min(args.max_heldout_sequences, len(heldout))))
    return train, heldout
