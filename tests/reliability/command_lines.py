"""Command lines with wrong values and files: what is on the shelf for them, and what may be said to each subcommand.

This module knows the command's arguments; it does not know what becomes of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

TEXTS = ["the cat sat on the mat", "a dog ran after the cat over the hill", "rain fell on the wet hill", "the sun"]


def json_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BAD_TEXTS: dict[str, bytes] = {
    "good.txt": "\n\n".join(TEXTS).encode(),
    "good.jsonl": json_lines(*({"text": text} for text in TEXTS[:2])),
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
    "spaces.jsonl": json_lines({"text": " "}, {"text": "\t\n"}, {"text": ""}),
    "some.jsonl": json_lines({"text": "the cat sat"}, {"text": ""}, {"text": None}, {"text": " "}, {"text": "a dog"}),
    "half.jsonl": b'{"text": "the cat sat"}\n{"text": "the',
    "mixed.jsonl": json_lines({"text": "the cat"}, {"text": 3}, {"text": ["a"]}, {"text": {"a": 1}}),
    "numbers.jsonl": json_lines({"text": 1}, {"text": 2}),
    "lists.jsonl": json_lines([1, 2], [3]),
    "scalars.jsonl": json_lines(1, "text", None),
    "nested.jsonl": json_lines({"a": {"text": "the cat"}}, {"a": {"text": "a dog"}}),
    "columns.jsonl": json_lines({"body": "the cat sat", "title": "a"}),
    "other.jsonl": json_lines({"text": "the cat sat"}, {"body": "a dog ran"}),
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
    "a[1]*.jsonl": json_lines({"text": "the cat sat on the mat"}),
    "a b'\"$.txt": b"the cat sat on the mat",
}


COUNTS = st.sampled_from(["0", "1", "2", "3", "-1", "7", "4096", "9" * 10, "9" * 30, "-" + "9" * 30]) | st.sampled_from(
    ["nan", "", " ", "1.5", "1e3", "0x10", "1_0", "\uff11\uff12", "\u00b2", "true", "None"]
)
AMOUNTS = (
    st.sampled_from(["0", "1", "0.5", "-1", "1e-300", "1e-8", "1e300", "1e999", "nan", "inf", "-inf", "-0.0"]) | COUNTS
)
NAMES = st.sampled_from(
    ["ekfac", "ekfac-top2", "ekfac-top1-tokens", "new", "a.part", "a.blocks", "..", "../x", "a/b", "", " ", "-",
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
TABLES = RUNS | RUNS.flatmap(lambda run: st.sampled_from([run + end for end in (".csv", ".parquet", ".safetensors")]))
FILTERED = RUNS | RUNS.flatmap(lambda run: st.sampled_from([run + end for end in (".txt", ".jsonl", ".csv")]))
CHOICES = st.sampled_from(["identity", "dot", "diagonal", "kfac", "ekfac", "shampoo", "bm25", "EKFAC", "", "none"])
SUMS = st.sampled_from(["sum", "mean", "max"])
BOOLEANS = st.sampled_from(["True", "False", "None", "", "1"])
SPLITS = st.sampled_from(["train", "validation", "test", "", "train[:1]", "train[", "\udcff"])
FLAG = st.none()
"""A flag without a value."""

Values = Mapping[str, SearchStrategy[str] | SearchStrategy[None]]

# What most subcommands share.
EXECUTION: Values = {
    "--memory-budget": AMOUNTS, "--half-precision": FLAG, "--query-batch-size": COUNTS, "--train-batch-size": COUNTS,
    "--checkpoint-seconds": AMOUNTS, "--offload-factors": FLAG, "--progress": BOOLEANS,
}  # fmt: skip
COMMON: Values = {"--device": DEVICES, "--overwrite": FLAG, **EXECUTION}
COLUMNS: Values = {
    "--split": SPLITS, "--column": st.sampled_from(["text", "body", "", "\udcff"]) | WEIRD,
    "--format": st.sampled_from(["text", "messages", "alpaca", "prompt-completion", "tokens", "none", ""]),
    "--count": st.sampled_from(["all", "completion", "assistant", ""]),
}  # fmt: skip

# Methods, each with its flags.
Methods = Mapping[str, Values]
DRAWN: Values = {"--empirical": BOOLEANS, "--seed": COUNTS}
FACTORED: Values = {
    "--damping": AMOUNTS, "--solver": st.sampled_from(["cg", "astra", "None", ""]), "--query-rank": COUNTS,
    "--query-bits": COUNTS, "--rescore": COUNTS, "--adam": FLAG, **DRAWN,
}  # fmt: skip
FITTED: Values = {"--empirical": FLAG, "--seed": COUNTS, "--adam": FLAG}
ITSELF: Values = {"--damping": AMOUNTS, "--adam": FLAG, **DRAWN}
AUDITED: Values = {"--damping": AMOUNTS, **DRAWN}
INDEXED: Values = {"--empirical": BOOLEANS, "--damping": AMOUNTS}
PROJECTED: Values = {"--rank": COUNTS, "--seed": COUNTS, "--damping": AMOUNTS}
STRATEGIES = ("dot", "diagonal", "kfac", "ekfac", "shampoo")
SCORING: Methods = {
    **dict.fromkeys(STRATEGIES, FACTORED),
    "cosine": {"--adam": FLAG},
    "fisher": {"--samples": COUNTS, "--damping": AMOUNTS, "--seed": COUNTS},
    "tracin": {"--scored": CHOICES, "--weights": AMOUNTS},
    "source": {"--segments": COUNTS, "--times": AMOUNTS, "--weight-decay": AMOUNTS, "--loss-scale": AMOUNTS, **DRAWN},
    "logra": {"--directions": st.sampled_from(["random", "eigenvectors", ""]), **PROJECTED},
    "trak": PROJECTED,
    "trackstar": {"--mixing": AMOUNTS, "--adam": FLAG, **PROJECTED},
    "two-stage": {"--first": CHOICES, "--then": CHOICES, "--candidates": COUNTS},
    "bm25": {},
    "random": {"--seed": COUNTS},
}
SKETCH: Values = {
    "--numbers": st.sampled_from(["64", "65536", "100", "0", ""]), "--bits": st.sampled_from(["1", "8", "2", ""]),
    "--seed": COUNTS,
}  # fmt: skip


@dataclass(frozen=True)
class Subcommand:
    """What may be said to one.

    Attributes:
        needed: what has to be, each with good values.
        options: with values of all kinds.
        methods: of which one may be named.
    """

    needed: Mapping[str, SearchStrategy[str]]
    options: Values
    methods: Methods = field(default_factory=dict)


SUBCOMMANDS = {
    "fit": Subcommand(
        {"--model": st.just("../model"), "--train": GOOD_TEXTS},
        {
            "--model": MODELS, "--train": TEXT_FILES, "--layers": LAYERS, "--max-length": COUNTS,
            "--unit": st.sampled_from(["documents", "blocks", ""]), "--history": RUNS, "--profile": FLAG,
            "--end-token": BOOLEANS, "--source-column": st.sampled_from(["text", "title", ""]) | WEIRD,
            "--dtype": st.sampled_from(["float64", "bfloat16", "float16"]), "--load-in-4bit": FLAG,
            "--device-map": st.sampled_from(["auto", "cpu", "", "balanced"]),
            **COLUMNS, **COMMON,
        },
        dict.fromkeys(STRATEGIES, FITTED),
    ),
    "score": Subcommand(
        {"--queries": GOOD_TEXTS},
        {
            "--queries": TEXT_FILES, "--name": NAMES, "--tokens": COUNTS, "--per-layer": FLAG, "--self-influence": FLAG,
            "--top-only": COUNTS, "--aggregate-queries": SUMS, "--aggregate-train": SUMS, "--explain": FLAG,
            "--profile": FLAG, **COLUMNS, **COMMON,
        },
        SCORING,
    ),
    "self-influence": Subcommand(
        {},
        {"--k": COUNTS, **COMMON},
        dict.fromkeys(STRATEGIES, ITSELF),
    ),
    "top": Subcommand({}, {"--name": NAMES, "--k": COUNTS, "--query": COUNTS}),
    "report": Subcommand({}, {"--name": NAMES, "--k": COUNTS, "--output": PAGES}),
    "export": Subcommand({"--output": TABLES}, {"--output": TABLES, "--name": NAMES, "--k": COUNTS}),
    "index": Subcommand(
        {},
        {"--name": NAMES, **SKETCH, **COMMON},
        dict.fromkeys(STRATEGIES, INDEXED),
    ),
    "query": Subcommand(
        {"--queries": GOOD_TEXTS},
        {
            "--queries": TEXT_FILES, "--name": NAMES, "--k": COUNTS, "--rerank": COUNTS, "--normalized": FLAG,
            "--device": DEVICES, **SKETCH, **COLUMNS, **EXECUTION,
        },
        dict.fromkeys(STRATEGIES, INDEXED),
    ),
    "audit": Subcommand(
        {},
        {
            "--held-out": TEXT_FILES, "--order": st.sampled_from(["neighbours", "loss", "held_out", "held-out", ""]),
            "--n": COUNTS, "--out": TABLES, "--drop": COUNTS, "--filtered": FILTERED, **COLUMNS, **COMMON,
        },
        dict.fromkeys(STRATEGIES, AUDITED),
    ),
    "select": Subcommand(
        {"--targets": GOOD_TEXTS, "--n": st.sampled_from(["1", "2"]), "--out": st.just("chosen.txt")},
        {
            "--targets": TEXT_FILES, "--n": COUNTS, "--out": FILTERED, "--overlap": AMOUNTS,
            "--normalized": st.sampled_from(["none", "targets", "examples", "query", ""]),
            "--balance": st.sampled_from(["text", "title", ""]) | WEIRD, **COLUMNS, **COMMON,
        },
        SCORING,
    ),
    "plan": Subcommand(
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
    name = draw(st.sampled_from(sorted(SUBCOMMANDS)))
    said = SUBCOMMANDS[name]
    chosen: dict[str, str | None] = {flag: draw(values) for flag, values in said.needed.items()}
    # Half of the time the cheapest method: what is under test is what comes before.
    methods = sorted(said.methods)
    named = bool(methods) and draw(st.integers(0, 3)) > 0
    method = [draw(st.just("dot") | st.sampled_from(methods))] if named else []
    options = {**said.options, **(said.methods[method[0]] if method else {})}
    for flag in draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=3, unique=True)):
        chosen[flag] = draw(options[flag])
    run = [] if name == "plan" else [draw(RUNS | st.just("run") if draw(st.integers(0, 3)) == 0 else st.just("run"))]
    line = [
        name,
        *run,
        *method,
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
        "drawn.jsonl": draw(rows.map(lambda drawn: json_lines(*drawn)) | st.binary(max_size=40)),
        "drawn.csv": draw(text.map(lambda drawn: b"text,a\n" + drawn) | st.binary(max_size=40)),
        "drawn.txt": draw(text | st.binary(max_size=40)),
    }
