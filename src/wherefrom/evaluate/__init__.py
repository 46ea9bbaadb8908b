"""Whether scores are right: retraining, removal, agreement, plots of these; it must not know how scores are made."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wherefrom.evaluate.datamodels import lds
    from wherefrom.evaluate.removal import counterfactual

__all__ = ["counterfactual", "lds"]

# Imported when they are first asked for, since `wherefrom` itself does without scipy.
_LAZY = {"counterfactual": "removal", "lds": "datamodels"}

if not TYPE_CHECKING:  # a type checker would take any name for an attribute

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
