"""Fine-tune adapters (LoRA) of the small GPT-2, trace its predictions through them, and compare with all weights.

    python analyze_lora.py
    python analyze_lora.py --quantization 4bit   # QLoRA: beside matrices of 4 bits

The model and the texts are those of examples/wikitext; what is trained is a low-rank adapter beside each frozen matrix.
Of a peft model, the adapters' layers are what is tracked. The same model with its adapters merged into the matrices,
those tracked, is what it is compared with; with quantization, the same adapters beside matrices in float32.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from datasets import Dataset
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

sys.path.append(str(Path(__file__).parents[1] / "wikitext"))
from common import METHODS, StrategyName
from data import load_data
from models import BLOCK_SIZES, load_base, small_folder
from training import TrainSettings, perplexity, train

import wherefrom as wf
from wherefrom.cli.shared import command_line
from wherefrom.evaluate.agreement import compare_scores, label_agreement
from wherefrom.evaluate.plots import BLUE, INK, RESOLUTION, png
from wherefrom.hf.text import ModelLoading, load_model
from wherefrom.report.figures import Figure, load_figures, save_evaluation
from wherefrom.tasks.adapters.quantized import multiplying_dequantized

console = Console()

ADAPTED = ["c_attn", "c_proj", "c_fc"]  # the four matrices of every block: c_proj is the name of two
EVAL_BATCH_SIZE = 16


@dataclass
class Arguments:
    """Where the predictions of a model with LoRA adapters come from."""

    run_dir: Path = Path("runs/lora")
    """Keeps factors, scores, plots and the page."""
    cache_dir: Path = Path("cache")
    """Keeps the pre-trained small model, which examples/wikitext shares."""
    rank: int = 8
    """Of the adapters; their scale (alpha) is twice that."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Of the model's own matrices, by bitsandbytes."""
    train_batch_size: int = 8
    learning_rate: float = 3e-3
    num_train_epochs: int = 3
    seed: int = 1004
    max_train_examples: int | None = None
    max_query_examples: int | None = None
    strategy: StrategyName = "ekfac"
    damping: float | None = 1e-8
    """Added to every eigenvalue; None is 0.1 x the mean eigenvalue of each layer."""
    overwrite: bool = False
    """Replace factors and scores that were made from something else."""


@dataclass(frozen=True)
class Texts:
    """Training sequences, queries, and what made tokens of them."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    queries: Dataset


@dataclass(frozen=True)
class Analysis:
    """Scores through some of a model's weights, and what they took.

    Attributes:
        weights: tracked, biases included.
        seconds: of a processor, for fitting and scoring; of loading, where the results were there.
    """

    study: wf.Study[dict[str, torch.Tensor]]
    scores: wf.Scores
    weights: int
    seconds: float

    def facts(self, texts: Texts) -> dict[str, float]:
        """The numbers of the comparison."""
        topics = label_agreement(self.scores, texts.queries["label"], texts.train["label"])
        return {
            "layers": len(self.study.layers),
            "tracked_weights": self.weights,
            "cpu_seconds": round(self.seconds, 1),
            "query_gradient_mib": 4 * self.weights * len(texts.queries) / 2**20,
            "topic_agreement": topics.hits,
            "topic_agreement_error": topics.standard_error,
            "topic_chance": topics.chance,
        }


def main(arguments: Arguments) -> None:
    """Train adapters, score through them and through all weights, compare, write the page."""
    tuned, texts, perplexities = train_adapters(arguments)
    if arguments.quantization is None:
        analyses = {"adapters": analyze(arguments, "adapters", tuned, texts)}
        analyses["all weights, merged"] = analyze(arguments, "merged", merged(tuned), texts)
    else:
        name = f"adapters, {arguments.quantization}"
        analyses = {name: analyze(arguments, f"adapters-{arguments.quantization}", tuned, texts)}
        analyses["adapters, float32"] = analyze(arguments, "adapters-float32", in_float32(tuned, arguments), texts)
    one, other = (each.scores for each in analyses.values())
    agreement = compare_scores(one, other)
    facts = {name: each.facts(texts) for name, each in analyses.items()}
    console.print(table(facts))
    top = overlap(one.values, other.values)
    console.print(
        f"Spearman {agreement.spearman.mean}, Pearson {agreement.pearson.mean}; {top:.1%} of top-10 sequences agree.",
        highlight=False,
    )
    results = {
        "settings": {name: str(value) for name, value in asdict(arguments).items()},
        "perplexity": perplexities,
        "sequences": {"train": len(texts.train), "queries": len(texts.queries)},
        "analyses": facts,
        "agreement": agreement.to_json(),
        "top_10_overlap": top,
    }
    first, second = analyses
    caption = f"Each query's rank correlation of scores through {first}, and through {second}."
    figure = Figure("Scores through adapters", caption, png(comparison(facts, agreement.spearman.values)))
    file = save_evaluation(arguments.run_dir, "adapters", figure, results, one.fingerprint)
    console.print(f"Plot and numbers: {file}", soft_wrap=True)
    page = analyses[first].study.report(
        one,
        texts.queries,
        tokenizer=texts.tokenizer,
        figures=load_figures(arguments.run_dir, one.fingerprint),
        path=arguments.run_dir / "report.html",
        summary=f"{len(texts.queries):,} queries x {len(texts.train):,} training sequences through LoRA adapters.",
    )
    console.print(f"The report is {page}", soft_wrap=True)


def train_adapters(arguments: Arguments) -> tuple[PeftModel, Texts, dict[str, float]]:
    """The fine-tuned model, its data, and the queries' perplexity before and after."""
    base, tokenizer = load_base("small", arguments.cache_dir)
    if arguments.quantization is not None:
        loading = ModelLoading(quantization=arguments.quantization)
        base = load_model(str(small_folder(arguments.cache_dir)), loading=loading)
    limits = (arguments.max_train_examples, arguments.max_query_examples)
    texts = Texts(tokenizer, *load_data("wikipedia", tokenizer, BLOCK_SIZES["small"], *limits))
    settings = TrainSettings(
        batch_size=arguments.train_batch_size,
        learning_rate=arguments.learning_rate,
        num_epochs=arguments.num_train_epochs,
    )
    # In evaluation mode, which it trains in too, bitsandbytes has no gradients on some CPUs.
    with multiplying_dequantized(base):
        before = perplexity(base, texts.queries, EVAL_BATCH_SIZE)
        tuned = with_adapters(base, arguments.rank, arguments.seed)
        began = time.perf_counter()
        train(base, texts.train, settings, arguments.seed, "Fine-tuning")
        seconds = time.perf_counter() - began
        after = perplexity(base, texts.queries, EVAL_BATCH_SIZE)
    console.print(f"Perplexity of {len(texts.queries):,} queries: {before:.1f}, then {after:.1f} ({seconds:.0f} s).")
    return tuned, texts, {"before": before, "after": after}


def with_adapters(base: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """Put an adapter of that rank beside every matrix of the model's blocks; the model itself is changed."""
    torch.manual_seed(seed)
    transposed = (
        type(base.get_submodule("transformer.h.0.attn.c_attn")).__name__ == "Conv1D"
    )  # not where it has few bits
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=ADAPTED, fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    model: PeftModel = get_peft_model(base, config)
    return model


def in_float32(tuned: PeftModel, arguments: Arguments) -> PeftModel:
    """The same adapters beside the matrices as they were before quantization."""
    model = with_adapters(load_base("small", arguments.cache_dir)[0], arguments.rank, arguments.seed)
    set_peft_model_state_dict(model, get_peft_model_state_dict(tuned))
    return model


def merged(tuned: PeftModel) -> nn.Module:
    """A plain GPT-2 that computes the same, with every weight trainable, and so tracked."""
    plain: nn.Module = copy.deepcopy(tuned).merge_and_unload()
    return plain.requires_grad_(True)


def analyze(arguments: Arguments, name: str, model: nn.Module, texts: Texts) -> Analysis:
    """Factors and scores through a model's adapters, or the matrices that had them."""
    patterns = None if isinstance(model, PeftModel) else [f"*.{each}" for each in ADAPTED]
    study = wf.Study(arguments.run_dir / name, model, wf.CausalLM(patterns), train=texts.train)
    began = time.process_time()
    method = METHODS[arguments.strategy](damping=arguments.damping)
    method = replace(method, factors=study.fit(method, overwrite=arguments.overwrite))
    scores = study.score(texts.queries, method, overwrite=arguments.overwrite)
    seconds = time.process_time() - began
    weights = sum(layer.shape[0] * layer.shape[1] for layer in study.layers.values())
    return Analysis(study, scores, weights, seconds)


def overlap(one: torch.Tensor, other: torch.Tensor, k: int = 10) -> float:
    """Which part of each query's k highest scores two matrices [queries, train] share, a mean over queries."""
    k = min(k, one.shape[1])
    marks = [torch.zeros_like(each).scatter_(1, each.topk(k, dim=1).indices, 1.0) for each in (one, other)]
    return float((marks[0] * marks[1]).sum(1).mean() / k)


def table(facts: Mapping[str, Mapping[str, float]]) -> Table:
    """What each analysis took and found."""
    shown = Table(
        "Tracked", "Layers", "Weights", "Fit and score, CPU s", "Query gradients, MiB", "Same topic in top 10"
    )
    for name, each in facts.items():
        shown.add_row(
            name,
            f"{each['layers']:.0f}",
            f"{each['tracked_weights']:,.0f}",
            f"{each['cpu_seconds']:.1f}",
            f"{each['query_gradient_mib']:,.0f}",
            f"{each['topic_agreement']:.1%} ± {each['topic_agreement_error']:.1%}",
        )
    return shown


def comparison(facts: Mapping[str, Mapping[str, float]], correlations: torch.Tensor) -> Plot:
    """How scores of the two agree, query by query, and how often the top of each has its query's topic."""
    plot = Plot(figsize=(7.6, 3.2), dpi=RESOLUTION, layout="constrained")
    FigureCanvasAgg(plot)
    left, right = plot.subplots(1, 2)
    left.hist(correlations.numpy(), bins=20, color=BLUE, alpha=0.7)
    left.set(xlabel="Spearman correlation of a query's scores", ylabel="Queries", xlim=(None, 1))
    left.yaxis.get_major_locator().set_params(integer=True)
    heights, errors = ([each[key] for each in facts.values()] for key in ("topic_agreement", "topic_agreement_error"))
    right.bar(list(facts), heights, yerr=errors, color=BLUE, alpha=0.7, width=0.5, capsize=3)
    chance = next(iter(facts.values()))["topic_chance"]
    right.axhline(chance, color=INK, linewidth=0.9, dashes=(5, 3), label="random pairs")
    right.set(ylabel="Top 10 with the query's topic", ylim=(0, None))
    right.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return plot


if __name__ == "__main__":
    disable_progress_bar()
    chosen = tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    with command_line():
        main(chosen)
