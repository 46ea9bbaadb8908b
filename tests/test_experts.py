"""Mixtures of experts: each expert's projections and each router are layers, exactly, at the cost of routed tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import wherefrom as wf
from tests.dense_gauss_newton import dense, study_of, system_of, token_logits
from tests.mixtures import FAMILIES, mixture, written_long
from tests.models import TRANSFORMERS, Case, relative_error, token_rows
from tests.reference import BruteForce
from tests.runs import factored
from wherefrom.curvature.factors import STRATEGIES
from wherefrom.engine.capture import Captured
from wherefrom.engine.example_gradients import weight_gradients
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.coverage import coverage, mostly_left_out, untracked
from wherefrom.engine.modules.layers import select_layers
from wherefrom.engine.sweep import Collector, Sweep
from wherefrom.hf.blueprint import measure
from wherefrom.runtime.errors import LayerError

pytestmark = pytest.mark.skipif(TRANSFORMERS < (5,), reason="experts are lists of linear layers, routed by their owner")

ROWS: list[Any] = token_rows(7)
QUERIES, TASK = token_rows(3, seed=4), wf.CausalLM()
# Models whose code computes in float32 at places, whatever the type of their weights.
ROUNDED = {"deepseek", "llama4", "nemotron"}


class Gradients(Collector):
    """Every example's gradient of every layer."""

    def __init__(self, layers: Any, examples: int) -> None:
        self.sums = {
            name: torch.zeros(examples, *layer.padded_shape, dtype=torch.float64) for name, layer in layers.items()
        }

    def collect(self, layer: str, captured: Captured, batch: slice) -> None:
        self.sums[layer][batch] += weight_gradients(captured)


def found_gradients(model: nn.Module, task: wf.CausalLM, rows: list[Any], batch: int) -> dict[str, Tensor]:
    layers = select_layers(model, task.layers)
    collector = Gradients(layers, len(rows))
    Sweep(model, task, layers).run("gradients", Examples(rows, task), collector, batch_size=batch)
    return {name: collector.sums[name][..., : layer.shape[1]] for name, layer in layers.items()}


def expected_gradients(model: Any, task: wf.CausalLM, rows: list[Any], names: list[str]) -> dict[str, Tensor]:
    """By autograd on the parameters, one example at a time; of an expert, its slice of them."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    parameters, weights = zip(*model.named_parameters(), strict=True)
    for row in rows:
        loss = task.train_loss(model, task.collate([row]))
        values = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradients = dict(zip(parameters, values, strict=True))
        for name in names:
            found[name].append(gradient_matrix(gradients, name))
    return {name: torch.stack(each) for name, each in found.items()}


def gradient_matrix(gradients: dict[str, Tensor], name: str) -> Tensor:
    """A layer's [out, in (+1)], of a model of 8 features whose experts have 6."""
    expert = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)", name)
    if expert is None:
        weight, bias = gradients[f"{name}.weight"], gradients.get(f"{name}.bias")
    else:
        owner, number, kind = expert[1], int(expert[2]), expert[3]
        if kind in {"w1", "v1", "w2"}:  # of all experts, one above the other
            weight = gradients[f"{owner}.mlp.{kind}"].unflatten(0, (-1, 6))[number]
        else:
            weight = gradients[f"{owner}.{kind}"][number]
        inputs = 6 if kind in {"down_proj", "w2"} else 8
        weight = weight if weight.shape[1] == inputs else weight.T
        every = gradients.get(f"{owner}.{kind}_bias")
        bias = None if every is None else every[number]
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_expert_and_router_equal_autograd(family: str) -> None:
    model, task = mixture(family), TASK
    expected = expected_gradients(model, task, ROWS, list(select_layers(model, task.layers)))
    assert sum(".experts." in name for name in expected) >= 8
    assert any(name.endswith(("gate", "router", "router.layer")) for name in expected)
    for batch in (1, 3, 7):
        found = found_gradients(model, task, ROWS, batch)
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            scale = max(float(each.abs().max()), 1e-9)
            assert float((found[name] - each).abs().max()) < (1e-5 if family in ROUNDED else 1e-12) * scale, name


def one_is_never_chosen() -> Any:
    """An expert that no token is routed to, and one for single tokens."""
    model = mixture("gpt-oss")
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -100
        model.model.layers[0].mlp.router.bias[4] -= 1
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_equal_brute_force(tmp_path: Path, strategy: str) -> None:
    """An expert that nobody chooses has factors, and a part of zero in every score."""
    model, method = one_is_never_chosen(), factored(strategy, empirical=True)
    study = wf.Study(tmp_path, model, TASK, train=ROWS)
    brute = BruteForce(written_long(model), TASK, list(study.layers), ROWS, QUERIES)
    counts = {len(each["model.layers.0.mlp.experts.4.down_proj"][0]) for each in brute.tokens}
    assert 0 in counts and counts != {0}, "every example has tokens of every expert, or none has"
    for size in (3, 7):
        execution = wf.Execution(train_batch_size=size, query_batch_size=2)
        keep = wf.Pairs(layers=True, self_influence=True)
        found = study.score(QUERIES, method, name=str(size), execution=execution, keep=keep)
        assert relative_error(found.values, brute.scores(strategy)) < 1e-8
        for name in ("gate_up_proj", "down_proj"):
            assert not found.layers[f"model.layers.0.mlp.experts.3.{name}"].any()
    among = study.score(ROWS, method, name="among").values
    assert found.self_influence is not None
    assert relative_error(found.self_influence, among.diagonal()) < 1e-8


@pytest.mark.parametrize("damping", [0.0, None])
def test_factors_of_an_expert_without_tokens_are_finite(tmp_path: Path, damping: float | None) -> None:
    study = wf.Study(tmp_path, one_is_never_chosen(), TASK, train=ROWS)
    for kind in (wf.EKFAC, wf.KFAC):
        factors = study.fit(kind(empirical=True))
        assert all(bool(each.isfinite().all()) for each in factors.eigenvalues.values())
        filters = factors.preconditioner(damping).filters
        assert not filters["model.layers.0.mlp.experts.3.down_proj"].any()
        assert all(bool(each.isfinite().all()) for each in filters.values())
        assert study.score(QUERIES, kind(factors=factors, damping=damping)).values.isfinite().all()


def test_tokens_equal_brute_force(tmp_path: Path) -> None:
    """Against experts that read every token, of which all but the chosen ones count nothing."""
    model = one_is_never_chosen()
    study = wf.Study(tmp_path, model, TASK, train=ROWS)
    method, execution = wf.EKFAC(empirical=True, damping=0.1), wf.Execution(train_batch_size=3)
    tokens = study.score(QUERIES, method, keep=wf.Tokens(), execution=execution)
    scores = study.score(QUERIES, method).values
    names = list(study.layers)
    chosen, every = (BruteForce(written_long(model, masked), TASK, names, ROWS, QUERIES) for masked in (False, True))
    for query, example in ((0, 0), (1, 3), (2, 6)):
        expected = torch.zeros(int(tokens.lengths[example]), dtype=torch.float64)
        for name in names:
            gradient = chosen.queries[query][name]
            damped = chosen.curvature("ekfac", name).detach() + 0.1 * torch.eye(gradient.numel()).double()
            gradient = torch.linalg.solve(damped, gradient.flatten()).view_as(gradient)
            activations, gradients = every.tokens[example][name]
            expected += torch.einsum("to,oi,ti->t", gradients, gradient, activations).detach()
        assert relative_error(tokens[query, example], expected) < 1e-8
    assert relative_error(tokens.values.sum(2), scores) < 1e-10


@pytest.mark.parametrize("family", sorted(ROUNDED))
def test_layers_that_compute_in_a_narrower_type_are_widened(tmp_path: Path, family: str) -> None:
    """A router in float32 beside sums in float64."""
    study = wf.Study(tmp_path, mixture(family), TASK, train=ROWS)
    scores = study.score(QUERIES, wf.EKFAC(empirical=True)).values
    tokens = study.score(QUERIES, wf.EKFAC(empirical=True), keep=wf.Tokens())
    assert scores.dtype == torch.float64
    assert relative_error(tokens.values.sum(2), scores) < 1e-10


def test_products_and_conditioning_know_slices_of_parameters(tmp_path: Path) -> None:
    """Gauss-Newton products with all that one parameter has of some experts; factors in an optimizer's coordinates."""
    model = one_is_never_chosen()
    task = wf.CausalLM(["*.experts.[13].*", "*.experts.0.down_proj", "*.router", "*.q_proj"])
    rows = ROWS[:3]
    study = study_of(Case(model, task, rows, QUERIES), tmp_path / "one")
    long = Case(written_long(model), task, rows, QUERIES)
    matrix = dense(long, study, token_logits)
    vectors = torch.randn(3, len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = system_of(study, Case(model, task, rows, [])).product(vectors)
    assert relative_error(found, vectors @ matrix + 0.1 * vectors) < 1e-6  # its norms are float32
    numbers = {
        name: 10 ** (2 * torch.rand(each.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 1)
        for name, each in model.named_parameters()
    }
    brute = BruteForce(long.model, task, list(study.layers), rows, QUERIES)
    own = {name: each for name, each in numbers.items() if "experts" not in name}
    for name in (each for each in numbers if "experts" in each):
        owner, _, kind = name.rpartition(".")
        for expert, each in enumerate(numbers[name]):
            own[f"{owner}.{expert}.{kind.removesuffix('_bias')}.{'bias' if 'bias' in kind else 'weight'}"] = (
                each if "bias" in kind else each.T
            )
    method = wf.Shampoo(empirical=True, conditioning=numbers)
    scores = study.score(QUERIES, method).values
    assert relative_error(scores, brute.conditioned(own).scores("shampoo")) < 1e-8


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_half_precision_is_close(tmp_path: Path, family: str) -> None:
    model = mixture(family, torch.float32)
    for name, half in (("passes", True), ("weights", False)):
        if name == "weights":
            nn.Module.to(model, torch.bfloat16)
        wide = mixture(family)
        wide.load_state_dict(model.state_dict())
        exact = wf.Study(tmp_path / f"{name} exact", wide, TASK, train=ROWS).score(QUERIES, wf.EKFAC(empirical=True))
        study = wf.Study(tmp_path / name, model, TASK, train=ROWS)
        found = study.score(QUERIES, wf.EKFAC(empirical=True), execution=wf.Execution(half_precision=half))
        assert relative_error(found.values, exact.values) < 0.1


def test_a_model_is_left_as_it_was_and_runs_as_it_may(tmp_path: Path) -> None:
    """With weights that accelerate brings, with parts that are computed twice, and after an exception."""
    import accelerate

    model = mixture("mixtral", num_hidden_layers=2)
    before = {name: dict(vars(each)) for name, each in model.named_modules()}
    expected = wf.Study(tmp_path / "plain", model, TASK, train=ROWS).score(QUERIES, wf.EKFAC(empirical=True)).values

    class Failing(wf.CausalLM):
        def train_loss(self, *arguments: Any, **keywords: Any) -> Tensor:
            super().train_loss(*arguments, **keywords)
            raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        wf.Study(tmp_path / "failing", model, Failing(), train=ROWS).fit(wf.Diagonal())
    for name, each in model.named_modules():
        assert vars(each).keys() == before[name].keys()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.model.layers:
        block.train()
        block.train = lambda mode: None
    twice = wf.Study(tmp_path / "twice", model, TASK, train=ROWS).score(QUERIES, wf.EKFAC(empirical=True)).values
    assert relative_error(twice, expected) < 1e-12
    model = mixture("mixtral", num_hidden_layers=2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(each.is_meta for each in model.parameters())
    brought = wf.Study(tmp_path / "brought", model, TASK, train=ROWS).score(QUERIES, wf.EKFAC(empirical=True)).values
    assert relative_error(brought, expected) < 1e-12
    assert all(each.is_meta and each.requires_grad for each in model.parameters())


def test_what_it_costs_does_not_depend_on_how_many_experts_there_are() -> None:
    """But for the router, and for logits of nobody; a token's vectors go through two experts and no others."""
    costs, vectors = [], []
    for experts in (4, 32):
        model = mixture("mixtral", num_local_experts=experts)
        task = wf.CausalLM(["*.experts.*"])
        seen: list[Captured] = []
        sweep = Sweep(model, task, select_layers(model, task.layers))
        sweep.probe(Examples(ROWS, task), lambda _, captured, seen=seen: seen.append(captured), count=7)
        vectors.append(sum(each.tokens for each in seen))
        costs.append(sweep.footprint(Examples(ROWS, task)).flop)
    lengths = [len(each["input_ids"]) for each in ROWS]
    assert vectors == [4 * sum(lengths), 4 * sum(lengths)]  # two projections of two experts
    router = 2 * max(lengths) * 8 * (32 - 4)
    assert costs[1] - costs[0] == router


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_plan_counts_what_a_run_does(tmp_path: Path, family: str) -> None:
    """Without weights nobody knows who chooses whom, but how many there are."""
    model = mixture(family, torch.float32)
    model.config.save_pretrained(tmp_path)
    planned = measure(str(tmp_path), 10)
    task = wf.CausalLM()
    layers = select_layers(model, None, model.lm_head)
    with sdpa_kernel(SDPBackend.MATH):
        run = Sweep(model, task, layers).footprint(Examples([{"input_ids": list(range(10))}], task))
    assert planned.layers.keys() == layers.keys()
    assert planned.example.flop == run.flop
    experts = [name for name in layers if ".experts." in name]
    assert sum(map(planned.example.tokens_of, experts)) == sum(map(run.tokens_of, experts)) == 2 * 2 * 10


def test_experts_are_chosen_counted_and_refused_by_name() -> None:
    model = mixture("mixtral")
    total = sum(each.numel() for each in model.parameters())
    experts = "model.layers.0.mlp.experts"
    layers = select_layers(model, None, model.lm_head)
    projections = [f"{experts}.{number}.{name}_proj" for number in range(5) for name in ("gate_up", "down")]
    assert [name for name in layers if ".mlp." in name] == ["model.layers.0.mlp.gate", *projections]
    assert {each.kind for each in untracked(model, layers)} == {"Embedding", "MixtralRMSNorm", "Linear"}
    assert mostly_left_out(model, layers, model.lm_head) is None
    for patterns in (["*.experts.3.*"], ["*.experts.*.down_proj"], ["*"]):
        layers = select_layers(model, patterns)
        tracked = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
        assert tracked + sum(each.weights for each in untracked(model, layers)) == total
    few = select_layers(model, ["*.experts.3.*"])
    assert f"{experts} MixtralExperts ({4 * 3 * 48})" in coverage(model, few)
    said = mostly_left_out(model, few, model.lm_head)
    assert said is not None
    assert "'model.layers.*.mlp.experts.*.down_proj'" in said and "'model.layers.*.mlp.gate'" in said
    with pytest.raises(LayerError, match=r"name the layers inside it with .*experts\.\*'"):
        select_layers(model, [experts])
    model.requires_grad_(False)
    model.get_submodule(experts).down_proj.requires_grad_(True)
    assert all(name.endswith("down_proj") for name in select_layers(model))
    model.get_submodule(experts).forward = lambda *arguments: arguments[0]
    assert not any(".experts." in name for name in select_layers(model, ["*"]))
    with pytest.raises(LayerError, match="a MixtralExperts with 720 weights of its own, which is not a layer"):
        select_layers(model, [experts])
    del model.get_submodule(experts).forward
    model.get_submodule(experts)._is_expert_parallel = True
    with pytest.raises(LayerError, match="a MixtralExperts that cannot be tracked: its experts are spread over proc"):
        select_layers(model, [experts])
    again = mixture("mixtral", num_hidden_layers=2)
    again.model.layers[1].mlp.experts.down_proj = again.model.layers[0].mlp.experts.down_proj
    assert len(select_layers(again, ["*down_proj"])) == 5


def test_routers_of_transformers_multiply_with_their_weight_by_one_function() -> None:
    """What stands in for it: whatever else they do to their weight would not be seen."""
    folder, found = Path(transformers.__file__).parent / "models", 0
    for file in folder.glob("*/modeling_*.py"):
        for router in re.finditer(r"^class \w*Router\b.*?(?=^\S|\Z)", file.read_text(), re.DOTALL | re.MULTILINE):
            if "self.weight = nn.Parameter(" in router[0]:
                found += 1
                assert len(re.findall(r"[.\s]linear\([^=]*?self\.weight\b", router[0])) == 1, router[0]
    assert found > 50
