"""The documentation: its code runs, its commands exist, the site builds without a network and has no dead link."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import CodeType, ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import torch
from torch import Tensor

import wherefrom as wf
from tests.models import gpt2, token_rows
from wherefrom.cli import main as cli
from wherefrom.evaluate import retrain

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)(?P<options>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
# A block whose title says this is for another machine or launcher; it is compiled only.
ELSEWHERE = re.compile(r'title="(needs|started by) ')
# A page with this comment, and the README, talk of a model and data that the reader has: here a tiny GPT-2.
GIVEN = "<!-- given: model, tokenizer, train_set, queries -->"
# Here the commands are run too, between the blocks of Python.
COMMANDS_RUN = {DOCS / "quickstart.md"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what stands behind that, its code and the line that it begins on."""

    page: Path
    language: str
    options: str
    code: str
    line: int

    def compiled(self) -> CodeType:
        return compile("\n" * self.line + self.code, str(self.page), "exec")

    def commands(self, program: str) -> list[list[str]]:
        """The arguments of each line that runs a program, also behind a prompt or started by torchrun."""
        lines = (line.strip().removeprefix("$ ") for line in self.code.replace("\\\n", " ").splitlines())
        begins = re.compile(rf"(?:(?:srun )?torchrun .*--no-python )?{program} (.*)")
        return [shlex.split(found[1], comments=True) for line in lines if (found := begins.fullmatch(line))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, each["language"], each["options"], each["code"], text.count("\n", 0, each.start()) + 1)
        for each in FENCE.finditer(text)
    ]


def shell_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in ("", "bash", "console", "sh")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Decoder:
    """Stands for the reader's tokenizer: a token's text is its number."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool = False) -> str:
        return "".join(f" {each}" for each in token_ids)


def nearest_mean(rows: list[list[int]], queries: list[list[int]], retrainings: Sequence[retrain.Retraining]) -> Tensor:
    """Stands for the reader's training: how far each query's mean token is from that of the kept examples."""
    means, queried = (torch.tensor([sum(row) / len(row) for row in each]) for each in (rows, queries))
    return torch.stack([(queried - means[list(each.subset)].mean()).square() for each in retrainings])


def given() -> dict[str, object]:
    """What a page means by "your model" and "your data"."""
    train_set, queries = token_rows(14), token_rows(5, seed=4)
    columns = [[row["input_ids"] for row in rows if isinstance(row, dict)] for rows in (train_set, queries)]
    return {
        "torch": torch,
        "wf": wf,
        "model": gpt2(torch.float32),
        "tokenizer": Decoder(),
        "train_set": train_set,
        "queries": queries,
        "train_function": functools.partial(nearest_mean, *columns),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=name
)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # A fresh process takes longer to start than all trainings of a page.
    monkeypatch.setattr(retrain, "default_workers", lambda: 1)
    # Classes look for their module, and scripts for this name.
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    namespace = main.__dict__
    if page.name == "README.md" or GIVEN in page.read_text(encoding="utf-8"):
        namespace.update(given())
    with torch.random.fork_rng():
        for block in blocks(page):
            if block.language == "python":
                code = block.compiled()
                if not ELSEWHERE.search(block.options):
                    exec(code, namespace)
            elif page in COMMANDS_RUN:
                for arguments in block.commands("wherefrom"):
                    monkeypatch.setattr(sys, "argv", ["wherefrom", *arguments])
                    cli.main()


@functools.cache
def known_flags(command: str, *method: str) -> set[str]:
    """The flags that the help of a subcommand lists, with those of a method where one is named."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(sys, "argv", ["wherefrom", command, *method, "--help"])
        cli.main()
    assert f"wherefrom {command} " in printed.getvalue(), f"wherefrom has no command {command!r}"
    return set(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


def test_commands_exist() -> None:
    found = [arguments for block in shell_blocks() for arguments in block.commands("wherefrom")]
    assert found
    for command, *arguments in found:
        if command.startswith("-"):
            continue
        named = [each for each in arguments if each in wf.METHODS]
        unknown = {each.partition("=")[0] for each in arguments if each.startswith("-")} - known_flags(command, *named)
        assert not unknown, f"wherefrom {command}: {unknown}"


def test_scripts_and_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in shell_blocks():
        for script, *arguments in block.commands("python"):
            if not script.startswith("-"):
                assert (ROOT / script).is_file(), script
                source = "".join(each.read_text() for each in (ROOT / script).parent.glob("*.py"))
                flags = {each.removeprefix("--").replace("-", "_") for each in arguments if each.startswith("--")}
                assert all(re.search(rf"\b{flag}\b", source) for flag in flags), (script, flags)
        for target, *_ in block.commands("make"):
            assert target in targets, target


@pytest.mark.skipif(importlib.util.find_spec("kronfluence") is None, reason="make compare installs kronfluence")
def test_the_migration_page_names_all_of_kronfluence() -> None:
    from kronfluence.analyzer import Analyzer  # type: ignore[import-not-found,unused-ignore]
    from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore[import-not-found,unused-ignore]
    from kronfluence.task import Task  # type: ignore[import-not-found,unused-ignore]

    text = (DOCS / "how-to/kronfluence.md").read_text(encoding="utf-8")
    paths = {"factors_output_dir", "scores_output_dir"}
    names = {
        *(each for each in dir(Analyzer) if not each.startswith("_") and each not in paths),
        *(each for each in dir(Task) if not each.startswith("_")),
        *vars(FactorArguments()),
        *vars(ScoreArguments()),
        *(set(inspect.signature(Analyzer).parameters) - {"args", "kwargs"}),
        *(set(inspect.signature(Analyzer.compute_pairwise_scores).parameters) - {"self", "dataloader_kwargs"}),
    }
    assert {each for each in names if not re.search(rf"\b{each}\b", text)} - {"score_args", "factor_args"} == set()


@dataclass
class Built:
    """What a built page refers to, and the places in it that can be referred to."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)


class PageParser(HTMLParser):
    """Reads a built page."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Built()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.found.ids.update(values[key] for key in ("id", "name") if key in values)
        if tag == "a" and "href" in values:
            self.found.links.append(values["href"])
            return
        self.found.resources += [values[key] for key in ("src", "href", "data", "poster") if key in values]
        self.found.resources += [each.split()[0] for each in values.get("srcset", "").split(",") if each.split()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Built]:
    return {path: parsed(path) for path in site.rglob("*.html")}


def parsed(path: Path) -> Built:
    parser = PageParser()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.found


def test_every_page_is_built(pages: dict[Path, Built], site: Path) -> None:
    expected = {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")}
    assert {path.relative_to(site) for path in pages} == {*expected, Path("404.html")}


def test_nothing_is_fetched_from_elsewhere(pages: dict[Path, Built], site: Path) -> None:
    outside = {each for page in pages.values() for each in page.resources if urlsplit(each).scheme not in ("", "data")}
    assert outside == set()
    for style in site.rglob("*.css"):
        urls = re.findall(r"""(?:url\(|@import\s+)["']?([^"')]+)""", style.read_text(encoding="utf-8"))
        assert [each for each in urls if each.startswith(("http", "//"))] == [], style


def test_links_and_resources_resolve(pages: dict[Path, Built], site: Path) -> None:
    dead = [
        f"{path.relative_to(site)}: {link}"
        for path, page in pages.items()
        if path.name != "404.html"  # its links begin at the root of a server
        for link in (*page.links, *page.resources)
        if not urlsplit(link).scheme and not resolves(path, link, pages)
    ]
    assert dead == []


def resolves(path: Path, link: str, pages: dict[Path, Built]) -> bool:
    parts = urlsplit(link)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return False
    return not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids


def test_the_reference_has_every_public_name(pages: dict[Path, Built]) -> None:
    ids = {each for path, page in pages.items() if path.parent.name == "api" for each in page.ids}
    assert {f"wherefrom.{each}" for each in wf.__all__ if not each.startswith("_")} - ids == set()


def test_formulas_are_drawn(pages: dict[Path, Built], site: Path) -> None:
    concepts = (site / "concepts.html").read_text(encoding="utf-8")
    assert concepts.count('<svg class="formula"') > 20
    assert all("arithmatex" not in path.read_text(encoding="utf-8") for path in pages)


def test_the_page_of_reliability_is_that_of_the_figures() -> None:
    import reliability

    assert reliability.DOCUMENT.read_text() == reliability.page()
