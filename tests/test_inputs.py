"""What is wrong with an example, a task, a model or a text is said before anything is computed from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wherefrom as wf
from tests.models import VOCABULARY, Mlp, gpt2, mlp_case, relative_error, token_rows
from tests.processes import start
from tests.runs import factored
from tests.test_language import bert, classified_rows, masked_rows, pair_rows, t5
from wherefrom.hf.preparation import Preparation, read_examples
from wherefrom.hf.text import local_path, read_dataset
from wherefrom.jobs.sources import checked_run
from wherefrom.report.html import write_page
from wherefrom.runtime.errors import InputError, LossError, WherefromError


def scores(path: Path, model: Any, task: Any, train: Any, queries: Any, strategy: str = "identity") -> Tensor:
    study = wf.Study(path, model, task, train=train, execution=wf.Execution(progress=False))
    return study.score(queries, factored(strategy)).values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "needs examples that are dicts with 'input_ids'"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [1, -1, 2]}, "holds -1, which is no token"),
        ({"input_ids": [1.0, 2.0]}, "torch.float32 [2]: expected whole numbers"),
        ({"input_ids": [[1, 2], [3, 4]]}, "torch.int64 [2, 2]: expected whole numbers"),
        ({"input_ids": "text"}, "is not a list of whole numbers"),
        ({"input_ids": [1, 2**70]}, "is not a list of whole numbers"),
        ({"input_ids": [1, VOCABULARY]}, "holds token 13, and the model has tokens 0 to 12"),
        ({"input_ids": [1] * 13}, "has 13 tokens, and the model positions for 12"),
        ({"labels": [1]}, "'labels' has 1 numbers and 'input_ids' 4 tokens"),
        ({"labels": [1] * 5}, "'labels' has 5 numbers and 'input_ids' 4 tokens"),
        ({"labels": [1, 2, 3, VOCABULARY]}, "'labels' holds 13, and the model has classes 0 to 12"),
        ({"labels": [1, 2, 3, -1]}, "'labels' holds -1"),
        ({"completion_mask": [1]}, "'completion_mask' has 1 numbers and 'input_ids' 4 tokens"),
        ({"assistant_masks": [1] * 5}, "'assistant_masks' has 5 numbers"),
        ({"attention_mask": [1]}, "'attention_mask' has 1 numbers"),
        ({"attention_mask": [1, 1, 2, 1]}, "'attention_mask' holds 2"),
        ({"attention_mask": [0, 0, 0, 0]}, "'attention_mask' is 0 everywhere"),
        ({"prompt_length": "two"}, "'prompt_length' is 'two': expected a whole number"),
        ({"prompt_length": 1.5}, "'prompt_length' is 1.5: expected a whole number"),
    ],
)
@pytest.mark.parametrize("side", ["train", "queries"])
def test_an_example_at_fault_is_named(tmp_path: Path, change: dict[str, object], message: str, side: str) -> None:
    rows: dict[str, list[Any]] = {"train": token_rows(5), "queries": token_rows(5, seed=4)}
    rows[side][3] = {"input_ids": [1, 2, 3, 4], **change}
    with pytest.raises(InputError) as caught:
        scores(tmp_path, gpt2(layers=1), wf.CausalLM(), rows["train"], rows["queries"])
    assert str(caught.value).startswith("Example 3 of the dataset: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "task", "rows", "change", "message"),
    [
        (bert, wf.MaskedLM(), masked_rows, {"labels": [-100]}, "'labels' has 1 numbers"),
        (
            bert,
            wf.MaskedLM(),
            masked_rows,
            {"token_type_ids": [7] * 3, "input_ids": [1] * 3, "labels": [1] * 3},
            "holds 7",
        ),
        (t5, wf.Seq2Seq(), pair_rows, {"labels": []}, "'labels' is empty"),
        (t5, wf.Seq2Seq(), pair_rows, {"labels": [13]}, "'labels' holds 13"),
        (lambda: bert(True), wf.SequenceClassification(), classified_rows, {"label": 3}, "model has classes 0 to 2"),
        (lambda: bert(True), wf.SequenceClassification(), classified_rows, {"label": 0.5}, "a label is a real number"),
        (
            lambda: bert(True),
            wf.SequenceClassification(),
            classified_rows,
            {"input_ids": [1, 2], "attention_mask": [0, 1], "token_type_ids": None},
            "Pad on the right",
        ),
        (lambda: bert(True), wf.SequenceClassification(), classified_rows, {"label": 2**63}, "'label' is no label"),
    ],
)
def test_other_tasks_of_text_name_it_too(
    tmp_path: Path, model: Callable[[], nn.Module], task: Any, rows: Any, change: dict[str, object], message: str
) -> None:
    train = rows(5, 3)
    train[2] = {**train[2], **change}
    with pytest.raises(InputError) as caught:
        scores(tmp_path, model(), task, train, rows(2, 4))
    assert "Example 2 of the dataset: " in str(caught.value)
    assert message in str(caught.value)


def test_sequences_in_which_nothing_is_counted_score_zero(tmp_path: Path) -> None:
    """One token has no next one, and a completion may be empty: no loss, no gradient, no error."""
    train = [*token_rows(2), {"input_ids": [5]}, {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 0]}]
    found = scores(tmp_path, gpt2(layers=1), wf.CausalLM(), train, token_rows(2, seed=4))
    assert bool((found[:, :2] != 0).all())
    assert not bool(found[:, 2:].any())


def test_what_is_predicted_from_padding_is_not_counted() -> None:
    """Its gradient would be that of a token which is none, and is masked."""
    task, tokens, mask = wf.CausalLM(), [3, 1, 4, 1, 5], [0, 0, 1, 0, 1]
    model = gpt2(layers=1).eval()
    _, labels = task.predictions(model, task.collate([{"input_ids": tokens, "attention_mask": mask}]))
    assert labels.tolist() == [[-100] * 5]
    _, labels = task.predictions(model, task.collate([{"input_ids": tokens, "attention_mask": [0, 1, 1, 1, 0]}]))
    assert labels.tolist() == [[-100, 4, 1, -100, -100]]
    rows = [{"input_ids": tokens, "attention_mask": mask, "labels": tokens}]
    _, labels = wf.MaskedLM().predictions(bert().eval(), wf.MaskedLM().collate(rows))
    assert labels.tolist() == [[-100, -100, 4, -100, 5]]


class Losses(wf.Classification):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._change = change

    def train_loss(self, model: nn.Module, batch: Any, sampler: wf.Sampler | None = None) -> Any:
        return self._change(super().train_loss(model, batch, sampler))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: None, "returned NoneType"),
        (lambda loss: loss.reshape(1), r"returned [1]"),
        (lambda loss: loss.long(), "of type torch.int64"),
        (lambda loss: loss.to(torch.complex64), "of type torch.complex64"),
        (lambda loss: loss.to("meta"), "on the meta device"),
        (lambda loss: loss.detach().requires_grad_(), "does not depend on any tracked layer"),
        (lambda loss: loss * torch.nan, "is nan"),
    ],
)
def test_losses_that_are_none(tmp_path: Path, change: Callable[[Tensor], Any], message: str) -> None:
    case = mlp_case()
    with pytest.raises(LossError) as caught:
        scores(tmp_path, case.model, Losses(change), case.train, case.queries)
    assert message in str(caught.value)


class OwnError(Exception):
    pass


class Reading:
    """A dataset that raises what it is told to at one position."""

    def __init__(self, rows: list[object], error: Exception) -> None:
        self.rows, self.error = rows, error

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> object:
        if position == 4:
            raise self.error
        return self.rows[position]


def test_errors_of_a_dataset_are_passed_on(tmp_path: Path) -> None:
    case = mlp_case()
    with pytest.raises(OwnError) as own:
        scores(tmp_path, case.model, case.task, Reading(case.train, OwnError("a disk")), case.queries)
    assert own.value.__notes__ == ["wherefrom was reading example 4 of a Reading of length 12."]
    with pytest.raises(
        InputError, match=r"Example 4 of the dataset, a Reading of length 12, cannot be read \(IndexError"
    ):
        scores(tmp_path, case.model, case.task, Reading(case.train, IndexError()), case.queries)


@pytest.mark.parametrize("wrong", [None, (row for row in "ab"), {1, 2}, {"input_ids": [1]}, 5])
def test_what_is_no_dataset_is_refused(tmp_path: Path, wrong: Any) -> None:
    case = mlp_case()
    for train, queries in ((wrong, case.queries), (case.train, wrong)):
        with pytest.raises(InputError):
            scores(tmp_path, case.model, case.task, train, queries)


class Masking(wf.Classification):
    def __init__(self, mask: Any) -> None:
        super().__init__()
        self._mask = mask

    def mask(self, batch: Any) -> Any:
        return self._mask


@pytest.mark.parametrize(
    "mask", [1, [True], torch.ones(1, 1), torch.ones(1, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)]
)
def test_masks_that_are_none_are_refused(tmp_path: Path, mask: Any) -> None:
    case = mlp_case()
    with pytest.raises(InputError, match=r"expected a boolean tensor \[batch, tokens\]"):
        scores(tmp_path, case.model, Masking(mask), case.train, case.queries)


def test_settings_are_the_same_in_every_process() -> None:
    class Weighted(wf.Classification):
        def __init__(self, weights: object) -> None:
            super().__init__()
            self.weights = weights

    long = torch.arange(5000.0)
    changed = long.clone()
    changed[2500] = 0  # where Python prints only dots
    for one, other in ((long, changed), ([long], [changed]), (long.numpy(), changed.numpy())):
        assert Weighted(one).settings() != Weighted(other).settings()
        assert Weighted(one).settings() == Weighted(copy.deepcopy(one)).settings()
    assert "0x" not in str(Weighted(nn.functional.relu).settings())
    with pytest.raises(InputError, match="attribute 'weights' is .* nothing tells it from another"):
        Weighted(object()).settings()
    torch.manual_seed(0)
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    for layer, unlike, alike in (
        (first, second, copy.deepcopy(first)),
        (first.forward, second.forward, copy.deepcopy(first).forward),
    ):
        assert Weighted(layer).settings() != Weighted(unlike).settings()
        assert Weighted(layer).settings() == Weighted(alike).settings()


def test_labels_of_bytes_and_probabilities_are_labels_and_wrong_classes_are_refused() -> None:
    case, task = mlp_case(), wf.Classification()
    inputs, labels = task.collate(case.train)
    loss = task.train_loss(case.model, (inputs, labels)).detach()
    assert torch.equal(task.train_loss(case.model, (inputs, labels.to(torch.uint8))).detach(), loss)
    soft = nn.functional.one_hot(labels, 3).double()
    assert relative_error(task.train_loss(case.model, (inputs, soft)), loss) < 1e-12
    for wrong in (labels + 3, labels - 3, labels.double(), labels[:3], labels[:, None]):
        with pytest.raises(InputError):
            task.train_loss(case.model, (inputs, wrong))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.dropout = Mlp().double(), nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.inner(self.dropout(inputs))
        return logits


def test_a_model_in_training_mode_is_run_without_dropout_and_left_as_it_is(tmp_path: Path) -> None:
    case, model = mlp_case(), Dropping()
    expected = scores(tmp_path / "a", model.eval(), case.task, case.train, case.queries, "ekfac")
    model.train()
    assert torch.equal(scores(tmp_path / "b", model, case.task, case.train, case.queries, "ekfac"), expected)
    assert model.dropout.training


def test_frozen_wrapped_and_compiled_models_score_as_the_model_itself(tmp_path: Path) -> None:
    case = mlp_case()
    expected = scores(tmp_path / "a", case.model, case.task, case.train, case.queries)
    models: dict[str, Any] = {
        "frozen": copy.deepcopy(case.model).requires_grad_(False),
        "parallel": nn.DataParallel(copy.deepcopy(case.model)),
        "compiled": torch.compile(copy.deepcopy(case.model), backend="eager"),
    }
    for name, model in models.items():
        assert torch.equal(scores(tmp_path / name, model, case.task, case.train, case.queries), expected), name


def test_the_head_of_a_model_in_data_parallel_is_not_tracked_either(tmp_path: Path) -> None:
    model = gpt2(layers=1)
    study = wf.Study(tmp_path, nn.DataParallel(model), wf.CausalLM(), train=token_rows(5))
    assert list(study.layers) == list(wf.Study(tmp_path, model, wf.CausalLM(), train=token_rows(5)).layers)


@pytest.mark.parametrize("method", [wf.EKFAC(), wf.Dot(), wf.LoGra(rank=2)], ids=["ekfac", "dot", "logra"])
@pytest.mark.parametrize(
    "mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode], ids=["autocast", "inference"]
)
def test_a_caller_s_own_autocast_changes_no_score(
    tmp_path: Path, mode: Callable[[], AbstractContextManager[object]], method: wf.Method
) -> None:
    train, queries = token_rows(5), token_rows(2, seed=4)

    def study(name: str) -> wf.Study[Any]:
        return wf.Study(tmp_path / name, gpt2(torch.float32, layers=1), wf.CausalLM(), train=train)

    expected, other = study("a").score(queries, method).values, study("b")
    with mode():
        found = other.score(queries, method).values
    assert torch.equal(found, expected)


def test_a_model_that_accelerate_runs_in_mixed_precision_is_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, train = gpt2(torch.float32, layers=1), token_rows(5)
    try:
        prepared: Any = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(InputError, match="accelerate has made its forward run in mixed precision"):
        wf.Study(tmp_path, prepared, wf.CausalLM(), train=train)
    wf.Study(
        tmp_path,
        accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False),
        wf.CausalLM(),
        train=train,
    )


def test_no_layers_are_no_choice() -> None:
    with pytest.raises(InputError, match=r"layers=\[\]: expected names or patterns"):
        wf.CausalLM([])


@pytest.mark.parametrize(
    "spoil", [lambda model: model.to("meta"), lambda model: model.first.to("meta"), lambda model: None]
)
def test_models_without_weights_are_refused(tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    case = mlp_case()
    model: Any = case.model
    changed = spoil(model)
    with pytest.raises(WherefromError):
        scores(tmp_path, model if isinstance(changed, nn.Linear) else changed, case.task, case.train, case.queries)


def test_rows_that_are_null_do_not_end_the_process(tmp_path: Path) -> None:
    """pyarrow does (apache/arrow, issue 47409), so the reading is tried in another process."""
    for name, content in (
        ("a.json", "null"),
        ("b.jsonl", ' null\n{"text": "a"}\n'),
        ("c.jsonl", '{"text": "a"}\nnull\n'),
    ):
        file = tmp_path / name
        file.write_text(content)
        done = start(read_dataset, str(file)).finished()
        assert done.returncode == 1, (name, done.returncode)
        assert "is null; expected an object with a column of text" in done.stderr


def test_texts_that_are_not_utf8_are_named_whatever_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "caf\xe9 the cat"}\n')
    with pytest.raises(InputError, match="UTF-8"):
        Preparation().prepare(read_examples(str(file)))


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_no_file_has_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="is no usable path"):
        local_path(name)
    with pytest.raises(InputError, match="is no usable path"):
        checked_run(Path(name))


def test_a_page_replaces_nothing_but_a_page(tmp_path: Path) -> None:
    file = tmp_path / "sources.json"
    file.write_text("{}")
    for path in (file, tmp_path, Path(), Path("a\0.html"), tmp_path / "fifo"):
        with pytest.raises(InputError, match=r"name ends in \.html"):
            write_page(path, "page")
    assert file.read_text() == "{}"
    write_page(tmp_path / "page.html", "page")
    assert (tmp_path / "page.html").read_text() == "page"
