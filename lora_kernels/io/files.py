"""Files that are written whole or not at all."""

import contextlib
import os
import shutil


def replace_files(directory, contents):
    """Writes ``{name: bytes or writer(path)}`` into ``directory``; after any error the files are as they were.

    Each file is written and synced next to its place, then renamed over it. Bytes that are already there are
    left alone, so saving new weights of the same adapter is one rename, which no crash can split.
    """
    directory = os.fspath(directory)
    created = _make_directories(directory)
    staged, done = [], []
    try:
        for name, data in contents.items():
            path = os.path.join(directory, name)
            if isinstance(data, bytes) and _read(path) == data:
                continue
            staged.append((path, os.path.join(directory, f".{name}.{os.getpid()}.part")))
            _write(staged[-1][1], data)
        for path, temporary in staged:
            done.append((path, _backup(path)))
            os.replace(temporary, path)
    except BaseException:
        for path, backup in reversed(done):
            with contextlib.suppress(OSError):
                os.rename(backup, path) if backup else os.unlink(path)
        for part in [temporary for _, temporary in staged] + [backup for _, backup in done if backup]:
            with contextlib.suppress(OSError):  # a rename between two links to one file does nothing
                os.unlink(part)
        for path in created:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise
    for _, backup in done:
        if backup:
            os.unlink(backup)


def _make_directories(directory):
    """Makes ``directory`` and its parents; returns those that were not there, deepest first."""
    missing, path = [], os.path.abspath(directory)
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    return missing


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _write(path, data):
    if isinstance(data, bytes):
        with open(path, "wb") as file:
            file.write(data)
    else:
        data(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _backup(path):
    """A second name for the present file, to go back to; None where there is no file."""
    if not os.path.exists(path):
        return None
    backup = f"{path}.{os.getpid()}.part"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(backup)
    try:
        os.link(path, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(path, backup)
    return backup
