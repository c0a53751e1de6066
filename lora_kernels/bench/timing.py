"""Timing several ways to do one job, in turns, so that all of them see the same machine."""

import time

import torch


def interleaved(contenders, device="cpu", seconds=1.0, min_rounds=10, max_rounds=300, calls=1, clock=time.perf_counter):
    """{name: [seconds a call, of each round]}; ``contenders`` maps a name to a function without arguments.

    All run once untimed, then in turns until ``seconds`` have passed. A round makes ``calls`` calls in a row (for
    work shorter than the clock is fine). Each round starts with another contender, so that none always follows
    the same one. CUDA work is waited for. ``clock``: ``time.process_time`` counts what the threads of the process ran,
    for a machine that others use too.
    """
    wait = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    for run in contenders.values():
        run()
    wait()
    times = {name: [] for name in contenders}
    order = list(contenders.items())
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (time.perf_counter() < end and rounds < max_rounds):
        for name, run in order:
            start = clock()
            for _ in range(calls):
                run()
            wait()
            times[name].append((clock() - start) / calls)
        order.append(order.pop(0))
        rounds += 1
    return times
