"""Sums over checkpoints: against brute force at each, the model given back, resumed, files of every kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wherefrom as wf
from tests.models import Case, gpt2, gpt2_case, mlp_case, relative_error
from tests.reference import BruteForce
from tests.runs import factored
from wherefrom.engine.modules.layers import select_layers
from wherefrom.runtime.errors import InputError, LossError, MismatchError
from wherefrom.store.recording import ParameterGroup, RecordedCheckpoint
from wherefrom.store.weights import load_weights

WEIGHTS = [0.3, 0.05]


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy with other weights, as if trained further."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.3)
    return other


def saved(case: Case, folder: Path) -> tuple[list[Path], list[nn.Module]]:
    """Two checkpoints: a safetensors file, and a torch file in a directory."""
    models = [moved(case.model, 1), moved(case.model, 2)]
    folder.mkdir(exist_ok=True)
    save_file(models[0].state_dict(), folder / "one.safetensors")
    (folder / "two").mkdir()
    torch.save(models[1].state_dict(), folder / "two" / "pytorch_model.bin")
    return [folder / "one.safetensors", folder / "two"], models


def expected_sum(case: Case, models: Sequence[nn.Module], strategy: str, seed: int | None) -> Tensor:
    layers = list(select_layers(case.model, case.task.layers))
    parts = [BruteForce(model, case.task, layers, case.train, case.queries, seed).scores(strategy) for model in models]
    return sum((weight * part for weight, part in zip(WEIGHTS, parts, strict=True)), torch.zeros(()))


@pytest.mark.parametrize("strategy", ["identity", "diagonal", "kfac", "ekfac", "shampoo"])
def test_scores_are_the_weighted_sum_of_brute_force_at_each_checkpoint(tmp_path: Path, strategy: str) -> None:
    case = mlp_case()
    paths, models = saved(case, tmp_path / "checkpoints")
    before = copy.deepcopy(case.model.state_dict())
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    scored = factored(strategy, seed=3)
    scores = study.score(case.queries, wf.TracIn(scored=scored, checkpoints=paths, weights=WEIGHTS))
    expected = expected_sum(case, models, strategy, None if strategy == "identity" else 3)
    assert relative_error(scores.values, expected) < 1e-9
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())
    assert (scores.method, scores.fingerprint["scored"]) == ("tracin", scored.name)
    assert scores.fingerprint["checkpoints"] == "0.3 x one.safetensors + 0.05 x two"
    label = "tracin" if strategy == "identity" else f"tracin-{scored.name}"
    assert torch.equal(wf.Scores.load(tmp_path / "run" / "scores" / label).values, scores.values)
    parts = [wf.Scores.load(tmp_path / "run" / "checkpoints" / path.name / "scores" / scored.name) for path in paths]
    summed = WEIGHTS[0] * parts[0].values + WEIGHTS[1] * parts[1].values
    assert relative_error(scores.values, summed) < 1e-12
    assert not list((tmp_path / "run" / "scores").glob("*.blocks"))


def test_a_transformer_with_recorded_rates(tmp_path: Path) -> None:
    """Directories that `save_pretrained` wrote, whole and in shards, with tied weights, at the rates of a recording."""
    case = gpt2_case()
    models = [moved(case.model, 1), moved(case.model, 2)]
    models[0].save_pretrained(tmp_path / "checkpoint-1")  # type: ignore[operator]
    models[1].save_pretrained(tmp_path / "checkpoint-2", max_shard_size="3KB")  # type: ignore[operator]
    assert (tmp_path / "checkpoint-2" / "model.safetensors.index.json").exists()
    records = [
        RecordedCheckpoint(tmp_path / f"checkpoint-{step}", step, 0.0, 1, "SGD", (ParameterGroup(rate),))
        for step, rate in enumerate(WEIGHTS, start=1)
    ]
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    scores = study.score(case.queries, wf.TracIn(checkpoints=records))
    assert relative_error(scores.values, expected_sum(case, models, "identity", None)) < 1e-9


def test_an_interrupted_sum_goes_on_and_gives_the_model_back(tmp_path: Path) -> None:
    class Fragile(wf.Classification):
        """Fails at the second checkpoint until it is told not to."""

        _fails = True
        _calls = 0

        def train_loss(self, model: nn.Module, batch: Any, sampler: Any = None) -> Tensor:
            Fragile._calls += 1
            loss = super().train_loss(model, batch, sampler)
            weight = model.get_parameter("first.weight")
            return loss * torch.nan if Fragile._fails and torch.equal(weight, second) else loss

    plain = mlp_case()
    case = replace(plain, task=Fragile())
    paths, models = saved(case, tmp_path / "checkpoints")
    second = models[1].get_parameter("first.weight")
    before = copy.deepcopy(case.model.state_dict())
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    with pytest.raises(LossError):
        study.score(case.queries, wf.TracIn(checkpoints=paths, weights=WEIGHTS))
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())
    Fragile._fails, Fragile._calls = False, 0
    study.score(case.queries, wf.TracIn(checkpoints=paths[:1], weights=WEIGHTS[:1]), name="first")
    assert Fragile._calls == 0  # it was finished before the second failed
    scores = study.score(case.queries, wf.TracIn(checkpoints=paths, weights=WEIGHTS))
    assert Fragile._calls > 0
    assert relative_error(scores.values, expected_sum(plain, models, "identity", None)) < 1e-9
    Fragile._calls = 0
    again = study.score(case.queries, wf.TracIn(checkpoints=paths, weights=WEIGHTS))
    assert Fragile._calls == 0
    assert torch.equal(again.values, scores.values)


def test_other_weights_and_other_checkpoints_are_refused(tmp_path: Path) -> None:
    case = mlp_case()
    paths, _ = saved(case, tmp_path / "checkpoints")
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    first = study.score(case.queries, wf.TracIn(checkpoints=paths), name="mine")
    with pytest.raises(MismatchError, match=r"stored 1.0 x one.safetensors \+ 1.0 x two, now 2.0 x"):
        study.score(case.queries, wf.TracIn(checkpoints=paths, weights=[2, 2]), name="mine")
    twice = study.score(case.queries, wf.TracIn(checkpoints=paths, weights=[2, 2]))
    assert relative_error(twice.values, 2 * first.values) < 1e-12
    save_file(moved(case.model, 5).state_dict(), paths[0])
    with pytest.raises(MismatchError, match="models: stored"):
        study.score(case.queries, wf.TracIn(checkpoints=paths), name="mine")
    changed = study.score(case.queries, wf.TracIn(checkpoints=paths), name="mine", overwrite=True)
    assert relative_error(changed.values, first.values) > 1e-3


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    case = mlp_case()
    paths, _ = saved(case, tmp_path / "checkpoints")
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    with pytest.raises(InputError, match="weights: 1 for 2 checkpoints"):
        study.score(case.queries, wf.TracIn(checkpoints=paths, weights=[1]))
    with pytest.raises(InputError, match="2 of them have 1 names"):
        study.score(case.queries, wf.TracIn(checkpoints=[paths[0], paths[0]]))
    with pytest.raises(InputError, match="expected a list"):
        study.score(case.queries, wf.TracIn(checkpoints=str(paths[0])))
    with pytest.raises(InputError, match="no weights there"):
        study.score(case.queries, wf.TracIn(checkpoints=[tmp_path / "nowhere"]))
    groups = (ParameterGroup(0.1), ParameterGroup(0.2))
    with pytest.raises(InputError, match=r"learning rates \[0.1, 0.2\]"):
        study.score(case.queries, wf.TracIn(checkpoints=[RecordedCheckpoint(paths[0], 1, 0.0, 1, "SGD", groups)]))


def test_weights_of_another_model_are_refused_and_nothing_is_executed(tmp_path: Path) -> None:
    case, before = mlp_case(), mlp_case().model.state_dict()
    save_file({"first.weight": torch.zeros(5, 4)}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"lacks 4 of the model's tensors \(first.bias"):
        load_weights(case.model, tmp_path / "part.safetensors")
    save_file({**before, "plain.weight": torch.zeros(2, 5)}, tmp_path / "shape.safetensors")
    with pytest.raises(InputError, match=r"plain.weight has the shape \[2, 5\] there and \[3, 5\]"):
        load_weights(case.model, tmp_path / "shape.safetensors")
    torch.save(case.model, tmp_path / "pickled.pt")
    with pytest.raises(InputError, match="not a plain state dict of tensors"):
        load_weights(case.model, tmp_path / "pickled.pt")
    torch.save({"model": before}, tmp_path / "nested.pt")
    with pytest.raises(InputError, match=r"expected a state dict of tensors, found \['model'\]"):
        load_weights(case.model, tmp_path / "nested.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    with pytest.raises(wf.WherefromError, match="cannot be read as weights"):
        load_weights(case.model, tmp_path / "cut.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())


def test_adapters_of_the_study_s_model(tmp_path: Path) -> None:
    import peft

    def adapted(seed: int) -> Any:
        model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, generator=generator)
        return nn.Module.double(model)

    case = gpt2_case()
    models = [adapted(1), adapted(2)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"checkpoint-{number}")
    case.model, case.task = adapted(3), wf.CausalLM(["*.lora_*"])
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    paths = [tmp_path / "checkpoint-0", tmp_path / "checkpoint-1"]
    scores = study.score(case.queries, wf.TracIn(checkpoints=paths, weights=WEIGHTS))
    assert relative_error(scores.values, expected_sum(case, models, "identity", None)) < 1e-9
    with pytest.raises(InputError, match="holds an adapter, and the study's model has none"):
        load_weights(gpt2(), paths[0])
