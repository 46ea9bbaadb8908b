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
    """A batch of examples with several sequences each.

    Attributes:
        sides: the sequences by what they are: "chosen" and "rejected", or "completion".
        numbers: other columns by name, float64 [batch].
    """

    sides: dict[str, TokenBatch]
    numbers: dict[str, Tensor]


class ComparingTask(Task[Compared]):
    """What `Preference` and `RewardModel` have in common.

    Args:
        sequences: how the sequences of a side are checked, padded and given to the model.
        sides: what the loss compares.
        numbers: the columns of numbers that it reads.
    """

    def __init__(
        self,
        sequences: LanguageTask,
        sides: Sequence[str],
        numbers: Sequence[str],
        layers: Sequence[str] | None,
        measure: PreferenceMeasure,
    ) -> None:
        super().__init__(layers)
        known = ("loss", "margin", *sides)
        check_argument(measure in known, "measure", measure, f"one of {known}")
        self.measure = measure
        self._sequences, self._sides, self._numbers = sequences, sides, numbers

    @abstractmethod
    def _margins(self, model: nn.Module, batch: Compared) -> Tensor:
        """What the loss is a function of, and grows with the preference: [batch]."""

    @abstractmethod
    def _values(self, model: nn.Module, batch: Compared, side: str) -> Tensor:
        """The log-probability, or the reward, of each example's sequence: [batch]."""

    @abstractmethod
    def _sequence(self, example: Mapping[str, object], side: str) -> dict[str, object]:
        """One side of an example, as the task of its sequences takes it."""

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
        return tuple(mask for each in batch.sides.values() for mask in self._sequences.masks(each))

    def measured_masks(self, batch: Compared) -> tuple[Tensor, ...]:
        sides = {side: each for side, each in batch.sides.items() if self.measure in (side, "loss", "margin")}
        return self.masks(batch._replace(sides=sides))

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
        for each in batch.sides.values():
            self._sequences.check(model, each)

    def select(self, model: nn.Module, example: object) -> object:
        """All of it; refuses columns that the model would use, since they would be of one sequence alone."""
        given = (
            {name for name, value in example.items() if value is not None} if isinstance(example, Mapping) else set()
        )
        taken = sorted(accepted(model) & given - {*self._numbers})
        if taken:
            raise InputError(
                f"{taken[0]!r} is an input of {type(model).__name__} that {type(self).__name__} does not pass on: its "
                f"sequences are made of {self._expected()}. Leave it out."
            )
        return example

    def collate(self, examples: Sequence[object]) -> Compared:
        """Pad each side of the examples on the right to its longest."""
        columns = [self._columns(example) for example in examples]
        names = {(*sides, *numbers) for sides, numbers in columns}
        if len(names) > 1:
            raise InputError(f"Examples of one batch have {sorted(names)}; give all examples the same columns.")
        sides, numbers = columns[0]
        return Compared(
            {side: self._together([each[side] for each, _ in columns]) for side in sides},
            {name: torch.tensor([each[name] for _, each in columns], dtype=torch.float64) for name in numbers},
        )

    def _columns(self, example: object) -> tuple[dict[str, dict[str, object]], dict[str, float]]:
        """An example's sequences, and its numbers. Only what is measured has to be there."""
        columns = example if isinstance(example, Mapping) else {}
        needed = [self.measure] if self.measure in self._sides else self._sides
        there = [side for side in self._sides if columns.get(f"{side}_ids") is not None]
        if not {*needed} <= {*there}:
            found = sorted(map(str, columns)) or type(example).__name__
            raise InputError(
                f"{type(self).__name__} needs examples that are dicts with {self._expected()}, which are tokens; found "
                f"{found}. Give wherefrom.study_from_pretrained texts or messages, or tokenise them first."
            )
        sides = {side: self._sequence(columns, side) for side in there}
        numbers = {name: real(name, columns[name]) for name in self._numbers if columns.get(name) is not None}
        if numbers.get("label", 0) not in (0, 1):
            raise InputError(f"'label' is {numbers['label']:g}: expected 1 or true for a good completion, and else 0.")
        return sides, numbers

    def _expected(self) -> str:
        return " and ".join(repr(f"{side}_ids") for side in self._sides)

    def _side(self, batch: Compared, side: str) -> TokenBatch:
        """The sequences of a side, which queries may lack that are measured by the other."""
        if side not in batch.sides:
            raise InputError(
                f"{type(self).__name__} needs examples with '{side}_ids' here; found {sorted(batch.sides)}."
            )
        return batch.sides[side]


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
        stored = [_REFERENCE[side] for side in loss.sides] if loss.referenced else []
        super().__init__(CausalLM(), loss.sides, [*stored, *loss.numbers], layers, measure)
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

    def _values(self, model: nn.Module, batch: Compared, side: str) -> Tensor:
        logits, labels = self._sequences.predictions(model, self._side(batch, side))
        return -cross_entropy(logits, labels).sum(1)

    def _sequence(self, example: Mapping[str, object], side: str) -> dict[str, object]:
        if example.get("prompt_ids") is None:
            raise InputError("Preference needs examples with 'prompt_ids'; of a completion alone, an empty list.")
        if any(example.get(name) is not None for name in self._stored) and self._reference is not None:
            raise InputError(
                f"{self._stored[0]!r} is there, and so is a reference model: of these, one. Give reference=None, or "
                "drop the columns of an earlier one."
            )
        prompt, completion = (vector(name, example[name]) for name in ("prompt_ids", f"{side}_ids"))
        if not len(completion):
            raise InputError(f"'{side}_ids' is empty: expected at least one token. Leave the example out.")
        return {"input_ids": torch.cat([prompt, completion]), "prompt_length": len(prompt)}

    def _completions(self, model: nn.Module, batch: Compared) -> dict[str, Completion]:
        """What the loss compares."""
        found = {}
        for side in self.loss.sides:
            logits, labels = self._sequences.predictions(model, self._side(batch, side))
            score = -cross_entropy(logits, labels).sum(1)  # [batch]
            if self.loss.referenced:
                score = score - self._reference_value(model, batch, side).to(score)
            counted = (labels != IGNORED).sum(1).clamp_min(1)
            found[side] = Completion(logits, labels, score / counted if self.loss.averaged else score)
        return found

    @torch.no_grad()
    def _reference_value(self, model: nn.Module, batch: Compared, side: str) -> Tensor:
        """The reference model's log-probability of each example's completion: [batch]."""
        stored = batch.numbers.get(_REFERENCE[side])
        if stored is not None:
            return stored
        if self._reference is None:
            raise InputError(
                f"Preference: {type(self.loss).__name__} compares with a reference model, and the examples have no "
                f"{_REFERENCE[side]!r}. Give reference= the model that the training started from, 'base' for a model "
                "with an adapter, or the columns that TRL's precompute_ref_log_probs writes."
            )
        if isinstance(self._reference, nn.Module):
            _check_reference(self._reference, model)
            with evaluating(self._reference):
                return self._values(self._reference, batch, side)
        with _without_adapter(model):
            return self._values(model, batch, side)


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
        chosen, rejected = (self._values(model, batch, side) for side in ("chosen", "rejected"))
        margin = batch.numbers.get("margin")
        return chosen - rejected if margin is None else chosen - rejected - margin.to(chosen)

    def _values(self, model: nn.Module, batch: Compared, side: str) -> Tensor:
        rewards = self._classifier.outputs(model, self._side(batch, side))
        if rewards.shape[1:] != (1,):
            raise InputError(
                f"RewardModel: the model has {rewards.shape[-1]} outputs, and a reward is one number. Expected a "
                "sequence classifier with num_labels=1."
            )
        return widened(rewards).squeeze(1)

    def _sequence(self, example: Mapping[str, object], side: str) -> dict[str, object]:
        prompt = example.get("prompt_ids")
        parts = [
            vector(name, example[name]) for name in (*(["prompt_ids"] if prompt is not None else []), f"{side}_ids")
        ]
        return {"input_ids": torch.cat(parts)}

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
