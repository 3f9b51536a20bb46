"""What the machine can do, and beside it every op, without the host: replayed from a CUDA graph.

The arguments rotate over more memory than the L2 cache holds. Ours and plain PyTorch take turns.
"""

import math
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.cases import Case, cases, difference, moved_bytes
from benchmarks.gpu.harvest import FAILED, WRONG, Harvest, begin
from dynmm_kernels import ops
from dynmm_kernels.measure.timing import ONCE, Effort, interleave
from dynmm_kernels.ops.schemas import OPS

CALLS = 20  # in a graph, at least
ROOFS = Effort(seconds=0.3, rounds=(9, 30), sample=5e-3)
REPLAYS = Effort(seconds=0.3, rounds=(7, 15), sample=2e-3)


def graph_of(calls: list[Callable[[], Any]], device: str) -> Callable[[], object]:
    """One call that does them all: on a GPU without the host."""
    if device == "cpu":
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # so that results rotate, too

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def roofs(harvest: Harvest) -> None:
    device, small = harvest.device, harvest.rehearsal
    source = torch.randn(2**14 if small else 2**29, device=device)
    target, tiny = torch.empty_like(source), torch.zeros(5, dtype=torch.int32, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "launch": tiny.zero_,
        "pageable read": tiny.tolist,
    }
    if device == "cuda":
        pinned, event = torch.empty(5, dtype=torch.int32, pin_memory=True), torch.cuda.Event()

        def read() -> None:
            pinned.copy_(tiny, non_blocking=True)
            event.record()
            event.synchronize()

        calls["pinned read"] = read
        calls["graph of 100 empty launches"] = graph_of(
            [lambda: torch.cuda._sleep(0)] * 100, device
        )
    seconds = interleave(calls, ONCE if small else ROOFS, device)
    rate = 2 * source.nbytes / median(seconds["copy"]) / 1e9
    harvest.write(roof=f"copy of {source.nbytes / 1e9:.1f} GB", gb_per_s=rate)
    for name in [name for name in calls if name != "copy"]:
        harvest.write(roof=name, us=1e6 * median(seconds[name]))


def race(case: Case, harvest: Harvest, wrong: list[Case]) -> None:
    """Ours and plain PyTorch; a case that gives a wrong result joins `wrong` and is not timed."""
    ours = getattr(ops.kernels(), case.op)
    arguments = case.make()
    results = ours(*arguments)
    size = moved_bytes(arguments, results)
    named = {"op": case.op, "case": case.title, "bytes": size}
    wanted = OPS[case.op].reference(*arguments)
    problem = difference(case.op, results, wanted)
    if problem:
        harvest.write(**named, wrong=problem[:500])
        wrong.append(case)
        return
    del results, wanted
    sets = [arguments, *(case.make() for _ in range(rotation(size, harvest) - 1))]
    turns = [sets[i % len(sets)] for i in range(2 if harvest.rehearsal else max(CALLS, len(sets)))]
    contestants = {}
    for name, call in (("ours", ours), ("torch", case.torch)):
        if call is None:
            continue

        def prepare(name=name, call=call) -> None:
            calls = [lambda a=a: call(*a) for a in turns]
            contestants[name] = graph_of(calls, harvest.device)

        harvest.attempt(f"{case.op} {case.title}: graph of {name}", prepare)
    seconds = interleave(contestants, ONCE if harvest.rehearsal else REPLAYS, harvest.device)
    us = {name: 1e6 * median(rounds) / len(turns) for name, rounds in seconds.items()}
    if "ours" in us:
        harvest.write(
            **named, us=us["ours"], gb_per_s=size / us["ours"] / 1e3, torch_us=us.get("torch")
        )


def rotation(size: int, harvest: Harvest) -> int:
    """Sets of arguments until twice the L2 cache is full."""
    if harvest.rehearsal:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(math.ceil(2 * cache / max(size, 1)), 2), CALLS)


def main(harvest: Harvest) -> int:
    torch.manual_seed(0)
    fine = harvest.attempt("roofs", lambda: roofs(harvest))
    wrong: list[Case] = []
    with torch.no_grad():
        for case in cases(harvest.device, small=harvest.rehearsal):
            what = f"{case.op} {case.title}"
            fine &= harvest.attempt(what, lambda case=case: race(case, harvest, wrong))
            if harvest.device == "cuda":
                torch.cuda.empty_cache()
    if wrong:
        return WRONG
    return 0 if fine else FAILED


if __name__ == "__main__":
    sys.exit(main(begin("roofs")))
