"""Where the time went: named actions, throughput and peak memory, as a table.

Actions may nest; an action's time excludes what its inner actions took, so the rows add up to the total. Times are
always taken. A GPU works on while the host goes on to the next action, so that an action is charged with waiting for
what others have started; with `synchronize`, each boundary waits for the GPU, which makes the whole slower.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table


@dataclass
class _Spent:
    """What an action has taken, or a kind of sweep and what it has processed in that time."""

    seconds: float = 0.0
    calls: int = 0
    examples: int = 0
    tokens: int = 0


@dataclass
class Profile:
    """Collects timings.

    Attributes:
        synchronize: wait for GPUs at every boundary, so that an action is charged with its own kernels.
    """

    synchronize: bool = False
    _actions: dict[str, _Spent] = field(default_factory=lambda: defaultdict(_Spent))
    _sweeps: dict[str, _Spent] = field(default_factory=lambda: defaultdict(_Spent))
    _inner: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def action(self, name: str) -> Iterator[None]:
        """Charge the time spent inside to `name`, less what inner actions take."""
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            self._actions[name].seconds += elapsed - self._inner.pop()
            self._actions[name].calls += 1
            self._inner[-1] += elapsed

    def processed(self, sweep: str, examples: int, tokens: int, seconds: float) -> None:
        """Add to a sweep's throughput."""
        spent = self._sweeps[sweep]
        spent.examples += examples
        spent.tokens += tokens
        spent.seconds += seconds

    def tables(self) -> list[Table]:
        """The actions, slowest first, and the throughput of each kind of sweep."""
        total = sum(action.seconds for action in self._actions.values())
        actions = _table("Action", "Mean duration (s)", "Calls", "Total time (s)", "Percentage (%)")
        actions.title, actions.title_justify = "Profile", "left"
        calls = sum(action.calls for action in self._actions.values())
        actions.add_row("Total", "-", str(calls), f"{total:.3f}", "100.0", end_section=True)
        for name, action in sorted(self._actions.items(), key=lambda item: -item[1].seconds):
            mean, share = action.seconds / action.calls, 100 * action.seconds / max(total, 1e-9)
            actions.add_row(name, f"{mean:.5f}", str(action.calls), f"{action.seconds:.3f}", f"{share:.1f}")
        actions.caption, actions.caption_justify = f"Peak memory: {_peak_memory()}", "left"
        if not self._sweeps:
            return [actions]
        sweeps = _table("Sweep", "Examples", "Tokens", "Seconds", "Examples/s", "Tokens/s")
        for name, done in self._sweeps.items():
            rates = (f"{count / done.seconds:,.0f}" for count in (done.examples, done.tokens))
            sweeps.add_row(name, f"{done.examples:,}", f"{done.tokens:,}", f"{done.seconds:.2f}", *rates)
        return [actions, sweeps]

    def text(self) -> str:
        """The tables as plain text."""
        console = Console(width=110, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(*self.tables())
        return capture.get()

    def _now(self) -> float:
        if self.synchronize and torch.cuda.is_initialized():
            for device in range(torch.cuda.device_count()):
                if torch.cuda.memory_reserved(device):  # of others, waiting would take memory
                    torch.cuda.synchronize(device)
        return time.perf_counter()


def _table(name: str, *figures: str) -> Table:
    table = Table(name)
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


def _peak_memory() -> str:
    # Linux counts in KiB, macOS in bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    parts = [f"{host / 2**30:.2f} GiB host"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB GPU")
    return ", ".join(parts)
