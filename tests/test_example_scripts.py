"""The example's scripts, one after another as the README runs them, on a model that is small enough for a test."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import analyze
import evaluate_lds
import half_precision_analysis
import models
import numpy as np
import pytest
import run_counterfactual
import tokenwise_analysis
import train
from common import Common
from retraining import Retrained

import wherefrom as wf
from tests.runs import labels
from tests.small_model import cache_small_model
from wherefrom.cli.main import main as cli
from wherefrom.hf.text import load_model, load_tokenizer
from wherefrom.jobs.sources import RunSources
from wherefrom.runtime.errors import InputError
from wherefrom.serve.views import RunViews

TRAIN, QUERIES = 14, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a tiny model in the small one's place, and what train.py makes of it."""
    path = tmp_path_factory.mktemp("example")
    cache_small_model(path / "cache", positions=32)
    train.main(
        train.Arguments(
            checkpoint_dir=path / "checkpoints",
            cache_dir=path / "cache",
            block_size=32,
            max_train_examples=TRAIN,
            max_query_examples=QUERIES,
        )
    )
    return path


Options = TypeVar("Options", bound=Common)


def placed(folder: Path, options: Options) -> Options:
    """Options with the checkpoint and the run directory of the test, and its cache where there is one."""
    options.checkpoint_dir, options.run_dir = folder / "checkpoints", folder / "run"
    if isinstance(options, Retrained):
        options.cache_dir, options.num_workers = folder / "cache", 1
    return options


def evaluation(folder: Path, name: str) -> dict[str, Any]:
    (file,) = (folder / "run" / "evaluation").glob(f"{name}-????????.json")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_lds_counterfactual_half_precision_and_the_page_that_shows_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_lds.main(placed(folder, evaluate_lds.Arguments(num_masks=5, num_repeats=2, dampings=(None,))))
    lds = evaluation(folder, "lds")
    assert set(lds["methods"]) == {
        *(
            "identity",
            "diagonal",
            "shampoo",
            "kfac",
            "ekfac",
            "ekfac, damping 0.1 x mean",
            "ekfac, half precision",
            "bm25",
            "random",
        )
    }
    assert (lds["subsets"], lds["repeats"], lds["train"]) == (5, 2, TRAIN)
    assert lds["ceiling"] is not None
    assert "Its top training" in capsys.readouterr().out

    run_counterfactual.main(placed(folder, run_counterfactual.Arguments(removals=(0, 700, 1400), num_repeats=2)))
    removal = evaluation(folder, "counterfactual")
    assert removal["counts"] == [0, 2, 4]  # 700 of 4656 is 2 of 14
    perplexity = {name: np.array(curve) for name, curve in removal["perplexity"].items()}
    assert set(perplexity) == {"ekfac", "identity", "bm25", "random"}
    assert all(curve.shape == (3, 2) for curve in perplexity.values())
    assert all((curve[0] == perplexity["ekfac"][0]).all() for curve in perplexity.values())  # nothing removed

    half_precision_analysis.main(placed(folder, half_precision_analysis.Arguments()))
    agreement = evaluation(folder, "half-precision-correlations")
    assert agreement["spearman"]["mean"]["value"] > 0.9
    assert evaluation(folder, "half-precision-scatter")["strategy"] == "ekfac"

    analyze.main(placed(folder, analyze.Arguments(compute_per_token_score=True)))
    (file,) = (folder / "run" / "reports").glob("ekfac-????????.html")
    page = file.read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4
    assert 'data-shares="' in page


def test_what_analyze_leaves_can_be_asked_and_served(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = placed(folder, analyze.Arguments())
    options.run_dir = folder / "asked"
    monkeypatch.setenv("PATH", "")
    analyze.main(options)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    serve = shlex.split(last.removeprefix("Ask where an answer comes from: "))
    assert serve[1:] == ["serve", str(options.run_dir)]
    assert Path(serve[0]).resolve() == Path(sys.executable).with_name("wherefrom").resolve()

    # As the data of the recipe say, without the files beside the checkpoint.
    recipe = models.load_recipe(options.checkpoint_dir)
    tokenizer = load_tokenizer(str(options.checkpoint_dir))
    leads, asked = models.recipe_data(recipe, tokenizer)
    plain = wf.Study(folder / "plain", load_model(str(options.checkpoint_dir)), wf.CausalLM(), train=leads)
    before, ids = (tokenizer(text)["input_ids"] for text in ("The river", "The river is the largest"))
    query = {"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]}
    values = plain.score([query], wf.EKFAC()).values[0]

    command = ["wherefrom", "ask", str(options.run_dir), "The river", "--answer", " is the largest"]
    monkeypatch.setattr(sys, "argv", [*command, "--group", "label", "--json", "--device", "cpu"])
    cli()
    found = json.loads(capsys.readouterr().out)
    best = values.topk(5)
    assert [each["train"] for each in found["supporting"]] == [int(each) for each in best.indices]
    assert [each["score"] for each in found["supporting"]] == pytest.approx(best.values.tolist(), rel=1e-5)
    assert [each["title"] for each in found["supporting"]] == [leads[int(each)]["title"] for each in best.indices]
    assert {each["group"]: each["examples"] for each in found["groups"]} == Counter(leads["label"])
    assert labels(options.run_dir / "factors") == ["sampled"]  # no new fit

    sources = RunSources.load(options.run_dir)
    views = RunViews(sources, sources.study(options.run_dir, "cpu", wf.Execution()))
    (name,) = views.scores()["scores"]
    exact = plain.score(asked, wf.EKFAC(damping=1e-8)).values
    for number in range(QUERIES):
        shown = views.hits(name, number, 3)
        assert shown["query"]["title"] == asked[number]["title"]
        assert [each["raw"] for each in shown["supporting"]] == pytest.approx(exact[number].topk(3).values.tolist())


def test_analyze_explains_compiles_and_takes_a_rank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = placed(folder, analyze.Arguments(query_gradient_rank=2, explain=True))
    analyze.main(arguments)
    assert "4 of 4 query gradients resident (rank 2" in " ".join(capsys.readouterr().out.split())
    arguments.explain, arguments.use_compile = False, shutil.which("g++") is not None
    arguments.run_dir = folder / "compiled"
    analyze.main(arguments)
    assert labels(folder / "compiled" / "scores") == ["ekfac-rank2"]


def test_tokenwise_analysis_prints_heat_maps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenwise_analysis.main(placed(folder, tokenwise_analysis.Arguments(use_half_precision=True, top=3, num_queries=2)))
    printed = capsys.readouterr().out
    assert printed.count(". train ") == 6
    assert list((folder / "run" / "reports").glob("ekfac-half-*-tokens.html"))


def test_ground_truth_from_a_file_replaces_retraining(folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    masks, losses = generator.random((6, TRAIN)) < 0.5, generator.random((6, QUERIES), dtype=np.float32)
    np.savez(tmp_path / "truth.npz", masks=masks, losses=losses)
    arguments = placed(folder, evaluate_lds.Arguments(ground_truth=tmp_path / "truth.npz", dampings=()))
    evaluate_lds.main(arguments)
    assert evaluation(folder, "lds")["ceiling"] is None
    np.savez(tmp_path / "truth.npz", masks=masks[:, 1:], losses=losses)
    with pytest.raises(InputError, match=r"retrainings for 13 training sequences and 4 queries, but .* has 14 and 4"):
        evaluate_lds.main(arguments)
