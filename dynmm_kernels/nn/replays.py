"""How a recorded call runs again: as a CUDA graph, or eagerly, for tests and for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..functional import tree


class Replay(Protocol):
    """What `Capture` needs to run a call again on new data in the same tensors.

    Recorded calls of one `Replay` may share memory: the caller copies inputs in, replays and
    copies outputs out before the next one.
    """

    def record(self, run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        """A call that does what `run` does, to what its tensors hold by then.

        It returns the same tensors every time. Whatever cannot be recorded raises here.
        """

    def follow(self, device: torch.device) -> None:
        """Work that is enqueued from here on runs behind the last replay, on any stream."""

    def finish(self, device: torch.device) -> None:
        """Waits for the last replay, so that its memory can be freed."""


class EagerReplay:
    """Runs the call again: all of a capture but the graph, on any device."""

    def record(self, run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        output = run()
        kept, _ = tree.flatten(output)

        def play() -> Any:
            for old, new in zip(kept, tree.flatten(run())[0], strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)
            return output

        return play

    def follow(self, device: torch.device) -> None:
        pass

    def finish(self, device: torch.device) -> None:
        pass


class CudaGraphReplay:
    """CUDA graphs that share one pool of memory, as they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._aborted: list[torch.cuda.CUDAGraph] = []
        self._sides: dict[torch.device, torch.cuda.Stream] = {}  # graphs of a pool share one
        self._lasts: dict[torch.device, torch.cuda.Stream] = {}  # where the last replay went

    def record(self, run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        if device.type != "cuda":
            raise ValueError(f"CUDA graphs need inputs on a GPU; got {device}")
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            if device not in self._sides:
                self._sides[device] = torch.cuda.Stream()
            side = self._sides[device]
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            side.wait_stream(current)
            graph = torch.cuda.CUDAGraph()
            try:
                # Once more around, for torch.cuda.graph does not leave its stream if it fails.
                with torch.cuda.stream(side):
                    run()  # libraries choose their kernels and load them
                    # A workspace of cuBLAS must come from the pool, and nobody else may get it.
                    torch._C._cuda_clearCublasWorkspaces()
                    with torch.cuda.graph(
                        graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
                    ):
                        output = run()
            except BaseException:
                self._pool = None  # of what an aborted capture left, nothing is used again
                del self._sides[device]
                self._aborted.append(graph)  # the allocator may go on asking it
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
                current.wait_stream(side)

        def play() -> Any:
            graph.replay()
            return output

        return play

    def follow(self, device: torch.device) -> None:
        current, last = torch.cuda.current_stream(device), self._lasts.get(device)
        if last is not None and last != current:
            current.wait_stream(last)
        self._lasts[device] = current

    def finish(self, device: torch.device) -> None:
        last = self._lasts.get(device)
        if last is not None:
            last.synchronize()
