"""Which training examples made a PyTorch model do what it did: influence functions on Kronecker-factored curvature."""

from importlib import import_module
from typing import TYPE_CHECKING

from wherefrom.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from wherefrom import evaluate as evaluate
    from wherefrom.api import *  # noqa: F403
    from wherefrom.api import TrainingRecorder as TrainingRecorder  # the reference does not find it by the star
    from wherefrom.api import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """The public names, with everything that they need, are imported when the first is used: it takes seconds."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "evaluate":  # which also does without scipy, until one of its functions is used
            return import_module(f"{__name__}.evaluate")
        return getattr(import_module("wherefrom.api"), name)

    def __dir__() -> list[str]:
        return [*globals(), *import_module("wherefrom.api").__all__]
