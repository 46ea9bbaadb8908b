"""The served page's requests, to a real server: who may ask, whose turn it is, and what is answered."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

import wherefrom as wf
from tests.test_ask import ANSWER, PROMPT, by_hand, save_model
from wherefrom.engine.execution import Execution
from wherefrom.hf.preparation import Preparation
from wherefrom.hf.pretrained import PretrainedStudy
from wherefrom.jobs.sources import DataSource, RunSources
from wherefrom.runtime.errors import DamagedError, InputError
from wherefrom.runtime.progress import watched
from wherefrom.serve.app import _streamed, listen, make_app
from wherefrom.serve.guard import HEADERS, MOST_BYTES
from wherefrom.serve.judgements import Judgement, Judgements
from wherefrom.serve.views import LONGEST_TEXT, RunViews
from wherefrom.serve.work import MOST_WAITING, Job, Stopped, Tell, Worker

HOSTILE = "</script><img src=x onerror=alert(1)> <b>bold</b> &amp; \u202eevil \x1b[31m\x07"
TEXTS = [
    "the cat sat on the mat and the dog sat too",
    "a dog ran after the cat over the hill",
    "rain fell on the hill and the mat was wet",
    HOSTILE,
    "the sun was over the hill and the cat ran",
    "a wet dog sat on a wet mat in the rain",
]
KINDS = ("plain", HOSTILE)  # of the training examples in turn
TOKEN = "a-token-of-this-test"


class Answered(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        parts = [part.split("\n", 1) for part in self.body.decode().split("\n\n") if part.startswith("event: ")]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


class Server(NamedTuple):
    port: int

    @property
    def own(self) -> dict[str, str]:
        """What the page's own requests have."""
        return {
            "Host": f"127.0.0.1:{self.port}",
            "Origin": f"http://127.0.0.1:{self.port}",
            "Cookie": f"wherefrom-{self.port}={TOKEN}",
            "Sec-Fetch-Site": "same-origin",
            "Content-Type": "application/json",
        }

    def ask(self, method: str, path: str, said: Any = None, **changed: str | None) -> Answered:
        """A request of the page, with other headers where these are given; None leaves one out."""
        found = {**self.own, **{name.replace("_", "-"): value for name, value in changed.items()}}
        headers = {name: value for name, value in found.items() if value is not None}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = None if said is None else said if isinstance(said, bytes) else json.dumps(said).encode()
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        found_headers = {name.lower(): value for name, value in answer.getheaders()}
        answered = Answered(answer.status, found_headers, answer.read())
        connection.close()
        return answered


@contextmanager
def serving(app: Callable[[int], Any]) -> Iterator[Server]:
    """A server in a thread."""
    listening = listen(0)
    port = listening.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app(port), http="h11", lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield Server(port)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


class Made(NamedTuple):
    run: Path
    sources: RunSources
    study: PretrainedStudy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A fitted run with finished scores of two queries."""
    path = tmp_path_factory.mktemp("serve")
    model = save_model(path / "model")
    lines = [{"text": text, "kind": KINDS[place % 2]} for place, text in enumerate(TEXTS)]
    (path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "queries.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:3]))
    train = DataSource((str(path / "train.jsonl"),), "train", Preparation(end_token=False))
    sources = RunSources(str(model), None, train, empirical=False, seed=0)
    study = sources.study(path / "run", "cpu", Execution(train_batch_size=2))
    study.fit(wf.EKFAC())
    sources.save(study.path)
    queries = sources.queries_from(str(path / "queries.jsonl"), "train", train.preparation)
    found = study.score(study.prepare(queries.names[0]), wf.EKFAC())
    study.score(study.prepare(queries.names[0]), wf.EKFAC(), keep=wf.Tokens(1))
    replace(sources, queries=queries).save(study.path, found.name)
    return Made(study.path, sources, study)


@pytest.fixture(scope="module")
def views(made: Made) -> RunViews:
    return RunViews(made.sources, made.study)


@pytest.fixture(scope="module")
def server(views: RunViews) -> Iterator[Server]:
    worker = Worker()
    with serving(lambda port: make_app(views, worker, TOKEN, port)) as server:
        yield server
    worker.close()


# Who may ask


def test_the_address_with_its_token_opens_the_page_and_leaves_a_cookie(server: Server) -> None:
    answered = server.ask("GET", f"/?token={TOKEN}", Cookie=None, Origin=None, Sec_Fetch_Site="cross-site")
    assert answered.status == 200
    assert b"<main" in answered.body
    cookie = f"wherefrom-{server.port}={TOKEN}; Path=/; HttpOnly; SameSite=Strict"
    assert answered.headers["set-cookie"] == cookie
    assert HEADERS.items() <= answered.headers.items()
    # Then all that the page asks for is there, and nothing of it is elsewhere.
    for name in (
        "report.css",
        "serve.css",
        "components.js",
        "parts.js",
        "main.js",
        "ask.js",
        "scores.js",
        "examples.js",
    ):
        part = server.ask("GET", f"/page/{name}", Origin=None)
        assert part.status == 200, name
        assert b"//" not in part.body.replace(b"http://www.w3.org/2000/svg", b"") or name.endswith(".js")
        assert HEADERS.items() <= part.headers.items()


@pytest.mark.parametrize(
    ("status", "changed"),
    [
        (401, {"Cookie": None}),
        (401, {"Cookie": "wherefrom-1=a-token-of-this-test"}),
        (401, {"Cookie": "wherefrom-PORT=another"}),
        (421, {"Host": "rebound.example"}),
        (421, {"Host": "rebound.example:PORT"}),
        (421, {"Host": "127.0.0.1:1"}),
        (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "http://127.0.0.1:1"}),
        (403, {"Origin": "https://127.0.0.1:PORT"}),
        (403, {"Origin": "null"}),
        (403, {"Origin": None}),
        (403, {"Sec_Fetch_Site": "cross-site"}),
        (403, {"Sec_Fetch_Site": "same-site"}),
        (400, {"Content_Type": "text/plain"}),
        (400, {"Content_Type": None}),
    ],
)
def test_nobody_else_may_ask(server: Server, status: int, changed: dict[str, str | None]) -> None:
    headers = {name: value and value.replace("PORT", str(server.port)) for name, value in changed.items()}
    answered = server.ask("PUT", "/api/judgements", {"train": 0, "verdict": "drop"}, **headers)
    assert answered.status == status, answered.body
    assert HEADERS.items() <= answered.headers.items()
    assert "set-cookie" not in answered.headers
    assert server.ask("GET", "/api/judgements").json == {"judgements": []}


@pytest.mark.parametrize("path", ["/?token=another", "/", "/api/run", "/page/main.js", f"/api/run?token={TOKEN}"])
def test_without_the_cookie_nothing_is_told(server: Server, path: str) -> None:
    assert server.ask("GET", path, Cookie=None, Origin=None).status == 401


def test_other_files_are_not_sent(server: Server) -> None:
    for path in ("/page/../views.py", "/page/%2e%2e/views.py", "/page/views.py", "/etc/passwd", "/.lock"):
        assert server.ask("GET", path).status == 404, path


def test_too_much_is_refused_before_it_is_read(server: Server) -> None:
    said = b'{"prompt": "' + b"a" * MOST_BYTES + b'"}'
    assert server.ask("POST", "/api/answer", said[:1], Content_Length=str(len(said))).status == 413
    answered = server.ask("POST", "/api/answer", {"prompt": "a" * (LONGEST_TEXT + 1)})
    assert answered.status == 400
    assert answered.json["message"] == "prompt has 50,001 characters; 50,000 are the most."


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/answer", b"{"),
        ("/api/answer", b"[" * 100_000),
        ("/api/answer", []),
        ("/api/answer", {"prompt": 1}),
        ("/api/answer", {"prompt": "\ud800"}),
        ("/api/answer", {"prompt": "a", "seed": -1}),
        ("/api/answer", {"prompt": "a", "temperature": "hot"}),
        ("/api/attribute", {"prompt": "a"}),
        ("/api/attribute", {"prompt": "a", "answer": "b", "span": [0]}),
        ("/api/attribute", {"prompt": "a", "answer": "b", "span": [0, True]}),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(server: Server, path: str, said: Any) -> None:
    answered = server.ask("POST", path, said)
    assert answered.status == 400
    assert len(answered.json["message"]) > 10


def test_it_listens_on_this_machine_alone() -> None:
    with listen(0) as listening:
        host, port = listening.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(InputError, match=rf"port={port}: cannot be used"):
            listen(port)


# Answers, and what is behind them


def test_an_answer_grows_and_its_sources_are_the_scores_of_the_library(server: Server, study_values: Any) -> None:
    written = server.ask("POST", "/api/answer", {"prompt": PROMPT, "max_new_tokens": 5}).events
    texts = [said["text"] for name, said in written if name == "text"]
    assert written[-1][0] == "answered"
    answer = written[-1][1]
    assert texts and all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert "".join(answer["pieces"]) == answer["answer"]

    found = server.ask("POST", "/api/attribute", {"prompt": PROMPT, "answer": ANSWER, "method": "ekfac", "k": 6}).events
    names = [name for name, _ in found if name not in ("note", "progress")]
    assert names == ["shared", "found"]
    stages = [said for name, said in found if name == "progress"]
    assert {"stage": "pairwise scores", "done": 6, "total": 6} in stages
    shared, last = found[[name for name, _ in found].index("shared")][1], found[-1][1]
    assert shared["hits"][0]["train"] == 1  # which has the whole answer
    hits = [*last["supporting"], *last["opposing"]]
    assert {hit["train"]: hit["raw"] for hit in hits} == pytest.approx(study_values)
    assert all("".join(text for text, _ in hit["tokens"]) == hit["text"] == TEXTS[hit["train"]] for hit in hits)
    assert last["scored"] == last["of"] == 6


@pytest.fixture(scope="module")
def study_values(made: Made) -> dict[int, float]:
    """The scores of the question, of an example made by hand."""
    scores = made.study.score([by_hand(made.study, PROMPT, ANSWER)], wf.EKFAC()).values[0]
    return dict(enumerate(scores.double().tolist()))


def test_a_part_of_an_answer_is_whole_tokens(server: Server) -> None:
    asked = {"prompt": PROMPT, "answer": ANSWER, "span": [8, 9], "method": "diagonal", "k": 1}
    found = server.ask("POST", "/api/attribute", asked).events[-1]
    assert found[0] == "found"
    start, stop = found[1]["span"]
    assert (ANSWER[start:stop], found[1]["method"]) == ("the", "Diagonal influence")
    failed = server.ask("POST", "/api/attribute", {**asked, "span": [5, 500]}).events[-1]
    assert failed[0] == "failed"
    assert "expected a part of the" in failed[1]["message"]
    assert server.ask("POST", "/api/attribute", {**asked, "method": "magic"}).events[-1][0] == "failed"


def test_a_contrast_is_the_difference_of_two_answers_and_groups_add_up(server: Server, made: Made) -> None:
    other = " lay on the hill"
    assert server.ask("GET", "/api/run").json["groupings"] == ["kind"]
    asked = {"prompt": PROMPT, "answer": ANSWER, "contrast": other, "group": "kind", "method": "ekfac", "k": 6}
    name, found = server.ask("POST", "/api/attribute", asked).events[-1]
    assert (name, found["contrast"], found["heading"]) == ("found", other, "Rise, nats")
    both = [by_hand(made.study, PROMPT, each) for each in (ANSWER, other)]
    mine, theirs = made.study.score(both, wf.EKFAC()).values.double()
    difference = (mine - theirs).tolist()
    hits = [*found["supporting"], *found["opposing"]]
    assert {hit["train"]: hit["raw"] for hit in hits} == pytest.approx(dict(enumerate(difference)), rel=1e-3, abs=1e-3)
    sums = {kind: sum(difference[place::2]) / len(TEXTS) for place, kind in enumerate(KINDS)}
    assert {kind: float(said) for kind, _, said, _ in found["groups"]} == pytest.approx(sums, rel=1e-2, abs=1e-3)
    assert [count for _, count, _, _ in found["groups"]] == [3, 3]
    assert server.ask("POST", "/api/attribute", {**asked, "group": "topic"}).events[-1][0] == "failed"
    assert server.ask("POST", "/api/attribute", {**asked, "contrast": "a" * (LONGEST_TEXT + 1)}).status == 400


# Whose turn it is


def test_a_stopped_sweep_goes_on_to_the_same_scores(made: Made) -> None:
    query, seen = [by_hand(made.study, "the sun", " was over the hill")], []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        if stage == "pairwise scores" and done:
            raise Stopped

    with watched(stop), pytest.raises(Stopped):
        made.study.score(query, wf.EKFAC())
    assert seen[-1] == ("pairwise scores", 2)  # a batch, of three
    after = made.study.score(query, wf.EKFAC())
    again = made.study.score(query, wf.EKFAC(), overwrite=True)
    assert torch.equal(after.values, again.values)


def streaming(worker: Worker, work: Callable[[Tell], None]) -> Callable[[int], Any]:
    route = Route("/", _streamed(worker, lambda asked: work), methods=["POST"])
    return lambda port: Starlette(routes=[route])


def test_a_browser_that_goes_away_ends_its_work() -> None:
    begun, ended, worker = threading.Event(), threading.Event(), Worker()

    def work(tell: Tell) -> None:
        try:
            while not ended.wait(0.01):
                tell("text", {})
                begun.set()
        except Stopped:
            ended.set()
            raise

    with serving(streaming(worker, work)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("POST", "/", b"{}")
        assert connection.getresponse().status == 200
        assert begun.wait(60)
        connection.close()
        assert ended.wait(60)
    worker.close()


def test_a_few_wait_their_turn_and_more_are_sent_away() -> None:
    release, worker = threading.Event(), Worker()
    begun = threading.Event()

    def first(tell: Tell) -> None:
        begun.set()
        assert release.wait(60)

    worker.submit(Job(first, lambda event: None))
    assert begun.wait(60)
    with serving(streaming(worker, lambda tell: tell("found", {}))) as server:
        asked = []
        for _ in range(MOST_WAITING):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("POST", "/", b"{}")
            asked.append((connection, connection.getresponse()))
        refused = server.ask("POST", "/", {})
        assert refused.status == 429
        assert refused.json["message"].startswith("4 questions wait already")
        release.set()
        bodies = [response.read().decode() for _, response in asked]
        for connection, _ in asked:
            connection.close()
    worker.close()
    assert 'event: waiting\ndata: {"ahead": 4}' in bodies[-1]
    assert all("event: found\ndata: {}" in body for body in bodies)


# Finished scores, and training examples


def test_finished_scores_are_shown_with_their_texts(server: Server, made: Made) -> None:
    listed = server.ask("GET", "/api/scores").json
    (name,) = listed["scores"]
    result = server.ask("GET", f"/api/scores/{name}").json
    assert [query["excerpt"] for query in result["queries"]] == TEXTS[1:3]
    hits = server.ask("GET", f"/api/scores/{name}/1?k=6").json
    scores = wf.Scores.load(made.run / "scores" / name)
    values = scores.values[1].double()
    shown = {hit["train"]: hit["raw"] for hit in (*hits["supporting"], *hits["opposing"])}
    assert shown == pytest.approx(dict(enumerate(values.tolist())))
    assert hits["query"]["text"] == TEXTS[2]
    token_scores = map(wf.TokenScores.load, (made.run / "tokens").iterdir())  # those of questions too
    (parts,) = (each for each in token_scores if not each.differences(scores.fingerprint))
    for hit in hits["supporting"][:1]:
        added = parts[1, hit["train"]].double().sum().item() / hit["raw"]  # in the unit that is shown
        assert "".join(text for text, _ in hit["tokens"]) == TEXTS[hit["train"]]
        assert added == pytest.approx(1, rel=1e-3)
        shown_parts = sum(part for _, part in hit["tokens"])
        assert f"{shown_parts:+#,.3g}" == hit["shown"]
    stored = {train for query, train in parts.pairs.tolist() if query == 1}
    for hit in (*hits["supporting"], *hits["opposing"]):
        assert bool(hit["tokens"]) == (hit["train"] in stored)
    assert len(stored) < len(TEXTS)
    for path in (f"/api/scores/{name}/2", "/api/scores/none", "/api/scores/..", f"/api/scores/{name}/0?k=0"):
        assert server.ask("GET", path).status in (400, 404), path


def test_examples_are_searched_and_their_texts_stay_texts(server: Server) -> None:
    found = server.ask("GET", "/api/examples?words=HILL%20the&start=2").json
    assert ([each["train"] for each in found["examples"]], found["next"]) == ([2, 4], None)
    hostile = server.ask("GET", "/api/examples/3")
    assert hostile.json["text"] == HOSTILE
    assert hostile.headers["content-type"] == "application/json"
    assert server.ask("GET", "/api/examples/6").status == 400
    assert server.ask("GET", "/api/examples?verdict=burn").status == 400


# Judgements


def test_judgements_stay_and_files_are_exported_without_what_is_dropped(made: Made, tmp_path: Path) -> None:
    worker, views = Worker(), RunViews(made.sources, made.study)
    try:
        with serving(lambda port: make_app(views, worker, TOKEN, port)) as server:
            for train, verdict, note in ((3, "drop", HOSTILE), (1, "fix", ""), (0, "keep", ""), (5, "", "why?")):
                said = {"train": train, "verdict": verdict, "note": note}
                assert server.ask("PUT", "/api/judgements", said).json == said
            server.ask("PUT", "/api/judgements", {"train": 0, "verdict": "", "note": ""})  # taken back
            for wrong in ({"train": 6, "verdict": "drop"}, {"train": 1, "verdict": "burn"}, {"train": True}, {}):
                assert server.ask("PUT", "/api/judgements", wrong).status == 400
        with serving(lambda port: make_app(RunViews(made.sources, made.study), worker, TOKEN, port)) as server:  # again
            found = server.ask("GET", "/api/judgements").json["judgements"]
            assert [(each["train"], each["verdict"], each["note"]) for each in found] == [
                (1, "fix", ""), (3, "drop", HOSTILE), (5, "", "why?"),
            ]  # fmt: skip
            dropped = server.ask("GET", "/api/examples?verdict=drop").json["examples"]
            assert [each["train"] for each in dropped] == [3]
            exported = server.ask("GET", "/export/judgements.jsonl")
            assert 'filename="judgements.jsonl"' in exported.headers["content-disposition"]
            lines = [json.loads(line) for line in exported.body.splitlines()]
            assert [(line["train"], line["verdict"], line["text"]) for line in lines] == [
                (1, "fix", TEXTS[1]), (3, "drop", HOSTILE), (5, "", TEXTS[5]),
            ]  # fmt: skip
            kept = server.ask("GET", "/export/filtered/0")
            whole = Path(made.sources.train.names[0]).read_bytes().splitlines(keepends=True)
            assert kept.body == b"".join(whole[:3] + whole[4:])
            assert 'filename="train-filtered.jsonl"' in kept.headers["content-disposition"]
            assert server.ask("GET", "/export/filtered/1").status == 400
        looked = RunViews(made.sources, made.study, read_only=True)
        with serving(lambda port: make_app(looked, worker, TOKEN, port)) as server:
            assert server.ask("PUT", "/api/judgements", {"train": 2, "verdict": "drop"}).status == 409
            assert len(server.ask("GET", "/api/judgements").json["judgements"]) == 3
    finally:
        views.judgements.file.unlink()
        worker.close()


def test_another_training_set_has_judgements_of_its_own_and_damage_is_named(tmp_path: Path) -> None:
    first, second = (Judgements(tmp_path, digest * 16, 3) for digest in "ab")
    first.judge(Judgement(2, "drop", "twice"))
    assert (first.read(), second.read()) == ({2: Judgement(2, "drop", "twice")}, {})
    for content in ("{", "[]", "{}", first.file.read_text().replace('"train": 2', '"train": 3')):
        first.file.write_text(content)
        with pytest.raises(DamagedError, match="Move it away"):
            first.read()
