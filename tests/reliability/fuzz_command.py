"""The command under wrong arguments: every subcommand, in this process, on a tiny model and a shelf of bad files.

A command may do its work, say in one `error:` line what is wrong, or be refused by the parser of arguments. It may not
end in any other exception, leave a file half written, or touch what an earlier command has finished.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import datasets
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.reliability.drawing import drawn
from tests.reliability.outcomes import Outcome
from wherefrom.cli.main import main
from wherefrom.scoring.results import load_scores

TEXTS = ["the cat sat on the mat", "a dog ran after the cat over the hill", "rain fell on the wet hill", "the sun"]


WORDS = sorted({word for text in TEXTS for word in text.split()})


def measure(folder: Path, count: int, number: int) -> list[Outcome]:
    """Run `count` command lines drawn from the seed `number`."""
    shelf = Shelf(folder)
    ends: Counter[int | str] = Counter()

    @drawn(count, number)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        files, arguments = data.draw(drawn_files(), "files"), data.draw(command_lines(), "arguments")
        ends[shelf.run(arguments, files)] += 1

    run()
    done, refused, parsed = ends[0], ends[1], ends[2]
    return [
        Outcome(
            "command lines of all subcommands with wrong values and files",
            sum(ends.values()),
            f"{done} did their work, {refused} ended with one line that names the error, {parsed} were refused by the "
            "parser of arguments; no traceback, no file left half written, earlier results untouched.",
        )
    ]


# What stands on the shelf


class Shelf:
    """A directory of models, texts and a finished run, and a place beside them where each command runs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "outer" / "inner"
        self.case, self.finished = self.root / "case", folder / "finished"
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        for parent in (self.root / "texts", self.case):
            parent.mkdir(parents=True)
        for name, content in BAD_TEXTS.items():
            (self.root / "texts" / name).write_bytes(content)
        datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(self.root / "texts" / "good.parquet"))
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(self.root / "texts" / "saved"))
        datasets.Dataset.from_dict({"text": [[1], [2]]}).to_parquet(str(self.root / "texts" / "lists.parquet"))
        _write_models(self.root)
        self._kept = {each for parent in (self.root, self.root.parent) for each in parent.iterdir()}
        self._make_run()

    def _make_run(self) -> None:
        """A run with factors and scores, which most commands start from."""
        fit = ["fit", "run", "--model", "../model", "--train", "../texts/good.txt", "--length", "12"]
        score = ["score", "run", "--queries", "../texts/good.jsonl", "--tokens", "1"]
        for arguments in (fit, [*score], [*score[:-2], "--top-only", "2"]):
            status, said = self._called(arguments)
            assert status == 0, said
        self.case.rename(self.finished)

    def run(self, arguments: list[str], files: Mapping[str, bytes]) -> int:
        """The exit status of a command line that ended as it should."""
        # A command that goes wrong must not be able to write outside of the shelf.
        assert not [each for each in arguments if each.startswith("/") or "../../.." in each]
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.finished, self.case)
        for name, content in files.items():
            (self.case / name).write_bytes(content)
        before = _contents(self.case)
        status, said = self._called(arguments)
        after = _contents(self.case)
        errors = sum(line.startswith("error: ") for line in said.splitlines())
        assert "Traceback" not in said, said
        assert status in (0, 1, 2), f"status {status}: {said}"
        assert errors == (status == 1), said
        assert not [name for name in after if ".part" in Path(name).suffixes], after.keys()
        if status and "--overwrite" not in arguments:
            changed = {name for name, content in before.items() if after.get(name) != content}
            assert not changed, changed
        if status == 0 and arguments[0] == "score" and "--explain" not in arguments:
            self._check_scores()
        for parent in (self.root, self.root.parent):
            for each in set(parent.iterdir()) - self._kept:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        return status

    def _check_scores(self) -> None:
        for manifest in (self.case / "run" / "scores").glob("*/manifest.json"):
            if "tokens" not in manifest.parent.name:
                assert bool(load_scores(manifest.parent).values.isfinite().all())

    def _called(self, arguments: list[str]) -> tuple[int, str]:
        """Exit status, and what was printed on the standard output and error."""
        self.case.mkdir(exist_ok=True)
        with _streams() as said, _inside(self.case), patch.object(sys, "argv", ["wherefrom", *arguments]):
            try:
                main()
                status = 0
            except SystemExit as stop:
                assert stop.code is None or isinstance(stop.code, int), stop.code
                status = stop.code or 0
        return status, said()


@contextlib.contextmanager
def _streams() -> Iterator[Callable[[], str]]:
    """Standard output and error as a terminal in UTF-8 has them: not every string can be written to them."""
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    error = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")

    def said() -> str:
        for stream in (output, error):
            stream.flush()
        return b"".join(stream.buffer.getvalue() for stream in (output, error)).decode()

    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        yield said


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _rows(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BAD_TEXTS: dict[str, bytes] = {
    "good.txt": "\n\n".join(TEXTS).encode(),
    "good.jsonl": _rows(*({"text": text} for text in TEXTS[:2])),
    "good.csv": ("text\n" + "\n".join(TEXTS)).encode(),
    "good.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "empty.txt": b"",
    "empty.csv": b"",
    "empty.jsonl": b"",
    "blank.txt": b" \n\t\n\n  \n",
    "blank.jsonl": b"\n\n\n",
    "latin.txt": "café\n\nle chat noir".encode("latin-1"),
    "latin.csv": "text\ncafé au lait\n".encode("latin-1"),
    "latin.jsonl": b'{"text": "caf\xe9 the cat"}\n',
    "utf16.txt": "the cat\n\nsat on".encode("utf-16"),
    "utf16.csv": "text\nthe cat sat\n".encode("utf-16"),
    "bom.txt": "the cat\n\nsat on".encode("utf-8-sig"),
    "bom.csv": "text\nthe cat sat\n".encode("utf-8-sig"),
    "bom.jsonl": '{"text": "the cat sat"}\n'.encode("utf-8-sig"),
    "binary.txt": bytes(range(256)) * 8,
    "binary.csv": bytes(range(256)) * 8,
    "binary.jsonl": bytes(range(256)) * 8,
    "binary.parquet": b"PAR1" + bytes(range(256)) + b"PAR1",
    "short.parquet": b"PAR1",
    "nul.txt": b"the cat\0sat\n\n\0\0",
    "long.txt": b"the cat " * 131_072,
    "word.txt": b"a" * 2**20,
    "emoji.txt": "the 🐈‍⬛ sat\n\n🏳️‍🌈🏳️‍🌈 and 👩‍👩‍👧‍👦 too\n\n\u202etac eht".encode(),
    "same.txt": b"the cat sat\n\n" * 50,
    "one.txt": b"the",
    "spaces.jsonl": _rows({"text": " "}, {"text": "\t\n"}, {"text": ""}),
    "some.jsonl": _rows({"text": "the cat sat"}, {"text": ""}, {"text": None}, {"text": " "}, {"text": "a dog"}),
    "half.jsonl": b'{"text": "the cat sat"}\n{"text": "the',
    "mixed.jsonl": _rows({"text": "the cat"}, {"text": 3}, {"text": ["a"]}, {"text": {"a": 1}}),
    "numbers.jsonl": _rows({"text": 1}, {"text": 2}),
    "lists.jsonl": _rows([1, 2], [3]),
    "scalars.jsonl": _rows(1, "text", None),
    "nested.jsonl": _rows({"a": {"text": "the cat"}}, {"a": {"text": "a dog"}}),
    "columns.jsonl": _rows({"body": "the cat sat", "title": "a"}),
    "other.jsonl": _rows({"text": "the cat sat"}, {"body": "a dog ran"}),
    "surrogate.jsonl": b'{"text": "the \\ud83d cat"}\n',
    "deep.jsonl": b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "object.json": b'{"text": "the cat sat"}',
    "null.json": b"null",
    "word.json": b'"text"',
    "ragged.csv": b"text,other\nthe cat\na,b,c,d\n",
    "quote.csv": b'text\n"the cat\n',
    "header.csv": b"text\n",
    "twice.csv": b"text,text\nthe cat,a dog\n",
    "nameless.csv": b",\nthe cat,a dog\n",
    "number.csv": b"text\n1\n2\n",
    "good.text": b"the cat sat",
    "picture.png": b"\x89PNG\r\n",
    ".txt": b"the cat sat",
    "a[1]*.jsonl": _rows({"text": "the cat sat on the mat"}),
    "a b'\"$.txt": b"the cat sat on the mat",
}


def _write_models(root: Path) -> None:
    """A good model, and what else may be found under a model's name."""
    vocabulary = {word: place for place, word in enumerate(["<unk>", *WORDS])}
    _write_model(root / "model", vocabulary, len(vocabulary))
    _write_model(root / "narrow", vocabulary, len(vocabulary) - 6)
    _write_model(root / "spoilt", vocabulary, len(vocabulary), spoilt=True)
    for name in ("config", "listed", "unknown", "weights", "cut", "tokens", "words", "other", "negative"):
        shutil.copytree(root / "model", root / name)
    (root / "config" / "config.json").write_text('{"model_type": ')
    (root / "listed" / "config.json").write_text("[]")
    (root / "unknown" / "config.json").write_text('{"model_type": "no-such-model"}')
    (root / "weights" / "model.safetensors").unlink()
    content = (root / "cut" / "model.safetensors").read_bytes()
    (root / "cut" / "model.safetensors").write_bytes(content[: len(content) // 2])
    (root / "tokens" / "tokenizer.json").write_text("{}")
    for each in (root / "words").glob("tokenizer*"):
        each.unlink()
    config = json.loads((root / "model" / "config.json").read_text())
    (root / "other" / "config.json").write_text(json.dumps({**config, "n_embd": 12}))
    (root / "negative" / "config.json").write_text(json.dumps({**config, "n_layer": -1, "vocab_size": "many"}))
    shutil.copytree(root / "model", root / "bert")
    bert = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForMaskedLM(bert).save_pretrained(root / "bert")


def _write_model(path: Path, vocabulary: Mapping[str, int], size: int, spoilt: bool = False) -> None:
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    if spoilt:
        with torch.no_grad():
            model.transformer.wte.weight[1] = float("nan")
    model.save_pretrained(path)


# Arguments

COUNTS = st.sampled_from(["0", "1", "2", "3", "-1", "7", "4096", "9" * 10, "9" * 30, "-" + "9" * 30]) | st.sampled_from(
    ["nan", "", " ", "1.5", "1e3", "0x10", "1_0", "\uff11\uff12", "\u00b2", "true", "None"]
)
AMOUNTS = (
    st.sampled_from(["0", "1", "0.5", "-1", "1e-300", "1e-8", "1e300", "1e999", "nan", "inf", "-inf", "-0.0"]) | COUNTS
)
NAMES = st.sampled_from(
    ["ekfac", "ekfac-top2", "ekfac.top1.tokens", "new", "a.part", "a.blocks", "..", "../x", "a/b", "", " ", "-",
     "a" * 300, "é", "a\nb", "[red]", "\udcff", "a\0b", "x.partial.safetensors", "CON", ".hidden"]
)  # fmt: skip
WEIRD = st.text(st.characters(exclude_characters="/~"), max_size=12) | st.sampled_from(
    ["\udce9", "[red]", "\x1b[2J", "%s{}", "-", "--", "\n"]
)
TEXT_FILES = st.sampled_from(
    ["../texts/" + name for name in BAD_TEXTS]
    + ["../texts/saved", "../texts/good.parquet", "../texts/lists.parquet", "../texts", "../texts/none.txt",
       "drawn.jsonl", "drawn.csv", "drawn.txt", "run", "run/sources.json", "", ".", "a\0b.txt", "\udce9.txt",
       "no such name!", "x" * 300 + ".txt", "../texts/good.txt/x", "http://localhost/x.jsonl", "a/b/c/d", "..", "*"]
)  # fmt: skip
MODELS = st.sampled_from(
    ["../" + name for name in
     ["narrow", "spoilt", "config", "listed", "unknown", "weights", "cut", "tokens", "words", "other", "negative",
      "bert", "texts", "texts/good.txt", "none"]]
    + ["", ".", "a\0b", "\udce9", "x" * 300, "a/b/c", "a b", "..", "~nobody"]
)  # fmt: skip
GOOD_TEXTS = st.sampled_from(["../texts/good.txt", "../texts/good.jsonl"])
RUNS = st.sampled_from(
    ["new", "run/", "./run", "run/factors", "run/sources.json", "", ".", "..", "../..", "../texts/good.txt/x",
     "a/b/c", "é", "\udcff", "a\nb", "a\0b", "x" * 300, "[red]", "~nobody/x", " "]
)  # fmt: skip
PAGES = RUNS | RUNS.map(lambda run: run + ".html")
DEVICES = st.sampled_from(
    ["auto", "cpu", "cpu:7", "cuda", "cuda:99", "meta", "mps", "xla", "hpu", "", "cpu:-1", "\udcff"]
)
LAYERS = st.sampled_from(
    ["*", "*.mlp.*", "*.wte", "*.ln_1", "lm_head", "mlp", "", "[", "*.wpe", "transformer", "\udcff"]
)
CHOICES = st.sampled_from(["identity", "diagonal", "kfac", "ekfac", "shampoo", "EKFAC", "", "none"])
SPLITS = st.sampled_from(["train", "validation", "test", "", "train[:1]", "train[", "\udcff"])
FLAG = st.none()
"""A flag without a value."""

# What most subcommands share.
COMMON: dict[str, SearchStrategy[str] | SearchStrategy[None]] = {
    "--device": DEVICES,
    "--memory-budget": AMOUNTS,
    "--overwrite": FLAG,
    "--half-precision": FLAG,
}
COLUMNS = {"--split": SPLITS, "--column": st.sampled_from(["text", "body", "", "\udcff"]) | WEIRD}

# For each subcommand: what it needs, each with good values; and its options, with values of all kinds.
Values = Mapping[str, SearchStrategy[str] | SearchStrategy[None]]
OPTIONS: dict[str, tuple[Mapping[str, SearchStrategy[str]], Values]] = {
    "fit": (
        {"--model": st.just("../model"), "--train": GOOD_TEXTS},
        {
            "--model": MODELS, "--train": TEXT_FILES, "--strategy": CHOICES, "--layers": LAYERS, "--length": COUNTS,
            "--unit": st.sampled_from(["documents", "blocks", ""]), "--empirical": FLAG, "--batch-size": COUNTS,
            "--seed": COUNTS, "--profile": FLAG, **COLUMNS, **COMMON,
        },
    ),
    "score": (
        {"--queries": GOOD_TEXTS},
        {
            "--queries": TEXT_FILES, "--strategy": CHOICES, "--name": NAMES, "--damping": AMOUNTS,
            "--query-rank": COUNTS, "--query-bits": COUNTS, "--rescore": COUNTS, "--tokens": COUNTS,
            "--per-layer": FLAG, "--self-influence": FLAG, "--top-only": COUNTS,
            "--aggregate-queries": st.sampled_from(["sum", "mean", "max"]), "--explain": FLAG,
            "--aggregate-train": st.sampled_from(["sum", "mean", "max"]), "--query-batch-size": COUNTS,
            "--train-batch-size": COUNTS, **COLUMNS, **COMMON,
        },
    ),
    "self-influence": (
        {},
        {"--strategy": CHOICES, "--damping": AMOUNTS, "--batch-size": COUNTS, "--k": COUNTS, **COMMON},
    ),
    "top": ({}, {"--name": NAMES, "--k": COUNTS, "--query": COUNTS}),
    "report": ({}, {"--name": NAMES, "--k": COUNTS, "--output": PAGES}),
    "plan": (
        {"--model": st.just("../model"), "--train": st.just("100"), "--queries": st.just("10"),
         "--flops": st.just("100"), "--device-memory": st.just("40"), "--length": st.just("16")},
        {
            "--model": MODELS, "--length": COUNTS, "--ranks": COUNTS, "--device-memory": AMOUNTS, "--flops": AMOUNTS,
            "--strategy": CHOICES, "--layers": LAYERS, "--fit-train": COUNTS, "--half-precision": FLAG,
            "--query-rank": COUNTS, "--query-bits": COUNTS, "--shard-model": FLAG, "--offload-factors": FLAG,
            "--top": COUNTS, "--batch-size": COUNTS, "--efficiency": AMOUNTS, "--eigen-flops": AMOUNTS,
            "--bandwidth": AMOUNTS, "--host-bandwidth": AMOUNTS, "--host-memory": AMOUNTS, "--page": PAGES,
            "--train": COUNTS, "--queries": COUNTS,
        },
    ),
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A line that would do, with one to three parts replaced or added, and now and then something in it spoilt."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    needed, options = OPTIONS[name]
    chosen: dict[str, str | None] = {flag: draw(values) for flag, values in needed.items()}
    for flag in draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=3, unique=True)):
        chosen[flag] = draw(options[flag])
    # The cheapest strategy where nothing else was drawn: what is under test is what comes before.
    if "--strategy" in options and name != "plan" and draw(st.booleans()):
        chosen.setdefault("--strategy", "identity")
    run = [] if name == "plan" else [draw(RUNS | st.just("run") if draw(st.integers(0, 3)) == 0 else st.just("run"))]
    line = [
        name,
        *run,
        *(part for flag, value in chosen.items() for part in ([flag] if value is None else [flag, value])),
    ]
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(line)))
        line[place : place + draw(st.integers(0, 1))] = [draw(WEIRD)]
    return line


@st.composite
def drawn_files(draw: st.DrawFn) -> dict[str, bytes]:
    """Files of which only the ending is certain."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner, max_size=2),
        max_leaves=4,
    )
    rows = st.lists(st.dictionaries(st.sampled_from(["text", "body", ""]), values, max_size=2) | values, max_size=4)
    text = st.text(max_size=60).map(lambda drawn: drawn.encode("utf-8", "surrogatepass"))
    return {
        "drawn.jsonl": draw(rows.map(lambda drawn: _rows(*drawn)) | st.binary(max_size=40)),
        "drawn.csv": draw(text.map(lambda drawn: b"text,a\n" + drawn) | st.binary(max_size=40)),
        "drawn.txt": draw(text | st.binary(max_size=40)),
    }
