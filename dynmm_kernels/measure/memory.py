"""Bytes: the heap, the peak of a call's allocations, what autograd keeps for the backward."""

import ctypes
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def keep_heap() -> bool:
    """Makes the C library keep freed memory, as the caching allocator does on a GPU.

    By default glibc gives large tensors back to the system at once, and faulting their pages in
    again, a fifth of the time of a stack of convolutions, swings with whatever else the machine
    does. Returns whether the C library knows the settings.
    """
    trim_threshold, mmap_max = -1, -4  # numbers of the parameters, from malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most that ``run()`` held at one time, above what was allocated before it.

    Counts what goes through PyTorch's allocator. On the CPU that leaves out the scratch space of
    matrix libraries, and memory from before that is freed inside counts as negative.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def saved_bytes(forward: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """What autograd saves during ``forward()``: every storage once.

    ``known`` tensors (parameters, inputs) are there in any case and are not counted.
    """
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(saved.values())
