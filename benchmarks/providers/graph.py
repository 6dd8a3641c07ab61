"""The CUDA kernels replayed from a CUDA graph: forward and backward without Python."""

from __future__ import annotations

import torch

from benchmarks.providers import ours
from benchmarks.suites.op import OpInputs
from benchmarks.task import Results, Task


def op(inputs: OpInputs) -> Task:
    live = ours.op("cuda")(inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        live.results()  # a first call may load kernels, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = live.results()

    def results() -> Results:
        graph.replay()
        return found

    return Task(results, {"both": lambda: graph.replay}, allocates=False)
