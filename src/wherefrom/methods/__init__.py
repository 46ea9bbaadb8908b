"""The ways of scoring, a file each over the engine. They do not know the study that calls them, nor pages."""

from wherefrom.methods.baselines import BM25, Random
from wherefrom.methods.factored import EKFAC, KFAC, Cosine, Diagonal, Dot, Shampoo
from wherefrom.methods.magic.scores import Magic
from wherefrom.methods.method import Method
from wherefrom.methods.projected.scores import LoGra, TrackStar, Trak
from wherefrom.methods.retrieval import TwoStage
from wherefrom.methods.sampled_fisher import Fisher
from wherefrom.methods.source import Source
from wherefrom.methods.tracin import TracIn
from wherefrom.methods.trajectory.flow import TrajectoryFlow
from wherefrom.methods.trajectory.scores import TrajectoryFisher

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        EKFAC, KFAC, Diagonal, Shampoo, Dot, Cosine, Fisher, TracIn, Source, Magic, TrajectoryFisher, TrajectoryFlow,
        Trak, LoGra, TrackStar, TwoStage, BM25, Random,
    )
}  # fmt: skip
"""Every method by its name, the word of `wherefrom score`."""
