"""A bar with bytes, speed and time left: one line that is rewritten on a terminal, a line now and then elsewhere."""

import sys
import time

GB = 1e9


class Progress:
    """``advance(nbytes)`` moves it. ``start``: bytes that an earlier run had done, left out of the speed."""

    def __init__(self, label, total, start=0, stream=None, quiet=False):
        self.label, self.total, self.position, self.start = label, max(total, 1), start, start
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._terminal = self.stream.isatty()
        self._began = time.monotonic()
        self._shown = self._began if self._terminal else self._began + 5

    def advance(self, nbytes):
        self.position += nbytes
        now = time.monotonic()
        if not self.quiet and now - self._shown >= (0.1 if self._terminal else 10):
            self._shown = now
            self._show(now)

    def _show(self, now):
        speed = (self.position - self.start) / max(now - self._began, 1e-9)
        left = (self.total - self.position) / speed if speed else float("inf")
        filled = int(24 * self.position / self.total)
        line = (
            f"{self.label} [{'#' * filled}{'.' * (24 - filled)}] {self.position / GB:.2f}/{self.total / GB:.2f} GB"
            f"  {speed / GB:.2f} GB/s  {_clock(left)} left"
        )
        self.stream.write(f"\r{line}\x1b[K" if self._terminal else line + "\n")
        self.stream.flush()

    def close(self):
        if self.quiet:
            return
        seconds = time.monotonic() - self._began
        done = (self.position - self.start) / GB
        line = f"{self.label}: {done:.2f} GB in {_clock(seconds)} ({done / max(seconds, 1e-9):.2f} GB/s)"
        self.stream.write(f"\r{line}\x1b[K\n" if self._terminal else line + "\n")
        self.stream.flush()


def _clock(seconds):
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
