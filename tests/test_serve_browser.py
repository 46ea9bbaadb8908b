"""The served page in a browser, from a prompt to an export: by pointer and keyboard, with hostile texts, on a phone, in
two tabs, and when the server dies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.test_ask import ANSWER, PROMPT
from tests.test_report_browser import CHROMIUM, browser, watch
from tests.test_serve import HOSTILE, TEXTS, TOKEN, Made, Server, made, serving
from wherefrom.serve.app import make_app
from wherefrom.serve.views import RunViews
from wherefrom.serve.work import Worker

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, such as Debian's package of that name")
__all__ = ["browser", "made"]  # fixtures

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def server(made: Made) -> Iterator[Server]:
    worker, views = Worker(), RunViews(made.sources, made.study)
    with serving(lambda port: make_app(views, worker, TOKEN, port)) as server:
        yield server
    worker.close()


@pytest.fixture
def opened(browser: Browser, made: Made) -> Iterator[Open]:
    """Opens a page; when the test ends there must have been no error, no refusal and no request elsewhere."""
    troubles: list[str] = []
    with ExitStack() as stack:

        def opened(server: Server, place: str = "", **options: Any) -> Page:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
            stack.callback(context.close)
            page = context.new_page()
            watch(page, troubles)
            page.set_default_timeout(60_000)
            page.goto(f"http://127.0.0.1:{server.port}/?token={TOKEN}{place}")
            expect(page.locator("#run")).to_have_text("Where from? run")
            expect(page.locator("main > section:not([hidden])")).to_have_count(1)  # until then nothing can be typed
            assert TOKEN not in page.url
            return page

        yield opened
    own = re.compile(r"http://127\.0\.0\.1:\d+/.*|(blob|data):.*")
    assert [trouble for trouble in troubles if not own.fullmatch(trouble)] == []
    for file in made.run.glob("judgements/*.json"):
        file.unlink()


expect.set_options(timeout=60_000)


def test_from_a_prompt_to_an_export_by_keyboard_alone(server: Server, opened: Open, tmp_path: Path) -> None:
    page = opened(server)
    page.locator("#prompt").focus()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.type(ANSWER)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#find-part")).to_be_visible()
    expect(page.locator("#answer")).to_be_focused()
    tokens = page.locator("#answer span")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#answer .chosen")).to_have_count(2)
    expect(tokens.nth(1)).to_have_class("chosen")
    expect(tokens.nth(2)).to_have_class("chosen")
    page.keyboard.press("Enter")
    expect(page.locator("#found .positive h3")).to_be_visible()
    assert "span=" in page.url
    page.locator("#found .hit summary").first.focus()
    page.keyboard.press("Enter")
    judge = page.locator("#found .judge").first
    judge.get_by_role("button", name="Drop").focus()
    page.keyboard.press("Enter")
    expect(judge.get_by_role("button", name="Drop")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#found .verdict-tag").first).to_have_text("drop")
    dropped = int(page.locator("#found .hit .facts a").first.inner_text().removeprefix("train "))
    page.get_by_role("link", name="Training examples").focus()
    page.keyboard.press("Enter")
    export = page.get_by_role("button", name="Export train.jsonl without what is to be dropped")
    export.focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "filtered.jsonl")
    kept = [json.loads(line)["text"] for line in (tmp_path / "filtered.jsonl").read_text().splitlines()]
    assert kept == [text for train, text in enumerate(TEXTS) if train != dropped]


def test_a_part_is_selected_with_the_pointer_and_a_link_leads_back_to_it(server: Server, opened: Open) -> None:
    page = opened(server)
    page.fill("#prompt", PROMPT)
    page.get_by_label("I have an answer").check()
    page.fill("#given", ANSWER)
    page.get_by_role("button", name="Take this answer").click()
    expect(page.locator("#selected")).to_contain_text("The whole answer")
    first, last = (page.locator("#answer span").nth(index).bounding_box() for index in (8, 10))
    assert first and last
    page.mouse.move(first["x"] + 1, first["y"] + 5)
    page.mouse.down()
    page.mouse.move(last["x"] + last["width"] - 1, last["y"] + 5)
    page.mouse.up()
    chosen = page.locator("#selected bdi").inner_text()
    page.select_option("#beside", "diagonal")
    page.get_by_role("button", name="Find its sources").click()
    expect(page.locator("#found .result h2")).to_have_text(["EK-FAC influence", "Diagonal influence"])
    expect(page.locator("#found .label.same").first).to_be_visible()
    found = page.locator("#found .result").first.inner_text()
    again = opened(server, page.url[page.url.index("#") :])  # in another tab
    expect(again.locator("#selected bdi")).to_have_text(chosen)
    expect(again.locator("#found .label.same").first).to_be_visible()
    assert again.locator("#found .result").first.inner_text() == found


def test_a_link_stays_whole_while_it_is_followed_and_nothing_is_to_be_found_before_there_is_an_answer(
    server: Server, opened: Open
) -> None:
    page, held = opened(server), list[Route]()

    def hold(route: Route) -> None:
        held.append(route)

    page.evaluate(
        """() => {
            const replace = history.replaceState.bind(history);
            window.places = [];
            history.replaceState = (state, title, to) => { window.places.push(to); replace(state, title, to); };
        }"""
    )
    page.route("**/api/answer", hold)
    picked = {"prompt": PROMPT, "answer": ANSWER, "method": "dot", "contrast": " in the rain"}
    page.evaluate("place => { location.hash = place; }", f"ask?{urlencode(picked)}")
    expect(page.locator("#answer-part .status")).to_be_visible()
    expect(page.locator("#find-part")).to_be_hidden()
    held[0].continue_()
    expect(page.locator("#found .positive h3")).to_be_visible()
    expect(page.locator("#find-part")).to_be_visible()
    places = page.evaluate("window.places")
    assert all("method=dot" in place and "contrast=" in place for place in [*places, page.url])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_why_this_and_not_that_on_a_phone_by_keyboard(server: Server, opened: Open, scheme: str) -> None:
    place = f"#ask?{urlencode({'prompt': PROMPT, 'answer': ANSWER})}"
    page = opened(server, place, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    expect(page.locator("#selected")).to_contain_text("whole answer")
    page.locator("#answer").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # unfolds
    expect(page.locator("#contrast")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.type(HOSTILE)
    for _ in range(5):  # over the button that draws one, and the choice of methods
        page.keyboard.press("Tab")
    expect(page.locator("#group")).to_be_focused()
    page.keyboard.press("k")
    page.locator("#contrast").press("Control+Enter")
    expect(page.locator("#found .groups tbody tr")).to_have_count(2)
    expect(page.locator("#found .versus bdi").last).to_have_text(f"“{HOSTILE}”", use_inner_text=False)
    expect(page.locator("#found .groups tbody")).to_contain_text("<img src=x")
    assert page.locator("img, main script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    again = opened(server, page.url[page.url.index("#") :])
    expect(again.locator("#contrast")).to_have_value(HOSTILE)
    expect(again.locator("#found .groups tbody tr")).to_have_count(2)
    again.get_by_role("button", name="Let the model draw one").click()
    expect(again.locator("#contrast")).to_be_focused()
    assert again.locator("#contrast").input_value() not in ("", HOSTILE)


def test_hostile_texts_stay_texts(server: Server, opened: Open) -> None:
    page = opened(server, "#examples?train=3")
    expect(page.locator("#examples .hit .text")).to_have_text(HOSTILE, use_inner_text=False)
    page.get_by_label("Note on example 3").fill(HOSTILE)
    page.get_by_label("Note on example 3").press("Enter")
    expect(page.locator(".judge .state")).to_have_text("Saved")
    page.get_by_role("link", name="Ask").click()
    page.fill("#prompt", HOSTILE)
    page.get_by_label("I have an answer").check()
    page.fill("#given", HOSTILE)
    page.get_by_role("button", name="Take this answer").click()
    page.get_by_role("button", name="Find its sources").click()
    expect(page.locator("#found .positive h3")).to_be_visible()
    assert page.locator("img, b, main script").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off(server: Server, opened: Open, scheme: str) -> None:
    page = opened(server, "#scores", viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    expect(page.locator("#hits .positive h3")).to_be_visible()
    for view in ("Ask", "Finished scores", "Training examples"):
        page.get_by_role("link", name=view).tap()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(253, 253, 252)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_two_tabs_see_the_same_judgements(server: Server, opened: Open) -> None:
    first, second = (opened(server, "#examples?train=2") for _ in range(2))
    first.get_by_role("button", name="Fix").click()
    expect(first.locator(".judge .state")).to_have_text("Saved")
    second.evaluate("dispatchEvent(new Event('visibilitychange'))")  # looked at again
    expect(second.get_by_role("button", name="Fix")).to_have_attribute("aria-pressed", "true")


def test_a_server_that_dies_is_named_and_another_goes_on(made: Made, browser: Browser) -> None:
    worker, views = Worker(), RunViews(made.sources, made.study)
    context = browser.new_context()
    page = context.new_page()
    with serving(lambda port: make_app(views, worker, TOKEN, port)) as server:
        page.goto(f"http://127.0.0.1:{server.port}/?token={TOKEN}")
        expect(page.locator("#run")).to_have_text("Where from? run")
    page.fill("#prompt", PROMPT)
    page.get_by_role("button", name="Write an answer").click()
    expect(page.get_by_role("alert").filter(has_text="The server does not answer")).to_be_visible()
    with serving(lambda port: make_app(views, worker, TOKEN, port)) as server:
        page.goto(f"http://127.0.0.1:{server.port}/?token={TOKEN}")
        page.fill("#prompt", PROMPT)
        page.get_by_role("button", name="Write an answer").click()
        expect(page.locator("#find-part")).to_be_visible()
    context.close()
    worker.close()


def test_who_has_no_token_is_told_where_to_find_it(server: Server, browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/#scores")
    expect(page.locator("body")).to_contain_text("Open the address that `wherefrom serve` has printed")
    context.close()
