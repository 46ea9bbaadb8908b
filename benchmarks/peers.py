"""The same job through dattri-llm 0.1.0, bergson 2.5.1 or wherefrom; both peers run on a CPU as they are.

    python benchmarks/peers.py --peer wherefrom --output benchmarks/results/peer_wherefrom.json
    python benchmarks/peers.py --peer dattri-llm --output dattri.json     # --scores dattri.safetensors keeps the scores
    python benchmarks/peers.py --peer bergson --output bergson.json

Each peer has an environment of its own, set up from the repository's root. bergson also names torchvision, torchaudio
and bitsandbytes, of which it needs none here; `--no-deps` keeps them and their CUDA packages away.

    python3 -m venv .venv-dattri
    sed '/--hash=/d; s/ *[\\]$//' requirements/lock.txt > .venv-dattri/constraints.txt
    export PIP_CONSTRAINT=.venv-dattri/constraints.txt
    .venv-dattri/bin/pip install torch==2.13.0
    .venv-dattri/bin/pip install dattri-llm==0.1.0 transformers accelerate numpy tyro safetensors

    python3 -m venv .venv-bergson
    .venv-bergson/bin/pip install torch==2.13.0
    .venv-bergson/bin/pip install --no-deps bergson==2.5.1 peft==0.21.2 torchopt==0.7.3 optree==0.20.0 \
        graphviz==0.21
    .venv-bergson/bin/pip install accelerate datasets jinja2 jaxtyping==0.3.11 ml_dtypes==0.6.0 natsort==8.4.0 \
        numpy scipy petname==2.9 pyarrow pyyaml simple-parsing==0.1.9 transformers huggingface-hub tyro safetensors

Both fit EK-FAC of the empirical Fisher (the sequences' own labels; dattri-llm has nothing else) and score all pairs,
with biases, damping 0.1 x the mean corrected eigenvalue, no random projection, and float32. One thing differs from
wherefrom and kronfluence: a sequence's last token, which has no gradient, counts in neither covariance, so the
eigenbases differ a little, and the scores with them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from workload import Stopwatch, Workload, provenance

Peer = Literal["wherefrom", "dattri-llm", "bergson"]
DAMPING = 0.1


@dataclass
class Arguments:
    """One peer, once, in this process."""

    peer: Peer
    output: Path
    """Where the figures go, as JSON."""
    train: int = 256
    queries: int = 512
    batch: int = 8
    """Sequences in a forward and backward pass."""
    query_part: int = 256
    """Queries that dattri-llm holds at once: it needs some 40 MB of memory a query."""
    scores: Path | None = None
    """Where the scores go, float32 [queries, train], as safetensors."""


def our_scores(work: Workload, arguments: Arguments, folder: Path, watch: Stopwatch) -> Tensor:
    """EK-FAC scores by wherefrom, which plans its own batches."""
    from versus_kronfluence import ours  # noqa: PLC0415

    return ours(work, folder, watch, empirical=True)


def dattri_scores(work: Workload, arguments: Arguments, folder: Path, watch: Stopwatch) -> Tensor:
    """EK-FAC scores by dattri-llm: gradients captured once as factors and kept in memory, then fitted and scored.

    Weights are frozen but for the position embedding, so that autograd forms no weight gradient; this is what its
    documentation advises for a probe. Query parts share the factors, which are fitted once.
    """
    from dattri_llm import (  # noqa: PLC0415
        AttributionArguments,
        AttributionTask,
        EKFACAttributor,
        GradientStorageManager,
        HookManagerConfig,
    )

    model = work.model().requires_grad_(False)
    model.transformer.wpe.weight.requires_grad_(True)
    sizes = {"per_device_train_batch_size": arguments.batch, "per_device_eval_batch_size": arguments.batch}
    settings = AttributionArguments(output_dir=str(folder), use_cpu=True, **sizes)
    attributor = EKFACAttributor(settings, task=AttributionTask(_summed_loss, model))
    hooks = HookManagerConfig(linear_io=[r"transformer\.h\.\d+\.(attn|mlp)\.c_"], include_frozen=True)
    train, queries = work.sequences(work.train, 1), work.sequences(work.queries, 2)
    factors, parts = str(folder / "factors"), []
    with GradientStorageManager(str(folder / "train"), residency="memory") as store:
        with watch.stage("training gradients and covariances"):
            attributor.collect_gradients(attributor.generate_train_rep(train, hook_config=hooks), store)
        with watch.stage("eigenbasis and eigenvalues"):
            attributor.fit(store, factors)
        with watch.stage("query gradients and pairwise scores"):
            for start in range(0, len(queries), arguments.query_part):
                name, part = str(folder / f"queries{start}"), queries[start : start + arguments.query_part]
                with GradientStorageManager(name, residency="memory") as asked:
                    attributor.collect_gradients(attributor.generate_test_rep(part, hook_config=hooks), asked)
                    found = attributor.attribute_from_cache(
                        store, asked, fisher_dir=factors, damping=DAMPING, relative_damping=True
                    )
                parts.append(found.agnostic_matrix()[1].T)
    return torch.cat(parts)


def _summed_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    tokens = batch["input_ids"]
    logits = model(input_ids=tokens).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def bergson_scores(work: Workload, arguments: Arguments, folder: Path, watch: Stopwatch) -> Tensor:
    """EK-FAC scores by bergson: the steps of its `bergson ekfac` command, which pass everything on through files."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from bergson.build import build_query  # noqa: PLC0415
    from bergson.config import (  # noqa: PLC0415
        DataConfig,
        HessianConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.data import load_scores  # noqa: PLC0415
    from bergson.hessians.apply_hessian import EkfacConfig, apply_worker  # noqa: PLC0415
    from bergson.hessians.hessian_approximations import approximate_hessians  # noqa: PLC0415
    from bergson.score.score import score_dataset  # noqa: PLC0415

    write_inputs(work, arguments.batch, folder)

    def index(name: str) -> Any:
        data = DataConfig(dataset=str(folder / "train"))
        batch = arguments.batch * work.tokens
        return IndexConfig(
            str(folder / name), model=str(folder / "model"), data=data, token_batch_size=batch, include_bias=True
        )

    with watch.stage("query gradients"):
        build_query(index("queried"), QuerySetConfig(dataset=str(folder / "queries")), PreprocessConfig())
    with watch.stage("covariances, eigenbasis and eigenvalues"):
        approximate_hessians(index("factors"), HessianConfig("kfac", ev_correction=True, use_dataset_labels=True))
    with watch.stage("preconditioned query gradients"):
        paths = (str(folder / name) for name in ("factors", "queried", "preconditioned"))
        apply_worker(0, 0, 1, EkfacConfig(*paths, ev_correction=True), InversionConfig(damping_factor=DAMPING))
    with watch.stage("pairwise scores"):
        asked = ScoreConfig(query_path=str(folder / "preconditioned"))
        score_dataset(index("scores"), asked, PreprocessConfig())
    return torch.from_numpy(load_scores(folder / "scores")[:]).T


def write_inputs(work: Workload, batch: int, folder: Path) -> None:
    """The model, a tokenizer that is never used and both datasets as files, which is how bergson takes them.

    It refuses batches of more tokens than the model has positions, so the model gets more positions, never reached.
    """
    from datasets import Dataset  # noqa: PLC0415
    from tokenizers import Tokenizer, models  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    model = work.model()
    positions = torch.zeros(batch * work.tokens, work.width)
    positions[: work.tokens] = model.transformer.wpe.weight.detach()
    model.transformer.wpe = nn.Embedding.from_pretrained(positions)
    model.config.n_positions = len(positions)
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "model")
    for name, count, seed in (("train", work.train, 1), ("queries", work.queries, 2)):
        rows = [row["input_ids"].tolist() for row in work.sequences(count, seed)]
        Dataset.from_dict({"input_ids": rows}).save_to_disk(folder / name)


def main(arguments: Arguments) -> None:
    """Run the peer and write its figures."""
    work, watch = Workload(train=arguments.train, queries=arguments.queries), Stopwatch()
    ways: dict[Peer, Callable[[Workload, Arguments, Path, Stopwatch], Tensor]] = {
        "wherefrom": our_scores,
        "dattri-llm": dattri_scores,
        "bergson": bergson_scores,
    }
    with tempfile.TemporaryDirectory() as folder:
        values = ways[arguments.peer](work, arguments, Path(folder), watch)
    assert values.shape == (work.queries, work.train)
    if arguments.scores:
        save_file({"values": values.float().contiguous()}, arguments.scores)
    watch.write(
        arguments.output,
        peer=arguments.peer,
        version=version(arguments.peer),
        computed="ekfac of the empirical Fisher, biases included, damping 0.1 x mean, no projection, float32",
        workload=asdict(work),
        batch=arguments.batch,
        query_part=arguments.query_part if arguments.peer == "dattri-llm" else None,
        threads=torch.get_num_threads(),
        **provenance(),
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
