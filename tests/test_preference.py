"""Preferences: losses against closed forms, gradients against autograd in float64, drawn targets against curvature."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, gpt2, relative_error
from tests.reference import BruteForce
from tests.runs import factored
from tests.test_language import configured, numbers
from wherefrom.engine.loading import Examples, collated
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError, MismatchError
from wherefrom.tasks.preference.losses import PreferenceLoss

Row = dict[str, Any]

# Tokens of prompt, chosen and rejected: batches have sides of equal width, padded, up to the model's last position.
SIZES = [(2, 3, 5), (4, 8, 2), (3, 1, 9), (1, 1, 1), (6, 6, 6), (2, 9, 10), (5, 2, 3), (3, 3, 7), (1, 4, 4), (4, 2, 8)]


def pairs(count: int, seed: int) -> list[Any]:
    """Preference pairs as TRL tokenises them."""
    rows = []
    for number in range(count):
        sizes = SIZES[(number + seed) % len(SIZES)]
        parts = [numbers(1, size, seed=31 * seed + 3 * number + part)[0] for part, size in enumerate(sizes)]
        rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), parts, strict=True)))
    return rows


def reference() -> nn.Module:
    """What the training of `gpt2()` is said to have started from."""
    model = gpt2()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def log_probability(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Of a completion behind a prompt: a scalar."""
    tokens = torch.tensor([prompt + completion])
    logarithms = model(input_ids=tokens).logits[0].log_softmax(-1)
    predicted = range(max(len(prompt), 1), tokens.shape[1])
    return torch.stack([logarithms[place - 1, tokens[0, place]] for place in predicted]).sum()


def with_reference(rows: list[Any], model: nn.Module) -> list[Any]:
    """With the columns of TRL's precompute_ref_log_probs."""
    names = {"ref_chosen_logps": "chosen_ids", "ref_rejected_logps": "rejected_ids", "ref_logps": "completion_ids"}
    return [
        {
            **row,
            **{
                name: float(log_probability(model.eval(), row["prompt_ids"], row[side]).detach())
                for name, side in names.items()
                if side in row
            },
        }
        for row in rows
    ]


def completions(count: int, seed: int) -> list[Any]:
    """Single completions, every second of them good."""
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": bool(number % 2)}
        for number, row in enumerate(pairs(count, seed))
    ]


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + (-value).exp())


def dpo(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor, _: int, __: int) -> Tensor:
    margin = 0.3 * ((c - ref_c) - (r - ref_r))
    return -0.9 * sigmoid(margin).log() - 0.1 * sigmoid(-margin).log()


def ipo(c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor, n: int, m: int) -> Tensor:
    return ((c - ref_c) / n - (r - ref_r) / m - 1 / (2 * 0.3)) ** 2


def simpo(c: Tensor, r: Tensor, _: Tensor, __: Tensor, n: int, m: int) -> Tensor:
    return -sigmoid(2 * c / n - 2 * r / m - 0.7).log()


def orpo(c: Tensor, r: Tensor, _: Tensor, __: Tensor, n: int, m: int) -> Tensor:
    p, q = (c / n).exp(), (r / m).exp()
    return -c / n - 0.3 * sigmoid(((p / (1 - p)) / (q / (1 - q))).log()).log()


Formula = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
LOSSES: dict[str, tuple[PreferenceLoss, Formula]] = {
    "DPO": (wf.DPO(beta=0.3, label_smoothing=0.1), dpo),
    "IPO": (wf.IPO(beta=0.3), ipo),
    "SimPO": (wf.SimPO(beta=2.0, gamma=0.7), simpo),
    "ORPO": (wf.ORPO(beta=0.3), orpo),
}


def batch_of(model: nn.Module, task: Any, rows: list[Any]) -> Any:
    return collated(Examples(rows, task), range(len(rows)), model)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas_whatever_the_batch(name: str) -> None:
    loss, formula = LOSSES[name]
    model, before, rows = gpt2().eval(), reference().eval(), pairs(10, 0)
    task = wf.Preference(loss, before if loss.referenced else None)
    expected = []
    for row in rows:
        of: list[Any] = [
            log_probability(each, row["prompt_ids"], row[side])
            for each in (model, before)
            for side in row
            if "pr" not in side
        ]
        sizes = [len(row[side]) for side in ("chosen_ids", "rejected_ids")]
        expected.append(float(formula(*of, *sizes).detach()))
    alone = [float(task.train_loss(model, batch_of(model, task, [row])).detach()) for row in rows]
    assert alone == pytest.approx(expected, rel=1e-10)
    for size in (2, 5):
        batches = [batch_of(model, task, rows[start : start + size]) for start in range(0, len(rows), size)]
        together = sum(float(task.train_loss(model, batch).detach()) for batch in batches)
        assert together == pytest.approx(sum(expected), rel=1e-10)


@pytest.mark.parametrize("stored", [False, True])
def test_kto_is_its_formula_with_the_reference_point_that_is_given(stored: bool) -> None:
    model, before, rows = gpt2().eval(), reference().eval(), completions(6, 0)
    points = [0.2 * number for number in range(6)] if stored else [0.4] * 6
    expected = 0.0
    for row, point in zip(rows, points, strict=True):
        ratio = float(
            (
                log_probability(model, row["prompt_ids"], row["completion_ids"])
                - log_probability(before, row["prompt_ids"], row["completion_ids"])
            ).detach()
        )
        value = 1 / (1 + math.exp(-0.3 * (ratio - point) * (1 if row["label"] else -1)))
        expected += (1 - value) * (1.5 if row["label"] else 0.7)
    loss = wf.KTO(beta=0.3, kl=None if stored else 0.4, desirable_weight=1.5, undesirable_weight=0.7)
    rows = [{**row, **({"kl": point} if stored else {})} for row, point in zip(rows, points, strict=True)]
    task = wf.Preference(loss, before)
    assert float(task.train_loss(model, batch_of(model, task, rows)).detach()) == pytest.approx(expected, rel=1e-10)


def test_a_reference_model_stored_columns_and_an_adapter_switched_off_are_one() -> None:
    peft = pytest.importorskip("peft")
    rows, base = pairs(5, 0), gpt2()
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    required = {name: each.requires_grad for name, each in adapted.named_parameters()}
    stored = with_reference(rows, base)
    found = []
    for task, data in (
        (wf.Preference(reference=base), rows),
        (wf.Preference(), stored),
        (wf.Preference(reference="base"), rows),
    ):
        loss = task.train_loss(adapted, batch_of(adapted, task, data))
        lora = [each for each in adapted.parameters() if each.requires_grad]
        found.append((loss.detach(), *torch.autograd.grad(loss, lora)))
        assert {name: each.requires_grad for name, each in adapted.named_parameters()} == required
    assert abs(float(found[0][0]) - 5 * math.log(2)) > 1e-3
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert relative_error(two, one) < 1e-10


def reward_model(decoder: bool) -> nn.Module:
    import transformers as hf

    torch.manual_seed(2)
    if decoder:
        config = configured(
            hf.GPT2Config, vocab_size=VOCABULARY, n_positions=12, n_embd=8, n_layer=2, n_head=2, initializer_range=0.4,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=1,
        )  # fmt: skip
        return nn.Module.double(hf.GPT2ForSequenceClassification(config))
    config = configured(
        hf.BertConfig, vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        intermediate_size=12, max_position_embeddings=12, initializer_range=0.4,
    )  # fmt: skip
    return nn.Module.double(hf.BertForSequenceClassification(config))


def whole(rows: list[Any]) -> list[Any]:
    """Pairs as TRL's RewardTrainer tokenises them, with margins."""
    return [
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            "margin": number / 4,
        }
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("decoder", [False, True])
def test_reward_models_have_the_loss_of_bradley_and_terry(decoder: bool) -> None:
    model, rows = reward_model(decoder).eval(), whole(pairs(5, 0))
    expected = 0.0
    for row in rows:
        one, other = (
            float(model(input_ids=torch.tensor([row[f"{side}_ids"]])).logits) for side in ("chosen", "rejected")
        )
        expected -= math.log(1 / (1 + math.exp(-(one - other - row["margin"]))))
    task = wf.RewardModel()
    assert float(task.train_loss(model, batch_of(model, task, rows)).detach()) == pytest.approx(expected, rel=1e-10)
    prompted = [{**row, "margin": each["margin"]} for row, each in zip(pairs(5, 0), rows, strict=True)]
    assert float(task.train_loss(model, batch_of(model, task, prompted)).detach()) == pytest.approx(expected, rel=1e-10)
    with pytest.raises(InputError, match="the model has 3 outputs, and a reward is one number"):
        three = copy.deepcopy(model)
        setattr(three, "score" if decoder else "classifier", nn.Linear(8, 3).double())
        task.train_loss(three, batch_of(three, task, rows))


CASES: dict[str, Callable[[], tuple[nn.Module, Any, list[Any], list[Any]]]] = {
    "DPO": lambda: (
        gpt2(), wf.Preference(LOSSES["DPO"][0], reference(), ["transformer.h.*"]), pairs(10, 0), pairs(3, 3),
    ),
    "DPO, margin, stored": lambda: (
        gpt2(), wf.Preference(layers=["transformer.h.*.mlp.*"], measure="margin"),
        with_reference(pairs(10, 0), reference()), with_reference(pairs(3, 3), reference()),
    ),
    "IPO, chosen": lambda: (
        gpt2(), wf.Preference(LOSSES["IPO"][0], reference(), ["transformer.h.*"], "chosen"), pairs(10, 0),
        [{name: row[name] for name in ("prompt_ids", "chosen_ids")} for row in pairs(3, 3)],
    ),
    "ORPO, rejected": lambda: (
        gpt2(), wf.Preference(LOSSES["ORPO"][0], None, ["transformer.h.*"], "rejected"), pairs(10, 0), pairs(3, 3),
    ),
    "KTO, completion": lambda: (
        gpt2(), wf.Preference(wf.KTO(kl=0.1), reference(), ["transformer.h.*"], "completion"), completions(10, 0),
        completions(3, 3),
    ),
    "reward, BERT": lambda: (reward_model(False), wf.RewardModel(), whole(pairs(10, 0)), whole(pairs(3, 3))),
    "reward, GPT-2": lambda: (
        reward_model(True), wf.RewardModel(["transformer.h.*", "score"], "chosen"), whole(pairs(10, 0)),
        [{"chosen_ids": row["chosen_ids"]} for row in whole(pairs(3, 3))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [None, 5])
def test_scores_equal_brute_force_and_do_not_depend_on_the_batch(tmp_path: Path, name: str, seed: int | None) -> None:
    model, task, train, queries = CASES[name]()
    if name.startswith("KTO") and seed is not None:
        with pytest.raises(InputError, match="no targets can be drawn .*EKFAC\\(empirical=True\\)"):
            wf.Study(tmp_path, model, task, train=train).fit(wf.EKFAC())
        return
    layers = list(select_layers(model, task.layers, task.head(model)))
    brute = BruteForce(model, task, layers, train, queries, seed)
    for size in (1, 5):
        execution = wf.Execution(train_batch_size=size, query_batch_size=min(size, 2))
        study = wf.Study(tmp_path / str(size), model, task, train=train, execution=execution)
        for strategy in ("identity", "ekfac"):
            scores = study.score(queries, factored(strategy, empirical=seed is None, seed=seed or 0))
            assert relative_error(scores.values, brute.scores(strategy)) < 1e-6, (size, strategy)


class Free(nn.Module):
    """Returns logits that are weights themselves, other ones for every call and every example of the batch."""

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        self._tables, self.leaves = tables, list[Tensor]()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        table = self._tables[len(self.leaves)]
        self.leaves.append(table.expand(len(input_ids), *table.shape).clone().requires_grad_())
        return SimpleNamespace(logits=self.leaves[-1])


def of_logits(task: Any, row: Row, count: int, measured: bool) -> tuple[float, Tensor]:
    """What is measured, or a loss with drawn targets, of an example `count` times, and gradients [count, logits]."""
    generator = torch.Generator().manual_seed(3)
    lengths = [len(row["prompt_ids"]) + len(row[side]) for side in ("chosen_ids", "rejected_ids")]
    model = Free(*(torch.randn(length, VOCABULARY, generator=generator, dtype=torch.float64) for length in lengths))
    batch = task.collate([row] * count)
    value = task.measurement(model, batch) if measured else task.train_loss(model, batch, wf.Sampler(0, range(count)))
    found = torch.autograd.grad(value, model.leaves)
    return float(value.detach()), torch.cat([each.flatten(1) for each in found], 1)


@pytest.mark.parametrize("name", LOSSES)
def test_drawn_targets_have_the_curvature_of_the_loss(name: str) -> None:
    """The mean outer product of drawn gradients is the cost's second derivative in the margin, times the margin's
    gradient with itself; of ORPO also the curvature of the mean cross-entropy of the chosen completion's tokens."""
    draws, row = 6000, {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6, 7]}
    if LOSSES[name][0].referenced:
        row = {**row, "ref_chosen_logps": -9.0, "ref_rejected_logps": -6.0}  # type: ignore[dict-item]
    task = wf.Preference(LOSSES[name][0], measure="margin")
    minus_margin, by_margin = of_logits(task, row, 1, measured=True)
    p = 1 / (1 + math.exp(minus_margin))
    weight = {"IPO": 2.0, "ORPO": 0.3 * p * (1 - p)}.get(name, p * (1 - p))
    expected = weight * by_margin.T @ by_margin
    if name == "ORPO":
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn(5, VOCABULARY, generator=generator, dtype=torch.float64)
        for place in (1, 2, 3):  # which predict the three tokens
            q, own = logits[place].softmax(0), slice(place * VOCABULARY, (place + 1) * VOCABULARY)
            expected[own, own] += (q.diag() - torch.outer(q, q)) / 3
    _, drawn = of_logits(task, row, draws, measured=False)
    found = drawn.T @ drawn / draws
    noise = (drawn.square().T @ drawn.square() / draws - found.square()).sqrt() / math.sqrt(draws)
    # Rare tokens have been drawn too seldom to show their noise.
    assert ((found - expected).abs() <= 5 * noise + 2e-3 * expected.abs().max()).all()
    assert float(noise.norm() / expected.norm()) < 0.1


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    model, rows = gpt2(), pairs(3, 0)
    with pytest.raises(InputError, match="reference=.*expected None, since this loss compares with no other model"):
        wf.Preference(wf.ORPO(), reference())
    with pytest.raises(InputError, match="reference='frozen': expected a module, 'base' or None"):
        wf.Preference(reference="frozen")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="measure='completion': expected one of"):
        wf.Preference(measure="completion")
    with pytest.raises(InputError, match="DPO: beta=0: expected a number above 0"):
        wf.DPO(beta=0)
    with pytest.raises(InputError, match="label_smoothing=0.5"):
        wf.DPO(label_smoothing=0.5)

    def refused(task: Any, data: list[Any], message: str) -> None:
        with pytest.raises(InputError, match=f"(?s){message}"):
            task.train_loss(model, batch_of(model, task, data))

    refused(wf.Preference(), rows, "compares with a reference model, and the examples have no 'ref_chosen_logps'")
    stored = with_reference(rows, reference())
    refused(
        wf.Preference(reference=reference()), stored, "Example 0 .*'ref_chosen_logps' is there, and so is a reference"
    )
    refused(wf.Preference(reference=model), rows, "it is the model itself")
    refused(wf.Preference(reference="base"), rows, "GPT2LMHeadModel has no adapter")
    refused(wf.Preference(), [rows[0], {"text": "a"}], r"Example 1 .*'chosen_ids' and 'rejected_ids'.*found \['text'\]")
    refused(wf.Preference(), [{**rows[0], "prompt_ids": None}], "needs examples with 'prompt_ids'")
    refused(wf.Preference(), [{**rows[0], "rejected_ids": []}], "'rejected_ids' is empty")
    refused(wf.Preference(), [{**rows[0], "position_ids": [0]}], "'position_ids' is an input .* does not pass on")
    refused(wf.Preference(), [{**rows[0], "chosen_ids": [13]}], "holds token 13")
    refused(wf.Preference(), [stored[0], rows[0]], "give all examples the same columns")
    refused(wf.Preference(wf.KTO(), reference()), completions(2, 0), "kl=None, and the examples have no column 'kl'")
    refused(wf.Preference(wf.KTO(kl=0.0), reference()), [{**completions(1, 0)[0], "kl": 0.0}], "expected exactly one")
    refused(wf.Preference(wf.KTO(), reference()), [{**completions(1, 0)[0], "label": 2}], "'label' is 2")
    one_sided = [{name: row[name] for name in ("prompt_ids", "chosen_ids")} for row in rows]
    refused(wf.Preference(wf.SimPO(), measure="chosen"), one_sided, "needs examples with 'rejected_ids' here")

    study = wf.Study(tmp_path, model, wf.Preference(), train=stored)
    with pytest.raises(InputError, match="several sequences, so its tokens have no one order"):
        study.score(stored, wf.Dot(), keep=wf.Tokens())
    with pytest.raises(InputError, match="loss of Preference is not convex"):
        study.score(stored, wf.EKFAC(damping=1.0, solver=wf.ConjugateGradients()))


def test_another_reference_model_is_another_task(tmp_path: Path) -> None:
    model, rows = gpt2(), pairs(3, 0)
    before, other = reference(), reference()
    assert wf.Preference(reference=before).settings() == wf.Preference(reference=other).settings()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    study = wf.Study(tmp_path, model, wf.Preference(reference=before), train=rows)
    study.score(rows, wf.Dot(), name="mine")
    with pytest.raises(MismatchError, match="task: stored"):
        wf.Study(tmp_path, model, wf.Preference(reference=other), train=rows).score(rows, wf.Dot(), name="mine")
    with pytest.raises(MismatchError, match=r"DPO\(beta=0.2"):
        wf.Study(tmp_path, model, wf.Preference(wf.DPO(0.2), before), train=rows).score(rows, wf.Dot(), name="mine")


def test_trainings_on_preferences_can_be_replayed() -> None:
    """MAGIC weighs examples at the model's outputs, here of two calls, and checks that it may."""
    rows = pairs(4, 0)
    training = wf.ReplayableTraining(
        gpt2(), wf.Preference(reference=reference()), rows, wf.TrainingRecipe(2, [0.1] * 2)
    )
    assert training.parameters().isfinite().all()
