"""The options that `ring-hf show` and `ring-hf simulate` share."""

import argparse

from ..costmodel.devices import Shape
from ..geometry import Mask
from ..text import parse_size, parse_sizes
from .scenario import Scenario, mixed_lengths


def add_scenario_options(command: argparse.ArgumentParser) -> None:
    """Add options for a sequence, its documents, its mask and an attention layer."""
    command.add_argument("--cp", type=int, default=8, help="ranks that share the sequence")
    command.add_argument("--seq", type=parse_size, default=2**16, help="tokens of the sequence, such as 64K")
    packed = command.add_argument_group("documents and mask")
    packed.add_argument("--documents", type=parse_sizes, default=(), help="lengths, such as 4000,12000,1K")
    packed.add_argument("--num-documents", type=int, help="instead: number of documents of mixed length")
    packed.add_argument("--documents-seed", type=int, default=0, help="seed of the mixed lengths")
    packed.add_argument("--full", action="store_true", help="every token sees its whole document")
    packed.add_argument("--window", type=parse_size, help="keys that a query sees, its own included")
    packed.add_argument("--chunk", type=parse_size, help="tokens see each other only inside runs of this many tokens")
    prefix_help = "tokens at the start of each document (one number: of all) that see each other in both directions"
    packed.add_argument("--prefix", type=parse_sizes, default=(), help=prefix_help)
    layer = command.add_argument_group("attention layer")
    layer.add_argument("--heads", type=int, default=32, help="query heads")
    layer.add_argument("--kv-heads", type=int, default=8, help="key/value heads")
    layer.add_argument("--head-dim", type=int, default=128)
    layer.add_argument("--bytes", type=int, default=2, help="bytes of an element: 2 for bf16, 4 for fp32")


def scenario_from(options: argparse.Namespace, ulysses: int = 1) -> Scenario:
    """Return the sequence and its ranks.

    Raises:
        ValueError: if the options contradict each other.
    """
    documents = options.documents
    if options.num_documents is not None:
        if documents:
            raise ValueError("--documents and --num-documents both describe the packed documents. Give one of them.")
        documents = mixed_lengths(options.seq, options.num_documents, options.documents_seed)
    mask = Mask(not options.full, options.window, options.chunk)
    return Scenario(options.cp, options.seq, mask, documents, options.prefix, ulysses)


def shape_from(options: argparse.Namespace) -> Shape:
    """Return the attention layer.

    Raises:
        ValueError: if the key/value heads do not divide the query heads.
    """
    if options.heads % options.kv_heads:
        raise ValueError(
            f"--kv-heads {options.kv_heads} does not divide --heads {options.heads}: every key/value head serves the "
            "same number of query heads. Choose a divisor."
        )
    return Shape(options.heads, options.kv_heads, options.head_dim, options.head_dim, options.bytes)
