"""Capture: branches recorded once per number of rows and replayed, where launching them costs most.

Rows are rounded up to a bucket: a power of two, or `max_rows`. They are copied into the tensors
that a recording reads, and one of them into the places left over; it is replayed, and the rows that
were wanted are copied out. What cannot be replayed runs as ever, and is counted with the reason.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..functional import autograd, tree
from .arguments import Arguments
from .branch import Branch
from .recording import Call, Recording
from .replays import CudaGraphReplay, Replay
from .watch import Refused, Watch, observe

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class CaptureReport(NamedTuple):
    """What became of the calls of the branches since `capture`.

    Attributes:
        hits: calls that were replayed.
        misses: calls that ran eagerly.
        reasons: why, and how many each.
        rows: that were wanted of the replays.
        padding: rows that these processed beyond.
        recorded: how many recordings were made; more than are held where parameters moved.
        held: by branch, the buckets of its recordings.
    """

    hits: int
    misses: int
    reasons: dict[str, int]
    rows: int
    padding: int
    recorded: int
    held: dict[str, tuple[int, ...]]


class Capture:
    """The recordings of one fusion, made by `RoutedFusion.capture`; copies of the fusion have none.

    Raises:
        ValueError: a branch that cannot be replayed, and why; no GPU and no `replay`.
    """

    def __init__(
        self, branches: Sequence[Branch], max_rows: int, replay: Replay | None = None
    ) -> None:
        if type(max_rows) is not int or max_rows < 1:
            raise ValueError(f"capture: max_rows must be a positive integer; got {max_rows!r}")
        if replay is None and not torch.cuda.is_available():
            raise ValueError(
                "capture: torch sees no GPU to record graphs on; replay=EagerReplay() does all but "
                "that, for tests"
            )
        self.max_rows = max_rows
        self.replay = CudaGraphReplay() if replay is None else replay
        self.lock = threading.Lock()  # recordings share memory
        self.caller: int | None = None  # the thread in which a recording calls a branch
        self.hits = self.rows = self.padding = self.recorded = 0
        self.missed: Counter[tuple[str, str]] = Counter()  # by branch and reason
        self._branches: list[tuple[Branch, BranchCapture]] = []
        for branch in branches:
            with _refusals_raised(branch):
                own = BranchCapture(self, branch)
                own.check(branch)
                self._branches.append((branch, own))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def record(self, example: Arguments) -> None:
        """Records every bucket of every branch, the largest first, for inputs like these.

        Raises:
            ValueError: a branch that cannot be recorded, and why; an example without samples.
        """
        if not example.num_rows:
            raise ValueError("capture: the example must hold tensors of at least one sample")
        sizes = {min(1 << i, self.max_rows) for i in range(self.max_rows.bit_length() + 1)}
        for branch, own in self._branches:
            with _refusals_raised(branch):
                arguments = branch.arguments(example)
                rows = arguments.rows_at_hand()
                call = Call(arguments.whole(example.num_rows) if rows else (), rows)
                for size in sorted(sizes, reverse=True):
                    own.record(branch, call, size)

    def attach(self) -> None:
        """From here on the branches are replayed."""
        for branch, own in self._branches:
            branch.replay = own

    def release(self) -> None:
        """Frees the recordings; the branches run eagerly again."""
        with self.lock:
            for branch, own in self._branches:
                own.clear()
                if branch.replay is own:
                    branch.replay = None

    def counts(self) -> tuple[int, int]:
        """Hits and misses so far."""
        return self.hits, self.missed.total()

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        """Hits and misses beyond those `before`."""
        hits, misses = self.counts()
        return hits - before[0], misses - before[1]

    def read(self) -> CaptureReport:
        """The counts so far; they are the host's, so nothing is waited for."""
        reasons = {f"{label} {reason}": count for (label, reason), count in self.missed.items()}
        held = {str(branch.name): own.buckets() for branch, own in self._branches}
        return CaptureReport(*self.counts(), reasons, self.rows, self.padding, self.recorded, held)


class BranchCapture:
    """The recordings of one branch, all for inputs of one kind: those it was recorded for first."""

    def __init__(self, capture: Capture, branch: Branch) -> None:
        self._capture = capture
        self._refused: str | None = None  # until `capture` is called again
        self._restart(branch)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _restart(self, branch: Branch) -> None:
        self._recordings: dict[int, Recording] = {}
        self._kind: tuple[Any, ...] | None = None
        self._device: torch.device | None = None
        self._watch = Watch(branch)

    def clear(self) -> None:
        """Frees the recordings."""
        if self._device is not None:
            self._capture.replay.finish(self._device)
        self._recordings = {}

    def buckets(self) -> tuple[int, ...]:
        """Those that are recorded."""
        return tuple(sorted(self._recordings))

    def check(self, branch: Branch) -> None:
        """Raises Refused for a branch that cannot be replayed now."""
        self._watch.check(branch)
        if branch.couples_samples():
            raise Refused("has a BatchNorm over the batch, which padding would change")

    def __call__(
        self, branch: Branch, arguments: Sequence[Any], rows: Sequence[int] | None
    ) -> tuple[Any] | None:
        """The output for `arguments`, or None where the branch must be called.

        Args:
            rows: positions of the per-sample leaves; None where some are Lazy, or not known.
        """
        capture = self._capture
        if torch.compiler.is_compiling() or capture.caller == threading.get_ident():
            return None
        with capture.lock:
            try:
                output, num_rows, size = self._play(branch, arguments, rows)
            except Refused as refusal:
                capture.missed[branch.label, str(refusal)] += 1
                return None
            capture.hits += 1
            capture.rows += num_rows
            capture.padding += size - num_rows
            return (output,)

    def _play(
        self, branch: Branch, arguments: Sequence[Any], rows: Sequence[int] | None
    ) -> tuple[Any, int, int]:
        if torch.is_grad_enabled() or autograd.follows_forward():
            raise Refused("is called with gradients recorded; use torch.no_grad()")
        if is_in_torch_dispatch_mode() or torch.jit.is_tracing():
            raise Refused("is called under a dispatch mode or a tracer")
        if self._refused is not None:
            raise Refused(self._refused)
        if self._watch.changed():
            self.clear()
            self._restart(branch)
        self._watch.check(branch)
        call, limit = Call(arguments, rows), self._capture.max_rows
        if not call.num_rows:
            raise Refused("is called with no rows, so there is none to pad with")
        if call.num_rows > limit:
            raise Refused(f"has more than max_rows={limit} rows")
        if self._kind is not None and call.kind != self._kind:
            raise Refused("is called with another kind of inputs than it was recorded for")
        size = min(1 << (call.num_rows - 1).bit_length(), limit)
        if size not in self._recordings:
            try:
                self.record(branch, call, size)
            except Refused as refusal:
                self._refused = str(refusal)
                warnings.warn(
                    f"capture: {branch.label} {refusal}; so it runs eagerly", stacklevel=2
                )
                raise
        self._capture.replay.follow(call.device)
        return self._recordings[size].play(call), call.num_rows, size

    def record(self, branch: Branch, call: Call, size: int) -> None:
        """Records the branch for `size` rows like those of `call`.

        Raises:
            Refused: it cannot be recorded. An exception of the branch itself is raised as it is.
        """
        self.check(branch)
        for leaf in call.leaves:
            if isinstance(leaf, Tensor) and leaf.device != call.device:
                raise Refused(f"reads a tensor on {leaf.device}, whose value would be kept")
            if not isinstance(leaf, (Tensor, *_CONSTANTS)):
                raise Refused(f"reads a {type(leaf).__name__}, which may change unseen")
        with torch.inference_mode(False), torch.no_grad():
            inputs = call.buffers(size)
            arguments = tree.unflatten(list(inputs), call.spec)

            def run() -> Any:
                with torch.inference_mode(False), torch.no_grad(), _no_autocast_cache():
                    return self._call(branch, arguments)

            held = [leaf for leaf in inputs if isinstance(leaf, Tensor)]
            output, read = observe(branch, run, held, call.device)
            for leaf in tree.flatten(output)[0]:
                if isinstance(leaf, Tensor) and (not leaf.ndim or leaf.shape[0] != size):
                    raise Refused(f"returns {list(leaf.shape)} for {size} rows")
            del output
            call.fill(inputs)
            try:
                play = self._capture.replay.record(run, call.device)
            except Exception as error:
                message = f"cannot be recorded: {type(error).__name__}: {error}"
                raise Refused(message) from error
        if self._watch.changed():
            if self._recordings:
                raise Refused("replaces buffers whenever the number of rows changes")
            self._watch = Watch(branch)
        self._watch.add(read)
        self._kind, self._device = call.kind, call.device
        self._recordings[size] = Recording(inputs, play)
        self._capture.recorded += 1

    def _call(self, branch: Branch, arguments: Any) -> Any:
        before, self._capture.caller = self._capture.caller, threading.get_ident()
        try:
            return branch.call(arguments)
        finally:
            self._capture.caller = before


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Weights that autocast casts are cast in each replay, for their sources may be written to."""
    keeps = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(keeps)


@contextmanager
def _refusals_raised(branch: Branch) -> Iterator[None]:
    try:
        yield
    except Refused as refusal:
        raise ValueError(f"capture: {branch.label} {refusal}") from refusal.__cause__
