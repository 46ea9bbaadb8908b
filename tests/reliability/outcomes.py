"""What a check of reliability found, in the form that docs/reliability.md is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One line of the page; it exists only when every try ended as it should, and otherwise the check has raised.

    Attributes:
        what: what was done, such as "SIGKILL at a random moment of a fit".
        times: how often.
        result: what was then true each time, in a sentence.
    """

    what: str
    times: int
    result: str
