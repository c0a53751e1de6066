"""The bar: bytes, speed and time left, on a terminal and in a log; a continued run counts only its own bytes."""

import io

import pytest

from lora_kernels.disk import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_on_a_terminal(clock):
    stream = Terminal()
    bar = progress.Progress("merge", 8e9, 2e9, stream)
    clock[0] += 2
    bar.advance(1e9)  # 0.5 GB/s, 5 GB to go
    assert stream.getvalue() == "\rmerge [" + "#" * 9 + "." * 15 + "] 3.00/8.00 GB  0.50 GB/s  0:10 left\x1b[K"
    bar.advance(1e9)  # too soon for another
    assert stream.getvalue().count("\r") == 1
    clock[0] += 4000
    bar.advance(1e6)
    assert "2:13:18 left" in stream.getvalue().split("\r")[-1]  # hours
    bar.close()
    assert stream.getvalue().endswith("merge: 2.00 GB in 1:06:42 (0.00 GB/s)\x1b[K\n")


def test_in_a_log(clock):
    stream = io.StringIO()
    bar = progress.Progress("verify", 4e9, stream=stream)
    for _ in range(30):
        clock[0] += 1
        bar.advance(1e8)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # after 15 seconds, then every 10
    assert lines[0].endswith("1.50/4.00 GB  0.10 GB/s  0:25 left")
    assert "\r" not in stream.getvalue()


def test_quiet(clock):
    stream = Terminal()
    bar = progress.Progress("merge", 10, stream=stream, quiet=True)
    clock[0] += 60
    bar.advance(10)
    bar.close()
    assert stream.getvalue() == ""
