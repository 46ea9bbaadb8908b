"""Tasks of preferences: which of two completions of a prompt is the better one, or whether one is good.

`Preference` is of language models that were trained on preferences (DPO and its family), `RewardModel` of models that
give a completion a number. An example has one sequence or two, which pass through the model one after the other, so
that every layer sees [batch, tokens] in each call.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.runtime.placement import execution_device
from wherefrom.runtime.precision import widened
from wherefrom.tasks.classification import SequenceClassification
from wherefrom.tasks.columns import real, vector
from wherefrom.tasks.descriptions import described
from wherefrom.tasks.language import CausalLM, LanguageTask, TokenBatch
from wherefrom.tasks.losses import IGNORED, cross_entropy
from wherefrom.tasks.model_inputs import accepted
from wherefrom.tasks.preference.losses import DPO, Completion, PreferenceLoss, bradley_terry
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Task, evaluating

PreferenceMeasure = Literal["loss", "margin", "chosen", "rejected", "completion"]

# The columns of the reference model's log-probabilities, as TRL writes them.
_REFERENCE = {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps", "completion": "ref_logps"}


class Compared(NamedTuple):
    """A batch of examples with a completion or two each.

    Attributes:
        completions: by name, "chosen" and "rejected" or "completion": whole sequences, prompts and all.
        numbers: other columns by name, float64 [batch].
    """

    completions: dict[str, TokenBatch]
    numbers: dict[str, Tensor]


class ComparingTask(Task[Compared]):
    """What `Preference` and `RewardModel` have in common.

    Args:
        sequences: how the sequences of a completion are checked, padded and given to the model.
        completions: the names of what the loss compares.
        numbers: the columns of numbers that it reads.
    """

    def __init__(
        self,
        sequences: LanguageTask,
        completions: Sequence[str],
        numbers: Sequence[str],
        layers: Sequence[str] | None,
        measure: PreferenceMeasure,
    ) -> None:
        super().__init__(layers)
        known = ("loss", "margin", *completions)
        check_argument(measure in known, "measure", measure, f"one of {known}")
        self.measure = measure
        self._sequences, self._names, self._numbers = sequences, completions, numbers

    @abstractmethod
    def _margins(self, model: nn.Module, batch: Compared) -> Tensor:
        """What the loss is a function of, and grows with the preference: [batch]."""

    @abstractmethod
    def _values(self, model: nn.Module, batch: Compared, name: str) -> Tensor:
        """The log-probability, or the reward, of each example's completion of that name: [batch]."""

    @abstractmethod
    def _sequence(self, example: Mapping[str, object], name: str) -> dict[str, object]:
        """A completion of an example behind its prompt, as the task of its sequences takes it."""

    def _together(self, sequences: Sequence[object]) -> TokenBatch:
        """Sequences as a batch."""
        return self._sequences.collate(sequences)

    def measurement(self, model: nn.Module, batch: Compared) -> Tensor:
        """What `measure` says, summed over the batch: a scalar; lower is more of it."""
        if self.measure == "loss":
            return self.train_loss(model, batch)
        if self.measure == "margin":
            return -self._margins(model, batch).sum()
        return -self._values(model, batch, self.measure).sum()

    def masks(self, batch: Compared) -> tuple[Tensor, ...]:
        """One for each call of the model."""
        return tuple(mask for each in batch.completions.values() for mask in self._sequences.masks(each))

    def measured_masks(self, batch: Compared) -> tuple[Tensor, ...]:
        passed = {name: each for name, each in batch.completions.items() if self.measure in (name, "loss", "margin")}
        return self.masks(batch._replace(completions=passed))

    def mask(self, batch: Compared) -> Tensor | None:
        """Refused: it is asked for token scores alone."""
        raise InputError(
            f"{type(self).__name__}: an example is several sequences, so its tokens have no one order. Ask for the "
            "scores of whole examples."
        )

    def head(self, model: nn.Module) -> nn.Module | None:
        return self._sequences.head(model)

    def check(self, model: nn.Module, batch: Compared) -> None:
        """Refuse tokens and positions that the model does not have, with an `InputError`."""
        for each in batch.completions.values():
            self._sequences.check(model, each)

    def select(self, model: nn.Module, example: object) -> object:
        """All of it; refuses columns that the model would use, since they would be of one sequence alone."""
        columns = example.items() if isinstance(example, Mapping) else ()
        taken = sorted(accepted(model) & {name for name, value in columns if value is not None})
        if taken:
            raise InputError(
                f"{taken[0]!r} is an input of {type(model).__name__} that {type(self).__name__} does not pass on: its "
                f"sequences are made of {self._expected()}. Leave it out."
            )
        return example

    def collate(self, examples: Sequence[object]) -> Compared:
        """Pad each of the examples' completions on the right to the longest of its name."""
        columns = [self._columns(example) for example in examples]
        found = {(*completions, *numbers) for completions, numbers in columns}
        if len(found) > 1:
            raise InputError(f"Examples of one batch have {sorted(found)}; give all examples the same columns.")
        completions, numbers = columns[0]
        return Compared(
            {name: self._together([each[name] for each, _ in columns]) for name in completions},
            {name: torch.tensor([each[name] for _, each in columns], dtype=torch.float64) for name in numbers},
        )

    def _columns(self, example: object) -> tuple[dict[str, dict[str, object]], dict[str, float]]:
        """An example's sequences, and its numbers. Only what is measured has to be there."""
        columns = example if isinstance(example, Mapping) else {}
        needed = {self.measure} if self.measure in self._names else {*self._names}
        given = [name for name in self._names if columns.get(f"{name}_ids") is not None]
        if not needed <= {*given}:
            found = sorted(map(str, columns)) or type(example).__name__
            raise InputError(
                f"{type(self).__name__} needs examples that are dicts with {self._expected()}, which are tokens; found "
                f"{found}. Give wherefrom.study_from_pretrained texts or messages, or tokenise them first."
            )
        numbers = {name: real(name, columns[name]) for name in self._numbers if columns.get(name) is not None}
        if numbers.get("label", 0) not in (0, 1):
            raise InputError(f"'label' is {numbers['label']:g}: expected 1 or true for a good completion, and else 0.")
        return {name: self._sequence(columns, name) for name in given}, numbers

    def _expected(self) -> str:
        return " and ".join(repr(f"{name}_ids") for name in self._names)

    def _completion(self, batch: Compared, name: str) -> TokenBatch:
        """Sequences that queries may lack, if they are measured by others."""
        if name not in batch.completions:
            raise InputError(
                f"{type(self).__name__} needs examples with '{name}_ids' here; found {sorted(batch.completions)}."
            )
        return batch.completions[name]


class Preference(ComparingTask):
    """A causal language model that was trained on preferences, each one example.

    Examples are dicts of tokens, as TRL's trainers make them: `prompt_ids`, `chosen_ids` and `rejected_ids`, or for
    `KTO` `prompt_ids`, `completion_ids` and `label`. The completions' tokens are counted, each after the prompt and the
    completion so far. `study_from_pretrained` makes such examples of texts and of messages.

    What a loss compares with a reference model (`DPO`, `IPO`, `KTO`) needs exactly one of: the columns
    `ref_chosen_logps` and `ref_rejected_logps` (`ref_logps` for `KTO`), which TRL's `precompute_ref_log_probs` writes;
    the reference model itself; or "base", the model without its adapter. A model is passed through in every sweep,
    beside the one that is studied, and nothing of it is tracked; columns cost nothing.

    The Fisher information is of preferences drawn from the model itself (see the losses). None of the losses is convex
    in the model's logits, so solvers are refused.

    Args:
        loss: what the model was trained with: `DPO` (the default), `IPO`, `SimPO`, `ORPO` or `KTO`.
        reference: a module, on the model's device; "base"; or None, where the columns are there, or for `SimPO` and
            `ORPO`, which have none.
        layers: as in `Task`.
        measure: of queries: "loss"; "margin", minus the margin that the loss is a function of; "chosen" or "rejected"
            (`KTO`: "completion"), minus the log-probability of that completion, of which the other is not needed.

    Raises:
        InputError: an argument is impossible, or does not go with the loss.
    """

    convex: ClassVar[bool] = False

    def __init__(
        self,
        loss: PreferenceLoss | None = None,
        reference: nn.Module | Literal["base"] | None = None,
        layers: Sequence[str] | None = None,
        measure: PreferenceMeasure = "loss",
    ) -> None:
        loss = loss or DPO()
        check_argument(isinstance(loss, PreferenceLoss), "loss", loss, "a loss of preferences, such as wf.DPO()")
        known = reference == "base" or isinstance(reference, nn.Module)
        expected = (
            "a module, 'base' or None" if loss.referenced else "None, since this loss compares with no other model"
        )
        check_argument(reference is None or (loss.referenced and known), "reference", str(reference)[:40], expected)
        stored = [_REFERENCE[name] for name in loss.completions] if loss.referenced else []
        super().__init__(CausalLM(), loss.completions, [*stored, *loss.numbers], layers, measure)
        self.loss = loss
        self._reference, self._stored = reference, stored

    def settings(self) -> dict[str, str]:
        return {**super().settings(), "reference": self._described_reference}

    @cached_property
    def _described_reference(self) -> str:
        return described("reference", self._reference)

    def train_loss(self, model: nn.Module, batch: Compared, sampler: Sampler | None = None) -> Tensor:
        completions = self._completions(model, batch)
        if sampler is not None:
            return self.loss.drawn(completions, batch.numbers, sampler).sum()
        return self.loss.costs(completions, batch.numbers).sum()

    def _margins(self, model: nn.Module, batch: Compared) -> Tensor:
        return self.loss.margins(self._completions(model, batch), batch.numbers)

    def _values(self, model: nn.Module, batch: Compared, name: str) -> Tensor:
        logits, labels = self._sequences.predictions(model, self._completion(batch, name))
        return -cross_entropy(logits, labels).sum(1)

    def _sequence(self, example: Mapping[str, object], name: str) -> dict[str, object]:
        if example.get("prompt_ids") is None:
            raise InputError("Preference needs examples with 'prompt_ids'; of a completion alone, an empty list.")
        if any(example.get(each) is not None for each in self._stored) and self._reference is not None:
            raise InputError(
                f"{self._stored[0]!r} is there, and so is a reference model: of these, one. Give reference=None, or "
                "drop the columns of an earlier one."
            )
        prompt, completion = (vector(each, example[each]) for each in ("prompt_ids", f"{name}_ids"))
        if not len(completion):
            raise InputError(f"'{name}_ids' is empty: expected at least one token. Leave the example out.")
        return {"input_ids": torch.cat([prompt, completion]), "prompt_length": len(prompt)}

    def _completions(self, model: nn.Module, batch: Compared) -> dict[str, Completion]:
        """What the loss compares."""
        found = {}
        for name in self.loss.completions:
            logits, labels = self._sequences.predictions(model, self._completion(batch, name))
            score = -cross_entropy(logits, labels).sum(1)  # [batch]
            if self.loss.referenced:
                score = score - self._reference_value(model, batch, name).to(score)
            counted = (labels != IGNORED).sum(1).clamp_min(1)
            found[name] = Completion(logits, labels, score / counted if self.loss.averaged else score)
        return found

    @torch.no_grad()
    def _reference_value(self, model: nn.Module, batch: Compared, name: str) -> Tensor:
        """The reference model's log-probability of each example's completion: [batch]."""
        stored = batch.numbers.get(_REFERENCE[name])
        if stored is not None:
            return stored
        if self._reference is None:
            raise InputError(
                f"Preference: {type(self.loss).__name__} compares with a reference model, and the examples have no "
                f"{_REFERENCE[name]!r}. Give reference= the model that the training started from, 'base' for a model "
                "with an adapter, or the columns that TRL's precompute_ref_log_probs writes."
            )
        with self._as_reference(model) as reference, evaluating(reference):
            return self._values(reference, batch, name)

    @contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference model, or a model with its adapter switched off."""
        if isinstance(self._reference, nn.Module):
            _check_reference(self._reference, model)
            yield self._reference
            return
        with _without_adapter(model):
            yield model


class RewardModel(ComparingTask):
    """A reward model: a sequence classifier with one output, trained so that the better of two completions has more.

    Examples are dicts of tokens, as TRL's RewardTrainer makes them: `chosen_ids` and `rejected_ids`, prompts and all,
    or beside `prompt_ids` without them. The loss of a pair is -log sigmoid(r_chosen - r_rejected - margin), with the
    number in the column `margin` where there is one (Bradley & Terry 1952; Touvron et al. 2023, equation 2). The Fisher
    information is of preferences drawn with that probability.

    Args:
        layers: as in `Task`.
        measure: of queries: "loss"; "margin", minus what the sigmoid is taken of; "chosen" or "rejected", minus the
            reward of that completion, of which the other is not needed.
        pad_token: as in `SequenceClassification`.
    """

    def __init__(
        self, layers: Sequence[str] | None = None, measure: PreferenceMeasure = "loss", *, pad_token: int = 0
    ) -> None:
        self._classifier = SequenceClassification(pad_token=pad_token)
        super().__init__(self._classifier, ("chosen", "rejected"), ["margin"], layers, measure)
        self.pad_token = pad_token

    def train_loss(self, model: nn.Module, batch: Compared, sampler: Sampler | None = None) -> Tensor:
        return bradley_terry(self._margins(model, batch), sampler).sum()

    def _margins(self, model: nn.Module, batch: Compared) -> Tensor:
        chosen, rejected = (self._values(model, batch, name) for name in ("chosen", "rejected"))
        margin = batch.numbers.get("margin")
        return chosen - rejected if margin is None else chosen - rejected - margin.to(chosen)

    def _values(self, model: nn.Module, batch: Compared, name: str) -> Tensor:
        rewards = self._classifier.outputs(model, self._completion(batch, name))
        if rewards.shape[1:] != (1,):
            raise InputError(
                f"RewardModel: the model has {rewards.shape[-1]} outputs, and a reward is one number. Expected a "
                "sequence classifier with num_labels=1."
            )
        return widened(rewards).squeeze(1)

    def _sequence(self, example: Mapping[str, object], name: str) -> dict[str, object]:
        given = [each for each in ("prompt_ids", f"{name}_ids") if example.get(each) is not None]
        return {"input_ids": torch.cat([vector(each, example[each]) for each in given])}

    def _together(self, sequences: Sequence[object]) -> TokenBatch:
        return self._classifier.sequences(sequences)


def _check_reference(reference: nn.Module, model: nn.Module) -> None:
    if reference is model:
        raise InputError("reference: it is the model itself, which differs from itself in nothing. Load it once more.")
    here, there = execution_device(model), execution_device(reference)
    if here != there:
        raise InputError(f"reference: it is on {there}, and the model on {here}. Move it there.")


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """A peft model without its adapter; which of its parameters require gradients is as before in the end."""
    switch_off = getattr(model, "disable_adapter", None)
    if not callable(switch_off):
        raise InputError(
            f"reference='base', and {type(model).__name__} has no adapter that could be switched off: expected a model "
            "of peft. Give the model that the training started from."
        )
    if "ref" in getattr(model, "peft_config", {}):
        raise InputError(
            "reference='base', and the model has an adapter 'ref', by which TRL means the reference. Give a model with "
            "that adapter as the reference."
        )
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with switch_off():
            yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
