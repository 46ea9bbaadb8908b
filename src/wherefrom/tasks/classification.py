"""Tasks of Hugging Face models that classify: whole sequences, by a head of any problem type, and single tokens.

Batches are dicts of tensors as in `language`. What a label is follows transformers' `problem_type`; losses are sums
over examples and outputs, where transformers takes means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.runtime.precision import widened_dtype
from wherefrom.tasks.columns import check_highest, number, tensor
from wherefrom.tasks.language import LanguageTask, Measure, TokenBatch, summed_loss
from wherefrom.tasks.losses import half_squared_error, summed_binary_cross_entropy, summed_log_odds
from wherefrom.tasks.model_inputs import check_tokens
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import check_probabilities

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


class TokenClassification(LanguageTask):
    """A class for each token, as in named-entity recognition, with a Hugging Face token classifier.

    Examples are dicts with `input_ids` and `labels`, the class of each token (-100 = not counted, such as special
    tokens and all but the first token of a word); optionally `attention_mask`.
    """

    needed_labels = "the class of each token, and -100 for what is not counted"

    def classes(self, model: nn.Module) -> int | None:
        return outputs_of(model)

    def predictions(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        logits: Tensor = model(**self.inputs(model, batch)).logits
        return logits, self.targets(model, batch)


class SequenceClassification(LanguageTask):
    """Classes or numbers of token sequences, with a Hugging Face model that has one vector of outputs a sequence.

    Examples are dicts with `input_ids` and `labels` (or `label`); optionally `attention_mask`. The problem type says
    what labels are, and what the loss of an example is:

    - "single_label_classification": a class number; cross-entropy;
    - "multi_label_classification": 0 or 1 for each output, a list, or of one output a number; binary cross-entropy,
      summed over outputs (transformers' loss times the number of outputs);
    - "regression": a number for each output, or of one output a number; half the squared error, summed over outputs:
      the negative log-likelihood of normal distributions of unit variance (transformers' loss times half their number).

    Args:
        layers: as in `Task`.
        measure: of queries: "loss", or "margin", minus the log-odds of the label (of each output's, summed); regression
            has none.
        pad_token: what `input_ids` are padded with. Decoders that classify by their last token look for it
            (`model.config.pad_token_id`); others do not care.
        problem_type: None is that of the model's configuration; where it says nothing, as in transformers: of one
            output regression, of more a class if labels are whole numbers, and else several.
    """

    padding: ClassVar[Mapping[str, int]] = {
        name: value for name, value in LanguageTask.padding.items() if name != "labels"
    }
    read: ClassVar[frozenset[str]] = LanguageTask.read.union(("label",))
    by_token = False

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        measure: Measure = "loss",
        *,
        pad_token: int = 0,
        problem_type: ProblemType | None = None,
    ) -> None:
        super().__init__(layers, measure)
        known = get_args(ProblemType)
        check_argument(problem_type in (None, *known), "problem_type", problem_type, f"one of {known}, or None")
        self.pad_token, self.problem_type = pad_token, problem_type

    def check(self, model: nn.Module, batch: TokenBatch) -> None:
        """Refuse tokens, positions and labels that the model does not have, with an `InputError`."""
        check_tokens(model, self.inputs(model, batch))
        mask, labels, outputs = batch.get("attention_mask"), batch.get("labels"), outputs_of(model)
        # Decoders, whose head is called so, classify by the last token, and others by the first.
        if mask is not None and not hasattr(model, "score") and bool((mask[:, 0] == 0).any()):
            raise InputError("the first token, which the model classifies by, is masked. Pad on the right.")
        looked_for = getattr(getattr(model, "config", None), "pad_token_id", None)
        if mask is not None and hasattr(model, "score") and looked_for not in (None, self.pad_token):
            raise InputError(
                f"pad_token={self.pad_token}, and the model, which classifies by the token before its padding, looks "
                f"for {looked_for} there. Give pad_token={looked_for}."
            )
        if labels is None or outputs is None:
            return
        problem = self._problem(model, outputs, labels)
        if problem == "single_label_classification":
            check_highest("labels", labels, outputs, "classes")
        elif problem == "multi_label_classification":
            check_probabilities(labels)

    def predictions(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Outputs [batch, outputs], and labels: class numbers [batch], or numbers [batch, outputs]."""
        outputs, labels = self.outputs(model, batch), batch["labels"]
        if self._problem(model, outputs.shape[-1], labels) != "single_label_classification":
            labels = labels.view(len(labels), -1).to(widened_dtype(outputs.dtype))
        return outputs, labels

    def trained(self, model: nn.Module, batch: TokenBatch) -> int:
        return 1

    def outputs(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """What the model makes of the sequences, [batch, outputs]."""
        outputs: Tensor = model(**self.inputs(model, batch)).logits
        return outputs

    def train_loss(self, model: nn.Module, batch: TokenBatch, sampler: Sampler | None = None) -> Tensor:
        outputs, labels = self.predictions(model, batch)
        problem = self._problem(model, outputs.shape[-1], batch["labels"])
        if problem == "single_label_classification":
            return summed_loss(outputs, labels, sampler)
        if problem == "regression":
            return half_squared_error(outputs, labels if sampler is None else sampler.normal(outputs.detach()))
        drawn = labels if sampler is None else sampler.binary(outputs.detach())
        return summed_binary_cross_entropy(outputs, drawn)

    def measurement(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        if self.measure == "loss":
            return self.train_loss(model, batch)
        outputs, labels = self.predictions(model, batch)
        problem = self._problem(model, outputs.shape[-1], batch["labels"])
        if problem == "regression":
            raise InputError("measure='margin': regression has no classes, and so no log-odds; expected 'loss'.")
        if problem == "single_label_classification":
            return -summed_log_odds(outputs, labels)
        return -((2 * labels - 1) * outputs).sum()  # for each output log p - log(1 - p) of its label

    def _problem(self, model: nn.Module, outputs: int, labels: Tensor) -> ProblemType:
        """The problem type of a model with so many outputs; refuses labels that do not suit it."""
        problem: ProblemType | None = self.problem_type or getattr(getattr(model, "config", None), "problem_type", None)
        whole, shape = not labels.is_floating_point(), list(labels.shape[1:])
        if problem is None and outputs == 1 and whole:
            raise InputError(
                "SequenceClassification: the labels are whole numbers, and the model has one output, which is no "
                "choice between classes. Give problem_type='regression', or 'multi_label_classification' for yes or "
                "no."
            )
        if problem is None:
            several: ProblemType = "regression" if outputs == 1 else "multi_label_classification"
            problem = "single_label_classification" if whole and not shape else several
        if problem == "single_label_classification":
            suits, expected = whole and not shape and outputs > 1, "a class number, of a model with several outputs"
        else:
            suits, expected = shape == [outputs] or (outputs == 1 and not shape), f"{outputs} number(s)"
        if not suits:
            found = f"of shape {shape}" if shape else f"a {'whole' if whole else 'real'} number"
            raise InputError(
                f"SequenceClassification: a label is {found}, and the model has {outputs} output(s); for "
                f"{problem!r} (problem_type), expected {expected}. Look whether the labels are those it was trained "
                "with."
            )
        return problem

    def collate(self, examples: Sequence[object]) -> TokenBatch:
        return {**self.sequences(examples), "labels": _labels_of(examples)}

    def sequences(self, examples: Sequence[object]) -> TokenBatch:
        """The examples as a batch without labels."""
        batch = super().collate(examples)
        if "attention_mask" in batch:
            batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, self.pad_token)
        return batch


def outputs_of(model: nn.Module) -> int | None:
    """How many outputs a Hugging Face classifier has for each prediction; None where its configuration is not there."""
    known = getattr(getattr(model, "config", None), "num_labels", None)
    return known if isinstance(known, int) else None


def _labels_of(examples: Sequence[object]) -> Tensor:
    """The labels of examples that have one for the whole of each: int64 [batch], or float64 [batch, ...]."""
    found = [_label_of(example) for example in examples]
    if len({each.shape for each in found}) > 1:
        raise InputError(f"'labels' have the shapes {sorted({str(list(each.shape)) for each in found})}: expected one.")
    dtype = next((each.dtype for each in found if each.is_floating_point()), torch.int64)
    return torch.stack([each.to(dtype) for each in found])


def _label_of(example: object) -> Tensor:
    """The label of an example: a class number, int64 [], or numbers, float64 [] or [outputs]."""
    assert isinstance(example, Mapping)
    for name in ("labels", "label"):
        value = example.get(name)
        if value is None:
            continue
        found = tensor(name, value, "is no label", "Expected a class number, or a number for each of the outputs.")
        if not found.dim() and not found.is_floating_point():
            return torch.tensor(number(name, value))
        if found.dim() > 1 or not bool(found.isfinite().all()):
            raise InputError(f"{name!r} is {str(value)[:40]}: expected finite numbers, one for each output.")
        return torch.as_tensor(value, dtype=torch.float64)
    raise InputError(f"SequenceClassification needs examples with 'labels'; found {sorted(map(str, example))}.")
