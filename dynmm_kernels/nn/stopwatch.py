"""How long a call takes on the device it runs on, its backward pass included; nothing waits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from .chooser import Clock, Trial


class HostClock:
    """For work that is done when the call returns."""

    mark = staticmethod(time.perf_counter)

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class DeviceClock:
    """Events on the current stream, to be asked later whether they have come."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        if not (end.query() and begin.query()):
            return None
        return begin.elapsed_time(end) / 1e3


_HOST = HostClock()


def clock_of(device: torch.device) -> Clock | None:
    """None: nothing tells the time there."""
    if device.type == "cpu":
        return _HOST
    return DeviceClock(device) if device.type == "cuda" else None


def follow_backward(trial: Trial, outputs: Iterable[Any], inputs: Sequence[Tensor]) -> None:
    """Measures the backward pass as well, and closes the trial.

    It begins where the first gradient reaches an output. It ends where what made an input is to go
    on, or, where inputs have no graph, with the whole pass. What is behind the fusion is then part
    of it, whichever way the fusion runs. Without a graph the trial is closed now; without a
    backward pass, or for a second one, nothing is recorded.
    """
    nodes = [y.grad_fn for y in outputs if isinstance(y, Tensor) and y.grad_fn is not None]
    if not nodes:
        trial.close()
        return
    state = ["ahead"]

    def begin(*_: Any) -> None:
        if state[0] == "ahead":
            state[0] = "running"
            trial.start()
            Variable._execution_engine.queue_callback(end)

    def end(*_: Any) -> None:
        if state[0] == "running":
            state[0] = "over"
            trial.stop()
            trial.close()

    for node in nodes:
        node.register_prehook(begin)
    for tensor in inputs:
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(end)
