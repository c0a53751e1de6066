"""What holds of a call in a CUDA graph and on several streams."""

import torch


def replay_reads_anew(run, adapter):
    """A captured call reads an adapter that was changed after the capture."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    adapter.mul_(-2.0)
    expected = run()
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def streams_give_the_bits_of_one(calls):
    """Calls on a stream each, at once, give what they give one after the other."""
    expected = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(20):
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected[i % len(calls)]) for i, result in enumerate(found))
