"""Timing on a GPU: contenders in turns, eager and inside CUDA graphs, by CUDA events."""

import statistics

import torch


def graph_of(run, calls):
    """A CUDA graph of ``calls`` calls in a row, after a warm-up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph


def graphs_of(runs, calls, at=lambda name: None):
    """({name: graph}, {name: why there is none}) of :func:`graph_of`: one that can not be captured hides no other.
    ``at`` is told each name first."""
    graphs, absent = {}, {}
    for name, run in runs.items():
        at(name)
        try:
            graphs[name] = graph_of(run, calls)
        except Exception as error:
            absent[f"{name} in a CUDA graph"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return graphs, absent


def _seconds(run):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(runs, calls, *, graphs=True, seconds=0.3, min_rounds=5, at=lambda name: None):
    """{name: seconds a call, the median of the rounds}.

    Args:
        runs: ``{name: function}``; a function makes one call, on the next copy of the weight. Or a CUDA graph of
            ``calls`` calls.
        calls: calls in a row in each round: at least as many as there are copies of the weight.
        graphs: time the replay of a CUDA graph of these calls instead of the calls themselves.
        seconds: time for all contenders together.
        at: is told the name of each contender before its turn.
    """

    def round_of(run):
        if not isinstance(run, torch.cuda.CUDAGraph):
            if not graphs:
                return lambda: [run() for _ in range(calls)] and None
            run = graph_of(run, calls)
        return run.replay

    rounds_of = {name: round_of(run) for name, run in runs.items()}
    for name, run in rounds_of.items():
        at(name)
        run()
        torch.cuda.synchronize()
    times, order, spent = {name: [] for name in runs}, list(rounds_of.items()), 0.0
    while spent < seconds or len(times[order[0][0]]) < min_rounds:
        for name, run in order:
            at(name)
            times[name].append(_seconds(run) / calls)
            spent += times[name][-1] * calls
        order.append(order.pop(0))
    return {name: statistics.median(found) for name, found in times.items()}
