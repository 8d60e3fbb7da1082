"""A tokenizer that needs no download: one token per UTF-8 byte, and the id of a byte is its value.

It is GPT-2's byte-level BPE with an empty merge list, so that every tool that reads a `tokenizer.json` reads it. Two
more ids follow the bytes: the end of a document and padding.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


def byte_alphabet() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte.

    A visible byte stands for itself; the others take the characters from 256 on, in order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def build_byte_tokenizer() -> Tokenizer:
    """Build the tokenizer: ids 0..255 are the bytes, 256 is `<|endoftext|>`, 257 is `<|padding|>`."""
    tokenizer = Tokenizer(
        models.BPE(vocab={character: byte for byte, character in byte_alphabet().items()}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), AddedToken(PADDING, special=True)])
    return tokenizer


def load_tokenizer(name: str, revision: str = "main") -> Any:
    """Return a Transformers tokenizer: of a hub id or a folder, or this one for the name `bytes`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    from ..hf.pretrained import load_auto_tokenizer, wrap_tokenizer  # Transformers, which only this function needs

    if name == "bytes":
        return wrap_tokenizer(build_byte_tokenizer(), eos_token=END_OF_TEXT, pad_token=PADDING)
    return load_auto_tokenizer(name, revision)
