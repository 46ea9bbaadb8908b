"""A chat template that leaves its sandbox: a tokenizer's template is a program, and this one looks for `os`.

What happens: transformers renders templates in Jinja's sandbox, which refuses the first step; here that ends in an
error which names the row. The sandbox bounds neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment

import wherefrom as wf
from attacks.common import Stop, main, refused, save_language_model

MESSAGES = [{"role": "user", "content": "a b c"}]
PATHS = {
    "through a global function": "cycler.__init__.__globals__.os",
    "through a message": "messages.__class__.__base__.__subclasses__()[0].__init__.__globals__.os",
    "through an attribute filter": "(cycler|attr('__init__')|attr('__globals__')).os",
}


def live(folder: Path) -> bool:
    Environment().from_string(_template(PATHS["through a global function"], folder / "executed")).render()
    return (folder / "executed").exists()


def attack(folder: Path) -> Iterator[Stop]:
    model, mark = folder / "model", folder / "executed"
    tokenizer = save_language_model(model)
    for name, path in PATHS.items():
        tokenizer.chat_template = _template(path, mark)
        tokenizer.save_pretrained(model)
        yield refused(
            f"a template that looks for os {name}",
            lambda: wf.study_from_pretrained(model, [{"messages": MESSAGES}]),
            mark,
        )


def _template(path: str, mark: Path) -> str:
    return f"{{{{ {path}.mkdir({str(mark)!r}) }}}}"


if __name__ == "__main__":
    main(live, attack)
