"""The same weights and data through kronfluence 1.0.1, where it is installed: the scores agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import wherefrom as wf
from tests.models import VOCABULARY, gpt2, relative_error
from wherefrom.curvature.factors import STRATEGIES

pytest.importorskip("kronfluence", reason="kronfluence is optional: make compare installs it")
from kronfluence.analyzer import Analyzer, prepare_model  # type: ignore[import-not-found,unused-ignore]
from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore[import-not-found,unused-ignore]
from kronfluence_job import LanguageModelling, as_linear

from tests.runs import factored


def padded_rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Rows of ten tokens, of which up to four are padding."""
    rows = wf.CausalLM().collate([{"input_ids": [1] * 10}, *_tokens(count, seed)])
    return [{name: column[row] for name, column in rows.items()} for row in range(1, count + 1)]


def _tokens(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 11, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(VOCABULARY, (each,), generator=generator)} for each in lengths]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "shampoo"])
def test_scores_agree_with_kronfluence(tmp_path: Path, strategy: str, record_property: Any) -> None:
    model = gpt2(torch.float32).eval()
    train, queries = padded_rows(24, seed=5), padded_rows(6, seed=6)
    study = wf.Study(tmp_path / "ours", model, wf.CausalLM(), train=train)
    ours = study.score(queries, factored(strategy, empirical=True)).values

    task = LanguageModelling(list(study.layers))
    analyzer = Analyzer(
        "test", prepare_model(as_linear(model), task), task, cpu=True, output_dir=str(tmp_path / "theirs"),
        disable_tqdm=True,
    )  # fmt: skip
    arguments = FactorArguments(strategy=strategy, use_empirical_fisher=True)
    analyzer.fit_all_factors("factors", train, 8, factor_args=arguments)
    damping = ScoreArguments(damping_factor=None)  # 0.1 x mean eigenvalue; its default is 1e-8
    analyzer.compute_pairwise_scores("scores", "factors", queries, train, 3, 8, score_args=damping)
    theirs = analyzer.load_pairwise_scores("scores")["all_modules"]
    error = relative_error(ours, theirs)
    record_property("relative_error", error)
    print(f"{strategy}: relative error {error:.1e}")
    assert error < 1e-4
