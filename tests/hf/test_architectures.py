"""Every causal language model of Transformers: exact under context parallelism, or refused before anything is
computed.

For each family of `architectures.EXACT`, two processes share padded sequences: logits, loss and the gradients of all
parameters must be those of one process, with Transformers' own "eager" attention (which takes softmax in fp32: hence
the tolerance) and with the ring backend in one process.
"""

import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ring_hf.hf import ContextParallelCollator, context, guard_model
from ring_hf.hf.evaluation import Evaluator
from ring_hf.hf.models import MODEL_RULES
from ring_hf.hf.supported import first_error
from ring_hf.parallel import all_gather, join, register_group
from scripts.architectures import with_table
from tests.harness import ROOT, rms_ratio, run_distributed
from tests.hf.architectures import (
    EXACT,
    REASONS,
    ROUTED,
    ROUTER_LOSS,
    SIZES,
    UNTESTED,
    dropouts,
    exact_families,
    refused,
    refused_families,
    tiny,
)

LENGTHS = (40, 33)
# Relative RMS of logits, difference of the loss, and the worst relative RMS of any parameter's gradient.
EAGER = (2e-6, 2e-6, 2e-5)
LOCAL = (1e-6, 2e-6, 2e-6)


def examples() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist()} for n in LENGTHS]


def compare(rank: int, world_size: int, names: list[str], settings: dict) -> dict[str, tuple | str]:
    """Per family the three differences, or the error. Rank 0's reference is eager, rank 1's the backend in one
    process."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    return {name: _compare(rank, world_size, name, settings) for name in names}


def _compare(rank: int, world_size: int, name: str, settings: dict) -> tuple | str:
    assert dist.group.WORLD is not None
    group = register_group(dist.group.WORLD)
    made: dict[str, Any] = {}
    for stage in (_reference, _shard):
        error = None
        try:
            stage(made, rank, world_size, name, settings, group)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        finally:
            context.activate(None)
        errors: list[str | None] = [None] * world_size
        dist.all_gather_object(errors, error)
        if any(errors):
            return str(error or f"on the other rank: {errors[1 - rank]}")
    reference, shard = made["reference"], made["shard"]
    segments = [made["sequence"].segments(other) for other in range(world_size)]
    logits = join(all_gather(shard.logits, group), segments, 1)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    loss = torch.stack(all_gather(shard.loss, group)).sum()
    worst = (0.0, "")
    for (label, found), wanted in zip(made["ring"].named_parameters(), made["whole"].parameters(), strict=True):
        gradient = torch.stack(all_gather(_gradient(found), group)).sum(0)
        worst = max(worst, (_apart(gradient, _gradient(wanted)), label))
    aux_loss = getattr(reference, "aux_loss", None)
    return (
        rms_ratio(logits[:, : max(LENGTHS)][real], reference.logits[real]),
        ((loss - reference.loss).abs() / reference.loss).item(),
        *worst,
        None if aux_loss is None else aux_loss.item(),
    )


def _reference(made: dict, rank: int, world_size: int, name: str, settings: dict, group: str) -> None:
    """One process: eager attention on rank 0, the ring backend on rank 1."""
    model = tiny(name, "ring_zigzag" if rank else "eager", **settings).train()
    ring = tiny(name, "ring_zigzag", **settings).train()
    batch = ContextParallelCollator(ring)(examples())
    count = int((batch["labels"][:, 1:] != -100).sum())
    output = model(**batch, num_items_in_batch=count, use_cache=False)
    output.loss.backward()
    made.update(whole=model, ring=ring, count=count, reference=output)


def _shard(made: dict, rank: int, world_size: int, name: str, settings: dict, group: str) -> None:
    process = context.ProcessContext(world_size, rank, 1, 0, group, None)
    context.activate(process, Evaluator(process))
    guard_model(made["ring"])
    batch = ContextParallelCollator(made["ring"])(examples())
    output = made["ring"](**batch, num_items_in_batch=made["count"], use_cache=False)
    output.loss.backward()
    made.update(shard=output, sequence=batch["context_parallel"].sequence)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative RMS; NaN becomes infinite, and a gradient that is 0 but for rounding is compared with 1."""
    ratio = rms_ratio(found, wanted) if wanted.abs().max() > 1e-9 else found.abs().max().item()
    return ratio if ratio == ratio else float("inf")


def check(results: list[dict[str, tuple | str]], names: list[str]) -> None:
    """Every family as close as the bar asks, to both references; names all that are not."""
    wrong = []
    for (reference, bar), found in zip((("eager", EAGER), ("local", LOCAL)), results, strict=True):
        for name in names:
            apart = found[name]
            if isinstance(apart, str):
                wrong.append(f"{name}: {apart}")
            elif not all(value <= limit for value, limit in zip(apart[:3], bar, strict=True)):
                differences = "logits {:.1e}, loss {:.1e}, gradients {:.1e} ({})".format(*apart)
                wrong.append(f"{name} against {reference}: {differences}")
    assert not wrong, "\n".join(wrong)


def test_exact_families_equal_one_process():
    names = list(EXACT)
    check(run_distributed(2, compare, names, {}, timeout=200), names)


def test_every_family_of_transformers_has_a_verdict():
    exact = exact_families()
    verdicts = [exact, set(refused_families()), set(UNTESTED)]
    assert set.union(*verdicts) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sum(map(len, verdicts)) == len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "a family has two verdicts"
    assert len(exact) >= 100


@pytest.mark.parametrize("reason", REASONS)
def test_refused_families_get_the_reason(reason):
    wrong = []
    for family, why in refused_families().items():
        if why == reason:
            message = verdict(family)
            if not re.search(REASONS[reason][1], message):
                wrong.append(f"{family}: {message}")
    assert not wrong, "\n".join(wrong)
    assert set(refused_families().values()) == set(REASONS)


def verdict(family: str) -> str:
    """What the rules say, or what keeps Transformers itself from building the model."""
    try:
        return first_error(MODEL_RULES, refused(family)) or "accepted"
    except (AttributeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def test_readme_says_what_these_tables_say():
    text = (ROOT / "README.md").read_text()
    assert with_table(text) == text, "run: python scripts/architectures.py"
    assert f"{len(exact_families())} families exact ({len(EXACT)} configurations)" in text
    assert all(name in text for name in [*EXACT, *refused_families(), *UNTESTED])


def test_default_dropout_is_refused_before_anything_is_computed():
    """Families that drop attention weights or anything else by default, as their configurations come."""
    found, wrong = 0, []
    for name in EXACT:
        default = CONFIG_MAPPING[name.split("/")[0]]()
        active = {key: value for key, value in dropouts(default).items() if value > 0}
        if active and "/" not in name:
            found += 1
            with torch.device("meta"):
                message = first_error(MODEL_RULES, tiny(name, "ring_zigzag", dropout=True))
            if message is None or "drop" not in message:
                wrong.append(f"{name} with {active}: {message}")
    assert not wrong, "\n".join(wrong)
    assert found >= 10


def test_auxiliary_losses_of_routers_are_those_of_the_whole_sequence():
    """Padding excluded; loss and gradients of all families whose loss contains one, with a coefficient that shows."""
    results = run_distributed(2, compare, ROUTED, ROUTER_LOSS, timeout=100)
    check(results, ROUTED)
    for name in ROUTED:
        assert all(found[name][4] > 0 for found in results), f"{name} has no auxiliary loss"
