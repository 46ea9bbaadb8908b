"""Hooks: what is tracked, what is refused, and what unusual models do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wherefrom as wf
from tests.models import Mlp, gpt2, gpt2_case, mlp_case, relative_error, token_rows, widened
from tests.reference import BruteForce
from tests.runs import factored, with_factors
from wherefrom.curvature.factors import bases_to_tensors
from wherefrom.engine.loading import Examples
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError, LayerError
from wherefrom.runtime.placement import execution_device, tied_names
from wherefrom.store.fingerprint import model_digest


def examples(count: int = 6) -> list[object]:
    torch.manual_seed(0)
    return [(torch.randn(4), torch.randint(3, ())) for _ in range(count)]


class InPlaceActivation(nn.Sequential):
    """ReLU overwrites the outputs of tracked layers; their gradients must be those before it."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
        )


def test_in_place_activations_are_harmless(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = InPlaceActivation(), examples()
    study = wf.Study(tmp_path, model, wf.Classification(), train=rows)
    found = study.score(rows, wf.Dot()).values
    plain = nn.Sequential(*(nn.ReLU() if isinstance(each, nn.ReLU) else each for each in model))
    wide = widened(rows)
    expected = BruteForce(plain, wf.Classification(), ["0", "2", "4"], wide, wide).scores("identity")
    assert relative_error(found, expected) < 1e-5


class OverwrittenInput(nn.Module):
    """What a layer has read is changed before the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs.clone()
        outputs = self.layer(hidden)
        hidden += 1
        result: Tensor = self.last(outputs + hidden)
        return result


def test_an_overwritten_input_is_refused(tmp_path: Path) -> None:
    study = wf.Study(tmp_path, OverwrittenInput(), wf.Classification(), train=examples())
    with pytest.raises(LayerError, match="input of layer 'layer' was overwritten in place"):
        study.fit(wf.Diagonal())


class Partly(nn.Module):
    """One layer never runs; one runs, and its second result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 3)
        self.idle = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        self.used(inputs * 2)
        result: Tensor = self.used(inputs)
        return result


def test_unused_layers_are_named_and_unused_calls_add_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = Partly(), examples()
    with pytest.raises(LayerError, match=r"1 tracked layer\(s\) never ran in a forward pass: idle"):
        wf.Study(tmp_path, model, wf.Classification(["*"]), train=rows).fit(wf.Diagonal())
    study = wf.Study(tmp_path, model, wf.Classification(["used"]), train=rows)
    found = study.score(rows, wf.Dot()).values
    wide = widened(rows)
    expected = BruteForce(model, wf.Classification(), ["used"], wide, wide).scores("identity")
    assert relative_error(found, expected) < 1e-5


class Idle(Mlp):
    """Another layer runs, and nothing reads what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.idle(inputs)
        return super().forward(inputs)


@pytest.mark.parametrize("strategy", ["diagonal", "kfac", "ekfac"])
def test_a_layer_without_part_in_the_loss_scores_nothing(tmp_path: Path, strategy: str) -> None:
    case = mlp_case()
    model, used = Idle().double(), ["first", "twice", "plain"]
    scores = []
    for name, layers in (("all", None), ("used", used)):
        study = wf.Study(tmp_path / name, model, wf.Classification(layers), train=case.train)
        scores.append(study.score(case.queries, factored(strategy)).values)
    assert relative_error(scores[0], scores[1]) < 1e-12


class Branches(nn.Module):
    """A branch that begins at a tracked layer, then one that begins at something else."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.left(inputs) + self.right(torch.tanh(inputs).detach().requires_grad_())
        return logits


def test_branches_may_begin_at_what_requires_gradients_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case, model = mlp_case(), Branches().double()
    study = wf.Study(tmp_path, model, wf.Classification(), train=case.train)
    found = study.score(case.queries, wf.Dot()).values
    brute = BruteForce(model, wf.Classification(), ["left", "right"], case.train, case.queries)
    assert relative_error(found, brute.scores("identity")) < 1e-10


def test_embeddings_that_require_gradients_change_nothing(tmp_path: Path) -> None:
    """As peft makes them for checkpointing; a LLaMA's first layer reads them as they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.double()
    scores = []
    for name in ("usual", "required"):
        study = wf.Study(tmp_path / name, model, wf.CausalLM(), train=token_rows(6))
        scores.append(study.score(token_rows(3, seed=4), wf.KFAC()).values)
        model.enable_input_require_grads()
    assert relative_error(scores[1], scores[0]) < 1e-12


class Folded(nn.Module):
    """The batch is folded into the tokens, so rows are not examples any more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(inputs.reshape(-1, 2))
        return result.reshape(len(inputs), 2, 3).sum(1)


def test_a_lost_batch_dimension_is_refused(tmp_path: Path) -> None:
    study = wf.Study(tmp_path, Folded(), wf.Classification(), train=examples())
    with pytest.raises(LayerError, match="saw a batch of 2 for 1 examples"):
        study.fit(wf.Diagonal())


class TokensFirst(nn.Module):
    """A layer that sees [tokens, batch, features], as PyTorch's transformers and recurrent networks do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(inputs.T[..., None]).square().sum(0)
        return result


class OncePositions(nn.Module):
    """Positions that are looked up without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.last = nn.Embedding(4, 3), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(inputs[..., None] * self.positions(torch.arange(4)))).sum(1)
        return result


@pytest.mark.parametrize("model", [TokensFirst(), OncePositions()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("size", [3, 4])
def test_tokens_are_not_taken_for_examples_where_there_are_as_many(tmp_path: Path, model: nn.Module, size: int) -> None:
    execution = wf.Execution(train_batch_size=size, query_batch_size=size)
    study = wf.Study(tmp_path, model, wf.Classification(["*"]), train=examples(8), execution=execution)
    for call in (lambda: study.fit(wf.KFAC()), lambda: study.self_influence(wf.Dot())):
        with pytest.raises(LayerError, match="saw a batch of 4 for [23] examples"):
            call()


def test_the_head_is_left_out_unless_it_is_named() -> None:
    model = gpt2()
    task = wf.CausalLM()
    names = list(select_layers(model, task.layers, task.head(model)))
    assert len(names) == 8
    assert names[:4] == [f"transformer.h.0.{each}" for each in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(select_layers(model, ["transformer.h.*.mlp.*"])) == [name for name in names if ".mlp.c_" in name]
    assert list(select_layers(model, ["lm_head"])) == ["transformer.wte"]  # one weight, under its first name
    with pytest.raises(LayerError, match=r"'transformer.h.0' names 'transformer.h.0', which is not a layer"):
        select_layers(model, ["transformer.h.0"])


def test_weights_get_no_gradient_and_the_graph_starts_at_the_first_layer(tmp_path: Path) -> None:
    """Nothing before the first tracked layer is differentiated: embeddings stay out of the graph."""
    model = gpt2(torch.float32)
    seen: list[bool] = []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model.transformer.h[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    study = wf.Study(tmp_path, model, wf.CausalLM(["transformer.h.1.mlp.*"]), train=token_rows(2))
    study.fit(wf.Diagonal(), execution=wf.Execution(train_batch_size=2))
    assert seen
    assert not any(seen)


class Positions(nn.Module):
    """Positions are looked up once for all examples; their row is broadcast, or taken out first, or repeated."""

    def __init__(self, use: str = "broadcast") -> None:
        super().__init__()
        self.positions, self.last, self.use = nn.Embedding(4, 2), nn.Linear(2, 3), use

    def forward(self, inputs: Tensor) -> Tensor:
        positions = self.positions(torch.arange(4)[None])
        if self.use == "first":
            positions = positions[0]
        elif self.use == "repeat":
            positions = positions.repeat(len(inputs), 1, 1)
        hidden = torch.tanh(inputs[..., None] * positions)
        result: Tensor = self.last(hidden).sum(1)
        return result


def test_rows_for_all_examples_are_each_examples_own_or_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows, task = Positions().double(), widened(examples(9)), wf.Classification(["*"])
    study = wf.Study(tmp_path / "run", model, task, train=rows)
    found = study.score(rows, wf.EKFAC(empirical=True), execution=wf.Execution(train_batch_size=5)).values
    expected = BruteForce(model, task, list(study.layers), rows, rows).scores("ekfac")
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize(
    ("use", "said"),
    [("first", "'positions' reads one input for all 3 examples"), ("repeat", "once for each example.*must match the")],
)
def test_rows_for_all_examples_that_are_not_broadcast_take_batches_of_one(tmp_path: Path, use: str, said: str) -> None:
    torch.manual_seed(0)
    model, rows, task = Positions(use).double(), widened(examples(9)), wf.Classification(["*"])
    study = wf.Study(tmp_path, model, task, train=rows)
    with pytest.raises(LayerError, match=f"{said}.*Give batch sizes of 1"):
        study.fit(wf.Diagonal(), execution=wf.Execution(train_batch_size=3))
    execution = wf.Execution(train_batch_size=1, query_batch_size=1)
    found = study.score(rows, wf.EKFAC(empirical=True), execution=execution).values
    expected = BruteForce(model, task, list(study.layers), rows, rows).scores("ekfac")
    assert relative_error(found, expected) < 1e-9


class TwoHeads(nn.Module):
    """Two layers read one tensor, a third another of the same size; an MLP before them, so that batches differ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two, self.other = (
            nn.Linear(4, 4),
            nn.Linear(4, 3),
            nn.Linear(4, 3),
            nn.Linear(4, 3),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        result: Tensor = self.one(hidden) * torch.tanh(self.two(hidden)) + self.other(hidden * 1.0)
        return result


class CalledTwice(wf.Classification):
    """Its loss is of the inputs and of their opposites, each a call of the model."""

    def train_loss(self, model: nn.Module, batch: Any, sampler: Any = None) -> Tensor:
        return super().train_loss(model, batch, sampler) + super().train_loss(model, [-batch[0], batch[1]], sampler)


@pytest.mark.parametrize("task", [wf.Classification(), CalledTwice()], ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_layers_that_read_one_tensor_share_activations_and_are_stored_apart(
    tmp_path: Path, strategy: str, task: wf.Task[Any]
) -> None:
    torch.manual_seed(0)
    model, rows = TwoHeads().double(), widened(examples(9))
    seen: dict[str, Tensor] = {}
    study = wf.Study(tmp_path, model, task, train=rows)
    receive = lambda layer, captured: seen.update({layer: captured.activations})  # noqa: E731
    study._sweep.probe(Examples(rows, task), receive)
    assert seen["one"] is seen["two"]
    assert seen["other"] is not seen["one"]
    factors = study.fit(factored(strategy, empirical=True), execution=wf.Execution(train_batch_size=4))
    named = bases_to_tensors(factors.bases)
    assert torch.equal(named["one.activations"], named["two.activations"])
    found = study.score(rows, with_factors(factors), execution=wf.Execution(train_batch_size=2)).values
    expected = BruteForce(model, task, list(study.layers), rows, rows).scores(strategy)
    assert relative_error(found, expected) < 1e-9
    again = wf.Study(tmp_path, model, task, train=rows).fit(factored(strategy, empirical=True))
    assert all(torch.equal(each, named[name]) for name, each in bases_to_tensors(again.bases).items())


def test_a_llama_is_scored_like_any_other(tmp_path: Path) -> None:
    """Without biases, with layers that share their inputs, gated and with rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=0.4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.float64)
    train, queries, task = token_rows(8), token_rows(3, seed=4), wf.CausalLM()
    study = wf.Study(tmp_path, model, task, train=train)
    found = study.score(queries, wf.EKFAC(empirical=True), execution=wf.Execution(train_batch_size=3)).values
    expected = BruteForce(model, task, list(study.layers), train, queries).scores("ekfac")
    assert relative_error(found, expected) < 1e-8


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass holds the first tracked layer, one that is called twice, and
    an in-place activation."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.use_reentrant = use_reentrant

    def block(self, inputs: Tensor) -> Tensor:
        hidden = self.twice(torch.relu_(self.first(inputs)))
        result: Tensor = self.twice(torch.tanh(hidden) * hidden)
        return result

    def forward(self, inputs: Tensor) -> Tensor:
        if self.use_reentrant is None:
            hidden = self.block(inputs)
        else:
            hidden = checkpoint(self.block, inputs, use_reentrant=self.use_reentrant)
        result: Tensor = self.last(torch.tanh(hidden))
        return result


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    found = []
    for use_reentrant in (None, False):
        torch.manual_seed(0)
        model, rows = Checkpointed(use_reentrant).double(), widened(examples(9))
        study = wf.Study(tmp_path / str(use_reentrant), model, wf.Classification(), train=rows)
        found.append(study.score(rows, wf.EKFAC(), execution=wf.Execution(train_batch_size=5)).values)
    assert torch.equal(*found)
    plain = Checkpointed(None).double()
    plain.load_state_dict(model.state_dict())
    scores = study.score(rows, wf.Dot()).values
    expected = BruteForce(plain, wf.Classification(), ["first", "twice", "last"], rows, rows).scores("identity")
    assert relative_error(scores, expected) < 1e-10


def test_reentrant_checkpointing_is_refused_by_name(tmp_path: Path) -> None:
    study = wf.Study(tmp_path, Checkpointed(True), wf.Classification(), train=examples())
    with pytest.raises(LayerError, match=r"gradients switched off: first, twice\. .* pass use_reentrant=False"):
        study.fit(wf.Diagonal())


@pytest.mark.parametrize("training", [False, True])
def test_a_language_model_with_checkpointing_is_scored_alike(tmp_path: Path, training: bool) -> None:
    """Models of transformers switch it off outside of training; one that does not is computed again."""
    found, runs = [], [0, 0]
    for enabled in (0, 1):
        case = gpt2_case()
        model: Any = case.model
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # the default since transformers 5
            for block in model.transformer.h:
                if training:  # and stay there
                    block.train = lambda mode: None
        study = wf.Study(tmp_path / str(enabled), model, case.task, train=case.train)

        def count(*_: object, enabled: int = enabled) -> None:
            runs[enabled] += 1

        model.transformer.h[0].mlp.c_fc.register_forward_hook(count)
        found.append(
            study.score(case.queries, wf.EKFAC(), execution=wf.Execution(train_batch_size=5, query_batch_size=5)).values
        )
    assert relative_error(found[1], found[0]) < 1e-12
    assert runs[1] == (2 if training else 1) * runs[0]


def test_weights_in_bfloat16_are_scored_as_rounded_ones(tmp_path: Path) -> None:
    """The model's passes are rounded to 8 bits everywhere; what is captured is multiplied and added up in float32."""
    model = gpt2(layers=1)
    nn.Module.to(model, torch.bfloat16)
    train, queries = token_rows(9), token_rows(4, seed=4)
    task = wf.CausalLM(["transformer.*"])
    study = wf.Study(tmp_path, model, task, train=train)
    for strategy in ("identity", "kfac"):
        scores = study.score(queries, factored(strategy, empirical=True)).values
        assert scores.dtype == torch.float32
        expected = BruteForce(model, task, list(study.layers), train, queries).scores(strategy)
        assert relative_error(scores, expected) < 0.05


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_weights_are_scored_and_known_again(tmp_path: Path, kind: str) -> None:
    """accelerate brings each layer's weights only while it computes; between passes they have no values."""
    import accelerate

    case = gpt2_case()
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    expected = study.score(case.queries, wf.EKFAC()).values
    model = gpt2_case().model
    place = torch.device("cpu")
    if kind == "cpu":
        accelerate.cpu_offload(model, place)
    else:
        accelerate.disk_offload(model, str(tmp_path / "weights"), place)
    assert all(each.is_meta for each in model.parameters())
    assert execution_device(model) == place
    assert model_digest(model) == model_digest(case.model)
    again = wf.Study(tmp_path / "again", model, case.task, train=case.train)
    found = again.score(case.queries, wf.EKFAC()).values
    assert relative_error(found, expected) < 1e-12
    assert all(each.requires_grad and each.is_meta for each in model.parameters())
    # The same model: what was fitted without offloading is used, not refused.
    same = wf.Study(tmp_path / "run", model, case.task, train=case.train)
    assert torch.equal(same.score(case.queries, wf.EKFAC()).values, expected)
    assert list(select_layers(model, ["lm_head"])) == ["transformer.wte"]


@pytest.mark.parametrize("kind", ["gpt2", "untied gpt2", "t5"])
def test_tied_weights_are_known_by_name(kind: str) -> None:
    """Under offloading they are two tensors."""
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    if kind == "t5":
        model: Any = T5ForConditionalGeneration(
            T5Config(vocab_size=7, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
        )
        names = ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        expected = dict.fromkeys(names, "shared.weight")
    else:
        tied = kind == "gpt2"
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=7, n_embd=4, n_head=2, n_layer=1, n_positions=8, tie_word_embeddings=tied)
        )
        expected = {"lm_head.weight": "transformer.wte.weight"} if tied else {}
    assert tied_names(model) == expected


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(InputError, match="'0.weight' is on the meta device and has no values"):
        model_digest(nn.Sequential(nn.Linear(2, 2, bias=False, device="meta")))
