"""The subcommands `wherefrom index` and `wherefrom query`: compress a training set once, query it again and again.

All work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import tyro
from rich.console import Console

from wherefrom.cli.shared import Run, StrategyName
from wherefrom.cli.sources import RunSources
from wherefrom.hf.pretrained import PretrainedStudy
from wherefrom.methods.index import GradientIndex
from wherefrom.methods.projections import Compression, Directions, IndexOptions, Numbers
from wherefrom.report.passages import DatasetPassages
from wherefrom.report.text import top_tables
from wherefrom.runtime.distributed import Ranks
from wherefrom.tasks.language import TokenBatch

console = Console()


@dataclass(frozen=True)
class IndexArguments:
    """The index that is meant.

    Attributes:
        strategy: The curvature; fitted first if the run does not have it yet.
        directions: What gradients are projected on: random directions, or leading eigenvectors of the curvature.
        rank: How many directions on either side of a layer's gradient.
        numbers: The type that compressed gradients are stored in.
        seed: Of random directions.
        half_precision: bfloat16 products in the model's passes.
        name: Of the index in the run; by default directions, rank and numbers.
    """

    strategy: StrategyName = "ekfac"
    directions: Directions = "random"
    rank: int = 16
    numbers: Numbers = "int8"
    seed: int = 0
    half_precision: bool = False
    name: str | None = None

    @property
    def options(self) -> IndexOptions:
        """As the library takes them, checked: a model that takes long to load is loaded after that."""
        options: IndexOptions = {
            "directions": self.directions,
            "rank": self.rank,
            "numbers": self.numbers,
            "seed": self.seed,
            "half_precision": self.half_precision,
            "name": self.name,
        }
        Compression.of(**options)
        return options


def index(
    run: Run,
    compression: tyro.conf.OmitArgPrefixes[IndexArguments],
    *,
    batch_size: int | None = None,
    device: str = "auto",
    memory_budget: float | None = None,
    overwrite: bool = False,
) -> None:
    """Store the compressed gradient of every training sequence, for `wherefrom query`.

    Args:
        run: A run directory that `wherefrom fit` made.
        compression: The index.
        batch_size: Sequences a batch; found by default.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        memory_budget: GiB to take on the device beyond the model and its factors; most of what is free by default.
        overwrite: Replace an index that was made from something else.
    """
    options: IndexOptions = {**compression.options, "batch_size": batch_size, "overwrite": overwrite}
    sources = RunSources.load(run)
    study = sources.study(run, device, memory_budget)
    found = _opened(study, sources, compression, options)
    if Ranks.current().writes:
        size = len(found) * found.bytes_per_example / 2**20
        console.print(f"{len(found):,} gradients, {size:,.2f} MiB, are in {found.path}.", soft_wrap=True)


def query(
    run: Run,
    compression: tyro.conf.OmitArgPrefixes[IndexArguments],
    *,
    queries: str,
    k: int = 5,
    rerank: int = 0,
    damping: float | None = None,
    split: str = "validation",
    column: str | None = None,
    device: str = "auto",
    memory_budget: float | None = None,
) -> None:
    """Show the most influential training sequences of new queries, from an index.

    Args:
        run: A run directory with an index; what of it is missing is made first.
        compression: The index, as for `wherefrom index`.
        queries: The query text: a file, a saved dataset or a hub name, cut as the training text was.
        k: Sequences for each query.
        rerank: Score this many of each query's highest and lowest again with whole gradients.
        damping: Added to every eigenvalue; 0.1 x the mean eigenvalue of each layer by default.
        split: The split of a saved or hub dataset.
        column: The column that holds the text; found when there is only one.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        memory_budget: GiB to take on the device beyond the model and its factors; most of what is free by default.
    """
    options, sources = compression.options, RunSources.load(run)
    study = sources.study(run, device, memory_budget)
    sequences = replace(sources.train, source=queries, split=split, column=column).sequences(study.tokenizer)
    found = _opened(study, sources, compression, options)
    scores = found.query(sequences, k, damping=damping, rerank=rerank)
    shown = range(len(sequences))
    console.print(top_tables(scores, DatasetPassages(sequences), DatasetPassages(study.train), shown=shown, k=k))


def _opened(
    study: PretrainedStudy, sources: RunSources, compression: IndexArguments, options: IndexOptions
) -> GradientIndex[TokenBatch]:
    """The index of a run, made unless it is there."""
    factors = study.fit(
        compression.strategy, empirical=sources.empirical, half_precision=compression.half_precision, seed=sources.seed
    )
    return study.index(factors, **options)
