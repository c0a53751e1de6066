"""What a killed merge had already made durable, so that the next run continues there.

The merge is made in ``OUT.partial``, which becomes OUT by one rename when every byte is there (and verified, where
that is asked for): OUT never exists half done. ``OUT.partial.jsonl`` beside it opens with what is being merged and
then has one line for each stretch that was synced to disk; a line that was cut short or damaged is ignored, with all
after it.
"""

import contextlib
import fcntl
import json
import os
import shutil

from ..io.checkpoint import CheckpointError


class Journal:
    """The open journal of ``folder``; ``done``: file name -> bytes of it that are safe.

    ``finished``: all is written and the folder was about to become, or is, the output.

    Raises:
        CheckpointError: the folder belongs to another merge, or to one that is running.
    """

    def __init__(self, folder, job):
        self.folder, self.path = folder, folder + ".jsonl"
        self.done, self.finished = {}, False
        if os.path.isdir(folder) and os.listdir(folder) and not os.path.isfile(self.path):
            raise CheckpointError(f"{folder} is in the way: no merge left it there; move or delete it")
        self._lock()
        try:
            self._load(job)
        except BaseException:
            self.close()
            raise
        if not self.finished:
            os.makedirs(folder, exist_ok=True)

    def _lock(self):
        while True:
            self._file = open(self.path, "a+b")  # noqa: SIM115 closed by close()
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise CheckpointError(f"{self.path}: another merge is writing there") from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    return
            self._file.close()  # another merge has ended, and removed it, since it was opened

    def _load(self, job):
        self._file.seek(0)
        text, position = self._file.read(), 0
        for line in text.splitlines(keepends=True):
            entry = _entry(line)
            if entry is None or ("job" in entry) != (position == 0):
                break
            if entry.get("job", job) != job:
                raise CheckpointError(
                    f"{self.folder} holds an unfinished merge of other files, weights or options; run that again, or "
                    "delete it"
                )
            position += len(line)
            self.finished = self.finished or "finished" in entry
            if "file" in entry:
                self.done[entry["file"]] = entry["bytes"]
        if position == 0 and b"\n" in text:
            raise CheckpointError(f"{self.path} is damaged: delete it, and {self.folder}, to begin again")
        if position < len(text):
            self._file.truncate(position)
        if position == 0:
            self._append({"job": job})
            sync_folder(os.path.dirname(os.path.abspath(self.path)))

    def _append(self, entry):
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def record(self, name, nbytes):
        """``nbytes`` of the file ``name`` are on disk."""
        self._append({"file": name, "bytes": nbytes})
        self.done[name] = nbytes

    def finish(self, out):
        """Turns the folder into ``out``, which is not there, or empty. After a kill inside, do it again."""
        if not self.finished:
            sync_folder(self.folder)
            self._append({"finished": True})
        if os.path.isdir(self.folder):
            os.rename(self.folder, out)
            sync_folder(os.path.dirname(os.path.abspath(out)))
        self._remove()

    def discard(self):
        """Removes what was written: what went wrong would go wrong again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._remove()

    def _remove(self):
        os.unlink(self.path)
        self.close()

    def close(self):
        self._file.close()


def _entry(line):
    """What a line of a journal says; None where it is cut short or damaged."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    known = isinstance(entry, dict) and not entry.keys().isdisjoint(("job", "file", "finished"))
    damaged = known and "file" in entry and not (isinstance(entry["file"], str) and _is_count(entry.get("bytes")))
    return entry if known and not damaged else None


def _is_count(value):
    return isinstance(value, int) and value >= 0


def sync_folder(path):
    """Makes names made or changed in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
