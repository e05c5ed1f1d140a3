"""Removal of the files that programs leave."""

from __future__ import annotations

import contextlib
import os


def empty_folder(path: str) -> None:
    """Remove the contents of a folder, without following links.

    Folders of any mode and depth are removed: each is made accessible, and its folders are moved up before it is
    removed, so that no path becomes too long.
    """
    unique, moved = os.urandom(8).hex(), 0  # a name that no program has used
    with contextlib.suppress(OSError):
        os.chmod(path, 0o777)
    while True:
        folders = [entry for entry in _entries(path) if not _unlink(entry)]
        removed = False
        for folder in folders:
            with contextlib.suppress(OSError):
                os.chmod(folder.path, 0o700)
                for inner in _entries(folder.path):
                    if not _unlink(inner):
                        os.chmod(inner.path, 0o700)
                        os.rename(inner.path, os.path.join(path, f"{unique}.{moved}"))
                        moved += 1
                os.rmdir(folder.path)
                removed = True
        if not removed:
            return


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _unlink(entry: os.DirEntry[str]) -> bool:
    """Remove a file or link, and return False for a folder."""
    if entry.is_dir(follow_symlinks=False):
        return False
    with contextlib.suppress(OSError):
        os.unlink(entry.path)
    return True
