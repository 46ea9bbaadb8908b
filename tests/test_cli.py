"""The command as a user runs it, on a tiny model directory and text files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.run import main as torchrun
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.models import relative_error
from tests.processes import command_in_process, run_command, start, start_ranks, wherefrom_command
from tests.runs import labels, only
from wherefrom.cli.main import _flags, main
from wherefrom.cli.shared import in_flags
from wherefrom.scoring.results import Scores, TopScores

TEXTS = [
    "the cat sat on the mat and the dog sat too",
    "a dog ran after the cat over the hill",
    "rain fell on the hill and the mat was wet",
    "the sun was over the hill and the cat ran",
    "a wet dog sat on a wet mat in the rain",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, a training text and two kinds of query file."""
    path = tmp_path_factory.mktemp("cli")
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path / "model")
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(vocabulary), n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).save_pretrained(path / "model")
    (path / "train.txt").write_text("\n\n".join(TEXTS))
    (path / "queries.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    return path


def wherefrom(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(folder, *arguments)


def test_fit_score_top_report(folder: Path) -> None:
    fit = wherefrom(folder, "fit", "run", "--model", "model", "--train", "train.txt", "--max-length", "12", "--profile")
    assert fit.returncode == 0, fit.stderr
    assert "ekfac factors of 5 sequences are in run/factors." in fit.stdout
    assert "Percentage" in fit.stdout
    score = wherefrom(folder, "score", "run", "--queries", "queries.jsonl", "--tokens", "2")
    assert score.returncode == 0, score.stderr
    found = only(folder / "run" / "scores", "ekfac")
    assert f"Scores of 2 queries x 5 training sequences are in run/scores/{found.name}." in score.stdout
    assert score.stderr.count("Plan:") == 1  # though tokens are scored, too
    assert Scores.load(folder / "run" / "scores" / "ekfac").values.shape == (2, 5)
    top = wherefrom(folder, "top", "run", "--k", "2", "--query", "1")
    assert top.returncode == 0, top.stderr
    assert "Query 1" in top.stdout
    assert "Query 0" not in top.stdout
    said = [top.stdout.index(each) for each in ("Query 1", "a dog ran after the cat over the hill", "Rank")]
    assert said == sorted(said)  # the query's text before the table that is about it
    assert "a dog ran after the cat" in top.stdout
    report = wherefrom(folder, "report", "run", "--output", "page.html")
    assert report.returncode == 0, report.stderr
    page = (folder / "page.html").read_text()
    assert "the cat sat on the mat" in page
    assert 'data-shares="' in page


def test_explain_prints_the_plan_and_low_rank_scores_are_kept_apart(folder: Path) -> None:
    fit = wherefrom(folder, "fit", "large", "--model", "model", "--train", "train.txt", "--memory-budget", "1")
    assert fit.returncode == 0, fit.stderr
    options = ("score", "large", "--queries", "queries.jsonl", "--query-rank", "2", "--rescore", "3")
    plan = wherefrom(folder, *options, "--explain")
    assert plan.returncode == 0, plan.stderr
    assert "2 of 2 query gradients resident" in plan.stdout.replace("\n", " ")
    assert all(stage in plan.stdout for stage in ("covariance", "eigenvalues", "query gradients", "pairwise scores"))
    assert not (folder / "large" / "scores").exists()
    score = wherefrom(folder, *options, "--tokens", "2")
    assert score.returncode == 0, score.stderr
    said = " ".join(score.stderr.split())
    assert "Plan: 2 of 2 query gradients resident (rank 2" in said
    assert "Rank 2 leaves out" in said
    assert "the 3 highest scores move by" in said
    found = Scores.load(folder / "large" / "scores" / "ekfac-rank2")
    assert found.changes is not None
    assert found.changes.shape == (2, 3)
    report = wherefrom(folder, "report", "large", "--name", "ekfac-rank2", "--output", "low.html")
    assert report.returncode == 0, report.stderr
    refused = wherefrom(folder, "score", "large", "--queries", "queries.jsonl", "--rescore", "3")
    assert refused.returncode == 1
    assert "--rescore 3: expected at least 1 together with a --query-rank or --query-bits" in " ".join(
        refused.stderr.split()
    )


def test_kinds_of_scores(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["wherefrom", *arguments])
        main()
        return capsys.readouterr().out

    said("fit", "kinds", "--model", "model", "--train", "train.txt", "dot")
    options = ("score", "kinds", "--queries", "queries.jsonl", "dot")
    said(*options, "--per-layer", "--self-influence", "--tokens", "2")
    scores = Scores.load(folder / "kinds" / "scores" / "dot-layers-self")
    assert scores.normalized("cosine").values.shape == (2, 5)
    assert len(scores.layers) == 4
    said("report", "kinds", "--name", "dot-layers-self", "--output", "kinds.html")
    assert 'data-shares="' in (folder / "kinds.html").read_text()
    few = said(*options, "--top-only", "3")
    found = only(folder / "kinds" / "scores", "dot-top3").name
    assert f"Scores of 2 queries, the 3 highest and lowest each, are in kinds/scores/{found}." in few
    names = ("dot-layers-self", "dot-top3")
    shown = [said("top", "kinds", "--name", name, "--k", "2") for name in names]
    assert "Query 1" in shown[0]
    assert shown[0] == shown[1]
    said(*options, "--aggregate-queries", "sum")
    assert "The sum of 2 queries." in said("top", "kinds", "--name", "dot-query-sum")
    said("report", "kinds", "--name", "dot-query-sum", "--output", "sum.html")
    page = (folder / "sum.html").read_text()
    assert "The sum of 2 queries." in page
    assert page.count('<section class="query') == 1
    assert f"{TEXTS[0]}</div>" in page  # the first training text
    said("report", "kinds", "--name", "dot-top3", "--output", "top.html")
    page = (folder / "top.html").read_text()
    assert "Of all scores only these were stored: the 3 highest and lowest of each query." in page
    assert "<svg role" not in page  # no histogram of what was not stored
    assert page.count('<li class="hit">') <= 2 * 2 * 3
    said("report", "kinds", "--name", "dot-top3")
    assert (folder / "kinds" / "reports" / f"{found}.html").exists()


Said = Callable[..., str]


@pytest.fixture
def said(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs the command in this process; what it printed on either stream, with a blank for each break of a line."""
    monkeypatch.chdir(folder)
    return command_in_process(monkeypatch, capsys)


OTHERS = ["snow lay on the hill", "the cat sat", "a wet sun ran after the rain", "the dog sat on the dog"]


def test_scores_are_shown_with_the_texts_that_they_are_of(folder: Path, said: Said) -> None:
    """A run that is fitted on another text goes on with that, and keeps the scores of the first with theirs."""
    (folder / "a.txt").write_text("\n\n".join(TEXTS))
    (folder / "b.txt").write_text("\n\n".join([*OTHERS, TEXTS[0]]))  # as many
    fit = ("fit", "two", "--model", "model", "--train")
    said(*fit, "a.txt", "diagonal")
    score = ("score", "two", "--queries", "queries.jsonl", "diagonal")
    said(*score)
    first = only(folder / "two" / "scores", "diagonal").name
    before = said("top", "two", "--name", first)
    told = said(*fit, "b.txt", "diagonal")
    assert f"{first} are of another training text or model than this fit. They stay" in told
    assert said("top", "two", "--name", first) == before
    assert OTHERS[2] not in before and TEXTS[4] in before
    said("report", "two", "--name", first, "--output", "two.html")
    page = (folder / "two.html").read_text()
    assert "a.txt" in page and TEXTS[4] in page and OTHERS[2] not in page
    assert "is new; what is beside it stays: diagonal-" in said(*score)
    assert labels(folder / "two" / "scores") == ["diagonal", "diagonal"]
    latest = said("top", "two")  # of b.txt, scored last
    assert OTHERS[2] in latest and TEXTS[4] not in latest
    assert f"choose others with --name: {first}." in latest
    with pytest.raises(SystemExit):
        said("top", "two", "--name", "diagonal")  # which of the two?
    said(*fit, "a.txt", "diagonal")
    said(*score)
    assert TEXTS[4] in said("top", "two")  # scored last again, out of what is there


@pytest.mark.parametrize("edited", ["train", "queries"])
def test_a_text_that_was_edited_after_scoring_is_noticed(
    folder: Path, said: Said, edited: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: folder / f"{edited}-{name}.txt" for name in ("train", "queries")}
    files["train"].write_text("\n\n".join(TEXTS))
    files["queries"].write_text("\n\n".join(TEXTS[:2]))
    run = f"edited-{edited}"
    said("fit", run, "--model", "model", "--train", files["train"].name, "dot")
    said("score", run, "--queries", files["queries"].name, "dot")
    said("top", run)
    files[edited].write_text(files[edited].read_text().replace("cat", "dog"))
    for command in ("top", "report"):
        with pytest.raises(SystemExit) as stopped:
            said(command, run)
        assert stopped.value.code == 1
        told = capsys.readouterr().err
        assert ("training data: scored" if edited == "train" else "queries: scored") in told
        assert files[edited].name in told and "put them back, or fit and score again" in told
    assert not (folder / run / "reports").exists()


def test_a_second_use_of_a_run_lies_beside_the_first(folder: Path, said: Said) -> None:
    said("fit", "uses", "--model", "model", "--train", "train.txt", "diagonal")
    score = ("score", "uses", "--queries", "queries.jsonl", "diagonal")
    said(*score)
    first = only(folder / "uses" / "scores", "diagonal").name
    said(*score, "--damping", "0.5")
    (folder / "more.jsonl").write_text(json.dumps({"text": TEXTS[3]}))
    said("score", "uses", "--queries", "more.jsonl", "diagonal")
    assert labels(folder / "uses" / "scores") == ["diagonal"] * 3
    assert "Query 1" in said("top", "uses", "--name", first[:-3])  # the beginning of its digest is enough
    assert "Query 1" not in said("top", "uses")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "run", "--queries", "q.txt", "--top-only", "2", "--per-layer"], "--per-layer with only the 2"),
        (["score", "run", "--queries", "q.txt", "--top-only", "2", "--tokens", "2"], "--tokens 2 needs every pair"),
        (
            ["score", "run", "--queries", "q.txt", "--aggregate-train", "sum", "--self-influence"],
            "--self-influence belongs to single examples",
        ),
        (["fit", "new", "--model", "model", "--train", "missing.txt"], "missing.txt"),
        # Of which the parser, or a table by their names, would take the last alone.
        (["fit", "new", "--model", "model", "--train", "train.txt", "--train", "queries.jsonl"], "--train is given 2"),
        (["fit", "new", "--model", "model", "--train", "train.txt", "train.txt"], "expected each name once"),
        (["fit", "new", "--model", "no-such-directory/x/y", "--train", "train.txt"], "no-such-directory/x/y"),
        (["fit", "new", "--model", "model", "--train", "train.txt", "--layers", "mlp.c_fd"], "Close names:"),
        (["fit", "new", "--model", "model", "--train", "train.txt", "--device", "cuda:99"], "--device 'cuda:99'"),
        (["fit", "new", "--model", "model", "--train", "train.txt", "--memory-budget", "0"], "--memory-budget 0.0"),
        (["score", "nowhere", "--queries", "queries.jsonl"], "nowhere is not a run directory"),
        (["top", "nowhere"], "no scores there"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["wherefrom", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (folder / "new").exists()


def test_torchrun_gives_the_scores_of_one_process(folder: Path) -> None:
    """The commands that docs/how-to/many-gpus.md gives; the first by processes that are started as torchrun does it."""
    fit = ("fit", "ranks", "--model", "model", "--train", "train.txt")
    ranks = [each.finished() for each in start_ranks(wherefrom_command, fit, count=2, folder=folder)]
    assert [each.returncode for each in ranks] == [0, 0], ranks
    assert sum(each.stdout.count("in ranks/") for each in ranks) == 1  # one process speaks for both
    script = folder / "wherefrom_command"
    script.write_text(f"#!{sys.executable}\nfrom wherefrom.cli.main import main\nmain()\n")
    script.chmod(0o755)
    launch = ["--standalone", "--nproc_per_node", "2", "--no-python", str(script)]
    score = ["score", "ranks", "--queries", "queries.jsonl", "--top-only", "2"]
    done = start(torchrun, [*launch, *score], folder=folder).finished()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in ranks/") == 1
    alone = wherefrom(folder, "fit", "alone", "--model", "model", "--train", "train.txt")
    assert alone.returncode == 0, alone.stderr
    assert wherefrom(folder, "score", "alone", "--queries", "queries.jsonl").returncode == 0
    expected = Scores.load(folder / "alone" / "scores" / "ekfac").values
    found = TopScores.load(folder / "ranks" / "scores" / "ekfac-top2")
    assert torch.equal(found.train, expected.topk(2).indices)
    assert relative_error(found.values, expected.topk(2).values) < 1e-4


def test_self_influence_is_shown_with_its_texts(folder: Path) -> None:
    fit = wherefrom(folder, "fit", "self", "--model", "model", "--train", "train.txt", "dot")
    assert fit.returncode == 0, fit.stderr
    shown = wherefrom(folder, "self-influence", "self", "dot", "--k", "2")
    assert shown.returncode == 0, shown.stderr
    assert sum(text in " ".join(shown.stdout.split()) for text in TEXTS) == 2


def test_an_index_answers_queries(folder: Path) -> None:
    fit = wherefrom(folder, "fit", "indexed", "--model", "model", "--train", "train.txt")
    assert fit.returncode == 0, fit.stderr
    options = ("--numbers", "64")
    index = wherefrom(folder, "index", "indexed", *options)
    assert index.returncode == 0, index.stderr
    found = only(folder / "indexed" / "index", "ekfac-sketch64-1bit").name
    assert f"5 gradients, 0.00 MiB, are in indexed/index/{found}." in index.stdout
    query = wherefrom(folder, "query", "indexed", "--queries", "queries.jsonl", *options, "--k", "2", "--rerank", "5")
    assert query.returncode == 0, query.stderr
    assert not (folder / "indexed" / "scores").exists()
    score = wherefrom(folder, "score", "indexed", "--queries", "queries.jsonl")
    assert score.returncode == 0, score.stderr
    assert query.stdout == wherefrom(folder, "top", "indexed", "--k", "2").stdout
    chunks = ("query", "indexed", "--queries", "queries.jsonl", *options, "--chunk", "3", "--k", "2", "--rerank", "9")
    passages = wherefrom(folder, *chunks)
    assert passages.returncode == 0, passages.stderr
    shown = re.sub(r"[^\S\n]+", " ", passages.stdout)
    hits = re.findall(r"│ (\d+) │ (\d+) │ (\d+) to (\d+) │ [^│]* │ ([^│]*) │", shown)
    assert [hit[0] for hit in hits] == ["1", "2"] * 2
    for _, train, first, last, text in hits:
        assert text.startswith(" ".join(TEXTS[int(train)].split()[int(first) : int(last) + 1]))
        assert int(first) % 3 == 0 < len(text)
    assert "of a chunk, its part of that" in " ".join(shown.split())
    wrong = wherefrom(folder, "index", "indexed", "--numbers", "100")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith("error: --numbers 100: expected a multiple of 64, such as 65536.")


def test_an_adapter_is_fitted_on_its_own_layers(folder: Path, said: Said) -> None:
    import peft

    adapter: Any = peft.get_peft_model(
        GPT2LMHeadModel.from_pretrained(folder / "model"),
        peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapter.save_pretrained(folder / "adapter")
    PreTrainedTokenizerFast.from_pretrained(folder / "model").save_pretrained(folder / "adapter")
    said("fit", "adapted", "--model", "adapter", "--train", "train.txt", "diagonal")
    (values,) = (folder / "adapted" / "factors").rglob("*.safetensors")
    layers = {name.rsplit(".", 2)[1] for name in load_file(values)}
    assert layers == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("command", "said", "expected"),
    [
        ("fit", "columns: ['a', 'b']. Pass column=NAME.", "columns: ['a', 'b']. Pass --column NAME."),
        ("fit", "max_length=1: expected more.", "--max-length 1: expected more."),
        ("fit", "source='a.txt': no such file.", "--train 'a.txt': no such file."),
        ("score", "source='a.txt': no such file.", "--queries 'a.txt': no such file."),
        ("score", "rescore=3 needs a query_rank, or leave query_rank out.",
         "--rescore 3 needs a --query-rank, or leave --query-rank out."),
        ("score", "damping=None with a solver; fit with empirical=True.",
         "no --damping with a solver; fit with --empirical."),
        ("score", "k=0: expected at least 1.", "--top-only 0: expected at least 1."),
        ("score", "Pass overwrite=True (--overwrite) to replace it.", "Pass --overwrite to replace it."),
        ("score", "damping=0.5. Give another.", "--damping 0.5. Give another."),
        # Not the command's: a call's own settings, a path, a name that is quoted, an argument of the library alone.
        ("score", "Astra(seed=0, damping=3): diverged.", "Astra(seed=0, damping=3): diverged."),
        ("score", "run/self_influence/query_rank: damaged.", "run/self_influence/query_rank: damaged."),
        ("score", "compile_activations=True: no.", "--compile-activations: no."),
        ("fit", "layers=['*.mlp']: matches none.", "--layers ['*.mlp']: matches none."),
    ],
)  # fmt: skip
def test_errors_of_the_command_are_in_its_own_words(command: str, said: str, expected: str) -> None:
    assert in_flags(said, _flags(command)) == expected


def test_a_column_that_is_not_there_is_named_as_the_flag_is(folder: Path) -> None:
    (folder / "two.jsonl").write_text(json.dumps({"one": "a b", "two": "c d"}) + "\n")
    found = wherefrom(folder, "fit", "other", "--model", "model", "--train", "two.jsonl")
    assert found.returncode == 1
    assert found.stderr.strip().endswith("pass --column NAME.")
