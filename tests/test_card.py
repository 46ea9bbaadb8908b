"""The section for a model card: what it says of scores, where its LDS comes from, and that names stay names."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

import wherefrom as wf
from tests.processes import run_command
from tests.runs import only
from tests.test_ask import TEXTS, save_model
from tests.test_report_html import HOSTILE, PNG
from wherefrom.evaluate.datamodels import evaluate_lds
from wherefrom.evaluate.retrainings import GroundTruth, retraining_key, store_retraining
from wherefrom.hf.preparation import Preparation
from wherefrom.jobs.card import measured, model_card, stored
from wherefrom.jobs.sources import DataSource, RunSources
from wherefrom.report.figures import Figure, save_evaluation
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.store.artifacts import read_manifest

MASKS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=torch.bool)
SCORES = wf.Scores(
    torch.tensor([[1.0, -4.0, 2.0], [0.5, -0.25, -1.0]]),
    {"library": "0", "method": "ekfac", "training data": "3 examples ab", "queries": "2 examples cd", "damping": "0.1"},
    name="ekfac-12345678",
)
TRUTH = GroundTruth(MASKS, -(MASKS.double() @ SCORES.values.double().T)[:, None])


def retrained(folder: Path, losses: torch.Tensor, masks: torch.Tensor, by: str = "me") -> None:
    """Finished retrainings of subsets [subsets, train] with losses [subsets, repeats, queries]."""
    for mask, repeats in zip(masks, losses, strict=True):
        for seed, found in enumerate(repeats):
            store_retraining(folder, {"by": by}, retraining_key(mask, seed), mask, found)


def test_the_command_says_what_was_attributed_and_how(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    fit = ["fit", "run", "--model", "model", "--train", "train.jsonl", "--no-end-token"]
    score = ["score", "run", "--queries", "train.jsonl", "kfac", "--damping", "0.5"]
    for arguments in (fit, score):
        done = run_command(tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
    done = run_command(tmp_path, "card", "run", "--out", "card.md")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "card.md").read_text()
    assert done.stdout == text
    folder = only(tmp_path / "run/scores", "kfac")
    about = read_manifest(folder)["fingerprint"]
    assert f"- **Model:** `model`, digest `{about['model']}`\n" in text
    assert f"- **Training data:** `train.jsonl`, `{about['training data']}`" in text
    assert f"- **Queries:** `train.jsonl`, `{about['queries']}`" in text
    assert "- **Method:** `kfac`, with\n" in text and "\n  - `damping`: `0.5`\n" in text
    assert re.search(r"Tracked weights:\*\* `4 layer\(s\), [\d.]+k? of [\d.]+k weights; not tracked: ", text)
    assert "**Not measured.**" in text
    assert f"```bash\nwherefrom {' '.join(fit)}\nwherefrom {' '.join(score)}\n```" in text
    again = run_command(tmp_path, "card", "run", "--out", "card.md")
    assert again.returncode == 1 and "card.md is there already" in again.stderr

    masks = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()
    values = wf.Scores.load(folder).values.double()
    retrained(tmp_path / "retrainings", -(masks.double() @ values.T)[:, None].expand(-1, 2, -1), masks)
    done = run_command(tmp_path, "card", "run", "--retrainings", "retrainings")
    assert "Linear datamodeling score: 1.000 [" in done.stdout, done.stderr
    assert "over 4 retrainings on random subsets" in done.stdout and "with 2 seeds each" in done.stdout
    assert "a ceiling of 1.000 [" in done.stdout


def test_an_evaluation_of_these_scores_is_found_and_no_other(tmp_path: Path) -> None:
    assert stored(tmp_path, SCORES) is None
    report = evaluate_lds({"a": replace(SCORES, values=-SCORES.values, name="other"), "b": SCORES}, TRUTH)
    save_evaluation(tmp_path, "lds", Figure("", "", PNG), report.to_json(), SCORES.fingerprint)
    found = stored(tmp_path, SCORES)
    assert found is not None and found == measured(SCORES, TRUTH)
    assert found["score"] == str(report.means["b"]) and found["score"].startswith("1.000 [")
    assert (found["subsets"], found["repeats"], found["queries"], found["ceiling"]) == (4, 1, 2, None)
    assert found["score"] in model_card(SCORES, lds=found)
    others = replace(SCORES, fingerprint={**SCORES.fingerprint, "queries": "2 examples ef"})
    assert stored(tmp_path, others) is None
    assert stored(tmp_path, replace(SCORES, name="ekfac-87654321")) is None
    with pytest.raises(InputError, match="of all pairs"):
        measured(wf.TopScores(SCORES.values, MASKS[:2].long(), SCORES.values, MASKS[:2].long(), {}), TRUTH)


def test_a_folder_of_retrainings_is_a_ground_truth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    losses = torch.arange(24, dtype=torch.float64).view(4, 3, 2)
    retrained(tmp_path, losses, MASKS)
    (tmp_path / f"{retraining_key(MASKS[0], 9)}.part").mkdir()  # a kill came
    found = GroundTruth.load(tmp_path)
    where = [next(at for at, each in enumerate(MASKS) if each.equal(mask)) for mask in found.masks]
    assert sorted(where) == [0, 1, 2, 3]
    torch.testing.assert_close(found.losses, losses[where], rtol=0, atol=0)
    extra = torch.tensor([[0, 1, 1]]).bool()
    retrained(tmp_path, losses[:1, :2], extra)
    with caplog.at_level("WARNING", logger="wherefrom"):
        torch.testing.assert_close(GroundTruth.load(tmp_path).losses, losses[where], rtol=0, atol=0)
    assert "1 of 5 subsets lack seeds" in caplog.text
    retrained(tmp_path, losses[:1], ~MASKS[:1], by="another")
    with pytest.raises(MismatchError, match="by"):
        GroundTruth.load(tmp_path)
    with pytest.raises(InputError, match="no finished retrainings"):
        GroundTruth.load(tmp_path / f"{retraining_key(MASKS[0], 9)}.part")


@pytest.mark.parametrize(
    "text", [*HOSTILE, "`", "``` \n# A heading\n\n[a](b) ![c](d)", "x|y", " ", "\\`<b>`"], ids=range(len(HOSTILE) + 5)
)
def test_names_are_names(text: str) -> None:
    def kinds(said: str) -> list[str]:
        data = DataSource((said,), "train", Preparation())
        sources = RunSources(said, None, data, False, 0, queries=data, commands=(("fit", said),))
        names = ("library", "model", "training data", "queries", "method", "layers", f"x{said}")
        card = model_card(replace(SCORES, fingerprint=dict.fromkeys(names, said)), sources)
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card)
        return [each.type for token in tokens for each in (token, *(token.children or ()))]

    assert kinds(text) == kinds("name")
