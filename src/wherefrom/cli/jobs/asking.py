"""The subcommands `wherefrom ask` and `serve`: from an answer to the training examples behind it, here or on a page.

All work is the library's; this module turns arguments into its calls.
"""

from __future__ import annotations

import json as json_format
import sys
import webbrowser
from threading import Thread

import tyro
from rich.console import Console

from wherefrom.cli.methods import EXECUTED, default
from wherefrom.cli.scoring import SCORED
from wherefrom.cli.shared import Run
from wherefrom.jobs.asking import Asker
from wherefrom.jobs.sources import RunSources
from wherefrom.runtime.distributed import Ranks
from wherefrom.runtime.errors import require

console = Console()


def ask(
    run: Run,
    prompt: tyro.conf.Positional[str],
    *,
    answer: str | None = None,
    span: str | None = None,
    contrast: str | None = None,
    method: tyro.conf.OmitArgPrefixes[SCORED] = default(SCORED),  # noqa: B008  (a frozen value)
    k: int = 5,
    candidates: int = 100,
    group: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    draw: int = 0,
    json: bool = False,
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Show the training examples behind an answer of the model.

    Args:
        run: A run directory that `wherefrom fit` made.
        prompt: What the model is asked.
        answer: What is attributed; without it the model writes one.
        span: Attribute this phrase of the answer alone; it has to be there once.
        contrast: Another answer: what speaks for the first and not for this one.
        method: How scores are computed; by EK-FAC unless one is named.
        k: Examples of each sign.
        candidates: With an index in the run, score this many of its highest and lowest, and of those that share words.
        group: Also add up the scores by this column of the training examples, such as 'source'.
        max_new_tokens: Of the answer that the model writes.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        draw: The seed of drawn tokens.
        json: Print all of it for programs.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
    """
    Ranks.current().check_alone("ask")
    executed, sources = execution.made(), RunSources.load(run, trust_remote_code)
    chosen = method.made(sources.fitted)
    asker = Asker(sources.study(run, device, executed), chosen)
    if answer is None:
        question = asker.writer.write(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=draw, span=span
        )
    else:
        question = asker.writer.question(prompt, answer, span)
    other = None if contrast is None else asker.writer.question(prompt, contrast)
    found = asker.attribute(question, contrast=other, k=k, candidates=candidates, group=group)
    if json:
        sys.stdout.write(json_format.dumps(found.to_json(), indent=1) + "\n")
    else:
        console.print(found.shown())


def serve(
    run: Run,
    *,
    port: int = 8765,
    browser: bool = True,
    read_only: bool = False,
    execution: tyro.conf.OmitArgPrefixes[EXECUTED] = EXECUTED(),  # noqa: B008
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Open a local page to ask in: prompts, answers, what is behind them, and judgements of training examples.

    Args:
        run: A run directory that `wherefrom fit` made.
        port: On 127.0.0.1; 0 takes any that is free.
        browser: Open the page in a browser; the address is printed in any case.
        read_only: Let nobody judge training examples. Scores are still computed and stored.
        execution: How to compute.
        device: 'auto', 'cpu', 'cuda', 'cuda:1', ...
        trust_remote_code: Run Python code that comes with the model, as for `wherefrom fit`.
    """
    Ranks.current().check_alone("serve")
    for library in ("starlette", "uvicorn"):
        require(library, "serve")
    from wherefrom.serve.app import listen, serve_page  # noqa: PLC0415  (needs them)
    from wherefrom.serve.views import RunViews  # noqa: PLC0415

    executed, sources = execution.made(), RunSources.load(run, trust_remote_code)
    listening = listen(port)  # or it turns out when the model is loaded that it is taken
    views = RunViews(sources, sources.study(run, device, executed), read_only=read_only)

    def ready(address: str) -> None:
        console.print(f"Ask at {address}", soft_wrap=True, highlight=False)
        console.print("Whoever has this address can ask. Ctrl-C ends the server.", style="dim")
        if browser:
            Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # some are programs of the terminal

    serve_page(views, listening, ready)
