"""Losses, masks and collation of the tasks that come with the library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wherefrom as wf
from tests.models import gpt2, relative_error, token_rows
from wherefrom.runtime.errors import InputError


def test_causal_lm_loss_is_the_sum_of_hugging_face_losses() -> None:
    """Transformers averages over tokens, in float32; ours is the sum, of a padded batch as of its rows alone."""
    model, task, rows = gpt2().eval(), wf.CausalLM(), token_rows(5)
    expected = 0.0
    for row in rows:
        tokens = torch.tensor([row["input_ids"]])  # type: ignore[index]
        expected += float(model(input_ids=tokens, labels=tokens).loss) * (tokens.shape[1] - 1)
    assert float(task.train_loss(model, task.collate(rows))) == pytest.approx(expected, rel=1e-7)
    assert float(task.measurement(model, task.collate(rows))) == pytest.approx(expected, rel=1e-7)


def test_ignored_labels_count_in_no_loss_and_draw_no_target() -> None:
    model, task = gpt2().eval(), wf.CausalLM()
    tokens = [3, 1, 4, 1, 5, 9]
    labels = [-100, -100, -100, 1, 5, 9]
    batch = task.collate([{"input_ids": tokens, "labels": labels}])
    logits = model(input_ids=torch.tensor([tokens])).logits[0, 2:5]
    expected = nn.functional.cross_entropy(logits, torch.tensor([1, 5, 9]), reduction="sum")
    assert float(task.train_loss(model, batch)) == pytest.approx(float(expected), rel=1e-12)
    drawn = task.train_loss(model, batch, wf.Sampler(0, [0]))
    three = nn.functional.log_softmax(logits, -1)
    possible = torch.cartesian_prod(*three).sum(1)  # the log-probability of every possible triple of targets
    assert float((possible + drawn).abs().min()) < 1e-9


def test_collation_pads_on_the_right() -> None:
    batch = wf.CausalLM().collate([{"input_ids": [1, 2, 3]}, {"input_ids": torch.tensor([4, 5])}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, 5, -100]]
    mask = wf.CausalLM().mask(batch)
    assert mask is not None
    assert mask.tolist() == [[True, True, True], [True, True, False]]


def test_collation_leaves_out_a_mask_of_ones() -> None:
    task = wf.CausalLM()
    rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}, {"input_ids": [4, 5, 6]}]
    batch = task.collate(rows)
    assert sorted(batch) == ["input_ids", "labels"]
    assert task.mask(batch).tolist() == [[True] * 3] * 2  # type: ignore[union-attr]
    # Rows that come padded to one length keep theirs.
    padded = task.collate([*rows, {"input_ids": [7, 8, 0], "attention_mask": [1, 1, 0]}])
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert padded["labels"].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, -100]]


def test_padded_rows_with_a_mask_are_the_rows_alone_without_one() -> None:
    model, task, rows = gpt2().eval(), wf.CausalLM(), token_rows(6)
    weights = dict(model.named_parameters())
    together = task.collate(rows)
    alone = [task.collate([row]) for row in rows]
    assert "attention_mask" in together
    assert not any("attention_mask" in batch for batch in alone)
    found = task.train_loss(model, together)
    expected = torch.stack([task.train_loss(model, batch) for batch in alone]).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    pairs = zip(
        weights, *(torch.autograd.grad(loss, list(weights.values())) for loss in (found, expected)), strict=True
    )
    for name, one, other in pairs:
        assert relative_error(one, other) < 1e-12, name


def test_untokenised_examples_are_refused() -> None:
    with pytest.raises(InputError, match=r"dicts with 'input_ids'; found \['text'\]"):
        wf.CausalLM().collate([{"text": "words"}])


def test_regression_refuses_shapes_that_would_broadcast() -> None:
    batch = (torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(InputError, match=r"output has shape \[4, 1\] and the targets \[4\]"):
        wf.Regression().train_loss(nn.Linear(3, 1), batch)


def test_settings_tell_tasks_apart() -> None:
    class Margin(wf.Classification):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

    assert Margin(1.0).settings() != Margin(2.0).settings()
    assert Margin(1.0).settings() == Margin(1.0).settings()
    assert wf.Classification(["a"]).settings() != wf.Classification().settings()


def test_examples_that_do_not_fit_into_memory_together_are_no_wrong_input() -> None:
    huge = torch.zeros(1).expand(2**46)
    with pytest.raises(RuntimeError, match="allocate memory"):
        wf.Classification().collate([huge, huge])
