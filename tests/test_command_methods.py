"""Methods on the command line: every one is a subcommand, and what is said becomes its fields."""

from __future__ import annotations

from typing import Any

import pytest
import tyro

import wherefrom as wf
from wherefrom.cli.methods import ALL, FACTORED, default, flags, subcommands, with_method
from wherefrom.cli.shared import in_flags
from wherefrom.methods import METHODS
from wherefrom.runtime.errors import InputError

FITTED: dict[str, object] = {"empirical": True, "seed": 3}


def said(*words: str, kinds: Any = ALL, fitted: dict[str, object] | None = None) -> wf.Method:
    """The method of a command line."""
    chosen = subcommands(kinds, of_the_fit=True)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    method: wf.Method = tyro.cli(chosen, args=list(words), config=config).made(fitted)
    return method


@pytest.mark.parametrize("name", ALL)
def test_every_method_is_a_subcommand_with_its_own_defaults(name: str) -> None:
    assert said(name) == METHODS[name]()


def test_only_what_a_shell_cannot_say_is_left_out() -> None:
    assert set(METHODS) - set(ALL) == {"magic", "trajectory", "trajectory-flow"}


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("kfac --damping 1e-3 --query-rank 4 --rescore 2", wf.KFAC(damping=1e-3, query_rank=4, rescore=2)),
        ("ekfac --solver cg --seed 5", wf.EKFAC(solver=wf.ConjugateGradients(), seed=5)),
        (
            "dot --adam --solver cg,iterations=8,examples=100,block-size=32",
            wf.Dot(adam=True, solver=wf.ConjugateGradients(8, examples=100, block_size=32)),
        ),
        ("ekfac --solver astra,batch-size=None,decay=0.5", wf.EKFAC(solver=wf.Astra(batch_size=None, decay=0.5))),
        ("tracin --scored diagonal --weights 0.5 1", wf.TracIn(scored=wf.Diagonal(), weights=[0.5, 1.0])),
        ("source --segments 2 --adam --strategy diagonal", wf.Source(segments=2, adam=True, strategy="diagonal")),
        ("trackstar --rank 8 --mixing 0.5", wf.TrackStar(rank=8, mixing=0.5)),
        ("two-stage --first logra --candidates 7", wf.TwoStage(first=wf.LoGra(), candidates=7)),
        ("logra --directions eigenvectors", wf.LoGra(directions="eigenvectors")),
        ("random --seed 2", wf.Random(seed=2)),
    ],
)
def test_flags_are_fields(words: str, method: wf.Method) -> None:
    assert said(*words.split()) == method


def test_what_factors_were_fitted_with_stands_for_flags_that_are_not_given() -> None:
    assert said("kfac", fitted=FITTED) == wf.KFAC(empirical=True, seed=3)
    assert said("kfac", "--seed", "1", fitted=FITTED) == wf.KFAC(empirical=True, seed=1)
    assert said("tracin", "--scored", "ekfac", fitted=FITTED) == wf.TracIn(scored=wf.EKFAC(empirical=True, seed=3))
    assert said("trackstar", fitted=FITTED) == wf.TrackStar()  # its seed is of directions


def test_impossible_fields_are_refused_by_the_method() -> None:
    with pytest.raises(InputError, match="mixing=2"):
        said("trackstar", "--mixing", "2")


def test_a_training_of_finite_time_can_be_said() -> None:
    flow = wf.GradientFlow(5, examples=40, block_size=32)
    assert said("dot", "--adam", "--solver", "flow,iterations=5,examples=40,block-size=32") == wf.Dot(
        adam=True, solver=flow
    )
    with pytest.raises(InputError, match="fitted for nothing") as refused:
        said("ekfac", "--solver", "flow")
    assert in_flags(str(refused.value), {"seed": "seed", "solver": "solver"}) == str(refused.value)


def test_impossible_solvers_are_refused() -> None:
    with pytest.raises(InputError, match=r"solver='gmres,iterations=3': expected cg or flow or astra"):
        said("ekfac", "--solver", "gmres,iterations=3")
    with pytest.raises(InputError, match="iterations=0"):
        said("ekfac", "--solver", "cg,iterations=0")


@pytest.mark.parametrize("setting", ["iterations=many", "batch-size=3", "iterations"])
def test_settings_that_a_solver_has_not_got_are_named(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        said("ekfac", "--solver", f"cg,{setting}")
    assert f"--{setting.partition('=')[0]}" in capsys.readouterr().err


def test_the_first_method_stands_for_none() -> None:
    assert with_method(["score", "run", "--queries", "q"]) == ["score", "ekfac", "run", "--queries", "q"]
    assert with_method(["score", "run", "kfac"]) == ["score", "run", "kfac"]
    assert with_method(["score", "--help"]) == ["score", "--help"]
    assert default(subcommands(FACTORED)).made() == wf.EKFAC()


def test_flags_say_what_the_docstring_says() -> None:
    annotations = flags(wf.Execution).__annotations__
    assert set(annotations) == set(wf.Execution.__dataclass_fields__)
    assert "GiB that may be taken" in str(annotations["memory_budget"])
