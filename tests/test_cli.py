"""The command as a user runs it, on a tiny model directory and text files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.models import relative_error
from tests.processes import run_command
from wherefrom.cli import main
from wherefrom.scores import Scores, TopScores

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
    fit = wherefrom(folder, "fit", "run", "--model", "model", "--train", "train.txt", "--length", "12", "--profile")
    assert fit.returncode == 0, fit.stderr
    assert "ekfac factors of 5 sequences are in run/factors." in fit.stdout
    assert "Percentage" in fit.stdout
    score = wherefrom(folder, "score", "run", "--queries", "queries.jsonl", "--tokens", "2")
    assert score.returncode == 0, score.stderr
    assert "Scores of 2 queries x 5 training sequences are in run/scores/ekfac." in score.stdout
    assert Scores.load(folder / "run" / "scores" / "ekfac").values.shape == (2, 5)
    top = wherefrom(folder, "top", "run", "--k", "2", "--query", "1")
    assert top.returncode == 0, top.stderr
    assert "Query 1" in top.stdout
    assert "Query 0" not in top.stdout
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
    assert "rescore=3: expected at least 1 together with a query_rank" in " ".join(refused.stderr.split())


def test_kinds_of_scores(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)

    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["wherefrom", *arguments])
        main()
        return capsys.readouterr().out

    said("fit", "kinds", "--model", "model", "--train", "train.txt", "--strategy", "identity")
    options = ("score", "kinds", "--queries", "queries.jsonl", "--strategy", "identity")
    said(*options, "--per-layer", "--self-influence", "--tokens", "2")
    scores = Scores.load(folder / "kinds" / "scores" / "identity-layers-self")
    assert scores.normalized("cosine").values.shape == (2, 5)
    assert len(scores.layers) == 4
    said("report", "kinds", "--name", "identity-layers-self", "--output", "kinds.html")
    assert 'data-shares="' in (folder / "kinds.html").read_text()
    few = said(*options, "--top-only", "3")
    assert "Scores of 2 queries, the 3 highest and lowest each, are in kinds/scores/identity-top3." in few
    names = ("identity-layers-self", "identity-top3")
    shown = [said("top", "kinds", "--name", name, "--k", "2") for name in names]
    assert "Query 1" in shown[0]
    assert shown[0] == shown[1]
    said(*options, "--aggregate-queries", "sum")
    assert "The sum of 2 queries." in said("top", "kinds", "--name", "identity-query-sum")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "run", "--queries", "q.txt", "--top-only", "2", "--per-layer"], "per_layer=True with only the 2"),
        (["score", "run", "--queries", "q.txt", "--top-only", "2", "--tokens", "2"], "tokens=2 needs every pair"),
        (["score", "run", "--queries", "q.txt", "--aggregate-train", "sum", "--self-influence"], "self_influence=True"),
        (["fit", "new", "--model", "model", "--train", "missing.txt"], "missing.txt"),
        (["fit", "new", "--model", "no-such-directory/x/y", "--train", "train.txt"], "no-such-directory/x/y"),
        (["fit", "new", "--model", "model", "--train", "train.txt", "--layers", "mlp.c_fd"], "Close names:"),
        (["fit", "new", "--model", "model", "--train", "train.txt", "--device", "cuda:99"], "device='cuda:99'"),
        (["fit", "new", "--model", "model", "--train", "train.txt", "--memory-budget", "0"], "memory_budget=0.0"),
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
    """The command that docs/how-to/many-gpus.md gives."""
    script = folder / "wherefrom_command"
    script.write_text(f"#!{sys.executable}\nfrom wherefrom.cli import main\nmain()\n")
    script.chmod(0o755)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    fit = ("fit", "ranks", "--model", "model", "--train", "train.txt")
    score = ("score", "ranks", "--queries", "queries.jsonl", "--top-only", "2")
    for arguments in (fit, score):
        done = subprocess.run(
            [*launch, str(script), *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("in ranks/") == 1  # one process speaks for both
    alone = wherefrom(folder, "fit", "alone", "--model", "model", "--train", "train.txt")
    assert alone.returncode == 0, alone.stderr
    assert wherefrom(folder, "score", "alone", "--queries", "queries.jsonl").returncode == 0
    expected = Scores.load(folder / "alone" / "scores" / "ekfac").values
    found = TopScores.load(folder / "ranks" / "scores" / "ekfac-top2")
    assert torch.equal(found.train, expected.topk(2).indices)
    assert relative_error(found.values, expected.topk(2).values) < 1e-4


def test_self_influence_is_shown_with_its_texts(folder: Path) -> None:
    fit = wherefrom(folder, "fit", "self", "--model", "model", "--train", "train.txt", "--strategy", "identity")
    assert fit.returncode == 0, fit.stderr
    shown = wherefrom(folder, "self-influence", "self", "--strategy", "identity", "--k", "2")
    assert shown.returncode == 0, shown.stderr
    assert sum(text in " ".join(shown.stdout.split()) for text in TEXTS) == 2


def test_an_index_answers_queries(folder: Path) -> None:
    fit = wherefrom(folder, "fit", "indexed", "--model", "model", "--train", "train.txt")
    assert fit.returncode == 0, fit.stderr
    options = ("--rank", "99", "--numbers", "float32")
    index = wherefrom(folder, "index", "indexed", *options)
    assert index.returncode == 0, index.stderr
    assert "5 gradients, 0.02 MiB, are in indexed/index/random-rank99-float32." in index.stdout
    query = wherefrom(folder, "query", "indexed", "--queries", "queries.jsonl", *options, "--k", "2", "--rerank", "3")
    assert query.returncode == 0, query.stderr
    assert not (folder / "indexed" / "scores").exists()
    score = wherefrom(folder, "score", "indexed", "--queries", "queries.jsonl")
    assert score.returncode == 0, score.stderr
    assert query.stdout == wherefrom(folder, "top", "indexed", "--k", "2").stdout
    wrong = wherefrom(folder, "index", "indexed", "--rank", "0")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith("error: rank=0: expected at least 1.")
