"""Stopping on Ctrl-C, SIGTERM or a closed terminal: at a point from which the run can be resumed, or at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from slimllm.runtime.progress import LayerMeasured, Progress

if TYPE_CHECKING:
    from slimllm.runtime.distributed import Ranks

# Signals that end a run. SIGHUP, sent when the terminal closes, is left out if nohup has set it to be ignored.
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
    SIGNALS.append(signal.SIGHUP)


def leave(number: int, frame: object = None) -> NoReturn:
    """Exit by an exception, so that partial output is deleted, or kept for resuming, on the way out."""
    heard_once(number)
    sys.exit(128 + number)


def heard_once(number: int) -> None:
    """Ignore further signals if this one is SIGHUP: when a terminal closes, the shell sends one and the system another."""
    if number == getattr(signal, "SIGHUP", None):
        signal.signal(number, signal.SIG_IGN)


def leave_interrupts_to_parent() -> None:
    """Ignore Ctrl-C in a child process: the signal also reaches the parent, which ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class SafeStop:
    """Signal handler: while layers are processed, the first signal stops the run after the current one, the second at once.

    Args:
        say: Called with a sentence about what will happen.
        ranks: The processes of the run; all stop after the same layer, whichever of them received the signal.
    """

    def __init__(self, say: Callable[[str], None], ranks: Ranks) -> None:
        self._say, self._ranks = say, ranks
        self._requested = 0
        self._at_work = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if not self._at_work or self._requested:
            leave(number)
        heard_once(number)
        self._requested = number
        self._say("Stopping after this layer. Press Ctrl-C again to quit now.")

    def progress(self, event: Progress) -> None:
        """Stop if requested, as a layer is now done and recorded; a `ProgressCallback`."""
        if requested := max(self._ranks.everyone(self._requested)):
            leave(requested)
        self._at_work = isinstance(event, LayerMeasured) or event.done < event.total
