"""One of several processes that solve together: `python -m tests.solver_worker RUN`, started by a test."""

from __future__ import annotations

import sys
from pathlib import Path

import wherefrom as wf
from tests.models import gpt2_case
from wherefrom.ranks import join_ranks

SOLVERS = {"cg": wf.ConjugateGradients(5, examples=9), "astra": wf.Astra(5, batch_size=3)}


def scores(run: Path) -> None:
    """Scores of a model of text by each solver."""
    case = gpt2_case()
    study = wf.Study(run, case.model, case.task, train=case.train[:11])
    factors = study.fit("ekfac", batch_size=3)
    for solver in SOLVERS.values():
        study.score(case.queries[:2], factors, solver=solver, damping=1.0, train_batch_size=4)


if __name__ == "__main__":
    join_ranks()
    scores(Path(sys.argv[1]))
