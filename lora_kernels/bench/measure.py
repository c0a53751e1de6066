"""Runs cases and describes the machine that they ran on."""

import dataclasses
import datetime
import pathlib
import statistics
import subprocess

import torch

from ..env import collect as environment
from .cases import Case
from .contenders import contenders
from .timing import interleaved


@dataclasses.dataclass
class Result:
    """Best and median seconds a call of each contender."""

    case: Case
    best: dict[str, float]
    median: dict[str, float]

    def ratio(self, name, other="base"):
        """Best over best; None where one of the two did not run."""
        if name not in self.best or other not in self.best:
            return None
        return self.best[name] / self.best[other]

    def as_json(self):
        values = dataclasses.asdict(self)
        return {"name": self.case.name, **values, "limit": self.case.limit, "ours/base": self.ratio("ours")}


def measure(case, device="cpu", seconds=1.0):
    """A :class:`Result`. PEFT's ``merge`` and the like are called as a user calls them."""
    with contenders(case, device) as runs:
        calls = 200 if case.op == "overhead" else 1
        times = interleaved(runs, device, seconds, calls=calls)
    best = {name: min(found) for name, found in times.items()}
    return Result(case, best, {name: statistics.median(found) for name, found in times.items()})


def facts():
    """What a figure must be read with."""
    found = environment()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "versions": found["versions"],
        "cpu": found["cpu"],
        "gpus": found["gpus"],
        "backends": found["backends"],
    }


def _commit():
    """Of the checkout that this package runs from; None elsewhere."""
    folder = pathlib.Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=folder, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if dirty else "")
