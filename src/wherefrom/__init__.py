"""Which training examples made a PyTorch model do what it did: influence functions on Kronecker-factored curvature."""

from importlib import import_module
from typing import TYPE_CHECKING

from wherefrom.curvature.conditioning import adam_conditioning
from wherefrom.curvature.factors import Factors
from wherefrom.curvature.solvers import Astra, ConjugateGradients
from wherefrom.methods.index import GradientIndex
from wherefrom.methods.magic.recipe import TrainingRecipe
from wherefrom.methods.magic.scores import magic_scores, metasmoothness
from wherefrom.methods.magic.training import ReplayableTraining
from wherefrom.methods.projected import logra_scores, trackstar_scores, trak_scores
from wherefrom.methods.sampled_fisher import fisher_scores
from wherefrom.methods.source import score_source
from wherefrom.methods.tracin import score_checkpoints
from wherefrom.runtime.distributed import join_ranks
from wherefrom.runtime.errors import WherefromError
from wherefrom.scoring.results import Hit, Scores, TopScores
from wherefrom.scoring.tokens import TokenScores
from wherefrom.study import Study
from wherefrom.tasks.language import CausalLM, ChosenToken, MaskedLM, Seq2Seq, SequenceClassification
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Classification, Regression, Task
from wherefrom.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from wherefrom import evaluate as evaluate
    from wherefrom.hf.pretrained import PretrainedStudy, study_from_pretrained
    from wherefrom.store.recording import RecordedCheckpoint, TrainingRecorder, read_recording

__all__ = [
    "Astra",
    "CausalLM",
    "ChosenToken",
    "Classification",
    "ConjugateGradients",
    "Factors",
    "GradientIndex",
    "Hit",
    "MaskedLM",
    "PretrainedStudy",
    "RecordedCheckpoint",
    "Regression",
    "ReplayableTraining",
    "Sampler",
    "Scores",
    "Seq2Seq",
    "SequenceClassification",
    "Study",
    "Task",
    "TokenScores",
    "TopScores",
    "TrainingRecipe",
    "TrainingRecorder",
    "WherefromError",
    "__version__",
    "adam_conditioning",
    "fisher_scores",
    "join_ranks",
    "logra_scores",
    "magic_scores",
    "metasmoothness",
    "read_recording",
    "score_checkpoints",
    "score_source",
    "study_from_pretrained",
    "trackstar_scores",
    "trak_scores",
]

# What needs transformers is imported when it is first asked for, since the engine runs on torch alone.
_LAZY = {
    "PretrainedStudy": "hf.pretrained",
    "study_from_pretrained": "hf.pretrained",
    "RecordedCheckpoint": "store.recording",
    "TrainingRecorder": "store.recording",
    "read_recording": "store.recording",
}

if not TYPE_CHECKING:  # a type checker would take any name for an attribute

    def __getattr__(name: str) -> object:
        if name == "evaluate":  # which also does without scipy, until one of its functions is asked for
            return import_module(f"{__name__}.evaluate")
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
