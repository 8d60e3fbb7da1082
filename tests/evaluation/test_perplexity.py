"""Perplexity by context length is the mean over tokens of the same text; its reports contain the measurements."""

import itertools
import math
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ring_hf.evaluation import (
    LengthResult,
    evaluation_windows,
    format_positions,
    format_table,
    perplexity_by_length,
    plot_perplexity,
    position_buckets,
)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).train()


class Uniform(torch.nn.Module):
    """A model that gives every token of a vocabulary of 10 the same probability."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))

    def forward(self, input_ids, use_cache):
        return types.SimpleNamespace(logits=self.weight.expand(*input_ids.shape, 10))


def test_uniform_model_has_the_perplexity_of_its_vocabulary():
    results = perplexity_by_length(Uniform(), torch.randint(0, 10, (3, 32)), [4, 16, 32])
    for result, length in zip(results, [4, 16, 32], strict=True):
        assert result.length == length
        assert result.num_tokens == 96 // length * (length - 1)
        assert result.perplexity == pytest.approx(10)
        assert result.position_losses == pytest.approx([math.log(10)] * len(position_buckets(length)))


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10_000])
def test_loss_is_the_mean_over_tokens_whatever_the_batching(llama, tokens_per_batch):
    windows = torch.randint(0, 61, (3, 24))
    results = perplexity_by_length(llama, windows, [8, 24], tokens_per_batch)
    assert llama.training
    for result in results:
        rows = windows.reshape(-1, result.length)
        with torch.no_grad():
            logits = llama.eval()(rows).logits
        llama.train()
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        assert result.loss == pytest.approx(losses.mean().item(), abs=1e-6)
        by_position = losses.view(len(rows), -1).mean(0)
        for (first, last), loss in zip(position_buckets(result.length), result.position_losses, strict=True):
            assert loss == pytest.approx(by_position[first - 1 : last].mean().item(), abs=1e-6)


@given(st.integers(2, 5000))
def test_position_buckets_cover_every_position_once(length):
    buckets = position_buckets(length)
    assert [n for first, last in buckets for n in range(first, last + 1)] == list(range(1, length))


def test_windows_come_from_one_document_each_in_rounds():
    documents = [list(range(10)), list(range(100, 103)), list(range(200, 225))]
    windows = evaluation_windows(documents, 4)
    assert [row[0].item() for row in windows] == [0, 200, 4, 204, 208, 212, 216, 220]
    assert all(b - a == 1 for row in windows.tolist() for a, b in itertools.pairwise(row))
    assert [row[0].item() for row in evaluation_windows(documents, 4, max_windows=3)] == [0, 200, 4]


def test_windows_longer_than_every_document_are_refused():
    with pytest.raises(ValueError, match=r"no held-out document has 64 tokens \(the longest of 2 has 9\)"):
        evaluation_windows([[1] * 9, [2] * 3], 64)


@pytest.mark.parametrize("length", [1, 5, 64])
def test_lengths_that_do_not_divide_the_windows_are_refused(length):
    with pytest.raises(ValueError, match=f"context length {length} must be at least 2 and divide the windows of 32"):
        perplexity_by_length(Uniform(), torch.zeros(1, 32, dtype=torch.long), [length])


RESULTS = {
    "before": [LengthResult(4, 9, math.log(3), (1.0, 2.0)), LengthResult(8, 14, math.log(40), (1.0, 2.0, 3.5))],
    "after": [LengthResult(8, 14, math.log(3), (1.0, 1.0, 0.25))],
}


def test_tables_have_a_row_per_model_and_a_column_per_length():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in format_table(RESULTS).splitlines()]
    assert rows[0] == ["held-out perplexity at", "4", "8"]
    assert set("".join(rows[1])) <= {"-", ":"}
    assert rows[2:] == [["before", "3.00", "40.00"], ["after", "", "3.00"]]
    assert len({len(line) for line in format_table(RESULTS).splitlines()}) == 1
    positions = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in format_positions(RESULTS).splitlines()
    ]
    assert positions[0] == ["loss after so many tokens", "1", "2-3", "4-7"]
    assert positions[2:] == [["before", "1.000", "2.000", "3.500"], ["after", "1.000", "1.000", "0.250"]]


def test_plot_is_a_png_of_some_size(tmp_path):
    path = tmp_path / "new" / "plot.png"
    plot_perplexity(RESULTS, path, trained_lengths={"before": 4, "after": 8})
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
