"""Documented examples: figures of papers and talks about long context, recomputed.

Where a paper's figure differs from its own formula, both are shown, with a note.

Letters: s sequence length, h hidden size, b batch, n heads, c block, F FLOP/s, B bytes/s.
"""

from dataclasses import dataclass

from ..text import format_tokens, markdown_table, wrap_prose
from .ring_thresholds import min_tokens_to_overlap

GB = 1e9


def make_hundred_million_table() -> str:
    """Return the bytes of a layer at 100M tokens and hidden size 1,024, more than 1,000 GB, as Markdown."""
    length, hidden, element, heads = 10**8, 1024, 2, 8
    elements = length * hidden

    def row(name: str, num_elements: int, num_bytes: int) -> list[str]:
        return [name, f"{num_elements:.3g}", f"{num_bytes / GB:,.1f}"]

    rows = [["tensors that a layer keeps for its backward", "elements", "GB"]]
    rows += [row(f"{name} (s x h)", elements, elements * element) for name in ("q", "k", "v", "out", "dout")]
    rows.append(row("together", 5 * elements, 5 * elements * element))
    rows.append(row(f"lse, {heads} heads in fp32 (s x {heads})", length * heads, length * heads * 4))
    rows.append(row("MLP of 4 h (8 b s h bytes)", 4 * elements, 4 * elements * element))
    note = (
        "100,000,000 tokens x 1,024 x 2 bytes = 204.8 GB per tensor, batch 1. FlashAttention makes memory linear, "
        "but q, k, v, the output and its gradient (or the outputs of five layers) are 1,024 GB: more than any device "
        "has, with any kernel. Ring Attention (arXiv 2310.01889) states the sum, not its terms; these five are those "
        "of the CUDA-MODE lecture. With N ranks, each holds 1 / N of every row."
    )
    return f"{markdown_table(rows)}\n\n{wrap_prose(note)}"


@dataclass(frozen=True)
class Interconnect:
    """A row of Ring Attention's table 2.

    Attributes:
        flops: peak FLOP/s.
        memory: GB of a device.
        bandwidth: bytes/s one way.
        block, sequence: the printed minimal block and sequence length, in thousands of tokens.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    block: float
    sequence: float


INTERCONNECTS = (
    Interconnect("A100 NVLink", 312e12, 80, 300e9, 1.0, 6.2),
    Interconnect("A100 InfiniBand", 312e12, 80, 12.5e9, 24.5, 149.5),
    Interconnect("TPU v3", 123e12, 16, 112e9, 1.1, 6.6),
    Interconnect("TPU v4", 275e12, 32, 268e9, 1.0, 6.2),
    Interconnect("TPU v5e", 196e12, 16, 186e9, 1.1, 6.3),
)


def make_ring_attention_2_table() -> str:
    """Return Ring Attention's table 2 as Markdown: minimal block and sequence per device, also with grouped heads."""
    header = ["interconnect", "TFLOP/s", "GB/s", "block F / B", "printed", "sequence 6 F / B", "printed"]
    header += ["causal", "causal, 4 query heads per key head", "backward"]
    rows = [header]
    for link in INTERCONNECTS:
        rates = link.flops, link.bandwidth
        block = min_tokens_to_overlap(*rates)
        causal = min_tokens_to_overlap(*rates, mask="causal")
        grouped = min_tokens_to_overlap(*rates, grouping=0.25, mask="causal")
        grouped_backward = min_tokens_to_overlap(*rates, grouping=0.25, mask="causal", backward=True)
        figures = [f"{link.flops / 1e12:.0f}", f"{link.bandwidth / 1e9:g}", f"{block:,.0f}", f"{link.block}K"]
        figures += [f"{6 * block:,.0f}", f"{link.sequence}K"]
        figures += [f"{tokens:,.0f}" for tokens in (causal, grouped, grouped_backward)]
        rows.append([link.name, *figures])
    note = (
        "A block of c tokens computes 4 d c^2 FLOPs while 4 c d bytes are sent (keys and values in bf16), so c >= F / "
        "B; six blocks are on a device. This holds for a full mask and as many key/value as query heads. Evenly "
        "balanced causal work halves the compute, grouped heads divide the bytes; the backward sends fp32 gradients "
        "and has 2.5 times the compute. Erratum: for InfiniBand the paper prints 24.5K, its formula gives 24,960 "
        "(149.5K is 6 x 24,917)."
    )
    return f"{markdown_table(rows)}\n\n{wrap_prose(note)}"


def make_ring_attention_1_table(batch: int = 1, length: int = 2**20, hidden: int = 4096, heads: int = 32) -> str:
    """Return Ring Attention's table 1 as Markdown: peak activations of a layer, for the ring on 8 ranks.

    Args:
        length: tokens of the whole sequence.
    """
    b, s, h, n, c = batch, length, hidden, heads, length // 8
    rows = [["layer", "attention", "GB", "FFN", "GB", "the larger, GB"]]

    def add_row(name: str, attention: str, attention_bytes: int, ffn: str, ffn_bytes: int) -> None:
        figures = [f"{num_bytes / GB:,.3g}" for num_bytes in (attention_bytes, ffn_bytes)]
        rows.append([name, attention, figures[0], ffn, figures[1], f"{max(attention_bytes, ffn_bytes) / GB:,.3g}"])

    add_row("vanilla", "2 b n s^2", 2 * b * n * s * s, "8 b s h", 8 * b * s * h)
    add_row("memory-efficient attention", "2 b s h + 4 b c h", 2 * b * s * h + 4 * b * c * h, "8 b s h", 8 * b * s * h)
    add_row("and blockwise FFN (BPT)", "2 b s h", 2 * b * s * h, "2 b s h", 2 * b * s * h)
    add_row("Ring Attention, per rank", "6 b c h (elements)", 12 * b * c * h, "2 b c h (elements)", 4 * b * c * h)
    note = (
        f"In bf16, b = {b}, s = {s:,}, h = {h:,}, n = {n}, c = s / 8 = {c:,}. Errata: the paper prints the vanilla "
        "total as 2 b h s^2 where the score matrix is 2 b n s^2; and 6 b c h as bytes, where six blocks of c x h "
        "elements in bf16 are 12 b c h bytes (shown here)."
    )
    return f"{markdown_table(rows)}\n\n{wrap_prose(note)}"


APPENDIX_D = {"7B": 4096, "13B": 5120, "33B": 7168, "65B": 8192, "175B": 12288, "1TB": 36864}
APPENDIX_D_LENGTHS = tuple(4096 * factor for factor in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 3072, 32768))


def appendix_d_ratio(hidden: int, length: int, causal: bool = False, base: int = 4096) -> float:
    """Return the FLOPs of a token at `length` over those at `base`, for a Transformer with 12 h^2 weights per layer.

    A layer has `24 s h^2 + 4 s^2 h` FLOPs (the whole layer, not its FFN alone), a causal one half the second term: the
    ratio is `(6 h + s) / (6 h + base)`, causal `(12 h + s) / (12 h + base)`.
    """
    weights = (12 if causal else 6) * hidden
    return (weights + length) / (weights + base)


def make_appendix_d_table() -> str:
    """Return Ring Attention's appendix D as Markdown: cost per token against 4K, without and with a causal mask."""
    tables = []
    for causal in (False, True):
        rows = [["causal" if causal else "not causal (as printed)", "h", *map(format_tokens, APPENDIX_D_LENGTHS)]]
        for name, hidden in APPENDIX_D.items():
            ratios = [f"{appendix_d_ratio(hidden, length, causal):.1f}" for length in APPENDIX_D_LENGTHS]
            rows.append([name, f"{hidden:,}", *ratios])
        tables.append(markdown_table(rows))
    note = (
        "FLOPs per token relative to a context of 4K, for the same number of tokens: the larger the model, the "
        "smaller the cost of length. The paper's rows count attention without a causal mask; with one the cost is "
        'nearly half. It prints h = 5,140 for 13B (5,120), and calls 3,072 x 4K = 12.6M "10M" and 32,768 x 4K = '
        '134M "100M".'
    )
    return "\n\n".join((*tables, wrap_prose(note)))
