"""A training process whose launcher is gone ends too, instead of waiting for its peers as an orphan.

A launcher that is killed with SIGKILL (by a scheduler, or for memory) cannot end its processes.  Each of
them therefore watches its parent, and once that has gone sends itself the SIGTERM which the launcher would
have sent: the step is finished, a checkpoint saved (interrupt.py).

Linux could send a signal by itself (PR_SET_PDEATHSIG), but does so when the thread that started the process
ends, not the launcher; asking for the parent works with every launcher and on every POSIX system.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

from tinyllm.interrupt import StopRequest

LAUNCHER_VARIABLE = "TINYLLM_LAUNCHER"  # id of the process that runs tinyllm.launch
LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 30  # more than interrupt.py's own, after which nothing is waited for


def name_launcher() -> None:
    """In the launcher: tell the processes that it starts whose end is theirs."""
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())


def watch_launcher(environment: Mapping[str, str] = os.environ) -> threading.Thread | None:
    """In a training process, first of all: watch the launcher.

    Returns:
        The watching thread; None where no launcher has started this process.
    """
    parent = parent_to_watch(environment)
    if parent is None:
        return None
    unsaid = threading.Semaphore(1)
    # another process may notice first, and this one have stopped with it before it looks
    atexit.register(_say_if_gone, parent, unsaid)
    thread = threading.Thread(
        target=_watch, args=(parent, unsaid), daemon=True, name="launcher watch"
    )
    thread.start()
    return thread


def parent_to_watch(environment: Mapping[str, str]) -> int | None:
    """Id of the process whose end ends this one; None where a shell or a person started it.

    ``nohup python sft_lora.py &`` outlives its shell on purpose; torchrun's and accelerate's processes
    have no use without theirs.
    """
    parent, said = os.getppid(), environment.get(LAUNCHER_VARIABLE, "")
    launcher = int(said) if said.isdigit() else None
    if "TORCHELASTIC_RUN_ID" not in environment:
        return launcher if launcher == parent else None
    if launcher is not None and launcher != parent and not _lives(launcher):
        return launcher  # it went before this process had begun to look
    return parent


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def stop_is_under_way() -> bool:
    """Whether interrupt.py has noted a signal already: a second one would not wait for the save."""
    request = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return isinstance(request, StopRequest) and request.wanted


def _say_if_gone(parent: int, unsaid: threading.Semaphore) -> None:
    """Say that the launcher has ended, once on each machine."""
    if os.getppid() == parent or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if unsaid.acquire(blocking=False):
        with contextlib.suppress(OSError):  # whoever read stderr may have gone with it
            print("the launcher of this process has ended: stopping", file=sys.stderr, flush=True)


def _watch(parent: int, unsaid: threading.Semaphore) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    _say_if_gone(parent, unsaid)
    if not stop_is_under_way():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    time.sleep(PATIENCE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
