"""Messages about calls that a sharded sequence cannot have, each written once.

The checks of a pass (`hf/checks`) raise them on all ranks together, before the model runs. The backend raises them at
a layer, for arguments that a model adds on the way and for calls that the guard does not see.
"""

from ..batch_metadata import METADATA_KEY, ContextParallelMetadata

MISSING_METADATA = (
    f"Sequences are shared by several ranks, but this training batch carries no {METADATA_KEY!r}: it "
    "did not come from ContextParallelCollator. Pass data_collator=ContextParallelCollator(model) to the Trainer, "
    "with inner= for a collator of your own, or collate_fn=... to the DataLoader."
)
UNCHECKED_BATCH = (
    "A sharded batch reached an attention layer without passing the checks of ring_hf, which compare it between ranks "
    "and sum its loss. Either a wrapper calls model.forward(...) instead of model(...) (PEFT does so before "
    "0.21, and for AdaLoRA and AdaptionPrompt): use another wrapper. Or this is a second model or a training loop of "
    "your own: call ring_hf.guard_model(model) first."
)
OUTPUT_ATTENTIONS = (
    "output_attentions=True needs the attention matrix, which ring attention never builds. Set it to False, or "
    "inspect a short sequence with attn_implementation='eager'."
)

CHUNKS_OF_PACKED_ROWS = (
    "Packed documents reached a layer that attends inside chunks. Transformers before 5.23 counts chunks from the "
    "first token of a row, ring_hf counts them from the first token of each document as later releases do, so losses "
    "would differ. Install Transformers 5.23 or newer, or train without packing."
)


def attention_mask_error(argument: str) -> str:
    """Return the message for an attention mask beside a sharded batch; `argument` describes it."""
    return (
        f"{argument} reached a sharded sequence. Padding and documents travel in the batch that "
        "ContextParallelCollator made; do not pass attention_mask beside it."
    )


def kv_cache_error(argument: str) -> str:
    """Return the message for a KV cache beside a sharded batch; `argument` says how it shows."""
    return (
        f"{argument}: a KV cache cannot be combined with sharded sequences. Pass use_cache=False and no "
        "past_key_values."
    )


def layout_error(backend: str, batch: ContextParallelMetadata, degrees: str = "") -> str:
    """Return the message for a batch that was sharded for another layout, or for other degrees of parallelism."""
    return (
        f"The model attends with {backend!r}, but the batch was sharded for layout {batch.sequence.layout!r}{degrees}."
        " Build the collator from the model that is trained, after its last set_attn_implementation call."
    )


def shard_length_error(num_tokens: int, batch: ContextParallelMetadata) -> str:
    """Return the message for a shard that has lost or gained tokens."""
    return (
        f"This rank got {num_tokens} tokens, but its {batch.sequence.layout} shard of {batch.sequence.length} tokens "
        f"has {batch.shard_length}. Do not cut or pad the batch after ContextParallelCollator."
    )
