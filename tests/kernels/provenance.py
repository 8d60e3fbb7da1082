"""The sources in which the API variants of FlashAttention were read, as listed in README.md."""

from dataclasses import dataclass

_FLASH_2_FILE = "flash_attn/flash_attn_interface.py"
_FLASH_3_FILE = "hopper/flash_attn_interface.py"
_FLASH_4_FILE = "flash_attn/cute/interface.py"
_HUB = "huggingface/kernels-community"


@dataclass(frozen=True)
class Provenance:
    """Tags or a commit of a repository, a file, and the line of each function, in the order of the variant."""

    tags: str
    lines: tuple[int, ...]
    file: str
    repository: str = "Dao-AILab/flash-attention"


# Tags -> line of forward, line of backward.
_FLASH_4_LINES = {
    "beta0 to beta4": (99, 577),
    "beta5, beta6": (288, 953),
    "beta7, beta8": (297, 968),
    "beta9": (281, 1058),
    "beta10": (282, 1150),
    "beta11": (286, 1183),
    "beta12": (286, 1205),
    "beta13": (287, 1207),
    "beta14, beta15": (292, 1208),
    "beta16": (292, 1250),
    "beta17, beta18": (294, 1250),
    "beta19": (297, 1305),
    "beta20": (297, 1292),
    "beta21": (297, 1294),
    "beta22 to beta24": (299, 1308),
    "beta25": (515, 1721),
    "beta26, beta27": (521, 1807),
}
# Kernel -> for each of its variants, in the order of the adapter, all sources that were read.
PROVENANCE: dict[str, tuple[tuple[Provenance, ...], ...]] = {
    "flash_attn_3": (
        (Provenance("0251105a (2025-09 and later)", (60, 259), _FLASH_3_FILE),),
        (Provenance("v2.8.0 to v2.8.3.post1", (20, 104), _FLASH_3_FILE),),
    ),
    "flash_attn_4": (
        tuple(Provenance(f"fa4-v4.0.0.{tags}", lines, _FLASH_4_FILE) for tags, lines in _FLASH_4_LINES.items()),
    ),
    "flash_attn_2": (
        (Provenance("v2.6.2, v2.6.3", (48, 70, 118, 168), _FLASH_2_FILE),),
        (
            Provenance("v2.7.0 to v2.7.0.post2", (77, 143, 236, 328), _FLASH_2_FILE),
            Provenance("v2.7.1 to v2.7.2.post1", (82, 148, 241, 333), _FLASH_2_FILE),
            Provenance("v2.7.3 to v2.7.4.post1", (82, 148, 243, 335), _FLASH_2_FILE),
            Provenance("v2.8.0 to v2.8.3.post1", (77, 143, 238, 330), _FLASH_2_FILE),
            Provenance("0251105a (2.8.4)", (85, 154, 253, 348), _FLASH_2_FILE),
        ),
    ),
    "kernels-community/flash-attn2": (
        (
            Provenance(
                "40d4194f", (85, 164, 264, 358), "flash-attn2/torch-ext/flash_attn2/flash_attn_interface.py", _HUB
            ),
        ),
    ),
    "kernels-community/flash-attn3": (
        (Provenance("40d4194f", (41, 240), "flash-attn3/torch-ext/flash_attn3/flash_attn_interface.py", _HUB),),
    ),
    "kernels-community/vllm-flash-attn3": (
        (
            Provenance(
                "40d4194f", (19, 103), "vllm-flash-attn3/torch-ext/vllm_flash_attn3/flash_attn_interface.py", _HUB
            ),
        ),
    ),
    "kernels-community/flash-attn4": (
        (Provenance("40d4194f", (297, 968), "flash-attn4/torch-ext/flash_attn4/interface.py", _HUB),),
    ),
}
