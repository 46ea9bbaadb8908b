"""The calculator: its counts are those of real runs and of closed forms, and its layout is what it says."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scale
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import wherefrom as wf
from tests.models import TRANSFORMERS, gpt2
from tests.runs import factored, with_factors
from wherefrom.cli.calculator import Estimate, PlanArguments
from wherefrom.cli.main import main
from wherefrom.cli.plan import sections
from wherefrom.cli.shared import StrategyName
from wherefrom.hf.blueprint import PRESETS, measure, model_without_weights
from wherefrom.runtime.errors import InputError, LayerError

GIB = 2**30
LINK, EIGEN = 1e11, 1e12  # bytes and operations a second, of `bandwidth` and `eigen_flops`
PUBLISHED = PlanArguments(
    "gpt2", train=4656, queries=481, device_memory=1000, host_memory=1000, flops=400, efficiency=0.5
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny GPT-2's config, without weights."""
    path = tmp_path_factory.mktemp("model")
    gpt2().config.save_pretrained(path)
    return path


def planned(**changes: Any) -> Estimate:
    """GPT-2 on the published job's sequences of 512 tokens, with some arguments changed."""
    return Estimate(replace(PUBLISHED, **changes))


def flop(estimate: Estimate) -> dict[str, float]:
    return {stage.name: stage.flop for stage in estimate.stages}


# Counts


@pytest.mark.parametrize("strategy", ["identity", "kfac", "ekfac", "shampoo"])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_plan_on_paper_is_that_of_the_real_model(
    tmp_path: Path, small: Path, strategy: StrategyName, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the real model is on the CPU
    rows: list[object] = [{"input_ids": list(range(10))}] * 14
    study = wf.Study(tmp_path, gpt2(torch.float32), wf.CausalLM(), train=rows)
    with sdpa_kernel(SDPBackend.MATH):  # without numbers there is no fused attention of a CPU
        real = study.plan(rows[:5], factored(strategy, query_rank=rank))
    arguments = PlanArguments(str(small), train=14, queries=5, length=10, strategy=strategy, query_rank=rank)
    paper = Estimate(replace(arguments, device_memory=1000))
    assert paper.plan.job.example == real.job.example
    assert (paper.plan.train_batch, paper.plan.block, paper.plan.form) == (14, 5, real.form)
    assert paper.plan.stages() == real.stages()
    for stage, planned in zip(paper.stages, real.stages(), strict=True):
        assert (stage.name, stage.passes, stage.flop) == (planned.name, planned.passes, planned.flop)
        assert stage.bytes == paper.weight_bytes + planned.bytes


@pytest.mark.parametrize(
    ("name", "weights"),
    [("gpt2", 124439808), ("smollm2-135m", 134515008), ("llama-3-8b", 8030261248), ("llama-3-70b", 70553706496)],
)
def test_presets_have_the_published_number_of_weights(name: str, weights: int) -> None:
    model = model_without_weights(name, torch.bfloat16)
    assert sum(each.numel() for each in model.parameters()) == weights
    assert {each.device.type for each in model.parameters()} == {"meta"}
    numbers = PRESETS[name]
    if numbers["model_type"] == "llama":
        hidden, inner, count = (numbers[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        keys = hidden * numbers["num_key_value_heads"] // numbers["num_attention_heads"]
        block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
        outside = numbers["vocab_size"] * hidden * (1 if numbers["tie_word_embeddings"] else 2) + hidden
        assert weights == count * block + outside


@pytest.mark.parametrize(("half", "attention"), [(False, 12), (True, 14)])
def test_a_pass_through_gpt2_takes_what_its_products_take(half: bool, attention: int) -> None:
    """Forward and backward without weight gradients; fused attention computes its scores again going back."""
    tokens, width, layers, vocabulary = 512, 768, 12, 50257
    found = measure("gpt2", tokens, half_precision=half)
    products = layers * 12 * width**2 + vocabulary * width
    first = 3 * width**2  # nobody asks for the gradient of the first layer's input
    expected = 2 * tokens * (2 * products - first) + attention * tokens**2 * width * layers
    assert found.example.flop == expected
    assert found.example.tokens == tokens


def test_the_published_job_takes_what_the_design_says() -> None:
    """DESIGN.md, section 4, to the two digits that it gives."""
    train, queries = PUBLISHED.train, PUBLISHED.queries
    attention = 12 * 512**2 * 768 * 12
    ekfac, identity = flop(planned()), flop(planned(strategy="identity"))
    passes = train * planned().blueprint.example.flop
    forming = train * identity["query gradients"] / queries - passes
    assert round((passes - train * attention) / 1e15, 1) == 1.2
    assert round(forming / 1e14) == 4
    assert round((identity["pairwise scores"] - passes - forming) / 1e14, 1) == 3.8
    assert round(2 * (ekfac["covariance"] - passes) / 1e15, 1) == 1.6  # there both triangles are counted
    assert round((ekfac["eigenvalues"] - passes - forming) / 1e15, 1) == 1.6


def test_fused_attention_keeps_no_matrix_of_tokens_by_tokens() -> None:
    """Without, each of 12 heads of 12 layers keeps one, in float32."""
    for half, matrices in ((True, 0), (False, 12 * 12 * 4)):
        short, long = (measure("gpt2", length, half_precision=half).example for length in (256, 1024))
        expected = 4 * short.saved_bytes + matrices * (1024**2 - 4 * 256**2)
        assert long.saved_bytes == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("rank", [None, 2, 20])
def test_the_operations_of_more_training_examples_are_those_that_run(tmp_path: Path, rank: int | None) -> None:
    """PyTorch's own counter, over scores of 40 examples and of 20."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 8))
    rows: list[object] = [(torch.randn(32), torch.tensor(row % 8)) for row in range(40)]
    counted, planned = [], []
    for train in (rows, rows[:20]):
        study = wf.Study(tmp_path / str(len(train)), model, wf.Classification(), train=train)
        factors = study.fit(wf.Dot())
        with FlopCounterMode(display=False) as counter:
            study.score(
                rows[:10],
                with_factors(factors, query_rank=rank),
                execution=replace(study.execution, train_batch_size=20),
            )
        counted.append(counter.get_total_flops())
        planned.append(
            study.plan(rows[:10], wf.Dot(query_rank=rank), execution=replace(study.execution, train_batch_size=20))
            .stages()[-1]
            .flop
        )
    assert counted[0] - counted[1] == planned[0] - planned[1]


# The layout


def test_ranks_share_the_work_and_exchange_their_sums() -> None:
    one, eight = (planned(train=4800, queries=480, ranks=ranks) for ranks in (1, 8))
    squares = 12 * 4 * sum(out**2 + width**2 for out, width in [(2304, 776), (768, 776), (3072, 776), (768, 3080)])
    for single, shared in zip(one.stages, eight.stages, strict=True):
        assert single.sent == 0
        assert shared.passes == single.passes
        if single.name != "eigendecomposition":
            assert shared.flop == single.flop
            arithmetic = shared.seconds - shared.sent / LINK
            assert arithmetic == pytest.approx(single.seconds / 8)
        assert shared.least_seconds <= shared.seconds
    sent = {stage.name: stage.sent for stage in eight.stages}
    assert sent["covariance"] == 2 * squares * 7 / 8
    assert sent["eigendecomposition"] == squares * 7 / 8
    assert sent["pairwise scores"] == 2 * 4 * 480 * 4800 * 7 / 8


def test_eigendecompositions_are_spread_by_layer() -> None:
    cubes = [9 * (out**3 + inputs**3) for out, inputs in [(2304, 769), (768, 769), (3072, 769), (768, 3073)]]
    seconds = []
    for ranks in (1, 12, 100):
        stages = planned(ranks=ranks).stages
        found = next(each for each in stages if each.name == "eigendecomposition")
        assert found.flop == 12 * sum(cubes)
        seconds.append(found.seconds - found.sent / LINK)
    assert seconds[0] == pytest.approx(12 * sum(cubes) / EIGEN)
    assert sum(cubes) <= seconds[1] * EIGEN < sum(cubes) + max(cubes)
    assert seconds[2] == pytest.approx(max(cubes) / EIGEN)


def test_sharded_weights_are_gathered_for_every_batch(small: Path) -> None:
    given: dict[str, Any] = {"model": str(small), "length": 10, "train": 100, "queries": 8, "strategy": "identity"}
    whole, sharded = planned(**given, ranks=4), planned(**given, ranks=4, shard_model=True, batch_size=5)
    weights, blocks = gpt2().num_parameters(), gpt2().transformer.h
    block = sum(each.numel() for each in blocks[0].parameters())
    assert whole.weight_bytes == 4 * weights
    assert sharded.weight_bytes == weights + 4 * (weights - 2 * block) + 4 * 2 * block  # both blocks, one ahead
    gathered = {stage.name: more.sent - stage.sent for stage, more in zip(whole.stages, sharded.stages, strict=True)}
    batches = {"query gradients": 1, "pairwise scores": 5}
    assert gathered == {name: 2 * count * 4 * weights * 3 / 4 for name, count in batches.items()}


def test_factors_on_the_host_leave_one_layer_on_the_device() -> None:
    resident, offloaded = planned(), planned(offload_factors=True)
    basis_bytes = resident.plan.job.basis_bytes
    largest = 4 * (768**2 + 3080**2 + 768 * 3080)
    assert {stage.memory["factors"] for stage in offloaded.stages if stage.passes} == {2 * largest}
    assert resident.host_bytes == 0
    assert offloaded.host_bytes == 2 * basis_bytes
    assert all(stage.copied == 0 for stage in resident.stages)
    batches = -(-4656 // offloaded.plan.train_batch)
    assert offloaded.stages[0].copied == batches * basis_bytes
    assert offloaded.stages[0].memory["factors"] < resident.stages[0].memory["factors"]


def test_what_does_not_fit_is_said_and_an_option_that_helps_is_found() -> None:
    little = planned(device_memory=4)
    assert little.lacking == "device memory"
    others = little.alternatives
    assert others["with --offload-factors"].lacking is None
    assert "with --shard-model" not in others  # one rank has nothing to share
    starved = planned(device_memory=4, offload_factors=True, host_memory=1)
    assert starved.lacking == "host memory"


def test_highest_scores_take_a_fixed_part_of_the_disk() -> None:
    matrix, top = planned(train=10**7).disk, planned(train=10**7, top=1000).disk
    assert matrix["scores"].stored == pytest.approx(4 * 481 * 10**7, rel=1e-3)
    assert matrix["scores"].peak == pytest.approx(4 * 481 * 10**7, rel=5e-3)  # written where it stays
    assert top["scores"].stored == pytest.approx(2 * 12 * 481 * 1000, rel=1e-3)  # the highest and the lowest
    exact = 12 * 4 * sum(out**2 + width**2 for out, width in [(2304, 769), (768, 769), (3072, 769), (768, 3073)])
    assert matrix["covariance"].stored == pytest.approx(exact, rel=1e-3)
    assert top["eigenbasis"].stored == pytest.approx(exact, rel=2e-3)  # and the eigenvalues of both sides


# Wrong use


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries=0: expected at least 1"),
        ({"fit_train": 10**6}, "at most the 4656 training sequences"),
        ({"ranks": 0}, "ranks=0: expected at least 1"),
        ({"flops": 0.0}, "flops=0.0: expected a number above 0"),
        ({"efficiency": 1.5}, "efficiency=1.5: expected a part"),
    ],
)
def test_impossible_arguments_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        planned(**change)


def test_impossible_models_are_refused(small: Path) -> None:
    with pytest.raises(InputError, match="length=13: expected 2 to 12 tokens"):
        measure(str(small), 13)
    with pytest.raises(InputError, match="model='gpt-5': expected one of gpt2, "):
        measure("gpt-5", 10)
    with pytest.raises(LayerError, match="Close names"):
        measure(str(small / "config.json"), 10, patterns=["transformer.h.*.mlp.c_fd"])


# The command and its pages


@pytest.mark.skipif(TRANSFORMERS < (5, 5), reason="before transformers 5.5, a Llama does not run without weights")
def test_the_page_on_large_models_says_what_the_commands_say() -> None:
    assert scale.DOCUMENT.read_text() == scale.page(), "python benchmarks/scale.py writes it anew"


def test_the_command_prints_and_writes_the_estimate(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--model {small} --train 1000 --queries 7 --length 12 --ranks 2 --device-memory 1 --flops 10"
    monkeypatch.setattr(sys, "argv", ["wherefrom", "plan", *options.split(), "--page", str(tmp_path / "page.html")])
    monkeypatch.setenv("COLUMNS", "120")
    main()
    printed, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    run = scale.Run(options)
    assert all(stage.name in printed for stage in run.estimate.stages)
    rows = [
        [html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>([^<]*)", row)] for row in re.findall(r"<tr>.*", page)
    ]
    for section in sections(run.estimate):
        for row in section.rows:
            assert list(row) in rows
            assert all(cell in printed for cell in row)
    assert "Fits: " in printed
    assert "<script" not in page


def test_without_a_speed_it_is_measured_here(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scale.Run(f"--model {small} --train 10 --queries 2 --length 12 --device-memory 1").estimate.arguments
    if not torch.cuda.is_available():
        assert found.device == torch.device("cpu")
    assert 1e8 < found.machine.matmul < 1e16


def test_wrong_use_of_the_command_is_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    options = f"--model {small} --train 0 --queries 7 --length 12 --device-memory 1 --flops 10 --page {page}"
    monkeypatch.setattr(sys, "argv", ["wherefrom", "plan", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.strip() == "error: --train 0: expected at least 1."
    assert not page.exists()
