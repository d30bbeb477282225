"""SIGTERM and Ctrl-C: finish the step, save, leave within half a minute with the usual exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time

from tinyllm.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE_SECONDS = 25  # then the process ends as it is; schedulers kill 30 s after their SIGTERM
SAME_SIGNAL_SECONDS = 1  # a terminal and a launcher both pass one Ctrl-C on


class NeverStop:
    """Stands where no signals are watched."""

    wanted, signal = False, None


class StopRequest:
    """Watches the signals; between :meth:`defer` and its end they only leave a note.

    Outside of that they raise :class:`Interrupted` at once.  A second signal does not wait either.
    A thread of its own makes sure that the process ends, whatever the main thread is stuck in.

    Attributes:
        signal: the first signal that came, None before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since, self.deferring, self.pid = 0.0, False, os.getpid()
        self.ended = threading.Event()
        self.handlers: dict = {}

    @property
    def wanted(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may install handlers
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.old_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.handlers:
            signal.set_wakeup_fd(self.old_fd)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            self.writer.close()  # the thread reads the end and leaves

    @contextlib.contextmanager
    def defer(self):
        """While this lasts, a signal waits for the end of the step."""
        self.deferring = True
        try:
            yield self
        finally:
            self.deferring = False

    def _note(self, number: int, _frame) -> None:
        if os.getpid() != self.pid:
            return  # a forked worker of a data loader; its parent ends it
        first = self.signal is None
        if first:
            self.signal, self.since = number, time.monotonic()
        if not self.deferring:
            raise Interrupted(self.signal, "")
        if first:
            _tell(f"{signal.Signals(number).name}: saving a checkpoint after this step ...")
        elif time.monotonic() - self.since > SAME_SIGNAL_SECONDS:
            raise Interrupted(self.signal, "at once, without a checkpoint of the last steps")

    def _watch(self) -> None:
        """Runs beside the main thread: the signal's number arrives here even if that is stuck."""
        number = 0
        while number not in SIGNALS:
            if not (data := self.reader.recv(1)):
                self.reader.close()
                return
            number = data[0]
        if not self.ended.wait(PATIENCE_SECONDS):
            stop = Interrupted(number, f"in a step of over {PATIENCE_SECONDS} s, not saved")
            _tell(str(stop))
            os._exit(stop.exit_code)


def _tell(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        with contextlib.suppress(OSError):  # whoever read stderr may have gone
            print(f"\n{text}", file=sys.stderr, flush=True)
