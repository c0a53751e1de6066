"""A progress bar where tqdm is installed, and nothing where it is not."""

import sys


def bar(iterable, label):
    try:
        from tqdm import tqdm
    except ImportError:
        return iterable
    seconds = 0.1 if sys.stderr.isatty() else 10  # in a log a line now and then
    return tqdm(iterable, desc=f"{label:<22}", leave=False, dynamic_ncols=True, mininterval=seconds)
