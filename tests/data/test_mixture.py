"""Mixtures keep the asked shares, lose nothing without weights, and are the same on every process."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.data.mixture import (
    count_tokens,
    is_read_as_it_is,
    overlong_outcomes,
    plan_epoch,
    plan_mixture,
    select_spans,
)
from ring_hf.data.source_spec import MixtureSpec, SourceSpec

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array)
LENGTH = 24
LONG = LENGTHS.filter(lambda lengths: lengths.sum() > LENGTH)  # so that a half is at least half of a span


def mixture(*specs, **options):
    return MixtureSpec(tuple(SourceSpec(f"s{n}", **spec) for n, spec in enumerate(specs)), **options)


def tokens(spans):
    return Counter((int(d), t) for d, start, stop in spans for t in range(start, stop))


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(0, 5))
def test_without_weights_every_token_is_read_once(lengths, seed):
    plan = plan_mixture(lengths, mixture(*[{}] * len(lengths), seed=seed), LENGTH)
    everything = np.concatenate(lengths)
    assert tokens(plan.spans) == Counter((d, t) for d, n in enumerate(everything) for t in range(n))
    assert [source.num_epochs for source in plan.sources] == [1.0] * len(lengths)
    if len(lengths) == 1:  # long documents are left to packing, in their order
        assert plan.spans.tolist() == [[d, 0, n] for d, n in enumerate(everything)]
    else:
        assert (plan.spans[:, 2] - plan.spans[:, 1]).max() <= LENGTH


@given(st.lists(st.tuples(LENGTHS, st.integers(1, 9)), min_size=2, max_size=4), st.integers(500, 4000), st.booleans())
def test_shares_are_kept_within_half_a_span(sources, total, is_given):
    lengths, weights = zip(*sources, strict=True)
    options = {"tokens": total} if is_given else {"stop": "all_exhausted"}
    spec = mixture(*({"weight": weight} for weight in weights), **options)
    plan = plan_mixture(lengths, spec, LENGTH)
    total = total if is_given else max(n.sum() / share for n, share in zip(lengths, spec.shares, strict=True))
    for source, share in zip(plan.sources, spec.shares, strict=True):
        assert abs(source.num_tokens - share * total) <= LENGTH / 2 + 0.5
    assert len(plan.spans) == sum(len(source.spans) for source in plan.sources)
    assert count_tokens(plan.spans) == sum(source.num_tokens for source in plan.sources)
    offsets = np.cumsum([0, *map(len, lengths)])
    owners = np.searchsorted(offsets, plan.spans[:, 0], side="right") - 1
    for number, source in enumerate(plan.sources):
        assert count_tokens(plan.spans[owners == number]) == source.num_tokens


@given(LONG, LONG)
def test_the_first_exhausted_source_ends_a_mixture(first, second):
    plan = plan_mixture([first, second], mixture({"weight": 1}, {"weight": 1}), LENGTH)
    assert all(count <= 1 for count in tokens(plan.spans).values())
    smallest = min(first.sum(), second.sum())
    (exhausted, *_) = (source for source in plan.sources if source.lengths.sum() == smallest)
    assert exhausted.num_epochs == 1.0


@given(LENGTHS, st.integers(0, 3), st.integers(1, 2000))
def test_epochs_are_whole_and_in_new_orders(lengths, seed, asked):
    epoch = plan_epoch(lengths, SourceSpec("a"), LENGTH, np.random.default_rng(0))
    spans = select_spans(epoch, asked, np.random.default_rng(seed))
    counts = tokens(spans)
    least, most = asked // lengths.sum(), -(-asked // lengths.sum())
    assert set(counts.values()) <= {least, most} - {0} or not counts
    assert abs(count_tokens(spans) - asked) <= LENGTH / 2


def test_plans_are_the_same_for_a_seed_and_differ_between_seeds_and_epochs():
    lengths = [np.arange(1, 60), np.arange(5, 90)]
    specs = ({"weight": 1, "length_weights": {30: 1.5}}, {"weight": 2, "max_tokens": 700})
    first, again, other = (plan_mixture(lengths, mixture(*specs, tokens=9000, seed=s), LENGTH) for s in (3, 3, 4))
    assert np.array_equal(first.spans, again.spans)
    assert not np.array_equal(first.spans, other.spans)
    source = first.sources[1]
    (one_epoch, next_epoch) = np.split(source.spans[: 2 * len(source.epoch)], 2)
    assert tokens(one_epoch) == tokens(next_epoch) and not np.array_equal(one_epoch, next_epoch)


@given(LENGTHS, st.integers(2, 30), st.integers(1, 20))
def test_overlong_documents_are_cut_dropped_or_truncated(lengths, longest, least):
    outcomes = overlong_outcomes(lengths, longest, least)
    kept = lengths[lengths >= least]
    for choice, outcome in outcomes.items():
        spec = SourceSpec("a", overlong=choice, max_length=longest, min_length=min(least, longest))
        if least > longest or not outcome.kept_tokens:
            continue
        spans = plan_epoch(lengths, spec, LENGTH * 9, np.random.default_rng(0))
        assert outcome.kept_tokens == count_tokens(spans) and outcome.tokens == kept.sum()
        assert outcome.whole + outcome.shortened + outcome.dropped == len(kept)
        assert (spans[:, 2] - spans[:, 1]).max() <= longest
        per_document = Counter(spans[:, 0].tolist())
        for document, length in enumerate(lengths):
            if length < least or (choice == "drop" and length > longest):
                assert document not in per_document
            else:
                assert per_document[document] == (-(-length // longest) if choice == "cut" else 1)


@settings(max_examples=50)
@given(LENGTHS, st.floats(0, 3), st.floats(0, 3), st.integers(0, 9))
def test_length_weights_repeat_documents_of_a_range(lengths, middle, high, seed):
    spec = SourceSpec("a", length_weights={20: middle, 40: high}, max_length=60)
    try:
        spans = plan_epoch(lengths, spec, 60, np.random.default_rng(seed))
    except ValueError:
        spans = np.empty((0, 3), int)
    counts = Counter(spans[:, 0].tolist())
    for least, below, weight in ((0, 20, 1), (20, 40, middle), (40, 99, high)):
        members = [d for d, n in enumerate(lengths) if least <= n < below]
        assert all(int(weight) <= counts[d] <= int(weight) + 1 for d in members)
        assert abs(sum(counts[d] for d in members) - weight * len(members)) <= 0.5 + 1e-9


def test_an_epoch_ends_at_most_tokens():
    lengths = np.full(50, 10)
    spans = plan_epoch(lengths, SourceSpec("a", max_tokens=125), 16, np.random.default_rng(0))
    assert count_tokens(spans) == 120
    with pytest.raises(ValueError, match="'a': max_tokens=9 is below the 10 tokens of a span"):
        plan_epoch(lengths, SourceSpec("a", max_tokens=9), 16, np.random.default_rng(0))


def test_replay_of_short_documents_is_cut_to_its_own_length():
    lengths = [np.array([100, 50]), np.array([30, 5])]
    plan = plan_mixture(lengths, mixture({}, {"max_length": 8}), 40)
    sizes = (plan.spans[:, 2] - plan.spans[:, 1]).tolist()
    assert sorted(sizes) == sorted([40, 40, 20, 40, 10] + [8, 8, 8, 6, 5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 60}, "nothing is left of 3 documents. 3 have less than min_length=60 tokens"),
        ({"max_length": 10, "overlong": "drop"}, "3 more than 10 (overlong: drop); the longest has 50"),
        ({"length_weights": {2: 0}}, "or length_weights={2: 0}"),
    ],
)
def test_a_source_of_which_nothing_is_left_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_mixture([np.array([50, 20, 30])], mixture(options), LENGTH)


def test_a_share_below_a_document_is_refused():
    with pytest.raises(ValueError, match=r"'s0': its share, 0.001 of 1,000 tokens, is less than half of a document"):
        plan_mixture([np.array([20]), np.array([20])], mixture({"weight": 1}, {"weight": 999}, tokens=1000), LENGTH)


def test_only_a_single_source_without_choices_is_read_as_it_is():
    assert is_read_as_it_is(mixture({}))
    assert is_read_as_it_is(mixture({"min_length": 9}))
    for others in (
        [{}, {}],
        [{"weight": 1}],
        [{"overlong": "drop"}],
        [{"max_tokens": 5}],
        [{"length_weights": {2: 2}}],
    ):
        assert not is_read_as_it_is(mixture(*others))
    assert not is_read_as_it_is(mixture({}, tokens=9))
