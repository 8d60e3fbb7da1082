"""The training runs of the launched script, one frozen `Case` each, with their models and data.

Shards hold unequal numbers of targets: rows differ in length, prompts have no labels, and with the data `hole` only
tokens predicted by rank 0 have labels, so that every other rank holds no target.
"""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ring_hf.geometry import shard_index
from ring_hf.hf.collate.default_collator import PadOrPackCollator

STATIC = ("contiguous", "zigzag", "striped")  # layouts that do not depend on documents
VOCABULARY = 64
LENGTH = 48  # a multiple of every layout's unit for 2 and 4 ranks
STEPS = 20 if os.environ.get("RING_HF_ALL_CASES") else 8


@dataclass(frozen=True)
class Case:
    """One run of the Trainer.

    Attributes:
        layout: a layout, or "ulysses"; None for one process with sdpa.
        cp, dp: ranks that share a sequence, and replicas.
        ulysses, inner: `ulysses_size` and `inner_ring_size` of the config.
        window: sliding window of a Mistral model, in tokens.
        data: "uneven", "hole" or "prefix", see `Rows`.
        hole_layout, hole_cp: labels are placed for the shards of this layout and number of ranks.
        checkpointing: activation checkpointing, "reentrant" or "non-reentrant".
        accumulation: micro-batches per optimizer step.
        batch: rows per optimizer step over all replicas.
        broken: a name of `BROKEN`, the mistake to make in the collator.
        learning_rate: one process agrees with itself at the default (`test_one_process_agrees_with_itself`).
    """

    name: str
    layout: str | None = None
    cp: int = 1
    dp: int = 1
    ulysses: int | str | None = None
    transport: str = "ring"
    inner: int = 1
    head_chunks: int = 1
    model: str = "llama"
    window: int | None = None
    data: str = "uneven"
    hole_layout: str | None = None
    hole_cp: int = 2
    packing: bool = False
    checkpointing: str | None = None
    accumulation: int = 2
    batch: int = 8
    bf16: bool = False
    lora: bool = False
    resume: bool = False
    workers: int = 0
    broken: str | None = None
    steps: int = STEPS
    learning_rate: float = 3e-4
    threads: int = 1

    def reference(self) -> "Case":
        """Return the same run in one process with the whole batch and `sdpa`. Its name lists its other settings."""
        plain = replace(self, layout=None, cp=1, dp=1, checkpointing=None, broken=None, resume=False, workers=0)
        plain = replace(plain, ulysses=None, transport="ring", inner=1, head_chunks=1)
        fields = {key: value for key, value in asdict(plain).items() if key != "name"}
        defaults = asdict(Case(""))
        return replace(plain, name="one:" + ",".join(f"{k}={v}" for k, v in fields.items() if v != defaults[k]))


def world_cases(world_size: int) -> list[Case]:
    """Return all runs of the launch with `world_size` processes."""
    meshes = {2: [(2, 1)], 4: [(4, 1), (2, 2)]}[world_size]
    cases = []
    for cp, dp in meshes:
        mesh = f"dp{dp}xcp{cp}"
        common = {"cp": cp, "dp": dp}
        for layout in STATIC:
            cases.append(Case(f"{mesh}-{layout}", layout, **common))
            hole = {"data": "hole", "hole_layout": layout, "hole_cp": cp}
            cases.append(Case(f"{mesh}-{layout}-hole", layout, **common, **hole, checkpointing="non-reentrant"))
        reentrant = {"checkpointing": "reentrant"}
        cases.append(Case(f"{mesh}-zigzag-packed", "zigzag", **common, packing=True, **reentrant))
    if world_size == 4:
        return cases + ALGORITHMS_OF_FOUR
    two: dict[str, Any] = {"cp": 2}
    for layout in STATIC:
        for checkpointing in ("reentrant", "non-reentrant"):
            cases.append(Case(f"cp2-{layout}-{checkpointing}", layout, **two, checkpointing=checkpointing))
        cases.append(Case(f"cp2-{layout}-packed", layout, **two, packing=True))
        cases.append(Case(f"cp2-{layout}-window-small", layout, **two, model="mistral", window=5))
        cases.append(Case(f"cp2-{layout}-window-large", layout, **two, model="mistral", window=30))
    cases += [
        Case("cp2-zigzag-packed-window", "zigzag", **two, model="mistral", window=7, packing=True),
        Case("cp2-zigzag-lora", "zigzag", **two, lora=True, checkpointing="non-reentrant"),
        Case("cp2-zigzag-bf16", "zigzag", **two, bf16=True, learning_rate=1e-4),
        Case("cp2-striped-workers", "striped", **two, workers=1),
        Case("cp2-zigzag-resume", "zigzag", **two, resume=True),
        Case("cp2-zigzag-shift-per-shard", "zigzag", **two, broken="shift-per-shard"),
        Case("cp2-zigzag-local-positions", "zigzag", **two, broken="local-positions"),
        Case("cp2-zigzag-no-documents", "zigzag", **two, packing=True, broken="no-documents"),
    ]
    return cases + ALGORITHMS_OF_TWO


# Every algorithm once or twice, crossed with packing, windows and checkpointing.
_WINDOW: dict[str, Any] = {"model": "mistral", "window": 7, "packing": True}
_AUTO: dict[str, Any] = {"transport": "auto"}
ALGORITHMS_OF_TWO = [
    Case("cp2-ulysses", "ulysses", 2, **_AUTO, checkpointing="non-reentrant"),
    Case("cp2-ulysses-chunks", "ulysses", 2, **_AUTO, head_chunks=2),
    Case("cp2-striped-allgather", "striped", 2, transport="allgather", checkpointing="reentrant"),
    Case("cp2-zigzag-direct-window", "zigzag", 2, transport="direct", model="mistral", window=5),
    Case("cp2-zigzag-auto", "zigzag", 2, **_AUTO),
    Case("cp2-balanced-packed", "balanced", 2, **_AUTO, packing=True, checkpointing="non-reentrant"),
    Case("cp2-balanced-packed-window", "balanced", 2, **_AUTO, **_WINDOW),
    Case("cp2-zigzag-prefix", "zigzag", 2, **_AUTO, data="prefix"),
    Case("cp2-zigzag-no-prefixes", "zigzag", 2, data="prefix", broken="no-prefixes"),
]
ALGORITHMS_OF_FOUR = [
    Case("cp4-zigzag-hybrid", "zigzag", 4, ulysses=2, checkpointing="non-reentrant"),
    Case("cp4-striped-hybrid-packed", "striped", 4, ulysses=2, packing=True),
    Case("cp4-zigzag-hybrid-chunks", "zigzag", 4, ulysses=2, head_chunks=2, packing=True, checkpointing="reentrant"),
    Case("cp4-zigzag-ulysses-auto", "zigzag", 4, ulysses="auto", **_AUTO),
    Case("cp4-ulysses", "ulysses", 4, **_AUTO),
    Case("cp4-zigzag-allgather", "zigzag", 4, transport="allgather"),
    Case("cp4-contiguous-direct-packed", "contiguous", 4, transport="direct", packing=True),
    Case("cp4-zigzag-double-ring", "zigzag", 4, transport="double_ring", inner=2, checkpointing="reentrant"),
    Case("cp4-balanced-packed", "balanced", 4, **_AUTO, packing=True),
    Case("cp4-balanced-hybrid-window", "balanced", 4, ulysses=2, transport="direct", **_WINDOW),
]


def reference_cases() -> list[Case]:
    """Return every distinct one-process run that a case is compared with, and those that show rounding."""
    references = {}
    for world_size in (2, 4):
        for case in world_cases(world_size):
            references[case.reference().name] = case.reference()
    return [*references.values(), *SELF_AGREEMENT, FP32_AT_THE_RATE_OF_BF16]


# One process with other rounding: another thread count, or the same batch in other micro-batches.
SELF_AGREEMENT = [
    replace(Case("one:two threads").reference(), name="one:two threads", threads=2),
    replace(Case("one:portions").reference(), name="one:portions", accumulation=1),
    replace(Case("", model="mistral", window=30).reference(), name="one:mistral portions", accumulation=1),
]
FP32_AT_THE_RATE_OF_BF16 = replace(Case("", learning_rate=1e-4).reference(), name="one:fp32 at the rate of bf16")


def attention_of(layout: str | None) -> str:
    return "sdpa" if layout is None else layout if layout == "ulysses" else f"ring_{layout}"


def build_model(case: Case) -> torch.nn.Module:
    """Return a random two-layer model with the same weights for every case of its kind."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # large enough for attention to be far from uniform from the first step on
        "attn_implementation": attention_of(case.layout),
    }
    if case.model == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=case.window))
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    if not case.lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


class Rows(torch.utils.data.Dataset):
    """`num_rows` rows of repeated tokens, so that attending far back helps.

    Args:
        data: which labels count: "uneven" leaves out prompts of different lengths, "hole" all labels that rank 0 does
            not predict, "prefix" the prefixes of a prefix LM.
        hole_layout, hole_cp: layout and ranks of the "hole".
    """

    def __init__(self, num_rows: int, data: str, hole_layout: str | None = None, hole_cp: int = 2, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for row in range(num_rows):
            length = LENGTH if data == "hole" else LENGTH - (row * 11) % 23
            period = 9 + row % 8
            tokens = torch.randint(1, VOCABULARY, (period,), generator=generator).repeat(length)[:length]
            labels = tokens.clone()
            if data == "uneven":
                labels[: (row * 13) % (length - 1)] = -100
            if data == "hole":
                assert hole_layout is not None
                predicted_by_rank_0 = torch.tensor(shard_index(hole_layout, LENGTH, hole_cp, 0)) + 1
                is_kept = torch.zeros(length + 1, dtype=torch.bool)
                is_kept[predicted_by_rank_0] = True
                labels[~is_kept[:length]] = -100
            self.rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
            if data == "prefix":
                prefix = (row * 7) % 20
                labels[:prefix] = -100
                self.rows[-1] |= {"labels": labels.tolist(), "prefix_length": prefix}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def pad_with_dense_prefixes(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the batch of one process with `sdpa`, with a boolean mask of shape [rows, 1, tokens, tokens]."""
    batch = PadOrPackCollator()([{key: row[key] for key in ("input_ids", "labels")} for row in features])
    index = torch.arange(batch["input_ids"].shape[1])
    later = torch.maximum(index[:, None], index)
    prefixes = torch.tensor([row["prefix_length"] for row in features])
    visible = (index <= index[:, None]) | (later < prefixes[:, None, None])
    return {**batch, "attention_mask": visible[:, None]}
