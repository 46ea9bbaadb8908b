"""What a language model's training on preferences was, in words and numbers that a command says and a file holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from torch import nn

from wherefrom.runtime.errors import InputError, check_argument
from wherefrom.tasks.preference.losses import DPO, IPO, KTO, ORPO, PreferenceLoss, SimPO
from wherefrom.tasks.preference.tasks import Preference

PreferenceName = Literal["dpo", "ipo", "kto", "orpo", "simpo"]
_LOSSES: dict[str, type[PreferenceLoss]] = {"dpo": DPO, "ipo": IPO, "kto": KTO, "orpo": ORPO, "simpo": SimPO}


@dataclass(frozen=True)
class PreferenceTraining:
    """How a causal language model was trained on preferences.

    Attributes:
        preference: the loss; None for a model that was not trained on preferences.
        beta: of the loss; 0.1 unless given.
        reference: what a loss compares with: "base", the model without its adapter; or the model directory or hub name
            that the training started from. None where the examples have the columns of TRL's
            `precompute_ref_log_probs`, or the loss has no reference model.
        label_smoothing: of DPO.
        gamma: of SimPO.
        kl: the reference point of KTO, in nats, which TRL logs as `kl`.
        desirable_weight, undesirable_weight: of KTO.
    """

    preference: PreferenceName | None = None
    beta: float | None = None
    reference: str | None = None
    label_smoothing: float | None = None
    gamma: float | None = None
    kl: float | None = None
    desirable_weight: float | None = None
    undesirable_weight: float | None = None

    def __post_init__(self) -> None:
        if self.preference is not None:
            known = get_args(PreferenceName)
            check_argument(self.preference in known, "preference", self.preference, f"one of {', '.join(known)}")
        self._loss()

    def task(self, load: Callable[[str], nn.Module], layers: Sequence[str] | None) -> Preference:
        """The task of it.

        Args:
            load: loads the reference model of a name, on the model's device.

        Raises:
            InputError: the loss compares with no reference model, and there is one.
        """
        named = self.reference not in (None, "base")
        Preference(self._loss(), "base" if self.reference else None)  # refuses it before a model is loaded
        return Preference(self._loss(), load(self.reference) if named else self.reference, layers)  # type: ignore[arg-type]

    def _loss(self) -> PreferenceLoss | None:
        """The loss with the numbers that are given; refuses those of another one."""
        kind = _LOSSES.get(self.preference or "")
        own = {each.name for each in fields(kind)} if kind else set[str]()
        said = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "preference"}
        given = {name: value for name, value in said.items() if value is not None}
        for name, value in given.items():
            if kind is None or (name not in own and name != "reference"):
                of = "no preference loss" if kind is None else f"preference={self.preference!r}"
                expected = f"what it has, {', '.join(sorted(own))}" if kind else f"one of {', '.join(_LOSSES)}"
                raise InputError(f"{name}={value!r} with {of}: expected {expected}.")
        numbers = {name: value for name, value in given.items() if name != "reference"}
        return kind(**numbers) if kind else None
