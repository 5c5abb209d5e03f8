"""Durable files: a file that was written is still there, and complete, after a power loss.

A file's content is on the disk once the file is synced. Its name is on the disk once its folder is synced. So a writer
writes under another name, syncs, renames, and syncs the folder. Only then may anything rely on the file.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Syncs a folder and everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def check_folder(folder: Path, field: str) -> None:
    """Raises ValueError, which begins with the configuration's `field`, when files cannot be written to `folder`.

    It is called before work starts, so that no result is lost. It creates nothing.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{field}: {there} is a file; choose a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{field}: {there} cannot be written to; choose another folder")


def make_folders(folder: Path) -> None:
    """Creates `folder` and its missing parents, and syncs their names."""
    missing = [made for made in (folder, *folder.parents) if not made.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)


def rename_lasting(partial: Path, final: Path) -> None:
    """Gives `partial`, a file or a folder, its final name, durably.

    After a power loss the final name has the old content (or nothing) or all of the new content.
    """
    if partial.is_dir():
        sync_all(partial)
    else:
        sync(partial)
    partial.rename(final)
    sync(final.parent)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """An empty hidden folder to write in. It takes the name `folder` when the block ends.

    If the block fails, nothing is left.
    """
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
    """The hidden name beside `path`, for content that is not complete yet or is being removed."""
    return path.with_name(f".{path.name}")


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """An empty folder to write files in. When the block ends, each file replaces the file of its name in `folder`.

    No file is ever half written. If the block fails, the old files stay.
    """
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
    """A path to write to. It replaces `file` when the block ends. If the block fails, the old file stays."""
    partial = hidden(file)
    try:
        yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    rename_lasting(partial, file)
