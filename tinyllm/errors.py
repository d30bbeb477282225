"""Mistakes of the user: one clear line, a non-zero exit, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """Something the user can mend; the message says what came, what was expected, what to do."""


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program's ``main`` and turn a :class:`UserError` into one line on stderr.

    Returns:
        The exit code.  Any other exception is our own mistake and keeps its traceback.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) has gone: leave quietly, and keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
