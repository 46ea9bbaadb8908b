"""HTML in texts, titles, labels, plots and settings, which a page would run or fetch when it is opened.

What happens: every text is escaped, so that the page has the elements and attributes that it has with harmless texts,
and is shown as it stands. Its policy allows its own style and script by their digests, and no address but those of
embedded pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import torch

import wherefrom as wf
from attacks.common import Stop, check, main
from wherefrom.report.figures import Figure
from wherefrom.report.html import PNG_SIGNATURE, render_report
from wherefrom.report.passages import Passage

TEXTS = {
    "a script": "<script>alert(1)</script>",
    "the end of our script and one more": "</script><script>alert(2)</script>",
    "a picture that fails": "<img src=x onerror=alert(3)>",
    "the end of an attribute": "\"'><svg onload=alert(4)>",
    "the end of every element": "</title></textarea></style></pre></details></div><b onclick=alert(5)>",
    "a policy of its own": '<meta http-equiv="Content-Security-Policy" content="default-src *">',
    "a template": "{{ 7 * 7 }}{% raw %}<i>",
    "a page in a frame": '<iframe srcdoc="&lt;script&gt;alert(6)&lt;/script&gt;">',
}


class Elements(HTMLParser):
    """The names of a page's elements and attributes, the values of attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.values: list[str | None] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names += [tag, *(name for name, _ in attrs)]
        self.values += [value for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def live(folder: Path) -> bool:
    """A page that puts texts where they are said to be gets elements from each, but from a template's."""
    found = [Elements(f"<p title='{text}'>{text}</p>").names for text in TEXTS.values()]
    return all(len(names) > len(["p", "title"]) for names in found)


def attack(folder: Path) -> Iterator[Stop]:
    for name, text in TEXTS.items():
        hostile, harmless = Elements(_page(text)), Elements(_page("x" * len(text)))
        check(hostile.names == harmless.names, f"{name}: other elements than with harmless texts")
        titles = {value for value in hostile.values if value not in harmless.values}
        check(titles == {text}, f"{name}: attributes {titles}, where only a plot's title is one")
        check(hostile.text.count(text) >= 10, f"{name}: it is not shown as it stands")
        yield Stop(f"{name}: {text}", f"it is text: {escape(text)[:60]}")
    page = _page(TEXTS["a script"])
    (policy,) = (each for each in Elements(page).values if each and each.startswith("default-src"))
    check(policy.startswith("default-src 'none'; ") and "unsafe" not in policy, f"the policy is {policy}")
    addresses = re.findall(r'\s(?:src|href|action|data|poster)="([^"]*)"', page)
    check(all(each.startswith(("#", "data:")) for each in addresses), f"the page asks for {addresses}")
    yield Stop("an address to fetch from", f"the page has none, and its policy allows none: {policy}")


def _page(text: str) -> str:
    """A page with the same text in every place that has one."""
    passage = Passage(text, text, text)
    figure = Figure(text, text, PNG_SIGNATURE)
    return render_report(
        title=text,
        summary=text,
        profile=text,
        queries=[passage] * 2,
        train=[passage] * 3,
        scores=wf.Scores(torch.tensor([[1.0, -1.0, 2.0]] * 2), {"method": text, text: text}),
        settings={text: text},
        tokens=lambda query, train: [(text, 1.0)],
        figures=[figure],
    )


if __name__ == "__main__":
    main(live, attack)
