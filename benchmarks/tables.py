"""Write `docs/performance.md`, and the table in the README, from `benchmarks/results/*.json` and the templates.

python benchmarks/tables.py            # --check only says whether they are up to date
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import tyro
from gpu_stages.summary import cards
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from workload import RESULTS, ROOT

DOCUMENT, README = ROOT / "docs" / "performance.md", ROOT / "README.md"


def results() -> dict[str, Any]:
    """Every result by the name of its file, with underscores for hyphens."""
    return {file.stem.replace("-", "_"): json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}


def rendered(template: str, **values: object) -> str:
    """A template of `templates/`, filled with the results and values; one that lacks a figure is an error."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "benchmarks" / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["gib"] = lambda count: f"{count / 2**30:.2f} GiB"
    environment.filters["mib"] = lambda count: f"{count / 2**20:,.0f} MiB"
    environment.filters["number"] = format
    found = results()
    return environment.get_template(template).render({"results": found, "cards": cards(found), **values})


def with_block(text: str, name: str, content: str) -> str:
    """A text with what stands between `<!-- NAME: ... -->` and `<!-- end -->` replaced."""
    block = re.compile(rf"(<!-- {name}: [^\n]*? -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda found: found[1] + content + found[2], text)


def main(check: bool = False) -> None:
    """Write both, or exit with 1 when one is not what would be written."""
    wanted = {
        DOCUMENT: rendered("performance.md.jinja"),
        README: with_block(
            with_block(README.read_text(), "performance", rendered("kronfluence.md.jinja")),
            "gpu",
            rendered("gpu_short.md.jinja"),
        ),
    }
    stale = [path.name for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    if check:
        sys.exit(f"Out of date: {', '.join(stale)}. Run python benchmarks/tables.py." if stale else 0)
    for path, content in wanted.items():
        path.write_text(content)


if __name__ == "__main__":
    tyro.cli(main)
