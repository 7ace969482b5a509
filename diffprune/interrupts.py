"""Ctrl-C ends a run even where the interrupt itself got lost."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """A context manager. An interrupt raises KeyboardInterrupt as always, and `check` does again; `heard` remembers it.

    Python drops what is raised while objects are finalised and in some callbacks from C, of which a training step has
    thousands: an interrupt that came at such a moment left the run going.
    """

    heard = False

    def __enter__(self) -> Self:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            Interrupts.heard = False
            signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if signal.getsignal(signal.SIGINT) == self._hear:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was an interrupt before."""
        if self.heard:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        Interrupts.heard = True
        raise KeyboardInterrupt
