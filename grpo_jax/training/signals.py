"""Signals that end a run: they are taken note of, and the loop saves when it can."""

from __future__ import annotations

import contextlib
import os
import signal


class StopSignal:
    """While it is entered, SIGTERM, SIGHUP and the first SIGINT (Ctrl-C) ask the loop to save and end; the second ends at once.

    doing: what the loop is at, for those who wait after a signal. speaks: says so; of several hosts the first does.
    """

    # Python runs a handler between any two statements. There the state may be donated to a call that has not returned, or a
    # record half written, so nothing could be saved from inside of it: it only takes note.
    is_set = False
    doing = "the step under way"
    speaks = True

    def __enter__(self) -> StopSignal:
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        # One that was ignored stays so: under nohup that is SIGHUP, in a sweep's process SIGINT.
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self.take_note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def take_note(self, number: int, _: object) -> None:
        """Handle a signal."""
        if number == signal.SIGINT and self.is_set:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.is_set = True
        said = f"{signal.Signals(number).name}: saves and ends after {self.doing}; Ctrl-C from now on ends at once\n"
        # Not `print`, which may be in the middle of something.
        if self.speaks:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{said}".encode())
