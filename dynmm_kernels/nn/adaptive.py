"""`execution="auto"`: a fusion that learns whether this machine runs it faster masked or routed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..functional import autograd, tree
from .cell import MASKED, ROUTED
from .chooser import Chooser
from .explanation import Explanation
from .settings import Settings
from .stopwatch import clock_of, follow_backward

# What is recorded where no graph is: by the general way, and by the short one.
FORWARD, FLAT = "forward", "plain forward"
NO_GATE = "without the gate"  # a graph that does not lead through it


def hindrance() -> str | None:
    """Why the way must not change from call to call here; None: it may."""
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if autograd.follows_forward() or torch._C._are_functorch_transforms_active():
        return "a transform of torch.func or forward-mode derivatives are in use"
    if torch.is_grad_enabled() and (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch._C._current_graph_task_id() != -1
    ):
        return "a checkpoint may run it again and must find the same graph"
    return None


def run_faster(
    chooser: Chooser,
    recorded: str,
    rows: int,
    counts: tuple[int, ...],
    like: Tensor,
    ways: tuple[Callable[[], Any], Callable[[], Any]],
    follow: Callable[[Any], tuple[Iterable[Any], Sequence[Tensor]]] | None = None,
) -> Any:
    """The result of one of two ways, by turns or the faster one, and its time for the chooser.

    Args:
        recorded: FORWARD, or how the gate learns.
        rows, counts: N, and the samples of each branch.
        like: a tensor on the device where it runs.
        ways: routed, masked.
        follow: gives outputs and inputs of a result, where a graph is recorded.
    """
    kind, trial = ("cpu" if like.is_cpu else like.device.type, recorded), None
    way = chooser.recall(kind, rows, counts)
    if way is None:
        clock = clock_of(like.device)
        if clock is None:
            chooser.last = f"times are not taken on {kind[0]}"
            return ways[0]()
        way, trial = chooser.choose(kind, rows, counts, clock)
        if trial is not None:
            trial.start()
    if way == ROUTED:
        result = ways[0]()
    else:
        problem = None
        try:
            result = ways[1]()
        except Exception as error:  # such as of a branch that is not made for every sample
            problem = f"masked execution failed with {type(error).__name__}: {error}"
        if problem is not None:
            result = ways[0]()
            chooser.barred = problem
            warnings.warn(
                f"execution='auto': {problem}; it will be routed from now on. execution='routed' "
                "does not try it",
                stacklevel=2,
            )
            return result
    if trial is not None:
        trial.stop()
        if follow is None or not torch.is_grad_enabled():
            trial.close()
        else:
            follow_backward(trial, *follow(result))
    return result


class Adaptive(Settings):
    """A fusion whose "auto" execution is measured."""

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.chooser = Chooser()

    def explain(self, *inputs: Any, **options: Any) -> Explanation:
        """Runs the fusion once, as it is called otherwise, and says how it ran and why.

        Args:
            inputs, options: those of the call.

        Returns:
            An `Explanation`: what was chosen, measured and predicted; printed, a few lines of text.
        """
        self.chooser.last = f"execution is {self.execution!r}"
        self(*inputs, **options)
        return self._explanation()

    def calibrate(self, *example: Any, rounds: int = 10, **options: Any) -> Explanation:
        """Measures both ways on an example, by turns, so that real calls need not try them.

        In training mode with a graph and its backward pass, else without. Parameters, gradients,
        buffers and random numbers are left as they were. On a GPU it waits for the device at the
        end, which calls never do.

        Args:
            example, options: those of a call. What is learnt holds for batches of about this size
                and these shares of branches, and is the ground of predictions for others.
            rounds: how often each way runs, after once to warm up.

        Raises:
            ValueError: execution is not "auto", or `rounds` is not positive.
        """
        if self.execution != "auto" or type(rounds) is not int or rounds < 1:
            raise ValueError(
                f"{type(self).__name__}.calibrate: wanted execution='auto' and rounds >= 1; got "
                f"execution={self.execution!r} and rounds={rounds!r}"
            )
        chooser = self.chooser
        tensors = [t for t in tree.flatten(example)[0] if isinstance(t, Tensor)]
        chooser.last = None
        with self._undone(tensors), torch.set_grad_enabled(self.training):
            try:
                for i in range(rounds + 1):
                    for way in (ROUTED, MASKED):
                        chooser.forced = way, i > 0
                        self._step(tensors, self(*example, **options))
            finally:
                chooser.forced = None
        for device in {t.device for t in tensors if t.is_cuda}:
            torch.cuda.synchronize(device)
        return self._explanation()

    def auto_state(self) -> dict[str, Any]:
        """What was learnt about this machine: numbers, strings, lists, for JSON or `torch.save`.

        It is no part of `state_dict`, for it belongs to the machine and not to the model.
        """
        return self.chooser.state()

    def load_auto_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `auto_state` returned, in place of what was learnt since.

        Raises:
            ValueError: it is something else.
        """
        self.chooser.load(state)

    def _explanation(self) -> Explanation:
        return Explanation.of(self.chooser, self._part_names())

    def _part_names(self) -> list[str]:
        """What the counts that the chooser gets are counts of."""
        raise NotImplementedError

    def _step(self, inputs: Sequence[Tensor], output: Any) -> None:
        """The backward pass of a call, without leaving gradients."""
        wanted = [t for t in (*self.parameters(), *inputs) if t.requires_grad]
        leaves = [y for y in tree.flatten(output)[0] if isinstance(y, Tensor) and y.requires_grad]
        if wanted and leaves:
            ones = [torch.ones_like(leaf) for leaf in leaves]
            torch.autograd.grad(leaves, wanted, ones, allow_unused=True)

    @contextmanager
    def _undone(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Puts buffers and random generators back."""
        kept = [(buffer, buffer.clone()) for buffer in self.buffers()]
        devices = sorted({t.get_device() for t in inputs if t.is_cuda})
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)
