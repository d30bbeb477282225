"""Mistakes of the user: one clear line, a non-zero exit, no traceback."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
SPEAKING_SECONDS = 4
SAID_SECONDS = 600


class UserError(ValueError):
    """Something the user can mend; the message says what came, what was expected, what to do."""


class AlreadyTold(UserError):
    """The same end on a process that has nothing to say: another one of the run has said it."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C has ended a run.

    Args:
        number: the signal.
        where: how far the run had come, and what is saved.
    """

    def __init__(self, number: int | None, where: str) -> None:
        self.number = number or signal.SIGTERM  # None: it came on another process of the run
        name = signal.Signals(self.number).name
        what = f"stopped by {name} {where}".rstrip()
        super().__init__(f"{what}; run the same command again to go on")

    @property
    def exit_code(self) -> int:
        """What shells and schedulers know: 128 + the signal's number."""
        return 128 + self.number


def _is_first_to_say(message: str) -> bool:
    """Whether no other process that the same launcher started on this machine has said so already.

    Processes that fail alike say it once: the first one to make an empty file named after the message.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    text = f"{os.getppid()} {os.environ.get('MASTER_PORT')} {message}"
    name = f"tinyllm-said-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:24]}"
    path = Path(tempfile.gettempdir()) / name
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return time.time() - path.stat().st_mtime > SAID_SECONDS  # of another launch, long ago
    except OSError:  # said twice is better than not at all
        return True
    return True


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program's ``main`` and turn a :class:`UserError` into one line on stderr.

    Returns:
        The exit code.  Any other exception is our own mistake and keeps its traceback.
    """
    try:
        return main() or 0
    except AlreadyTold:
        if "RANK" in os.environ:
            time.sleep(SPEAKING_SECONDS)  # the end of one process ends those that want to speak
        return EXIT_USER_ERROR
    except UserError as error:
        if _is_first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Interrupted as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\n{stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except RuntimeError as error:
        from tinyllm.faults import LOST_PROCESS, lost_process

        if not lost_process(error):
            raise
        print(f"error: {LOST_PROCESS}; run the same command again", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # the reader (head, less) has gone: leave quietly, and keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
