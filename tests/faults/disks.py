"""Small disks of their own for a run, which can be filled, emptied and made read-only: root may mount them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILLER = "filler"


def missing() -> str | None:
    """Why no disk can be mounted here; None if one can."""
    if os.geteuid() != 0:
        return "only root may mount a disk of its own"
    if shutil.which("mount") is None:
        return "there is no command `mount`"
    return None


@contextmanager
def small(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk in memory of this size at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        mount(str(folder), how="umount", lazy="-l")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """What is below a folder can be read, and nothing be written."""
    mount("--bind", str(folder), str(folder))
    try:
        mount("-o", "remount,bind,ro", str(folder))
        yield
    finally:
        mount(str(folder), how="umount", lazy="-l")


@contextmanager
def full(disk: Path, free: int = 0) -> Iterator[None]:
    """A disk of which something else has left so many bytes."""
    with (disk / FILLER).open("wb") as file:
        for _ in range(100):  # a run writes meanwhile: what was free a moment ago may be so no more
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - free))
                break
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            (disk / FILLER).unlink()


@contextmanager
def without_names(disk: Path) -> Iterator[None]:
    """A disk on which two more files can be made, fewer than a checkpoint has, as where a quota counts files."""
    used = os.statvfs(disk)
    mount("-o", f"remount,nr_inodes={used.f_files - used.f_ffree + 2}", str(disk))
    try:
        yield
    finally:
        mount("-o", f"remount,nr_inodes={used.f_files}", str(disk))


def mount(*words: str, how: str = "mount", lazy: str | None = None) -> None:
    subprocess.run([how, *([lazy] if lazy else []), *words], check=True, capture_output=True)
