"""The CUDA kernels replayed from a CUDA graph: forward and backward without Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.providers.ours import Ours
from benchmarks.suites.op import OpInputs, OpSuite
from benchmarks.task import Task


@dataclass(frozen=True)
class _Replay(Task):
    """`forward` replays both passes; what `backward` returns has been computed by then."""

    found: tuple[Tensor, ...] = ()

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.found


class OursGraph:
    name = "ours-cuda-graph"
    title = "attbalance_ext, backend cuda, replayed from a CUDA graph"

    def task(self, suite: str, inputs: OpInputs) -> Task | None:
        live = Ours("cuda").task(suite, inputs)
        if live is None:
            return None
        gradients = OpSuite().gradients(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            live.backward(live.forward(), gradients)  # a first call may load kernels, which a capture may not
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = live.forward()
            found = live.backward(outputs, gradients)

        def replay() -> Sequence[Tensor]:
            graph.replay()
            return outputs

        return _Replay(replay, live.inputs, modes=("both",), found=found)
