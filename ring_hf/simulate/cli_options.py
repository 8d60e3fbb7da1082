"""The options that `ring-hf show` and `ring-hf simulate` share, what they mean, and the look of every help text."""

import argparse

from ..costmodel.devices import Shape
from ..geometry import Mask
from ..text import parse_size, parse_sizes
from .scenario import Scenario, mixed_lengths


def add_problem(command: argparse.ArgumentParser) -> None:
    """Options for a sequence, its documents, its mask and an attention layer."""
    command.add_argument("--cp", type=int, default=8, help="ranks that share the sequence")
    command.add_argument("--seq", type=parse_size, default=2**16, help="tokens of the sequence, such as 64K")
    packed = command.add_argument_group("documents and mask")
    packed.add_argument("--documents", type=parse_sizes, default=(), help="lengths, such as 4000,12000,1K")
    packed.add_argument("--num-documents", type=int, help="instead: so many documents of mixed length")
    packed.add_argument("--documents-seed", type=int, default=0, help="of the mixed lengths")
    packed.add_argument("--full", action="store_true", help="every token sees its whole document")
    packed.add_argument("--window", type=parse_size, help="keys that a query sees, its own included")
    packed.add_argument("--chunk", type=parse_size, help="tokens see each other only in runs of so many")
    both_ways = "tokens at the start of each document (one number: of all) that see each other both ways"
    packed.add_argument("--prefix", type=parse_sizes, default=(), help=both_ways)
    layer = command.add_argument_group("attention layer")
    layer.add_argument("--heads", type=int, default=32, help="query heads")
    layer.add_argument("--kv-heads", type=int, default=8, help="key/value heads")
    layer.add_argument("--head-dim", type=int, default=128)
    layer.add_argument("--bytes", type=int, default=2, help="of an element: 2 for bf16, 4 for fp32")


def setting_of(options: argparse.Namespace, ulysses: int = 1) -> Scenario:
    """The sequence and its ranks.

    Raises:
        ValueError: if the options contradict each other.
    """
    documents = options.documents
    if options.num_documents is not None:
        if documents:
            raise ValueError("--documents and --num-documents both say what is packed. Give one of them.")
        documents = mixed_lengths(options.seq, options.num_documents, options.documents_seed)
    mask = Mask(not options.full, options.window, options.chunk)
    return Scenario(options.cp, options.seq, mask, documents, options.prefix, ulysses)


def shape_of(options: argparse.Namespace) -> Shape:
    """The attention layer.

    Raises:
        ValueError: if the heads do not fit together.
    """
    if options.heads % options.kv_heads:
        raise ValueError(
            f"--kv-heads {options.kv_heads} does not divide --heads {options.heads}: every key/value head serves the "
            "same number of query heads."
        )
    return Shape(options.heads, options.kv_heads, options.head_dim, options.head_dim, options.bytes)
