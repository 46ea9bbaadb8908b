"""Evaluations on disk, and heat maps in the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console, Group
from rich.style import Style
from rich.text import Text

from wherefrom.report.figures import Figure, load_figures, save_evaluation
from wherefrom.report.text import heat_map
from wherefrom.runtime.errors import DamagedError, InputError

PNG = b"\x89PNG\r\n\x1a\n of a sort"


def test_an_evaluation_is_found_again_with_its_numbers(tmp_path: Path) -> None:
    assert load_figures(tmp_path, {}) == []
    second, first = Figure("B", "of b", PNG), Figure("A", "of a", PNG + b"!")
    save_evaluation(tmp_path, "b", second, {"value": 0.5}, {})
    file = save_evaluation(tmp_path, "a", first, {}, {})
    assert file.read_bytes() == first.png
    assert load_figures(tmp_path, {}) == [first, second]
    stored = json.loads((tmp_path / "evaluation" / "b.json").read_text())
    assert stored == {"title": "B", "caption": "of b", "value": 0.5, "about": {}}
    with pytest.raises(InputError, match="name='../c'"):
        save_evaluation(tmp_path, "../c", first, {}, {})


def test_an_evaluation_is_shown_only_with_what_it_is_about(tmp_path: Path) -> None:
    """A run that is fitted on other data keeps the plots of the first, side by side, and shows each with its own."""
    one, other = ({"queries": "q", "training data": data, "model": "m", "damping": "1.0"} for data in ("a", "b"))
    plots = [Figure("LDS", f"on {name}", PNG) for name in ("a", "b")]
    first, second = (
        save_evaluation(tmp_path, "lds", plot, {}, about) for plot, about in zip(plots, (one, other), strict=True)
    )
    assert first != second
    assert load_figures(tmp_path, one) == plots[:1]
    assert load_figures(tmp_path, {**other, "damping": "2.0"}) == plots[1:]
    assert load_figures(tmp_path, {**one, "model": "another"}) == []


@pytest.mark.parametrize("damage", ["without plot", "not json", "without title"])
def test_a_damaged_evaluation_is_named(tmp_path: Path, damage: str) -> None:
    file = save_evaluation(tmp_path, "lds", Figure("A", "of a", PNG), {}, {})
    if damage == "without plot":
        file.unlink()
    else:
        file.with_suffix(".json").write_text("{" if damage == "not json" else "{}")
    with pytest.raises(DamagedError, match=rf"lds\.{'png' if damage == 'without plot' else 'json'} cannot be used"):
        load_figures(tmp_path, {})


def test_heat_maps_shade_by_value_and_show_every_token() -> None:
    group = heat_map([("up", 2.0), (" [red]half", -1.0), ("\n", 0.0), ("down", -2.0)])
    assert isinstance(group, Group)
    text, legend = group.renderables
    assert isinstance(text, Text)
    assert text.plain == "up [red]half↵down"  # nothing is taken for markup
    colours = {
        text.plain[span.start : span.end]: tuple(Style.parse(str(span.style)).bgcolor.triplet)  # type: ignore[union-attr, arg-type]
        for span in text.spans
    }
    assert colours["up"] == (86, 180, 233)
    assert colours["down"] == (230, 159, 0)
    assert colours["↵"] == (255, 255, 255)
    assert colours[" [red]half"] == (242, 207, 128)  # half way from white to the orange of -2
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(legend)
    assert capture.get().split() == ["-2", "-1", "+0", "+1", "+2"]
    heat_map([("nothing", 0.0)])
