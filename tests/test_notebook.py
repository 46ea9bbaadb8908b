"""Results in a notebook: the numbers that are in them, texts that stay text, colours that can be read on any page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import sync_playwright

import wherefrom as wf
from tests.models import gpt2_case
from tests.test_report_browser import FLAGS
from tests.test_report_html import HOSTILE, Page
from wherefrom.evaluate.datamodels import evaluate_lds
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.report.histogram import MINUS
from wherefrom.report.notebook import Strip, query_view
from wherefrom.report.passages import Passage
from wherefrom.report.reading import Reading
from wherefrom.report.shading import SHOWN
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.scoring.results import GroupScore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VALUES = torch.tensor([[1.0, -4.0, 2.0], [0.5, -0.25, -1.0]])
SCALE = torch.tensor([0.25, 0.5], dtype=torch.float64)


def cells(shown: str) -> list[list[str]]:
    """The rows of a table, without their markup."""
    rows = re.findall(r"<tr>\s*(.*?)</tr>", shown, re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", row) for row in rows]


def found(text: str, **changes: Any) -> wf.Found:
    tokens = [(f"{text} owl", 0.5), (f" {text}", -1.0)]
    passage = Passage("".join(each for each, _ in tokens), text, text, text)
    return wf.Found(1, 4, **{"score": 2.0, "passage": passage, "tokens": tokens, "overlaps": [(2, 6)], **changes})


def attribution(text: str) -> wf.Attribution:
    read = Reading(f"Rise {text}", text, 0.5)
    ends = [found(text)], [found(text, score=-4.0, tokens=(), overlaps=())]
    groups = [GroupScore(0, text, 3, 2.0, 1.0)]
    return wf.Attribution(
        text, text * 3, (1, 2), text, text, text, read, True, *ends, [found(text)], groups, "kind", 3, 9
    )


def test_scores_show_the_highest_of_the_first_queries() -> None:
    scores = wf.Scores(VALUES, {"method": "ekfac", "unit": "nats"}, rise_per_score=SCALE)
    shown = scores._repr_html_()
    assert shown is not None
    assert cells(shown) == [
        ["Query", "Rank", "Train", "Rise, nats", "Raw score"],
        ["0", "1", "2", "+0.500", "2"],
        ["", "2", "0", "+0.250", "1"],
        ["", "3", "1", "-1.00", "-4"],
        ["1", "1", "0", "+0.250", "0.5"],
        ["", "2", "1", "-0.125", "-0.25"],
        ["", "3", "2", "-0.500", "-1"],
    ]
    queries = [{"text": "first"}, {"text": "second", "title": "Second"}]
    titled = wf.Scores(VALUES, {"method": "ekfac"}, queries=queries)._repr_html_()
    assert titled is not None
    assert cells(titled)[1] == ["0", "first", "1", "2", "+0.500", "2"]
    assert cells(titled)[4][:2] == ["1", "Second"]
    assert "study.show(scores" in titled


def test_top_scores_show_the_positions_that_they_have() -> None:
    few = wf.TopScores(VALUES[:1, 2:], torch.tensor([[7]]), VALUES[:1, 1:2], torch.tensor([[1]]), {})._repr_html_()
    assert few is not None
    assert cells(few)[1:] == [["0", "1", "7", "+0.500", "2"]]


def test_a_query_is_shown_with_the_texts_behind_it() -> None:
    scores = wf.Scores(VALUES, {"method": "dot"}, rise_per_score=SCALE)
    train = [Passage(f"text {each}", f"Name {each}", "Arts") for each in range(3)]
    pieces = [("te", 0.5), ("xt ", -2.0), ("0", 2.5)]
    view = query_view(
        scores, 0, [Passage("asked", label="Arts"), Passage("")], train, lambda query, each: None if each else pieces
    )
    shown = view._repr_html_()
    names = re.findall(r'class="name" dir="auto">([^<]*)<.*?class="score"[^>]*>([^<]*)<', shown, re.DOTALL)
    assert names == [("Name 2", "+0.500"), ("Name 0", "+0.250"), ("Name 1", f"{MINUS}1.000")]
    assert [each.kind for each in view.ends] == ["positive", "negative"]
    tokens = [(each.text, each.kind, each.share, each.score) for each in view.ends[0].hits[1].pieces]
    assert tokens == [
        ("te", "positive", 20, "+0.125"),
        ("xt ", "negative", 80, "-0.500"),
        ("0", "positive", 100, "+0.625"),
    ]
    assert "asked" in shown and shown.count("(same as the query's)") == 3


def test_a_long_text_is_cut_to_what_says_most_and_overlaps_are_underlined() -> None:
    tokens = [(f"w{each:03} ", 9.0 if each == 500 else 0.001) for each in range(1000)]
    text = "".join(each for each, _ in tokens)
    one = found("", passage=Passage(text), tokens=tokens, overlaps=[(2503, 2512)])
    html = wf.Attribution(
        "p", "a", (0, 1), None, "ekfac", "ekfac", Reading("Rise", "", 1.0), True, [one], [], None, None, None, 1, 1
    )._repr_html_()
    shown = "".join(re.findall(r'<span class="positive" style[^>]*>(?:<u>)?([^<]*)', html))
    assert shown in text and "w500 " in shown and len(shown) == SHOWN
    assert re.findall(r"<u>([^<]*)</u>", html) == ["0 ", "w501 ", "w5"]  # w500 begins at 2500


def test_token_scores_show_where_they_arise() -> None:
    assert Strip.of(torch.tensor([1.0, -2.0, 0.0, 4.0])) == Strip(
        "M0 0v-0.25h.8V0zM3 0v-1.00h.8V0z", "M1 0v0.50h.8V0z", 4
    )
    pairs = torch.arange(256.0)
    both = Strip.of(pairs)
    assert both.parts == 128 and both.positive.endswith("M127 0v-1.00h.8V0z")
    assert f"M63 0v{-(126 + 127) / (254 + 255):.2f}h" in both.positive


def test_a_study_shows_what_it_has_scored(tmp_path: Path) -> None:
    case = gpt2_case(torch.float32)
    queries: list[object] = [
        {**row, "text": f"query {at}"} for at, row in enumerate(case.queries) if isinstance(row, dict)
    ]
    train: list[object] = [{**row, "title": f"Name {at}"} for at, row in enumerate(case.train) if isinstance(row, dict)]
    study = wf.Study(tmp_path, case.model, case.task, train=train)
    scores = study.score(queries, wf.Dot())
    best = int(scores.values[1].argmax())
    shown = study.show(scores, query=1, k=1)._repr_html_()
    assert "query 1" in shown and f">Name {best}</span>" in shown
    with pytest.raises(InputError, match="query=9: expected 0 to"):
        study.show(scores, query=9)
    other = wf.Study(tmp_path, case.model, case.task, train=train[1:] + train[:1])
    with pytest.raises(MismatchError):
        other.show(scores)
    tokens = study.score(queries, wf.Dot(), keep=wf.Tokens(2))
    rows = cells(tokens._repr_html_() or "")
    sums = {(int(query), int(each)): float(raw.replace(",", "")) for query, each, _, raw, *_ in rows[1:]}
    assert len(sums) == 9
    for pair, total in sums.items():
        assert total == pytest.approx(float(tokens[pair].sum()), rel=1e-3)


def test_an_audit_and_an_evaluation_show_their_numbers() -> None:
    audit = wf.Audit({"loss": torch.tensor([0.5, 2.0, 1.0]), "self_influence": torch.tensor([1.0, 2, 3])}, "loss")
    assert cells(audit._repr_html_()) == [
        ["Rank", "Train", "Loss", "Self influence"],
        ["1", "1", "2", "2"],
        ["2", "2", "1", "3"],
        ["3", "0", "0.5", "1"],
    ]
    masks = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
    truth = GroundTruth(masks, -(masks.double() @ VALUES.double().T)[:, None])
    report = evaluate_lds({"right": VALUES, "wrong": -VALUES}, truth, resamples=20)
    rows = cells(report._repr_html_())
    assert rows[1][0] == "right" and rows[1][1].startswith("1.000 [")
    assert rows[2] == ["wrong", str(report.means["wrong"]), str(report.difference("wrong", "right"))]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_texts_are_text(text: str) -> None:
    def views(said: str) -> str:
        passages = [Passage(said, said, said, said)] * 3
        scores = wf.Scores(
            VALUES, {"method": said, said: said, "unit": said}, rise_per_score=SCALE, name=said,
            queries=[{"text": said}] * 2,
        )  # fmt: skip
        shown = query_view(scores, 0, passages[:2], passages, lambda *_: [(said, 1.0)])
        return "".join(each._repr_html_() or "" for each in (scores, shown, attribution(said)))

    hostile, harmless = Page(views(text)), Page(views("x" * len(text)))
    assert hostile.elements == harmless.elements
    assert hostile.values == harmless.values
    assert not {"script", "img", "iframe", "link"} & {tag for tag, _ in hostile.elements}


def test_it_asks_for_nothing() -> None:
    shown = attribution("x")._repr_html_()
    assert not re.search(r"url\(|https?:|@import|<script| on\w+=|src=|href=", shown)


COLOURS = """() => [...document.querySelectorAll(".wherefrom *")].filter(
  (each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && each.localName !== "style"
).map((each) => [each.textContent, getComputedStyle(each).color, getComputedStyle(each).backgroundColor])"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, such as Debian's package of that name")
def test_it_can_be_read_on_a_light_and_a_dark_page() -> None:
    """WCAG 2.1's contrast of every text, on its own shade, with the page."""
    body = "".join(each._repr_html_() or "" for each in (attribution("x"), wf.Scores(VALUES, {"method": "dot"})))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for ink, paper in (("rgba(0, 0, 0, .87)", 255), ("#fff", 17)):
            page = browser.new_page()
            page.set_content(f"<body style='color: {ink}; background: rgb({paper}, {paper}, {paper})'>{body}")
            page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            texts = page.evaluate(COLOURS)
            assert len(texts) > 30
            for text, ink_used, shade in texts:
                ground = over(shade, [paper / 255] * 3)
                lighter, darker = sorted((luminance(over(ink_used, ground)), luminance(ground)), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (text, ink_used, shade, paper)
        browser.close()


def over(colour: str, ground: list[float]) -> list[float]:
    """A CSS colour, as computed, on an opaque one."""
    *parts, alpha = [
        *(float(each) for each in re.findall(r"[\d.]+(?:e-\d+)?", colour)),
        *([] if "/" in colour or "rgba" in colour else [1.0]),
    ]
    parts = parts if colour.startswith("color(") else [each / 255 for each in parts]
    return [alpha * mine + (1 - alpha) * below for mine, below in zip(parts, ground, strict=True)]


def luminance(colour: list[float]) -> float:
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
