"""Where a small batch spends its time: launches, allocations and waits, and the host's phases.

At N=128 a GPU waits for the host. Counted and timed is the routed model, and beside it the bare
calls of its gate and branches: the difference is what routing costs.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.harvest import FAILED, Harvest, begin
from benchmarks.problem import Problem, Setting
from dynmm_kernels import ops
from dynmm_kernels.ops.backends import Kernels
from dynmm_kernels.ops.schemas import OPS

ROWS = 128
# imdb takes the general way, for its cheap branch selects an input; trivial the short one.
WORKLOADS = ("imdb", "trivial")
COUNTED = {
    "launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy", "cudaMemsetAsync"),
    "waits": ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize"),
}
Span = tuple[str, float, float]  # what, begin, end, in us


class Clock:
    """Seconds of the host, by phase; a phase within another does not count twice."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.inside: list[str] = []
        self.since = 0.0

    def enter(self, phase: str) -> None:
        self._turn()
        self.inside.append(phase)

    def leave(self) -> None:
        self._turn()
        self.inside.pop()

    def _turn(self) -> None:
        now = time.perf_counter()
        if self.inside:
            self.spent[self.inside[-1]] += now - self.since
        self.since = now

    def around(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            self.enter(phase)
            try:
                return call(*arguments, **named)
            finally:
                self.leave()

        return timed


@contextmanager
def phases(clock: Clock, modules: dict[str, nn.Module]) -> Iterator[None]:
    """The clock sees the user's modules, every op and the wait for the counts."""
    with ExitStack() as stack:
        for phase, module in modules.items():
            for hook in (
                module.register_forward_pre_hook(lambda *_, p=phase: clock.enter(p)),
                module.register_forward_hook(lambda *_: clock.leave()),
            ):
                stack.callback(hook.remove)
        serving = ops.serving()
        timed = {op: clock.around(op, getattr(serving, op)) for op in OPS}
        stack.enter_context(ops.using(Kernels(timed)))
        for phase, kind, name in (
            ("wait", torch.cuda.Event, "synchronize"),
            ("backward", torch.Tensor, "backward"),
        ):
            before = getattr(kind, name)
            setattr(kind, name, clock.around(phase, before))
            stack.callback(setattr, kind, name, before)
        yield


def phases_us(call: Callable[[], Any], modules: dict[str, nn.Module], times: int) -> dict[str, Any]:
    """Medians; "rest" is the library's own Python, in training the loss, too."""
    seen: dict[str, list[float]] = defaultdict(list)
    for _ in range(times):
        clock = Clock()
        with phases(clock, modules):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.around("rest", call)()
        for phase, seconds in clock.spent.items():
            seen[phase].append(1e6 * seconds)
    return {phase: round(median(each), 1) for phase, each in seen.items()}


def counts(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Of one call: launches, copies, waits, allocations; how long the GPU stood idle."""
    gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    with profile(activities=activities, profile_memory=True) as recorded:
        call()
        if gpu:
            torch.cuda.synchronize()
    names = Counter(event.name for event in recorded.events())
    found: dict[str, Any] = {
        what: sum(names[name] for name in calls) for what, calls in COUNTED.items()
    }
    if gpu:
        found["waits"] -= 1  # this function's own
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    events = recorded.profiler.kineto_results.events()
    memory = [e for e in events if e.name() == "[memory]" and e.device_type() == wanted]
    found["allocations"] = sum(event.nbytes() > 0 for event in memory)
    found["ops"] = sum(number for name, number in names.items() if "::" in name)
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA
    ]
    return found | idle_us(spans)


def idle_us(spans: list[Span]) -> dict[str, float]:
    """Between the first and the last work of the GPU, and after what it sent to the host."""
    if not spans:
        return {}
    idle = after_copy = 0.0
    spans = sorted(spans, key=lambda span: span[1])
    last, end = spans[0][0], spans[0][2]
    for name, begins, ends in spans[1:]:
        gap = max(begins - end, 0.0)
        idle += gap
        after_copy += gap * ("DtoH" in last)
        if ends >= end:
            last, end = name, ends
    return {"idle_us": idle, "idle_after_copy_us": after_copy, "gpu_us": end - spans[0][1]}


def profile_of(workload: str, training: bool, harvest: Harvest) -> None:
    problem = Problem.build(Setting(workload, ROWS, 0.5, training, harvest.device))
    rows = problem.rows()
    modules = {"gate": problem.gate}
    modules |= {f"branch {name}": expert.module for name, expert in problem.experts.items()}
    named = {"workload": workload, "n": ROWS, "training": training}
    with torch.set_grad_enabled(training):
        for row in ("routed", "bare"):
            for _ in range(2 if harvest.rehearsal else 10):
                rows[row].call()
            harvest.write(**named, row=row, **counts(rows[row].call, harvest.device))
        spent = phases_us(rows["routed"].call, modules, 3 if harvest.rehearsal else 100)
        harvest.write(**named, row="phases", us=spent)


def main(harvest: Harvest) -> int:
    fine = True
    for workload in WORKLOADS:
        for training in (False, True):
            what = f"{workload} {'training' if training else 'eval'}"
            fine &= harvest.attempt(what, lambda w=workload, t=training: profile_of(w, t, harvest))
    return 0 if fine else FAILED


if __name__ == "__main__":
    sys.exit(main(begin("host")))
