"""The day with a GPU, without one: nothing measured is lost, what fails is known, pages are made from the rest."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import workload
from gpu_stages import day as days
from gpu_stages.day import INDEX, RUNNING, Day, after_failure
from gpu_stages.report import Figures, Report, Setting, UnavailableError
from gpu_stages.summary import cards, merged
from tables import rendered


def test_a_part_that_fails_leaves_the_others_and_is_measured_again(tmp_path: Path) -> None:
    measured: list[str] = []

    def part(name: str, broken: bool = False) -> Figures:
        measured.append(name)
        if broken:
            raise ZeroDivisionError(name)
        return {"number": len(measured)}

    def unavailable() -> Figures:
        raise UnavailableError("no such thing")

    def stage(broken: bool) -> Report:
        report = Report(tmp_path / "report.json", "stage")
        report.measure("first", lambda: part("first"))
        report.measure("second", lambda: part("second", broken))
        report.measure("third", unavailable)
        report.measure("wrong", lambda: {"passed": not broken, "number": 1})
        return report

    found = stage(broken=True).parts
    assert str(found["second"]["error"]).endswith("ZeroDivisionError: second")
    assert found["third"]["unavailable"] == "no such thing"
    assert json.loads((tmp_path / "report.json").read_text())["parts"] == found
    again = stage(broken=False).parts
    assert measured == ["first", "second", "second"]
    assert [again[name]["figures"] for name in ("first", "second", "wrong")] == [
        {"number": 1}, {"number": 3}, {"passed": True, "number": 1},
    ]  # fmt: skip


def test_a_stage_that_fails_or_takes_too_long_is_in_the_index_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a GPU has all of its environment but the GPU."""
    limits = {**days.STAGES, "micro": days.Stage("micro:micro", 1, limit=0.01)}
    monkeypatch.setattr(days, "STAGES", limits)
    day = Day.opened(tmp_path, Setting(device="no such device"), "first")
    day.run(["environment", "micro"], seconds=500.0)
    day.run(["job"], seconds=1.0)
    stored = json.loads((tmp_path / INDEX).read_text())
    assert {name: stage["state"] for name, stage in stored["stages"].items()} == {
        "environment": "failed", "micro": "out of time", "job": "out of time",
    }  # fmt: skip
    parts = stored["stages"]["environment"]["parts"]
    assert parts["provenance"]["figures"]["machine"]["torch"]
    assert "error" in parts["gpu"]
    assert not (tmp_path / RUNNING).exists()
    # As if the machine had been taken away in the middle of a stage.
    running = {"stage": "draws", "parts": {"normal": {"figures": {"error": 0.0}, "seconds": 1.0}}}
    (tmp_path / RUNNING).write_text(json.dumps(running))
    again = Day.opened(tmp_path, Setting(device="cpu", rehearse=True), "second")
    assert again.stages["draws"]["parts"] == running["parts"]
    again.stages["environment"]["state"] = "done"
    again.run(["environment"], seconds=500.0)
    again.write()
    stored = json.loads((tmp_path / INDEX).read_text())
    assert (stored["command"], stored["stages"]["environment"]["parts"]) == ("first; second", parts)


def test_what_is_known_to_fail_is_left_out_of_what_comes_after() -> None:
    setting = Setting()
    failed: dict[str, object] = {"state": "failed", "parts": {"job": {"error": "..."}}}
    compiling = "torch._inductor.exc.InductorError: no compiler"
    assert after_failure(setting, failed, compiling) == Setting(compiled=False)
    assert after_failure(Setting(compiled=False), failed, compiling) == Setting(compiled=False)
    short = after_failure(setting, failed, "torch.OutOfMemoryError: CUDA out of memory.")
    assert after_failure(short, failed, "Gradients do not fit into memory") == Setting(less_memory=20.0)
    wrong = {"state": "failed", "parts": {"out_dtype": {"figures": {"passed": False}}}}
    assert after_failure(setting, wrong, "") == Setting(half=False)
    assert after_failure(setting, failed, "ValueError") == setting
    assert after_failure(setting, {"state": "done", "parts": {}}, "out of memory") == setting


def test_every_stage_of_both_calls_exists() -> None:
    for stage in days.STAGES.values():
        module, _, function = stage.function.partition(":")
        assert callable(getattr(importlib.import_module(f"gpu_stages.{module}"), function))
    assert {stage.call for stage in days.STAGES.values()} == {1, 2}


def test_indexes_are_merged_with_what_is_done_before_what_is_not(tmp_path: Path) -> None:
    states = ({"a": "done", "b": "failed"}, {"a": "failed", "b": "done", "c": "failed"})
    files = []
    for number, each in enumerate(states):
        stages = {name: {"state": state, "from": number} for name, state in each.items()}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"command": f"call {number}", "stages": stages}))
    found = merged(files)
    assert found["commands"] == ["call 0", "call 1"]
    assert {name: (stage["state"], stage["from"]) for name, stage in found["stages"].items()} == {
        "a": ("done", 0), "b": ("done", 1), "c": ("failed", 1),
    }  # fmt: skip


def test_a_copy_without_its_history_says_its_commit_or_that_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "ROOT", tmp_path)
    monkeypatch.delenv("WHEREFROM_COMMIT", raising=False)
    assert workload.provenance()["commit"] == "unknown"
    monkeypatch.setenv("WHEREFROM_COMMIT", "abc1234")
    assert workload.provenance()["commit"] == "abc1234"
    (tmp_path / ".git").mkdir()  # what git does not take for a repository
    assert workload.provenance()["commit"] == "abc1234"


def done(**parts: Mapping[str, object]) -> dict[str, object]:
    measured = {name: {"figures": figures, "seconds": 12.0} for name, figures in parts.items()}
    return {"state": "done", "seconds": 30.0, "parts": measured}


def test_pages_are_made_of_what_was_measured_alone() -> None:
    """Of everything, of one failed stage, and of nothing."""
    work = {"layers": 12, "width": 768, "vocabulary": 50257, "tokens": 512, "train": 4656, "queries": 481}
    taken = {"wall_seconds": 9.25, "operations_per_second": 412e12, "part_of_product_speed": 0.55}
    alike = {"pearson": 0.99871, "mean_spearman": 0.99612, "lowest_spearman": 0.98, "top_10_in_common": 0.954}
    job = {
        "workload": work, "precision": "bfloat16", "compiled": True, "seconds": 28.75, "peak_bytes": 2**36,
        "product_speed": 750e12, "stages": {"eigenvalues": taken},
    }  # fmt: skip
    both = {"wherefrom_seconds": 3.0, "kronfluence_seconds": 36.0, "times_faster": 12.0}
    peer = {
        "workload": work, "precision": "bfloat16", "agreement": alike, "stages": {"eigenvalues": both},
        "seconds": {"wherefrom": 5.0, "kronfluence": 61.0}, "times_faster": 12.2,
    }  # fmt: skip
    stages = {
        "job": done(**{"warm-up": {}, "job": job}),
        "against kronfluence": done(comparison=peer),
        "precision": done(bfloat16=alike),
        "0.5B Llama": done(**{"LoGra, 64 x 1": {"seconds": 4.5}}),
        "resume": {"state": "failed", "parts": {"killed": {"error": "...", "seconds": 1.0}}},
    }
    origin = {"command": "python x", "commit": "abc1234", "machine": {"gpu": "NVIDIA H200", "torch": "2.11.0"}}
    whole = cards({"gpu_H200": {**origin, "stages": stages}, "floor": {}})
    long, short = (rendered(f"{name}.md.jinja", cards=whole) for name in ("gpu", "gpu_short"))
    assert "| eigenvalues | 9.2 | 412 | 55% |" in long
    assert "| in all | 5.0 | 61.0 | **12.2** |" in long
    assert "| bfloat16 | 0.9987 | 0.9961 | 0.9800 | 95.4% |" in long
    assert "| LoGra, 64 x 1 | 4.5 |" in long
    assert "| resume | failed, 0 of 1 parts; failed: killed |" in long
    assert "| NVIDIA H200 | bfloat16 | 28.8 s | 12.2 times slower | 0.9987 |" in short
    one = cards({"gpu_H200": {**origin, "stages": {"resume": stages["resume"]}}})
    assert "| resume | failed, 0 of 1 parts; failed: killed |" in rendered("gpu.md.jinja", cards=one)
    assert "| NVIDIA H200 |  | not measured | not measured | not measured |" in rendered(
        "gpu_short.md.jinja", cards=one
    )
    for template in ("gpu.md.jinja", "gpu_short.md.jinja"):
        assert "No GPU has been used" in rendered(template, cards=[])
