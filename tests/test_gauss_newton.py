"""Gauss-Newton products against dense matrices, and against how fast predictions move apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.dense_gauss_newton import CASES, Logits, dense, gpt2_case, label_rows, study_of, system_of, token_logits
from tests.models import Case, gpt2, mlp_case, relative_error
from wherefrom.curvature import gauss_newton
from wherefrom.curvature.collectors import EigenvalueCollector
from wherefrom.curvature.gauss_newton import DampedGaussNewton
from wherefrom.curvature.operators import Operator
from wherefrom.engine.loading import Examples
from wherefrom.runtime.errors import LossError
from wherefrom.tasks.language import LanguageTask
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Batch, Task


@pytest.mark.parametrize(("make", "logits"), CASES.values(), ids=CASES)
def test_products_equal_dense_matrices(tmp_path: Path, make: Callable[[], Case], logits: Logits) -> None:
    case = make()
    study = study_of(case, tmp_path)
    before = [(each.clone(), each.requires_grad) for each in case.model.parameters()]
    matrix = dense(case, study, logits)
    vectors = torch.randn(5, len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = vectors @ matrix + 0.1 * vectors
    for pairs in (1000, 7, 2):  # all at once; a batch of one example; fewer than the vectors
        assert relative_error(system_of(study, case, pairs=pairs).product(vectors), expected) < 1e-10
    alone = torch.cat([system_of(study, case).product(each.unsqueeze(0)) for each in vectors])
    assert relative_error(alone, expected) < 1e-10
    for (value, required), now in zip(before, case.model.parameters(), strict=True):
        assert torch.equal(value, now) and required == now.requires_grad and now.grad is None


def encoder_decoder() -> tuple[nn.Module, LanguageTask]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=13, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config), wf.Seq2Seq()


def grouped_attention() -> tuple[nn.Module, LanguageTask]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), wf.CausalLM()


@pytest.mark.parametrize("make", [encoder_decoder, grouped_attention])
def test_products_are_how_fast_predictions_move_apart(
    tmp_path: Path, make: Callable[[], tuple[nn.Module, LanguageTask]]
) -> None:
    """v^T H v is the second derivative of the divergence of p(w + t v) from p(w), summed over what is counted."""
    torch.manual_seed(0)
    model, task = make()
    model.double().eval()
    train: list[object] = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [3, -100, 4, 5, 6]},
        {"input_ids": [1, 2, 3], "labels": [3, 7, -100]},
    ]
    study = wf.Study(tmp_path, model, task, train=train)
    system = DampedGaussNewton(study._sweep, Operator({}, {}), Examples(train, task), 1e-12, 3)
    vectors = torch.randn(1, sum(system.space.sizes.values()), dtype=torch.float64)
    direction = system.space.to_parameters(vectors)

    def log_probabilities(step: float) -> Tensor:
        weights = {name: model.get_parameter(name).detach() + step * each[0] for name, each in direction.items()}
        rows = []
        for example in train:
            with torch.no_grad(), parametrised(model, weights):
                logits, labels = task.predictions(model, task.collate([example]))
            rows.append(logits[labels != -100].log_softmax(-1))
        return torch.cat(rows)

    here, step = log_probabilities(0), 1e-4
    expected = sum(
        float((here.exp() * (here - log_probabilities(each))).sum()) / step**2 / len(train) for each in (step, -step)
    )
    assert float((vectors * system.product(vectors)).sum()) == pytest.approx(expected, rel=1e-3)


@contextmanager
def parametrised(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights for a while."""
    before = {name: model.get_parameter(name).detach().clone() for name in weights}
    model.load_state_dict(dict(weights), strict=False)
    try:
        yield
    finally:
        model.load_state_dict(before, strict=False)


def test_some_examples_count_as_often_as_they_are_named(tmp_path: Path) -> None:
    case = mlp_case()
    study = study_of(case, tmp_path)
    few = Case(case.model, case.task, [case.train[place] for place in (3, 1, 3)], [])
    vectors = torch.randn(2, len(dense(few, study, label_rows)), dtype=torch.float64)
    expected = vectors @ dense(few, study, label_rows) + 0.1 * vectors
    assert relative_error(system_of(study, case).product(vectors, [3, 1, 3]), expected) < 1e-10


def test_a_product_goes_on_in_halves_when_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = mlp_case()
    system = system_of(study_of(case, tmp_path), case)
    vectors = torch.randn(5, sum(system.space.sizes.values()), dtype=torch.float64)
    expected = system.product(vectors)
    whole, sizes = gauss_newton.batch_product, []

    def small_device(loss: Callable[[], Tensor], *arguments: object) -> dict[str, Tensor]:
        found = whole(loss, *arguments)  # type: ignore[arg-type]
        sizes.append(len(next(iter(found.values()))))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("too much")
        return found

    monkeypatch.setattr(gauss_newton, "batch_product", small_device)
    assert relative_error(system.product(vectors), expected) < 1e-12
    sizes.clear()
    system.product(vectors)
    assert max(sizes) <= 2  # what did not fit is not tried again


def test_the_matrix_is_what_sampled_eigenvalues_estimate(tmp_path: Path) -> None:
    """Squared gradients of sampled targets, on average over many draws, are the diagonal of the matrix."""
    case = gpt2_case()
    study = study_of(case, tmp_path)
    sweep = study._sweep
    total = torch.zeros(())
    draws = 150
    for seed in range(draws):
        collector = EigenvalueCollector(study.layers, {}, len(case.train), sweep.dtype, sweep.device)
        drawn = Examples(case.train, case.task, "drawn", seed)
        sweep.run("draw", drawn, collector, batch_size=len(case.train))
        total = total + torch.cat([each.flatten() for each in collector.means().values()]) / draws
    diagonal = dense(case, study, token_logits).diagonal()
    assert abs(float(total.sum() / diagonal.sum()) - 1) < 0.05
    assert torch.corrcoef(torch.stack([total, diagonal]))[0, 1] > 0.97


class OwnLoss(Task[dict[str, Tensor]]):
    """Takes the loss that the model has computed."""

    def train_loss(self, model: nn.Module, batch: dict[str, Tensor], sampler: Sampler | None = None) -> Tensor:
        loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
        return loss


class Penalised(wf.Classification):
    """Adds a penalty on the weights."""

    def train_loss(self, model: nn.Module, batch: object, sampler: Sampler | None = None) -> Tensor:
        return super().train_loss(model, batch, sampler) + model.first.weight.square().sum()  # type: ignore[arg-type,operator,union-attr]


class Inside(wf.Classification):
    """Calls parts of the model rather than the model."""

    def train_loss(self, model: nn.Module, batch: object, sampler: Sampler | None = None) -> Tensor:
        return super().train_loss(nn.Sequential(model.first, model.plain), batch, sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (OwnLoss(["transformer.h.*"]), "no curvature in what the model returns"),
        (Penalised(), "in another way than through what the model returns"),
        (Inside(["first", "plain"]), "does not depend on what calling the model returns"),
    ],
)
def test_losses_that_are_no_function_of_the_output_are_refused(tmp_path: Path, task: Task[Batch], message: str) -> None:
    case = mlp_case()
    if isinstance(task, OwnLoss):
        case = Case(gpt2(layers=1), task, [{"input_ids": torch.tensor([1, 2, 3])}] * 2, [])
    elif isinstance(task, Inside):
        case.model.first = nn.Linear(4, 5).double()
    study = wf.Study(tmp_path, case.model, task, train=case.train)
    system = system_of(study, case)  # type: ignore[arg-type]
    with pytest.raises(LossError, match=message):
        system.product(torch.ones(1, sum(system.space.sizes.values()), dtype=torch.float64))
