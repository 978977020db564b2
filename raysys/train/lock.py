"""One driver to a run folder: a lock that the system takes back when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysys.errors import UserError

LOCK = "lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the one driver of an existing run folder; a UserError names the process that is it already.

    The file stays behind: to delete it while another process waits to open it would make two locks of one.
    """
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        except OSError as error:
            raise UserError(
                f"{folder / LOCK} cannot be locked: {error.strerror}",
                "runs_folder needs a file system with locks, such as NFS 4, or Lustre mounted with -o flock",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_free(folder: Path) -> None:
    """Raise what `held` would raise, without writing anything, before a start costs time."""
    if is_held(folder):
        raise _in_use(folder)


def is_held(folder: Path) -> bool:
    """Whether a process drives the run of this folder now."""
    if not (folder / LOCK).exists():
        return False
    with open(folder / LOCK) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # an exclusive one needs a writable file on NFS
        except BlockingIOError:
            return True
    return False


def _in_use(folder: Path) -> UserError:
    return UserError(
        f"run {folder} is being trained by {(folder / LOCK).read_text()}",
        "wait for its end or stop it, or give this run another run_id",
    )
