"""Work on a GPU in a process that may hang or die: it is started again, and goes on without what it was at.

A kernel that reads what is not there leaves its process without a GPU, and one that waits for ever does not give it
back: neither may cost the results of the others. The process keeps :class:`Notes` of what it is at; :func:`run` reads
them when it has ended, or when they have not changed for too long.
"""

import json
import os
import subprocess
import sys
import time

GPU_LOST = 75  # exit code of a process whose GPU answers no more
_MOST_BYTES = 200  # of the name of what is at work
MOST_KILLED = 2  # how often one item may be at work when somebody else ends the run: by then it is to blame


class Notes:
    """A file that says what was lost and why, under which ``stack``, and one beside it (``.now``) of what is at work:
    written before each call that is timed, so it takes microseconds."""

    def __init__(self, path):
        self.path = path
        found = json.loads(path.read_text()) if path.is_file() else {}
        self.stack, self.lost, self.killed = found.get("stack"), found.get("lost", {}), found.get("killed", {})
        self._now = os.open(path.with_suffix(".now"), os.O_RDWR | os.O_CREAT, 0o644)

    def __del__(self):
        os.close(self._now)

    @property
    def now(self):
        """What is at work; None: nothing."""
        return os.pread(self._now, _MOST_BYTES, 0).decode(errors="replace").rstrip() or None

    def changed(self):
        """When something was last at work."""
        return os.fstat(self._now).st_mtime

    def write(self):
        partial = self.path.with_suffix(f".{os.getpid()}")
        values = {"stack": self.stack, "lost": self.lost, "killed": self.killed}
        partial.write_text(json.dumps(values, indent=1) + "\n")
        partial.replace(self.path)

    def under(self, stack):
        """Forgets what was lost under another stack, which must be what JSON can hold."""
        stack = json.loads(json.dumps(stack))
        if self.stack != stack:
            self.stack, self.lost, self.killed = stack, {}, {}
            self.write()

    def at(self, item):
        """``item`` is at work from now on; None: nothing is."""
        os.pwrite(self._now, (item or "").encode()[:_MOST_BYTES].ljust(_MOST_BYTES), 0)

    def lose(self, why):
        """What is at work is lost, and nothing is at work."""
        self.lost[self.now] = why
        self.write()
        self.at(None)

    def leave_if_lost(self, error):
        """Ends the process, noting ``error``, when after it the GPU does not answer."""
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            self.lose(f"lost the GPU: {type(error).__name__}: {error}".split("\n")[0][:200])
            sys.stdout.flush()
            os._exit(GPU_LOST)


def run(command, path, patience):
    """Runs a process that keeps :class:`Notes` in ``path`` until it ends by itself; its exit code.

    Args:
        command: started again while each time something more was lost.
        path: of the notes; they stay, so that what was lost is not tried again by the next run.
        patience: seconds after which a process that is at the same thing still is killed.
    """
    before = Notes(path)
    if before.now is not None:  # the last run was ended from outside
        before.killed[before.now] = before.killed.get(before.now, 0) + 1
        if before.killed[before.now] >= MOST_KILLED:
            before.lose(f"was at work {MOST_KILLED} times when the run was ended")
        before.write()
    before.at(None)
    while True:
        code, hung = _wait(subprocess.Popen(command), before, patience)
        before = Notes(path)
        again = before.now is not None and (hung or code != 0)
        if again:
            before.lose(f"no answer in {patience:g} s" if hung else f"the process ended with {code}")
        if not again and code != GPU_LOST:
            return 1 if hung else code
        item, why = list(before.lost.items())[-1]
        print(f"{item}: {why}; going on without it", flush=True)


def _wait(process, notes, patience):
    """(exit code, whether it had to be killed)."""
    began = time.time()
    while True:
        try:
            return process.wait(timeout=0.2), False
        except subprocess.TimeoutExpired:
            if time.time() - max(began, notes.changed()) > patience:
                process.kill()
                return process.wait(), True
        except BaseException:  # Ctrl-C and the like: the process must not outlive this one
            process.kill()
            raise
