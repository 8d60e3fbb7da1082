"""Perplexity over shards is that of one process, token by token; windows predict every token once; a check of short
text warns when it is predicted worse."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from ring_hf.evaluation.perplexity_report import plot_positions
from ring_hf.evaluation.short_context import (
    automatic_length,
    check_short_context,
    warnings_of,
    with_short_context,
)
from ring_hf.evaluation.sliding_perplexity import (
    PerplexitySpec,
    measure_perplexity,
    read_perplexity,
    sliding_windows,
)
from ring_hf.evaluation.task_registry import TASKS, split_tasks
from ring_hf.evaluation.token_losses import TokenLosses
from ring_hf.hf import ContextParallelConfig, context
from ring_hf.memory.lazy_logits import LazyLogits
from ring_hf.verify.model_families import tiny
from tests.hf.double_precision import DoublePrecision
from tests.support.harness import run_distributed

SPEC = PerplexitySpec((8, 16, 48), max_tokens=100)
ORIGIN = {"model": "a"}


def excerpts(num_excerpts=2, length=48):
    return torch.randint(3, 60, (num_excerpts, length), generator=torch.Generator().manual_seed(0))


def whole_losses(model, ids_BS):
    logits = model(input_ids=ids_BS, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="none").view(
        len(ids_BS), -1
    )


@pytest.mark.parametrize(("size", "attention"), [(2, "ring_zigzag"), (3, "ring_striped"), (2, "ulysses")])
def test_losses_of_shards_are_those_of_one_process(size, attention):
    for differences, largest in run_distributed(size, compare_losses, attention):
        assert max(differences.values()) < 1e-12, differences
        assert largest <= 4  # logits of one block at a time


def share_sequences(size):
    """Let the processes share sequences, as a script does."""
    Accelerator(cpu=True, parallelism_config=ContextParallelConfig(context_parallel_size=size))


def compare_losses(rank, size, attention):
    """Return the largest difference by family (windows of an odd length, too), and the most tokens with logits."""
    share_sequences(size)
    torch.set_default_dtype(torch.float64)
    differences, sizes = {}, []
    compute = LazyLogits.logits_of

    def counted(self, hidden):
        sizes.append(hidden.shape[:-1].numel())
        return compute(self, hidden)

    LazyLogits.logits_of = counted
    precision = DoublePrecision()
    precision.__enter__()
    try:
        for name in ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"):
            model = tiny(name, attention).eval()
            for ids in (excerpts(), excerpts(1, 37)):
                with context.whole_sequences(), torch.no_grad():
                    expected = whole_losses(model, ids)
                    alone = TokenLosses(model, 4)(ids)
                shared = TokenLosses(model, 4)(ids)
                for losses in (alone, shared):
                    assert losses.shape == expected.shape
                    key = f"{name} {tuple(ids.shape)}"
                    difference = (losses - expected).abs().max().item()
                    differences[key] = max(difference, differences.get(key, 0.0))
            assert "forward" not in vars(model.get_output_embeddings())
    finally:
        precision.__exit__(None, None, None)
        context.reset()
        LazyLogits.logits_of = compute
        torch.set_default_dtype(torch.float32)
    return differences, max(sizes)


def test_ranks_that_hold_other_windows_are_refused():
    for message in run_distributed(2, refuse_other_windows):
        assert "disagree" in message or "differ" in message, message


def refuse_other_windows(rank, size):
    share_sequences(size)
    model = tiny("llama", "ring_zigzag").float().eval()
    try:
        with pytest.raises(ValueError) as caught:
            TokenLosses(model)(excerpts() + rank)
    finally:
        context.reset()
    return str(caught.value)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        TokenLosses(tiny("llama", "sdpa").train())


@given(st.integers(2, 60), st.data())
def test_windows_predict_every_token_once_with_enough_before_it(num_tokens, data):
    length = data.draw(st.integers(2, num_tokens))
    stride = data.draw(st.integers(1, length - 1))
    predicted = []
    for start, first in sliding_windows(num_tokens, length, stride):
        assert 0 <= start <= num_tokens - length and start < first < start + length
        assert start == 0 or first - start >= length - stride
        predicted += range(first, start + length)
    assert predicted == list(range(1, num_tokens))


def by_previous_token(ids_BL):
    """Losses that depend on the number of preceding tokens and on the token before."""
    positions = torch.arange(1, ids_BL.shape[1], dtype=torch.float64)
    return positions.log2()[None] + ids_BL[:, :-1] / 100


def test_means_are_over_tokens_and_by_position(tmp_path):
    text = excerpts()
    done = read_perplexity(tmp_path / "a", SPEC, ORIGIN)
    result = measure_perplexity(text, by_previous_token, tmp_path / "a", done=done, tokens_per_batch=24)
    assert result.is_complete and SPEC.num_excerpts == 2
    for length in SPEC.lengths:
        expected = []
        for row, (start, first) in itertools.product(text, sliding_windows(48, length, length // 2)):
            losses = by_previous_token(row[None, start : start + length])[0]
            expected += [(p - start, losses[p - start - 1].item()) for p in range(first, start + length)]
        measured = result.at_length(length)
        assert measured.num_tokens == len(expected) == 2 * 47
        assert measured.loss == pytest.approx(sum(loss for _, loss in expected) / len(expected), abs=1e-12)
        second = [loss for position, loss in expected if 2 <= position <= 3]
        assert measured.position_losses[1] == pytest.approx(sum(second) / len(second), abs=1e-12)
    plot_positions({"a": result.at_length(48), "b": result.at_length(16)}, tmp_path / "plots" / "positions.png")
    assert (tmp_path / "plots" / "positions.png").stat().st_size > 10_000


def test_a_measurement_that_was_killed_continues(tmp_path):
    path, calls = tmp_path / "a.jsonl", []

    def losses_of(ids):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(ids)
        return by_previous_token(ids)

    with pytest.raises(KeyboardInterrupt):
        measure_perplexity(excerpts(), losses_of, path, done=read_perplexity(path, SPEC, ORIGIN))
    with path.open("a") as file:
        file.write('{"length": 16, "exc')
    done = read_perplexity(path, SPEC, ORIGIN)
    assert len(done.losses) == 3 and not done.is_complete
    result = measure_perplexity(excerpts(), by_previous_token, path, done=done)
    assert result.losses.items() >= done.losses.items() and len(result.losses) == 6
    again = read_perplexity(path, SPEC, ORIGIN)
    assert again == result and again.is_complete
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 7
    with pytest.raises(ValueError, match="holds results of other settings"):
        read_perplexity(path, replace(SPEC, stride=3), ORIGIN)
    with pytest.raises(ValueError, match="was measured on another text"):
        measure_perplexity(excerpts() + 1, by_previous_token, path, done=again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lengths": ()}, "ascending"), ({"lengths": (16, 8)}, "ascending"), ({"stride": 8}, "below the shortest")],
)
def test_texts_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **settings)


def test_short_text_that_is_predicted_worse_is_reported(tmp_path):
    def measured(name, factor, text):
        done = read_perplexity(tmp_path / name, SPEC, ORIGIN)
        return measure_perplexity(text, lambda ids: factor * by_previous_token(ids), tmp_path / name, done=done)

    results = {name: measured(name, factor, excerpts()) for name, factor in (("old", 1), ("new", 1.1), ("good", 1.01))}
    results["other"] = measured("other", 1, excerpts() + 1)
    checks = check_short_context(results, 8, "old", margin=0.03)
    assert {name: check.is_worse for name, check in checks.items()} == {
        "old": False,
        "new": True,
        "good": False,
        "other": False,
    }
    assert checks["new"].change == pytest.approx(math.exp(0.1 * results["old"].at_length(8).loss) - 1)
    sentences = warnings_of(checks, "old", 0.03)
    assert len(sentences) == 2 and sentences[0].startswith("new predicts short text worse than old")
    assert sentences[1].startswith("other has other tokens")
    table = with_short_context([["model", "1"], ["old", "a"], ["new", "b"]], checks, 0)
    assert table[0] == ["model", "1", "short context (8)"]
    assert table[1][2] == f"{checks['old'].perplexity:.2f}" and table[2][2].endswith("%, worse)")
    with pytest.raises(ValueError, match="reference='older' is none of the models"):
        check_short_context(results, 8, "older", 0.03)
    assert [automatic_length(length) for length in (None, 128, 1024, 131072)] == [512, 512, 1024, 2048]


def test_all_tasks_are_in_one_registry():
    assert len(TASKS) == 13 and {task.family for task in TASKS.values()} == {"retrieval", "perplexity"}
    names = ["perplexity", "needle", "short_context", "lines"]
    assert split_tasks(names) == (("needle", "lines"), ("perplexity", "short_context"))
    for wrong in ([], ["needles"]):
        with pytest.raises(ValueError, match="choose one or more of needle"):
            split_tasks(wrong)
