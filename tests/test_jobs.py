"""Jobs that end in a file: training examples as a review queue, and training files without some of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from wherefrom.hf.preparation import Source, read_examples
from wherefrom.jobs.filtering import dropped_of_each, filtered, origins
from wherefrom.runtime.errors import InputError


def test_files_are_filtered_in_their_own_format(tmp_path: Path) -> None:
    (text := tmp_path / "a.txt").write_text("one\nline\n\n\ntwo\n \nthree\n")
    (lines := tmp_path / "b.jsonl").write_bytes(b'{"text": "\\u00e9",  "n": 1}\r\n\n{"text": "x"}\n{"text":"y"}')
    (table := tmp_path / "c.csv").write_text("text,n\none,1\ntwo,2\n")
    sources = [read_examples(str(file))[0] for file in (text, lines, table)]
    each = dropped_of_each(sources, {1, 3, 7})
    assert each == [{1}, {0}, {1}]
    made = [filtered(*found) for found in zip(sources, map(str, (text, lines, table)), each, strict=True)]
    assert made == [
        ("a-filtered.txt", b"one\nline\n\nthree\n\n"),
        ("b-filtered.jsonl", b'{"text": "x"}\n{"text":"y"}\n'),
        ("c-filtered.jsonl", b'{"text": "one", "n": 1}\n'),
    ]
    assert [line for _, line in origins(sources, [str(text), str(lines), str(table)])] == [1, 5, 7, 1, 3, 4, None, None]
    text.write_text("one alone")
    with pytest.raises(InputError, match="has 1 texts, and had 3"):
        filtered(sources[0], str(text), set())
    with pytest.raises(InputError, match="JSON cannot hold"):
        filtered(Source("", "", [{"text": b"bytes"}]), "somewhere", set())
