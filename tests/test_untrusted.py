"""Nothing that comes in a file is executed."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import wherefrom as wf
from tests.models import gpt2, mlp_case, token_rows
from tests.processes import run_command
from wherefrom.evaluate.retrainings import GroundTruth
from wherefrom.hf.text import load_model, load_tokenizer
from wherefrom.runtime.errors import InputError, WherefromError

SOURCE = Path(wf.__file__).parent

# Calls that execute what they read, unless an argument forbids it.
UNPICKLING = {"pickle.load", "pickle.loads", "torch.load", "np.load", "numpy.load", "joblib.load", "dill.loads"}
EXECUTING = {"eval", "exec", "compile", "__import__", "os.system", "yaml.load", "marshal.loads"}
SAFE_ARGUMENTS = {("weights_only", True), ("allow_pickle", False)}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = str(file)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._file,)


def calls(file: Path) -> Iterator[tuple[str, set[tuple[str | None, object]]]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            constants = [(each.arg, each.value.value) for each in node.keywords if isinstance(each.value, ast.Constant)]
            yield ast.unparse(node.func), set(constants)


def test_the_source_unpickles_and_executes_nothing() -> None:
    found = [
        (str(file.relative_to(SOURCE)), name)
        for file in sorted(SOURCE.rglob("*.py"))
        for name, constants in calls(file)
        if name in EXECUTING
        or (name in UNPICKLING and not constants & SAFE_ARGUMENTS)
        or ("trust_remote_code", True) in constants
    ]
    # What goes between a process and the workers that it started, never a file.
    assert found == [("evaluate/pool.py", "pickle.loads")] * 2


def test_the_payload_of_these_tests_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def malicious(model: Path, executed: Path) -> None:
    """A model directory whose weights are a pickle with a payload."""
    gpt2(torch.float32).save_pretrained(model)
    (model / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload(executed)}, model / "pytorch_model.bin")


def test_a_malicious_model_is_refused_by_the_command(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    malicious(tmp_path / "model", executed)
    (tmp_path / "train.txt").write_text("a line\n\nanother")
    found = run_command(tmp_path, "fit", "run", "--model", "model", "--train", "train.txt")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert not executed.exists()


def test_a_model_that_brings_its_own_code_is_refused(tmp_path: Path) -> None:
    model, executed = tmp_path / "model", tmp_path / "executed"
    gpt2(torch.float32).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": own}))
    (model / "code.py").write_text(f"import os\nos.mkdir({str(executed)!r})\n")
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match="trust_remote_code"):
            load(str(model))
        assert not executed.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_malicious_checkpoints_are_refused(tmp_path: Path, name: str) -> None:
    executed, folder = tmp_path / "executed", tmp_path / "checkpoint"
    folder.mkdir()
    torch.save({"first.weight": Payload(executed)}, folder / name)
    case = mlp_case()
    study = wf.Study(tmp_path / "run", case.model, case.task, train=case.train)
    with pytest.raises(WherefromError, match=name):
        study.score(case.queries, wf.TracIn(checkpoints=[folder if name.startswith("pytorch") else folder / name]))
    assert not executed.exists()


def test_malicious_results_are_refused(tmp_path: Path) -> None:
    """A pickle under every name that a run directory has."""
    executed, run = tmp_path / "executed", tmp_path / "run"
    model, rows = gpt2(), token_rows(5)
    study = wf.Study(run, model, wf.CausalLM(), train=rows)
    study.score(rows[:2], wf.EKFAC())
    for file in sorted(path for path in run.rglob("*") if path.suffix in (".json", ".safetensors")):
        copy = shutil.copytree(run, tmp_path / "copy")
        with (copy / file.relative_to(run)).open("wb") as stream:
            pickle.dump(Payload(executed), stream)
        again = wf.Study(copy, model, wf.CausalLM(), train=rows)
        try:
            again.score(rows[:2], wf.EKFAC())
        except WherefromError as error:
            assert str(copy) in str(error)
        assert not executed.exists()
        shutil.rmtree(copy)


def test_a_malicious_ground_truth_is_refused(tmp_path: Path) -> None:
    import numpy as np

    executed = tmp_path / "executed"
    np.savez(tmp_path / "truth.npz", masks=np.array([Payload(executed)], dtype=object), losses=np.zeros((1, 1)))
    with pytest.raises(WherefromError, match=r"truth\.npz"):
        GroundTruth.load(tmp_path / "truth.npz")
    assert not executed.exists()
