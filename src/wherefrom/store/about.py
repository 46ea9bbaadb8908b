"""What a result is about: its queries, training examples and model, by their digests in its fingerprint.

Whatever shows a result beside texts, labels or other results asks `check_about` first. This module knows fingerprints;
it does not know how anything is shown.
"""

from __future__ import annotations

from collections.abc import Mapping

from wherefrom.runtime.errors import MismatchError
from wherefrom.store.fingerprint import Fingerprint

QUERIES, TRAIN, MODEL = "queries", "training data", "model"
_ADVICE = "Give the queries, the training set and the model that were scored, or score these."


def subjects(fingerprint: Fingerprint) -> dict[str, str]:
    """The digests of a result's queries, training examples and model, of those that it has."""
    return {name: fingerprint[name] for name in (QUERIES, TRAIN, MODEL) if name in fingerprint}


def unlike(result: Fingerprint, shown: Mapping[str, str]) -> list[str]:
    """What a result is about and what it would be shown beside, where they differ, a readable phrase for each.

    What only one of them says is not compared: self-influence has no queries, and scores made by hand say nothing.

    Args:
        shown: digests of `dataset_digest` and `model_digest` under the names of this module.
    """
    about = subjects(result)
    return [
        f"{name}: scored {about[name]}, given {digest}"
        for name, digest in shown.items()
        if about.get(name, digest) != digest
    ]


def check_about(result: Fingerprint, shown: Mapping[str, str], advice: str = _ADVICE) -> None:
    """Refuse to show a result beside anything but what it is about.

    Args:
        shown: as for `unlike`.
        advice: the next step.

    Raises:
        MismatchError: names what differs.
    """
    found = unlike(result, shown)
    if found:
        raise MismatchError(f"The scores belong to something else. {'; '.join(found)}. {advice}")
