"""Stopping at a safe moment: Ctrl-C, SIGTERM and SIGHUP wait until what is done is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Handler = Callable[[int, FrameType | None], object] | int | None


class HeldSignals:
    """Signals that ask this process to stop, and wait."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # the first that has come
        self._before: dict[signal.Signals, _Handler] = {}
        self._process = os.getpid()

    def hold(self) -> None:
        """From now on note signals, except those that are ignored; a second one is not held back."""
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                self._before[number] = handler
                signal.signal(number, self._receive)

    def deliver(self) -> None:
        """Let the handlers that were there before have the signal; where they return, go on holding, if it did."""
        holding = bool(self._before)
        self.release()
        if holding:
            self.hold()

    def release(self) -> None:
        """Put those handlers back, and let them have the signal."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        received, self.received = self.received, None
        if received is not None:
            signal.raise_signal(received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = self.received or signal.Signals(number)
        if again or os.getpid() != self._process:  # forked, as by a user's dataset: there is nothing to be saved there
            self.release()


_holding: list[HeldSignals] = []


@contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Hold signals back; in a thread, where Python handles none, nothing is held.

    Inside another one it is that one, so that what is delivered leaves both.
    """
    if threading.current_thread() is not threading.main_thread():
        yield HeldSignals()
        return
    if _holding:
        yield _holding[0]
        return
    held = HeldSignals()
    held.hold()
    _holding.append(held)
    try:
        yield held
    finally:
        _holding.clear()
        held.release()
