"""Label agreement on matrices small enough to count."""

from __future__ import annotations

import pytest
import torch

import wherefrom as wf
from wherefrom.evaluate.agreement import label_agreement
from wherefrom.runtime.errors import InputError


def test_agreement_is_counted() -> None:
    scores = wf.Scores(torch.tensor([[9.0, 8.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]]), {})
    found = label_agreement(scores, ["a", "b"], ["a", "b", "a", "c"], k=2)
    # Query a: hits a, b; query b: hits c, a. Pairs: a twice of four, b once of four.
    assert found.hits == pytest.approx(0.25)
    assert found.chance == pytest.approx(3 / 8)
    assert found.standard_error == pytest.approx(0.25)
    with pytest.raises(InputError, match="labels"):
        label_agreement(scores, ["a"], ["a", "b", "a", "c"])
