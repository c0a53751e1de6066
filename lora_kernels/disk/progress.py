"""A bar with what is done, speed and time left: rewritten in place on a terminal, a line now and then elsewhere."""

import sys
import time

GB = 1e9


class Progress:
    """``advance(count)`` moves it. ``start``: what an earlier run had done, left out of the speed. ``unit``: what is
    counted, bytes for ``"GB"``."""

    def __init__(self, label, total, start=0, stream=None, quiet=False, unit="GB"):
        self.unit, self._scale, self._digits = unit, GB if unit == "GB" else 1, 2 if unit == "GB" else 0
        self.label, self.total, self.position, self.start = label, max(total, 1), start, start
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._terminal = self.stream.isatty()
        self._began = time.monotonic()
        self._shown = self._began if self._terminal else self._began + 5

    def advance(self, count):
        self.position += count
        now = time.monotonic()
        if not self.quiet and now - self._shown >= (0.1 if self._terminal else 10):
            self._shown = now
            self._show(now)

    def _show(self, now):
        speed = (self.position - self.start) / max(now - self._began, 1e-9)
        left = (self.total - self.position) / speed if speed else float("inf")
        filled = int(24 * self.position / self.total)
        line = (
            f"{self.label} [{'#' * filled}{'.' * (24 - filled)}] {self._amount(self.position)}/"
            f"{self._amount(self.total)} {self.unit}  {speed / self._scale:.2f} {self.unit}/s  {_clock(left)} left"
        )
        self.stream.write(f"\r{line}\x1b[K" if self._terminal else line + "\n")
        self.stream.flush()

    def _amount(self, count):
        return f"{count / self._scale:.{self._digits}f}"

    def close(self):
        if self.quiet:
            return
        seconds = time.monotonic() - self._began
        done = self.position - self.start
        speed = done / self._scale / max(seconds, 1e-9)
        line = f"{self.label}: {self._amount(done)} {self.unit} in {_clock(seconds)} ({speed:.2f} {self.unit}/s)"
        self.stream.write(f"\r{line}\x1b[K\n" if self._terminal else line + "\n")
        self.stream.flush()


def _clock(seconds):
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
