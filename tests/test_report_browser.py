"""The HTML report in a browser: by pointer, keyboard and touch, in both themes, without a request or a stray script."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from tests.test_report_html import HOSTILE, PNG, hostile_report, make_report
from wherefrom.report.figures import Figure
from wherefrom.report.histogram import MINUS
from wherefrom.report.passages import Passage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-background-networking"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, such as Debian's package of that name")

PIECES = [
    "The",
    " owl",
    "🦉",
    " hunts",
    "\n",
    "\n",
    " 日本",
    "\t",
    " a\r",
    " &lt;b>",
    " " + "long" * 100,
    " night",
    ".",
]
SHARES = [0.5, -1.2345, 0.0012, 3.0, -0.25, 0.126, -2.718, 0.0, 1.0, -1.0, 0.07, -0.08, 0.333]
TOKENS = ".query.current .hit:first-of-type .tokens"

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def watch(page: Page, troubles: list[str]) -> None:
    """Note what a page says, errors and refusals among it, and whatever it requests."""
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: troubles.append(request.url))


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; when the test ends there must have been no error, no refusal and no request."""
    troubles: list[str] = []
    contexts = []

    def show(source: str, **options: Any) -> Page:
        path = tmp_path / "page.html"
        path.write_text(source, encoding="utf-8")
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options}))
        page = contexts[-1].new_page()
        watch(page, troubles)
        page.goto(path.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    own = re.compile(rf"{re.escape((tmp_path / 'page.html').as_uri())}(#.*)?|data:.*")
    assert [trouble for trouble in troubles if not own.fullmatch(trouble)] == []


def tokens(query: int, train: int) -> list[tuple[str, float]] | None:
    """Shares in query 0 of its first hit (4) and of one that query 1 shows too; in query 1 they are smaller."""
    return list(zip(PIECES, [share / 10**query for share in SHARES], strict=True)) if train in (4, 5) else None


def shaded_report() -> str:
    return make_report(tokens=tokens, figures=[Figure("A plot", "Its caption", PNG)])


def signed(value: float, decimals: int) -> str:
    """The number as it should be read, by Python's own rounding."""
    return "0" if round(value, decimals) == 0 else f"{value:+.{decimals}f}".replace("-", MINUS)


def current(page: Page) -> str:
    """The heading of the query that is shown, which must be the only one and the one that is marked in the list."""
    shown = page.locator(".query:visible h2").all_inner_texts()
    assert shown == [page.locator("#list a[aria-current=true] .name").inner_text()]
    return shown[0]


def many_queries() -> str:
    titles = ["Alpha", "Beta", "Gamma", "Café Delta"]
    queries = [Passage(f"about {title}", title, "Greek" if title == "Gamma" else "") for title in titles]
    return make_report(queries=queries, values=torch.ones(4, 6))


def test_queries_are_picked_by_click_and_by_key(show: Open) -> None:
    page = show(many_queries())
    assert current(page) == "Alpha"
    page.get_by_role("link", name="Gamma").click()
    assert current(page) == "Gamma"
    assert page.url.endswith("#query-2")
    for key, name in [("k", "Beta"), ("j", "Gamma"), ("ArrowRight", "Café Delta"), ("j", "Café Delta")]:
        page.keyboard.press(key)
        assert current(page) == name
    page.locator("#list a[aria-current]").focus()
    for key, name in [("ArrowUp", "Gamma"), ("ArrowLeft", "Beta"), ("ArrowDown", "Gamma")]:
        page.keyboard.press(key)
        assert current(page) == name
    page.get_by_role("button", name="Previous query").click()
    assert current(page) == "Beta"


def test_the_filter_narrows_the_list_by_title_label_and_text(show: Open) -> None:
    page = show(many_queries())
    names = page.locator("#list .name:visible")
    page.keyboard.press("/")
    for typed, left in [("cafe", ["Café Delta"]), ("greek", ["Gamma"]), ("about ALPHA", ["Alpha"]), ("none", [])]:
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type(typed)
        assert names.all_inner_texts() == left
        assert page.locator("#count").inner_text() == f"{len(left)} of 4 queries"
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("greek")
    page.keyboard.press("Enter")
    assert current(page) == "Gamma"
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    assert names.count() == 4


def open_hit(page: Page) -> list[Locator]:
    """Opens the first hit of the query that is shown; its tokens, which must be the pieces."""
    page.locator(".query.current .hit summary").first.click()
    page.locator(".query.current .readout").first.wait_for()
    return page.locator(TOKENS).first.locator("span").all()


def point_at(page: Page, token: Locator) -> None:
    """Moves the pointer to where the token begins; it may go over several lines."""
    place = "element => { element.scrollIntoView({ block: 'center' }); return element.getClientRects()[0].toJSON(); }"
    box = token.evaluate(place)
    page.mouse.move(box["x"] + min(2, box["width"] / 2), box["y"] + box["height"] / 2)


def test_pointing_at_a_token_shows_its_share(show: Open) -> None:
    page = show(shaded_report())
    spans = open_hit(page)
    assert [span.text_content() for span in spans] == [piece.replace("\r", "␍") for piece in PIECES]
    readout = page.locator(".query.current .readout").first
    assert readout.inner_text().split("\n") == ["Share of", "“ hunts”", "+3.00"]  # the largest, to begin with
    for span, share in zip(spans, SHARES, strict=True):
        point_at(page, span)
        assert readout.locator("strong").inner_text() == signed(share, 2)
        assert page.locator(".cursor").all_text_contents() == [span.text_content()]
    legend = page.locator(".query.current .scale").first
    assert legend.locator(".low").inner_text() == f"{MINUS}3.00"
    assert legend.locator(".high").inner_text() == "+3.00"


def test_the_same_sequence_has_other_shares_in_another_query(show: Open) -> None:
    page = show(shaded_report())
    page.keyboard.press("j")
    for span, share in zip(open_hit(page), SHARES, strict=True):
        point_at(page, span)
        assert page.locator(".query.current .readout strong").inner_text() == signed(share / 10, 3)


@pytest.mark.parametrize(
    ("scale", "shown"), [(1e-8, f"+3.00e{MINUS}8"), (1e-4, "+0.000300"), (1e3, "+3,000"), (1e6, "+3.00e+6"), (0.0, "0")]
)
def test_shares_of_any_size_can_be_read(show: Open, scale: float, shown: str) -> None:
    page = show(make_report(tokens=lambda query, train: [("a", 3.0 * scale), ("b", -1.0 * scale)]))
    point_at(page, open_hit(page)[0])
    assert page.locator(".query.current .readout strong").inner_text() == shown


def test_keys_move_over_the_tokens_and_not_to_another_query(show: Open) -> None:
    page = show(shaded_report(), viewport={"width": 390, "height": 800})
    page.locator(".query.current .hit summary").first.focus()
    page.keyboard.press("Enter")
    readout = page.locator(".query.current .readout").first
    readout.wait_for()
    page.keyboard.press("Tab")
    seen = []
    page.keyboard.press("Home")
    for _ in PIECES:
        seen.append(readout.locator("strong").inner_text())
        page.keyboard.press("ArrowRight")
    assert seen == [signed(share, 2) for share in SHARES]
    assert current(page) == "Alpha"
    page.keyboard.press("Home")
    for key, piece in [("End", "."), ("ArrowLeft", " night"), ("Home", "The"), ("ArrowLeft", "The")]:
        page.keyboard.press(key)
        assert readout.locator("bdi").inner_text() == f"“{piece}”"
    page.keyboard.press("ArrowRight")
    for key, piece in [("ArrowDown", "↵"), ("ArrowDown", " 日本"), ("ArrowUp", "↵"), ("ArrowUp", "The")]:
        page.keyboard.press(key)
        assert readout.locator("bdi").inner_text() == f"“{piece}”"
    page.keyboard.press("j")
    assert current(page) == "Beta"


def test_a_tap_reads_a_token_and_the_page_fits_a_phone(show: Open) -> None:
    page = show(shaded_report(), viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.locator(".query.current .hit summary").first.tap()
    page.locator(TOKENS).first.locator("span").nth(6).tap(position={"x": 10, "y": 10})
    assert page.locator(".query.current .readout strong").first.inner_text() == f"{MINUS}2.72"
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def luminance(color: list[float]) -> float:
    """Relative luminance by WCAG 2, of red, green and blue from 0 to 1."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_on_the_strongest_shades_can_be_read(show: Open, theme: str) -> None:
    page = show(make_report(tokens=lambda query, train: [("up", 1.0), ("down", -1.0)]), color_scheme=theme)
    spans = open_hit(page)
    style = "(element, name) => getComputedStyle(element)[name]"
    body = page.locator("body").evaluate(
        "element => [getComputedStyle(element).backgroundColor, getComputedStyle(element).color]"
    )
    paper, ink = ([int(part) / 255 for part in re.findall(r"\d+", color)] for color in body)
    shades = []
    for token in spans:
        shade = token.evaluate(style, "backgroundColor")
        red, green, blue, alpha = (float(part) for part in re.findall(r"[\d.]+", shade.removeprefix("color(srgb")))
        assert alpha > 0.3
        mixed = [alpha * part + (1 - alpha) * under for part, under in zip((red, green, blue), paper, strict=True)]
        dark, light = sorted((luminance(mixed), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5
        shades.append(shade)
    assert len(set(shades)) == 2


def test_the_theme_can_be_switched_and_is_remembered(show: Open) -> None:
    page = show(shaded_report(), color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Dark theme").click()
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(background) == light


def test_figures_are_shown(show: Open) -> None:
    image = show(shaded_report()).get_by_role("img", name="A plot")
    assert image.evaluate("image => [image.complete, image.naturalWidth]") == [True, 1]


def test_without_scripts_all_texts_can_be_read(show: Open) -> None:
    page = show(shaded_report(), java_script_enabled=False)
    assert page.locator(".query:visible").count() == 2
    assert page.locator("#train-4 .text").is_visible()
    assert page.locator("#train-4 .text").text_content() == "".join(PIECES).replace("\r", "␍")
    assert page.locator("#filter").is_hidden()
    assert not page.get_by_text("share of the score").is_visible()


@pytest.mark.parametrize("protected", [True, False], ids=["with policy", "without policy"])
def test_hostile_text_stays_text(show: Open, protected: bool) -> None:
    """Without the content security policy it is the escaping, and moving texts as text, that hold alone."""
    text = " ".join(HOSTILE)
    source = hostile_report(text)
    if not protected:
        source, removed = re.subn(r"<meta http-equiv[^>]*>", "", source)
        assert removed == 1
    page = show(source)
    for summary in page.locator(".query.current .hit summary").all():
        summary.click()
    tokens = page.locator(".query.current .tokens")
    tokens.nth(page.locator(".query.current .hit").count() - 1).wait_for()
    shown = [re.sub(r"\s", " ", each) for each in tokens.locator("span").all_text_contents()]
    assert len(set(shown)) == 1
    assert shown[0].startswith(" ".join(HOSTILE[:6]))
    assert page.locator(".tokens span *, main script, main img, main b, main object").count() == 0
    assert HOSTILE[0] in page.locator(".query.current .readout bdi").first.inner_text()
    assert page.evaluate("document.documentElement.dataset.broken") is None
