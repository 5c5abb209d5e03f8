"""Durable files: what was written is still there, and whole, after a power loss.

A file's content is on the disk once the file is synced, its name once its folder is synced. So: write under another
name, sync, rename, sync the folder. Only then may anything rely on the file.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` of a folder and of everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def check_folder(folder: Path, field: str) -> None:
    """Raises ValueError, which begins with the configuration's `field`, when files cannot be written to `folder`:
    before work starts whose result would be lost. Makes nothing."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{field}: {there} is a file; choose a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{field}: {there} cannot be written to; choose another folder")


def make_folders(folder: Path) -> None:
    """`folder`, and those above it that are missing; their names last."""
    missing = [made for made in (folder, *folder.parents) if not made.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def rename_lasting(partial: Path, final: Path) -> None:
    """Give `partial`, a file or a folder with all in it, its final name. A power loss leaves either nothing under that
    name (or the file that was there), or all of it."""
    if partial.is_dir():
        sync_all(partial)
    else:
        sync(partial)
    partial.rename(final)
    sync(final.parent)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """An empty folder to write in, hidden beside `folder`, whose name it takes when the block ends. Nothing of it stays
    if it fails."""
    partial = hidden(folder)
    shutil.rmtree(partial, ignore_errors=True)
    make_folders(folder.parent)
    partial.mkdir()
    try:
        yield partial
        rename_lasting(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hidden(path: Path) -> Path:
    """Beside `path`, for what is not whole yet, or no longer."""
    return path.with_name(f".{path.name}")


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """An empty folder to write files in. When the block ends they take the place of those with their names in `folder`,
    each one whole. What was there stays if it fails."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        sync_all(partial)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write in place of `file`, which is replaced when the block ends. What was there stays if it fails."""
    partial = hidden(file)
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    rename_lasting(partial, file)
