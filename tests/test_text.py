"""Text for people: units, sizes, tables."""

import pytest

from ring_hf.text import (
    align_columns,
    format_bytes,
    format_duration,
    format_tokens,
    markdown_table,
    parse_size,
    parse_sizes,
    wrap_prose,
)


def test_numbers_carry_three_digits_and_a_unit():
    assert [format_bytes(n) for n in (0, 999, 1000, 33_554_432, 4e9)] == ["0 B", "999 B", "1 kB", "33.6 MB", "4 GB"]
    assert [format_duration(s) for s in (2e-6, 0.0294, 1.5, 1234)] == ["2 us", "29.4 ms", "1.5 s", "1234 s"]
    assert [format_tokens(n) for n in (1000, 98304, 1_562_378, 2**20)] == ["1,000", "96K", "1.49M", "1M"]
    assert [format_tokens(n, exact=True) for n in (12_345, 98304, 3 * 2**19)] == ["12,345", "96K", "1536K"]


def test_sizes_are_read_as_they_are_written():
    assert [parse_size(text) for text in ("4096", "64K", "1m", "0.5K")] == [4096, 65536, 2**20, 512]
    assert parse_sizes("8000, 2K,0") == (8000, 2048, 0)
    for text in ("64X", "", "0", "1.5", "-4", "K"):
        with pytest.raises(ValueError, match=r"is not a number of tokens\. Write 4096, 64K"):
            parse_size(text)


def test_tables_are_aligned_or_compact():
    rows = [["layout", "", "work"], ["zigzag", "x", "1.0"], ["contiguous", "", "1.875"]]
    assert markdown_table(rows, align="llr").splitlines() == [
        "| layout     |   |  work |",
        "| ---------- | - | ----: |",
        "| zigzag     | x |   1.0 |",
        "| contiguous |   | 1.875 |",
    ]
    assert markdown_table(rows, padded=False).splitlines()[:3] == [
        "| layout | | work |",
        "|---|---:|---:|",
        "| zigzag | x | 1.0 |",
    ]
    assert align_columns(rows)[1] == "  zigzag      x  1.0  "


def test_prose_is_wrapped_with_indented_lines_and_whole_words():
    first, *further = wrap_prose("two-word " * 40).splitlines()
    assert further and len(first) <= 116 and first.endswith("two-word")
    assert all(line.startswith("    two-word") and len(line) <= 116 for line in further)
