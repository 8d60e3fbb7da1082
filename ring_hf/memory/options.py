"""The options of `ring_hf.memory`: one frozen dataclass, checked when it is created."""

from dataclasses import dataclass

ATTENTION = ("save", "recompute", "none")
OFFLOAD = (None, "attention", "layers", "all")


@dataclass(frozen=True)
class MemoryConfig:
    """Options for the memory of a training step; none of them changes its numbers.

    Args:
        attention: the tensors that a decoder layer keeps for its backward pass. "save": its input and the result of
            attention, so that attention and its exchanges run once per layer and step; "recompute": its input alone
            (plain activation checkpointing); "none": all of them, without checkpointing.
        offload: which of them are kept in host memory: "attention" (its results), "layers" (the inputs), "all".
        ffn_block: tokens at a time in feed-forward layers and experts, whose backward pass recomputes them; "auto"
            takes as many as make the activations of a block as large as the weights, None computes all at once.
        loss_block: tokens at a time in the LM head and the cross entropy; "auto" takes as many as make their logits
            as large as the hidden states of all tokens, None keeps the logits of all tokens.

    Raises:
        ValueError: if a value is unknown, or if `offload` names tensors that `attention` does not keep.
    """

    attention: str = "save"
    offload: str | None = None
    ffn_block: int | str | None = "auto"
    loss_block: int | str | None = "auto"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r} is not known. Choose one of {', '.join(ATTENTION)}.")
        if self.offload not in OFFLOAD:
            raise ValueError(f"offload={self.offload!r} is not known. Choose one of {', '.join(map(str, OFFLOAD))}.")
        allowed = {"attention": ("save",), "layers": ("save", "recompute"), "all": ("save",)}
        if self.offload is not None and self.attention not in allowed[self.offload]:
            raise ValueError(
                f"offload={self.offload!r} moves tensors that attention={self.attention!r} does not keep apart. Set "
                f"attention={' or '.join(map(repr, allowed[self.offload]))}, or offload=None."
            )
        for name in ("ffn_block", "loss_block"):
            block = getattr(self, name)
            is_number = isinstance(block, int) and not isinstance(block, bool) and block > 0
            if block not in ("auto", None) and not is_number:
                raise ValueError(f'{name}={block!r} must be a number of tokens, "auto" or None.')
