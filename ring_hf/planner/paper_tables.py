"""Documented examples: the numbers that papers and talks about long context state, worked out.

Where a paper's figure is not what its own formula gives, both are shown and the difference is said.

Letters: s sequence length, h hidden size, b batch, n heads, c block, F FLOP/s, B bytes/s.
"""

from dataclasses import dataclass

from ..text import format_tokens, markdown_table, wrap_prose
from .ring_thresholds import least_tokens

GB = 1e9


def hundred_million_table() -> str:
    """How 100M tokens at hidden size 1,024 come to more than 1,000 GB."""
    length, hidden, element, heads = 10**8, 1024, 2, 8
    each = length * hidden * element
    rows = [["what one layer must hold for backward", "elements", "GB"]]
    rows += [
        [f"{name} (s x h)", f"{length * hidden:.3g}", f"{each / GB:.1f}"] for name in ("q", "k", "v", "out", "dout")
    ]
    rows.append(["together", f"{5 * length * hidden:.3g}", f"{5 * each / GB:,.1f}"])
    rows.append(
        [f"lse, {heads} heads in fp32 (s x {heads})", f"{length * heads:.3g}", f"{length * heads * 4 / GB:.1f}"]
    )
    rows.append(["MLP of 4 h (8 b s h bytes)", f"{4 * length * hidden:.3g}", f"{4 * each / GB:.1f}"])
    said = (
        "100,000,000 tokens x 1,024 x 2 bytes = 204.8 GB per tensor, batch 1. FlashAttention makes memory linear, "
        "but q, k, v, the output and its gradient (or five layers' outputs) are 1,024 GB: more than any device, "
        "whatever the kernel. Ring Attention (arXiv 2310.01889) states the sum, not its terms; these five are the "
        "CUDA-MODE lecture's. Shared by N ranks each holds 1 / N of every line."
    )
    return f"{markdown_table(rows)}\n\n{wrap_prose(said)}"


@dataclass(frozen=True)
class Interconnect:
    """A row of Ring Attention's table 2: peak, memory, one-way bandwidth, and what it prints (in thousands)."""

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


def ring_attention_2_table() -> str:
    """Ring Attention's table 2: minimal block and sequence per device, recomputed; and for today's heads."""
    head = ["interconnect", "TFLOP/s", "GB/s", "block F / B", "printed", "sequence 6 F / B", "printed"]
    head += ["causal", "causal, 4 query heads a key head", "backward"]
    rows = [head]
    for link in INTERCONNECTS:
        block = least_tokens(link.flops, link.bandwidth)
        causal = least_tokens(link.flops, link.bandwidth, mask="causal")
        grouped = [least_tokens(link.flops, link.bandwidth, 0.25, "causal", backward) for backward in (False, True)]
        figures = [f"{link.flops / 1e12:.0f}", f"{link.bandwidth / 1e9:g}", f"{block:,.0f}", f"{link.block}K"]
        figures += [f"{6 * block:,.0f}", f"{link.sequence}K", f"{causal:,.0f}", *(f"{x:,.0f}" for x in grouped)]
        rows.append([link.name, *figures])
    said = (
        "A block of c tokens computes 4 d c^2 FLOPs while 4 c d bytes travel (keys and values in bf16), so c >= F / "
        "B; six blocks are on a device. That is the case of a full mask and as many key/value as query heads. "
        "Causal work dealt evenly halves the compute, grouped heads divide the bytes; backward moves fp32 gradients "
        "beside 2.5 times the compute. Erratum: for InfiniBand the paper prints 24.5K, its formula gives 24,960 "
        "(149.5K is 6 x 24,917)."
    )
    return f"{markdown_table(rows)}\n\n{wrap_prose(said)}"


def ring_attention_1_table(batch: int = 1, length: int = 2**20, hidden: int = 4096, heads: int = 32) -> str:
    """Ring Attention's table 1, maximum activation of a layer, with numbers; the length over 8 ranks for the ring."""
    block = length // 8
    b, s, h, n, c = batch, length, hidden, heads, block
    found = (
        ("vanilla", "2 b n s^2", 2 * b * n * s * s, "8 b s h", 8 * b * s * h),
        ("memory-efficient attention", "2 b s h + 4 b c h", 2 * b * s * h + 4 * b * c * h, "8 b s h", 8 * b * s * h),
        ("and blockwise FFN (BPT)", "2 b s h", 2 * b * s * h, "2 b s h", 2 * b * s * h),
        ("Ring Attention, a rank", "6 b c h (elements)", 12 * b * c * h, "2 b c h (elements)", 4 * b * c * h),
    )
    rows = [["layer", "attention", "GB", "FFN", "GB", "the larger, GB"]]
    for name, attention, first, ffn, second in found:
        figures = [f"{x / GB:,.3g}" for x in (first, second)]
        rows.append([name, attention, figures[0], ffn, figures[1], f"{max(first, second) / GB:,.3g}"])
    said = (
        f"In bf16, b = {b}, s = {s:,}, h = {h:,}, n = {n}, c = s / 8 = {c:,}. Errata: the paper prints the vanilla "
        "total as 2 b h s^2 where the score matrix is 2 b n s^2; and 6 b c h as bytes, where six blocks of c x h "
        "elements in bf16 are 12 b c h bytes (shown here)."
    )
    return f"{markdown_table(rows)}\n\n{wrap_prose(said)}"


APPENDIX_D = {"7B": 4096, "13B": 5120, "33B": 7168, "65B": 8192, "175B": 12288, "1TB": 36864}
APPENDIX_D_LENGTHS = tuple(4096 * factor for factor in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 3072, 32768))


def appendix_d_ratio(hidden: int, length: int, causal: bool = False, base: int = 4096) -> float:
    """FLOPs of a token at `length` over those at `base`, for a Transformer of 12 h^2 weights a layer.

    A layer takes `24 s h^2 + 4 s^2 h` FLOPs (the whole layer, not its FFN alone), causal half the second term: the
    ratio is `(6 h + s) / (6 h + base)`, causal `(12 h + s) / (12 h + base)`.
    """
    weights = (12 if causal else 6) * hidden
    return (weights + length) / (weights + base)


def appendix_d_table() -> str:
    """Ring Attention's appendix D: cost per token against 4K, and the same with a causal mask."""
    parts = []
    for causal in (False, True):
        rows = [["causal" if causal else "not causal (as printed)", "h", *map(format_tokens, APPENDIX_D_LENGTHS)]]
        for name, hidden in APPENDIX_D.items():
            ratios = [f"{appendix_d_ratio(hidden, length, causal):.1f}" for length in APPENDIX_D_LENGTHS]
            rows.append([name, f"{hidden:,}", *ratios])
        parts.append(markdown_table(rows))
    said = (
        "FLOPs per token relative to a context of 4K, for the same number of tokens: the larger the model, the "
        "smaller the price of length. The paper's rows count attention without a causal mask; with one the price is "
        'nearly half. It prints h = 5,140 for 13B (5,120), and calls 3,072 x 4K = 12.6M "10M" and 32,768 x 4K = '
        '134M "100M".'
    )
    return "\n\n".join((*parts, wrap_prose(said)))
