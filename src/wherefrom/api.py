"""The public names, which `import wherefrom` gives; imported when the first of them is used."""

from importlib import import_module
from typing import TYPE_CHECKING

from wherefrom.curvature.conditioning import adam_conditioning
from wherefrom.curvature.factors import Factors
from wherefrom.curvature.solvers.astra import Astra
from wherefrom.curvature.solvers.conjugate_gradients import ConjugateGradients
from wherefrom.curvature.solvers.gradient_flow import GradientFlow
from wherefrom.engine.execution import Execution
from wherefrom.engine.loading import read_stream
from wherefrom.hf.preparation import Preparation
from wherefrom.hf.pretrained import PretrainedStudy, study_from_pretrained
from wherefrom.hf.text import ModelLoading
from wherefrom.jobs.asking import Asker
from wherefrom.jobs.auditing import Audit, audit
from wherefrom.jobs.questions import Question
from wherefrom.jobs.selecting import Selection, select
from wherefrom.jobs.sources import record_sources
from wherefrom.methods import METHODS
from wherefrom.methods.baselines import BM25, Random
from wherefrom.methods.factored import EKFAC, KFAC, Cosine, Diagonal, Dot, Factored, Shampoo
from wherefrom.methods.index.gradient_index import GradientIndex
from wherefrom.methods.index.sketches import Sketch
from wherefrom.methods.magic.recipe import TrainingRecipe
from wherefrom.methods.magic.scores import Magic, metasmoothness
from wherefrom.methods.magic.training import ReplayableTraining
from wherefrom.methods.method import Method
from wherefrom.methods.projected.scores import LoGra, TrackStar, Trak
from wherefrom.methods.retrieval import TwoStage
from wherefrom.methods.sampled_fisher import Fisher
from wherefrom.methods.source import Source
from wherefrom.methods.tracin import TracIn
from wherefrom.methods.trajectory.flow import TrajectoryFlow
from wherefrom.methods.trajectory.scores import TrajectoryFisher
from wherefrom.report.attribution import Attribution, Found
from wherefrom.runtime.distributed import join_ranks
from wherefrom.runtime.errors import WherefromError
from wherefrom.scoring.keep import Aggregated, Keep, Pairs, Tokens, Top
from wherefrom.scoring.results import GroupScore, Hit, Scores, TopScores
from wherefrom.scoring.tokens import ChunkHit, TokenScores, TopChunks
from wherefrom.store.recording import RecordedCheckpoint, read_recording
from wherefrom.study import Study
from wherefrom.tasks.classification import SequenceClassification, TokenClassification
from wherefrom.tasks.language import CausalLM, ChosenToken, MaskedLM, Seq2Seq
from wherefrom.tasks.packing import unpacked
from wherefrom.tasks.preference.losses import DPO, IPO, KTO, ORPO, SimPO
from wherefrom.tasks.preference.tasks import Preference, RewardModel
from wherefrom.tasks.sampling import Sampler
from wherefrom.tasks.task import Classification, MultiLabel, Regression, Task
from wherefrom.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from wherefrom.hf.recording import TrainingRecorder

__all__ = [
    "BM25",
    "DPO",
    "EKFAC",
    "IPO",
    "KFAC",
    "KTO",
    "METHODS",
    "ORPO",
    "Aggregated",
    "Asker",
    "Astra",
    "Attribution",
    "Audit",
    "CausalLM",
    "ChosenToken",
    "ChunkHit",
    "Classification",
    "ConjugateGradients",
    "Cosine",
    "Diagonal",
    "Dot",
    "Execution",
    "Factored",
    "Factors",
    "Fisher",
    "Found",
    "GradientFlow",
    "GradientIndex",
    "GroupScore",
    "Hit",
    "Keep",
    "LoGra",
    "Magic",
    "MaskedLM",
    "Method",
    "ModelLoading",
    "MultiLabel",
    "Pairs",
    "Preference",
    "Preparation",
    "PretrainedStudy",
    "Question",
    "Random",
    "RecordedCheckpoint",
    "Regression",
    "ReplayableTraining",
    "RewardModel",
    "Sampler",
    "Scores",
    "Selection",
    "Seq2Seq",
    "SequenceClassification",
    "Shampoo",
    "SimPO",
    "Sketch",
    "Source",
    "Study",
    "Task",
    "TokenClassification",
    "TokenScores",
    "Tokens",
    "Top",
    "TopChunks",
    "TopScores",
    "TracIn",
    "TrackStar",
    "TrainingRecipe",
    "TrainingRecorder",
    "TrajectoryFisher",
    "TrajectoryFlow",
    "Trak",
    "TwoStage",
    "WherefromError",
    "__version__",
    "adam_conditioning",
    "audit",
    "join_ranks",
    "metasmoothness",
    "read_recording",
    "read_stream",
    "record_sources",
    "select",
    "study_from_pretrained",
    "unpacked",
]

if not TYPE_CHECKING:  # a type checker would take any name for an attribute

    def __getattr__(name: str) -> object:
        if name != "TrainingRecorder":  # which needs transformers as soon as it is imported
            raise AttributeError(f"module 'wherefrom' has no attribute {name!r}")
        return import_module("wherefrom.hf.recording").TrainingRecorder
