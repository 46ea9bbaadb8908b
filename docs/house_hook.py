"""For mkdocs: draws the folders of the package, floor by floor, where a page says `<!-- house -->`.

It reads the order of the folders from CONTRIBUTING.md, and modules and their sizes from the source.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "wherefrom"
_WIDTH, _ROW, _NAME, _COLUMN = 1000, 62, 110, 88


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the mark by the picture."""
    return markdown.replace("<!-- house -->", picture()) if "<!-- house -->" in markdown else markdown


def floors() -> list[str]:
    """The folders, from the ground up."""
    found = re.search(r"```floors\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].replace("<-", " ").split()


def picture() -> str:
    """An SVG: a row for each folder, the highest first, with a box for each module, as tall as it is long."""
    order = floors()[::-1]
    rows = [_row(name, number * _ROW) for number, name in enumerate(order)]
    height = len(order) * _ROW
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="The folders of the package, floor by floor" '
        f'font-family="sans-serif" fill="currentColor">{"".join(rows)}</svg>'
    )


def _row(name: str, top: int) -> str:
    folder = PACKAGE / name
    parts = sorted(folder.iterdir()) if folder.is_dir() else [PACKAGE / f"{name}.py"]
    sizes = {
        part.stem + "/" * part.is_dir(): _lines(part) for part in parts if _lines(part) and part.stem != "__init__"
    }
    boxes = [_box(module, lines, _NAME + column * _COLUMN, top) for column, (module, lines) in enumerate(sizes.items())]
    line = (
        f'<line x1="0" x2="{_WIDTH}" y1="{top + _ROW - 2}" y2="{top + _ROW - 2}" stroke="currentColor" opacity=".3"/>'
    )
    title = f'<text x="0" y="{top + 34}" font-size="17" font-weight="bold">{escape(name)}</text>'
    total = f'<text x="0" y="{top + 50}" font-size="10" opacity=".7">{sum(sizes.values()):,} lines</text>'
    return title + total + "".join(boxes) + line


def _lines(part: Path) -> int:
    """How long a module is, or all of a folder."""
    files = part.rglob("*.py") if part.is_dir() else [part] * (part.suffix == ".py")
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def _box(module: str, lines: int, left: int, top: int) -> str:
    height = min(44, max(4, 40 * lines / 450))
    bottom = top + _ROW - 4
    return (
        f'<rect x="{left}" y="{bottom - height:.0f}" width="{_COLUMN - 6}" height="{height:.0f}" fill="#4878a8" '
        f'opacity=".35"><title>{escape(module)}: {lines} lines</title></rect>'
        f'<text x="{left + 3}" y="{bottom - 4}" font-size="10.5">{escape(module[:15])}</text>'
    )
