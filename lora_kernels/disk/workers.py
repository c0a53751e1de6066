"""Blocks side by side: each thread reads, edits and writes its own, so that no block waits for the threads of another.

Inside a worker torch uses one thread: the rows of a block are too few for several to meet after each step.
"""

import contextlib
import queue
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch


class Workers:
    """As many threads as torch has, for the time of a ``with``; their number is ``count``."""

    def __init__(self):
        self.count = max(1, torch.get_num_threads())

    def __enter__(self):
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # a worker's call counts for threads that start later, too

    @contextlib.contextmanager
    def together(self):
        """For work of the caller's own, while no block is under way: all threads, and so the same bits each time."""
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def run(self, function, items, make_state):
        """Yields ``function(state, item)`` of every item, in order; a little ahead of who asks.

        Args:
            make_state: called without arguments for each of the states, which are lent to one call at a time.

        Raises:
            What the first item that fails does, when it is its turn. The calls under way have ended then.
        """
        states, ahead = queue.SimpleQueue(), deque()
        for _ in range(self.count):
            states.put(make_state())

        def call(item):
            state = states.get()
            try:
                return function(state, item)
            finally:
                states.put(state)

        try:
            for item in items:
                ahead.append(self._pool.submit(call, item))
                if len(ahead) > 2 * self.count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
            for future in ahead:
                with contextlib.suppress(BaseException):
                    future.result()
