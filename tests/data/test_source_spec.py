"""A source and a mixture keep all rules, or the message names the source, the value and the way out."""

import re

import pytest

from ring_hf.data.run_options import DataArguments
from ring_hf.data.source_spec import MixtureSpec, SourceSpec, default_name, parse_sources


def test_sources_are_names_or_mappings_or_lists_of_them():
    (spec,) = parse_sources("books/*.txt", encoding="latin-1")
    assert spec == SourceSpec("books/*.txt", name="books", encoding="latin-1")
    specs = parse_sources(["a.txt", {"source": "b.jsonl", "weight": 2, "overlong": "cut"}], overlong="drop")
    assert [(spec.name, spec.weight, spec.overlong) for spec in specs] == [("a", None, "drop"), ("b", 2, "cut")]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("builtin", "builtin"),
        ("a/b/c.jsonl.gz", "c"),
        ("a/b/*.txt", "b"),
        ("*.txt", "*.txt"),
        ("owner/set:part", "set:part"),
        ("a/.hidden", ".hidden"),
    ],
)
def test_a_source_is_named_after_its_file_or_folder(source, name):
    assert default_name(source) == name


def test_command_line_and_yaml_describe_the_same_mixture():
    listed = [{"source": "a", "weight": 1, "length_weights": {4096: 2}}, {"source": "b", "weight": 3}]
    text = "[{source: a, weight: 1, length_weights: {4096: 2}}, {source: b, weight: 3}]"
    assert DataArguments(data=listed).mixture() == DataArguments(data=text).mixture()
    assert DataArguments(data="[ab]*.txt").mixture().sources[0].source == "[ab]*.txt"
    mixture = DataArguments(data=text, mixture_tokens=8, overlong="drop", min_length=4, errors="skip").mixture()
    assert {(s.overlong, s.min_length, s.errors) for s in mixture.sources} == {("drop", 4, "skip")}
    assert (mixture.shares, mixture.tokens) == ([0.25, 0.75], 8)


REFUSED = {
    "key": ([{"source": "a", "wieght": 1}], "unknown in data, entry 1: 'wieght' (did you mean weight"),
    "no source": (["a", {"name": "b"}], "data, entry 2 has no source"),
    "entry": ([3], "data, entry 1: 3 is no mapping"),
    "nothing": ([], "data is empty: nothing to read"),
    "empty name": ([""], "source='' is no name"),
    "twice": (["x/a.txt", "y/a.txt"], "several data sources have the name 'a'. Set `name` of each"),
    "some weights": ([{"source": "a", "weight": 1}, "b"], "data sources without a weight: b. Give every source"),
    "weight": ([{"source": "a", "weight": 0}], "data source 'a': weight=0 must be above 0"),
    "text weight": ([{"source": "a", "weight": "1"}], "data source 'a': weight='1' must be above 0"),
    "overlong": (
        [{"source": "a", "overlong": "split"}],
        "overlong='split' is unknown. Choose one of cut, drop",
    ),
    "errors": ([{"source": "a", "errors": "log"}], "errors='log' is unknown. Choose one of raise, skip"),
    "min_length": ([{"source": "a", "min_length": 0}], "min_length=0 must be a number of tokens of at least 1"),
    "max_length": ([{"source": "a", "max_length": 1}], "max_length=1 must be a number of tokens of at least 2"),
    "max_tokens": ([{"source": "a", "max_tokens": 1.5}], "max_tokens=1.5 must be a number of tokens of at least 1"),
    "lengths": ([{"source": "a", "length_weights": {"4K": 2}}], "length_weights has '4K': 2. Write a least length"),
    "times": ([{"source": "a", "length_weights": {4: -1}}], "length_weights has 4: -1"),
    "mapping": ([{"source": "a", "options": 3}], "options=3 is not a mapping"),
    "text": ([{"source": "a", "format": 3}], "format=3 is not text"),
    "two names": ([{"source": "a", "text_column": "x", "columns": {"text": "y"}}], "columns name the text twice"),
    "both ends": (
        [{"source": "a", "min_length": 9, "max_length": 8, "overlong": "drop"}],
        "min_length=9 is above max_length=8, and overlong=drop leaves nothing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_refused_and_explained(name):
    data, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        DataArguments(data=data).mixture()


def test_settings_of_the_mixture_are_checked():
    with pytest.raises(ValueError, match=r"mixture_tokens=0 must be a number of tokens above 0"):
        DataArguments(mixture_tokens=0).mixture()
    with pytest.raises(ValueError, match=r"mixture_stop='longest' is unknown. Choose one of first_exhausted, all_exh"):
        DataArguments(mixture_stop="longest").mixture()
    with pytest.raises(ValueError, match=r"'a': max_length=64 is above the 32 tokens of a sequence"):
        SourceSpec("a", max_length=64).span_length(32)
    with pytest.raises(ValueError, match=r"streaming=True with heldout_fraction=0.1: to hold documents out of a"):
        DataArguments(streaming=True)
    with pytest.raises(ValueError, match=r"stream_buffer=0 must be at least 1"):
        DataArguments(stream_buffer=0)
    assert MixtureSpec((SourceSpec("a"),)).has_weights is False
