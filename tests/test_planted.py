"""Planted influence: a query that stands in the training set is found, and leaving it out is what hurts most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import wherefrom as wf
from tests.models import VOCABULARY, gpt2
from wherefrom.evaluate.retrain import Retraining, retrain

PLANTED = 11  # its place in the training set
TASK = wf.CausalLM(["transformer.h.*"])


def rows() -> tuple[list[object], list[object]]:
    """Training sequences without structure, and queries of which the first is also a training sequence."""
    generator = torch.Generator().manual_seed(7)
    made: list[object] = [
        {"input_ids": torch.randint(VOCABULARY, (10,), generator=generator).tolist()} for _ in range(26)
    ]
    train, queries = made[:24], made[24:]
    train[PLANTED] = queries[0]
    return train, queries


def trained(kept: Sequence[int], seed: int) -> torch.nn.Module:
    train, _ = rows()
    model = gpt2(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        for batch in torch.tensor(kept)[torch.randperm(len(kept), generator=generator)].split(4):
            loss = TASK.train_loss(model, TASK.collate([train[row] for row in batch.tolist()])) / (9 * len(batch))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return model


def measured(retrainings: Sequence[Retraining]) -> Tensor:
    models = [trained(each.subset, each.seed) for each in retrainings]
    _, queries = rows()
    with torch.no_grad():
        return torch.stack([torch.stack([TASK.measurement(m, TASK.collate([q])) for q in queries]) for m in models])


def test_a_planted_query_ranks_first_and_its_removal_hurts_most(tmp_path: Path) -> None:
    train, queries = rows()
    study = wf.Study(tmp_path / "run", trained(range(len(train)), 0), TASK, train=train)
    scores = study.score(queries, wf.EKFAC())
    assert scores.top(1)[0].train == PLANTED
    assert scores.top(1)[1].train != PLANTED  # the other query stands nowhere

    # Every training sequence left out in turn, with two seeds: the planted one's removal raises the loss most.
    masks = ~torch.eye(len(train), dtype=torch.bool)
    done = retrain(tmp_path / "bank", measured, masks, [0, 1], fingerprint={}, workers=1)
    raised = done.losses.mean(1)[:, 0]  # [train]
    assert raised.argmax() == PLANTED
    ordered = raised.sort(descending=True).values
    assert ordered[0] - ordered[1] > ordered[1] - ordered[-1]  # by more than all others differ
