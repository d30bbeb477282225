"""One run at a time in a run folder: a lock that the system takes back when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from tinyllm.errors import UserError

LOCK_FILE = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class FolderLock:
    """``flock`` on a file in a run folder; the file's text says who holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_FILE
        self.descriptor: int | None = None

    def take(self) -> None:
        """Take the lock, or say who has it.

        Raises:
            UserError: another run is under way in this folder.
            OSError: the file cannot be written.
        """
        while self.descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace")
                os.close(descriptor)
                raise UserError(
                    f"{self.folder}: another run is writing into this folder"
                    f"{f' ({holder})' if holder else ''}; wait for it, or give another --output_dir"
                ) from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                # a file system without locks: nothing to hold, and no reason not to train
            if self._is_still_there(descriptor):
                self.descriptor = descriptor
            else:
                os.close(descriptor)  # its holder removed the file while we opened it
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self.descriptor, 0)
        text = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        os.pwrite(self.descriptor, text.encode(), 0)

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and let go; nothing happens when the lock is not held."""
        if self.descriptor is None:
            return
        if self._is_still_there(self.descriptor):
            with contextlib.suppress(OSError):  # a folder that has become read-only
                self.path.unlink()
        os.close(self.descriptor)
        self.descriptor = None
