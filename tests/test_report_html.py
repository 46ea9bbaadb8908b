"""The HTML report: what it shows, that hostile text stays text, that a file is whole or absent."""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import Markup

import wherefrom as wf
from wherefrom.report.figures import Figure
from wherefrom.report.histogram import MINUS
from wherefrom.report.html import render_report
from wherefrom.report.passages import Passage
from wherefrom.report.shading import encode_lengths, encode_numbers, encode_shares, visible_pieces
from wherefrom.runtime.errors import InputError, StorageError
from wherefrom.store.files import write_text

HOSTILE = [
    "<script>document.documentElement.dataset.broken = 1</script>",
    "</script><script>document.documentElement.dataset.broken = 2</script>",
    "<img src=x onerror='document.documentElement.dataset.broken = 3'>",
    '"\'><svg onload="document.documentElement.dataset.broken = 4">',
    "</title></textarea></style></pre></details></div><b onclick=alert(5)>",
    "<!-- <script> ]]> --!> {{ 7 * 7 }} {% raw %} &lt;script&gt; &#60;b&#62;",
    "javascript:alert(6) \u2028\u2029\u202e \x00\x08\x1b \ud83d\ude00 \ud800",
    Markup("<script>document.documentElement.dataset.broken = 7</script>"),
]

# One white pixel.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2GwAAAABJRU5ErkJggg==")


VALUES = torch.tensor([[0.5, 2, -1, 0, 4, -8], [0, 0, 0, 0, 0, 1.0]])


def make_report(**changes: Any) -> str:
    """A page of 2 queries and 6 training sequences, with `changes` to the arguments."""
    arguments: dict[str, Any] = {
        "title": "A title",
        "summary": "A summary",
        "queries": [Passage("first query", "Alpha", "Arts"), Passage("second query", "Beta")],
        "train": [Passage(f"text {i}", f"Name {i}", "Arts" if i % 2 else "") for i in range(6)],
        "values": VALUES,
        "rise_per_score": None,
        "settings": {"strategy": "ekfac"},
        "profile": "action  total",
    }
    arguments |= changes
    values, scale = arguments.pop("values"), arguments.pop("rise_per_score")
    scale = torch.ones(len(values), dtype=torch.float64) if scale is None else scale
    if "scores" not in arguments:
        arguments["scores"] = wf.Scores(values, arguments.pop("settings"), rise_per_score=scale)
    return render_report(**arguments)


class Page(HTMLParser):
    """A parsed page: counts of tags with their attribute names, all attribute values, all text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.values: list[str] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag, tuple(sorted(name for name, _ in attrs))] += 1
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def hits(page: str, query: int) -> list[tuple[int, str, str]]:
    """(train index, score, bar length) of a query's hits, in the order of the page."""
    section = page.split(f'id="query-{query}"')[1].partition("</section>")[0]
    pattern = r'class="score"[^>]*>([^<]*)<.*?rect width="([^"]*)%".*?href="#train-(\d+)"'
    found = re.findall(pattern, section, re.DOTALL)
    return [(int(index), score.replace(MINUS, "-"), bar) for score, bar, index in found]


def hostile_report(text: str) -> str:
    return make_report(
        title=text,
        summary=text,
        queries=[Passage(text, text, text), Passage(text, text, text)],
        train=[Passage(text, text, text) for _ in range(6)],
        settings={text: text, "kept": text},
        profile=text,
        tokens=lambda query, train: [(text, 1.0), (text, -2.0)],
        figures=[Figure("Title", text, PNG)],
    )


def attributes(page: str, name: str) -> list[str]:
    return re.findall(rf' {name}="([^"]*)"', page)


def test_numbers_are_predicted_rises_and_raw_scores_stay_at_hand() -> None:
    page = make_report(rise_per_score=torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert hits(page, 0)[0] == (4, "+1.000", "50.0")
    assert hits(page, 1)[0][1] == "+0.5000"
    assert attributes(page, "title")[:2] == ["raw score +4.000", "raw score +2.000"]
    assert "predicted rise of the query&#39;s loss if the example had been left out" in page


def test_scores_without_a_scale_are_shown_as_parts_of_the_largest() -> None:
    page = make_report(scores=wf.Scores(VALUES, {"method": "bm25"}))
    assert hits(page, 0)[0] == (4, "+0.500", "50.0")
    assert "scores of bm25 have no scale beyond their order" in page
    assert "predicted rise" not in page


def test_hits_are_the_largest_of_each_sign_on_one_scale() -> None:
    page = make_report(k=2)
    assert hits(page, 0) == [
        (4, "+4.000", "50.0"),
        (1, "+2.000", "25.0"),
        (5, "-8.000", "100.0"),
        (2, "-1.000", "12.5"),
    ]
    assert [index for index, _, _ in hits(make_report(k=99), 0)] == [4, 1, 0, 5, 2]
    assert hits(page, 1) == [(5, "+1.000", "100.0")]
    assert "No training sequence has a negative score." in page


def test_equal_scores_keep_the_order_of_the_dataset() -> None:
    page = make_report(values=torch.ones(2, 6), k=4)
    assert [index for index, _, _ in hits(page, 0)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("scale", "shown"),
    [
        (1e-6, "+4.00e-06"),
        (1e-2, "+0.04000"),
        (1e2, "+400.0"),
        (1e5, "+400,000"),
        (1e9, "+4.00e+09"),
    ],
)
def test_scores_of_any_size_are_legible(scale: float, shown: str) -> None:
    values = torch.tensor([[0.5, 2, -1, 0, 4, -3], [0, 0, 0, 0, 0, 1.0]]) * scale
    assert hits(make_report(values=values), 0)[0][1] == shown


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_any_real_dtype_is_shown(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 2, -1, 0, 4, -8], [0, 0, 0, 0, 0, 1]], dtype=dtype)
    assert hits(make_report(values=values), 0)[0][:2] == (4, "+4.000")


def test_histogram_counts_every_sequence_on_its_side_of_zero() -> None:
    page = make_report(values=torch.tensor([[-1, -1, -1, 0, 0.5, 1.0]] * 2))
    negative, positive = re.findall(r'<path class="\w+" d="([^"]*)"', page)[:2]
    assert negative.count("M") == 1  # three sequences in one bar, the tallest
    assert "v-40.0" in negative
    assert positive.count("M") == 3
    assert f"from {MINUS}1.000 to +1.000" in page


def test_all_scores_zero_is_a_page_without_histogram() -> None:
    page = make_report(values=torch.zeros(2, 6))
    assert "<figure" not in page
    assert hits(page, 0) == []


def test_equal_labels_are_marked_in_words_and_counted() -> None:
    page = make_report()
    assert page.count("(same as the query's)") == 2  # 1 and 5 for query 0; query 1 has no label
    assert "1 of 3 share its label." in page


def test_each_text_stands_once_and_only_shown_sequences_are_read() -> None:
    read: list[int] = []

    class Lazy:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Passage:
            read.append(index)
            return Passage(f"start {'word ' * 100} the end of {index}")

    page = make_report(train=Lazy(), k=1)
    assert sorted(read) == [4, 5]
    assert page.count("the end of 5") == 1  # shown by both queries


def test_fifty_queries_by_twenty_long_sequences_stay_under_five_megabytes() -> None:
    """Each query has 20 sequences of its own, 512 tokens each and as long as WikiText's are in the tokens of GPT-2."""
    words = [" the", " praying", "ing", " of", " owls", ", so", " at", " night"]
    pieces = [*words, *[word.replace(" of", " off") for word in words]] * 32
    text = "".join(pieces)
    assert (len(pieces), len(text)) == (512, 2336)  # WikiText-2 has 4.56 characters a token
    shares = torch.randn(1000, 512, generator=torch.Generator().manual_seed(0)).tolist()
    values = torch.zeros(50, 1000)
    for query in range(50):
        values[query, 20 * query : 20 * query + 20] = torch.tensor([1.5, -2.5] * 10)

    page = render_report(
        title="Large",
        queries=[Passage(text, "Query", "Topic")] * 50,
        train=[Passage(text, "Sequence", "Topic")] * 1000,
        scores=wf.Scores(values, {}),
        tokens=lambda query, train: list(zip(pieces, shares[train], strict=True)),
    )
    assert len(attributes(page, "data-lengths")) == len(attributes(page, "data-shares")) == 1000
    assert len(page.encode()) < 5_000_000


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_adds_no_element_and_no_attribute(text: str) -> None:
    harmless_text = "x" * (len(text.encode("utf-16", "surrogatepass")) // 2 - 1)
    hostile, harmless = Page(hostile_report(text)), Page(hostile_report(harmless_text))
    assert hostile.elements == harmless.elements
    assert hostile.values == harmless.values  # no text in any attribute
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", "".join(hostile.text))


@pytest.mark.parametrize("text", HOSTILE[:6])
def test_hostile_text_is_shown_as_it_is(text: str) -> None:
    assert Page(hostile_report(text)).text.count(text) >= 10


def test_the_page_asks_nothing_of_the_network() -> None:
    page = make_report()
    addresses = re.findall(r'(?:src|href|action|data|poster)="([^"]*)"', page)
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest", page)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_title_of_a_figure_is_one_attribute_and_one_text(text: str) -> None:
    hostile = Page(make_report(figures=[Figure(text, "Caption", PNG)]))
    harmless = Page(make_report(figures=[Figure("words", "Caption", PNG)]))
    assert hostile.elements == harmless.elements
    different = [pair for pair in zip(hostile.values, harmless.values, strict=True) if pair[0] != pair[1]]
    assert [other for _, other in different] == ["words"]
    assert different[0][0] in hostile.text


def test_figures_stand_before_the_settings_as_they_were_given() -> None:
    page = make_report(figures=[Figure("First", "One caption", PNG), Figure("Second", "Another", PNG + b"more")])
    images = [base64.b64decode(source) for source in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]
    assert images == [PNG, PNG + b"more"]
    assert attributes(page, "alt") == ["First", "Second"]
    assert page.index("Evaluation</h2>") < page.index("One caption") < page.index("Another") < page.index("strategy<")
    assert "Evaluation</h2>" not in make_report()


def test_numbers_are_written_as_source_maps_write_them() -> None:
    """The values are those that the specification's readers give: npm's vlq, and single digits by hand."""
    assert encode_numbers([123, 456, 789]) == "2HwcqxB"
    assert encode_numbers([0, 1, -1, 15, -15, 16]) == "ACDefgB"


@pytest.mark.parametrize(
    ("values", "exponent", "multiples"),
    [
        ([1.0, -0.254, 0.0044], -2, [100, -25, 0]),
        ([99_950.0, 123.0], 2, [1000, 1]),  # rounded up to four digits
        ([2.5e-9, -1e-9], -11, [250, -100]),
        ([1.7e308, -1.7e308], 306, [170, -170]),
        ([5e-324, 0.0], -300, [0, 0]),
        ([0.0, -0.0], 0, [0, 0]),
    ],
)
def test_shares_of_any_size_keep_three_digits_of_the_largest(
    values: list[float], exponent: int, multiples: list[int]
) -> None:
    shares = encode_shares(values)
    assert shares.exponent == exponent
    assert shares.multiples == encode_numbers(multiples)


def test_lengths_are_counted_as_javascript_does() -> None:
    assert encode_lengths(["a", "", "é", "🦉", "x" * 1000]) == encode_numbers([1, 0, 1, 2, 1000])


@pytest.mark.parametrize(
    ("pieces", "visible"),
    [
        ([("a", 1.0), ("", 2.0), ("", 3.0), ("🦉", 4.0), ("b", 5.0)], [("a", 1.0), ("🦉", 9.0), ("b", 5.0)]),
        ([("a", 1.0), ("", 2.0)], [("a", 3.0)]),
        ([("", 1.0)], []),
    ],
)
def test_shares_of_pieces_without_text_go_where_the_character_is(
    pieces: list[tuple[str, float]], visible: list[tuple[str, float]]
) -> None:
    assert visible_pieces(pieces) == visible


def test_pieces_are_the_text_and_are_asked_for_what_is_shown_only() -> None:
    asked: list[tuple[int, int]] = []

    def tokens(query: int, train: int) -> Sequence[tuple[str, float]] | None:
        asked.append((query, train))
        return [("[CLS]", 0.5), (f" token of {train}", -1.5)] if train == 5 else None

    page = make_report(tokens=tokens, k=1)
    assert asked == [(0, 4), (0, 5), (1, 5)]
    assert "[CLS] token of 5</div>" in page
    assert "text 5</div>" not in page
    assert "text 4</div>" in page
    assert attributes(page, "data-lengths") == [encode_numbers([5, 11])]
    assert attributes(page, "data-shares") == [encode_numbers([50, -150])] * 2
    assert attributes(page, "data-exponent") == ["-2"] * 2


def test_without_tokens_the_page_says_nothing_of_them() -> None:
    for page in (make_report(), make_report(tokens=lambda query, train: None)):
        assert "share of the score" not in page
        assert "token-bar" not in page.split("</script>")[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(2, 5)}, r"scores have shape \(2, 5\); expected a row for each of 2 .* of 6 training"),
        ({"values": torch.zeros(12)}, r"scores have shape \(12,\); expected a row for each of 2"),
        ({"values": torch.zeros(3, 6)}, r"scores have shape \(3, 6\); expected a row for each of 2"),
        ({"values": torch.full((2, 6), torch.nan)}, r"values\[0, 0\] is nan; expected finite"),
        ({"values": torch.full((2, 6), -torch.inf)}, r"values\[0, 0\] is -inf; expected finite"),
        ({"values": torch.zeros(2, 6, dtype=torch.complex64)}, "expected real numbers"),
        ({"queries": [], "values": torch.zeros(0, 6)}, "queries is empty"),
        ({"train": [], "values": torch.zeros(2, 0)}, "train is empty"),
        ({"k": 0}, "k is 0; expected at least 1"),
        (
            {"tokens": lambda query, train: [("one", 1.0), ("two", float("inf"))]},
            r"tokens\(0, 4\) gives 'two' a share of inf; expected finite",
        ),
        (
            {"tokens": lambda query, train: [("one", 1.0), ("two" * query, 1.0)]},
            r"tokens\(1, 5\) gives other pieces of text than for an earlier query",
        ),
        ({"figures": [Figure("Plot", "", b"<svg></svg>")]}, r"'Plot' starts with b'<svg></s'; expected .* PNG"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_report(**changes)


def write(path: Path) -> Path:
    write_text(path, make_report())
    return path


def test_a_report_is_written_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "page.html"
    assert write(path) == path
    assert write(path).read_text(encoding="utf-8").endswith("</html>")
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "page.html")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wherefrom.store.files.os.fsync", full)
    with pytest.raises(StorageError, match=r"page\.html.*No space left"):
        write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Cannot write"):
        write(tmp_path / "file" / "page.html")


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="no file but a directory or a device"):
        write_text(pipe, "text")
    assert pipe.is_fifo()
