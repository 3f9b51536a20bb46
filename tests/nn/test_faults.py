"""Injected faults leave nothing behind; threads agree; repeated calls do not grow."""

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from fuzz import leaks
from torch import Tensor, nn

from dynmm_kernels import Branch, ChainedFusion, Lazy, NestedFusion, RoutedFusion
from dynmm_kernels.nn import Add, SEAdd

WIDTH = 4


class Bomb:
    """Goes off at the chosen call of whatever asks it."""

    def __init__(self) -> None:
        self.calls, self.at, self.error = 0, 0, Exception

    def arm(self, at: int, error: type[BaseException]) -> None:
        self.calls, self.at, self.error = 0, at, error

    def disarm(self) -> None:
        self.at = 0

    def tick(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("the injected fault")


class Ticking(nn.Module):
    """A module that asks the bomb before and after it has run."""

    def __init__(self, bomb: Bomb, module: nn.Module) -> None:
        super().__init__()
        self.bomb, self.module = (bomb,), module

    def forward(self, *inputs: Tensor) -> Tensor:
        self.bomb[0].tick()
        output = self.module(*inputs)
        self.bomb[0].tick()
        return output


class Gate(nn.Module):
    def __init__(self, logits: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, logits)

    def forward(self, main: Tensor, aux: Tensor) -> Tensor:
        return self.linear(torch.cat([main, aux], 1))


def layer() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def normed() -> nn.Module:
    return nn.Sequential(layer(), nn.BatchNorm1d(WIDTH))


def routed(bomb: Bomb) -> nn.Module:
    branches = [
        Branch(Ticking(bomb, layer()), inputs=[0]),
        Branch(Ticking(bomb, normed()), inputs=[1]),
        Branch(Ticking(bomb, Gate(WIDTH))),
    ]
    return RoutedFusion(Ticking(bomb, Gate(3)), branches)


def subset(bomb: Bomb) -> nn.Module:
    fusion = routed(bomb)
    fusion.batch_norm = "subset"
    return fusion


def nested(bomb: Bomb) -> nn.Module:
    return NestedFusion(
        Ticking(bomb, Gate(3)),
        [Ticking(bomb, layer()), Ticking(bomb, normed())],
        [Ticking(bomb, layer()), Ticking(bomb, layer())],
        [SEAdd(WIDTH), Ticking(bomb, Add())],
    )


def nested_with_norms(bomb: Bomb) -> nn.Module:
    fusion = nested(bomb)
    fusion.aux_stages[1] = Ticking(bomb, normed())
    return fusion


def chained(bomb: Bomb) -> nn.Module:
    return ChainedFusion(
        [Ticking(bomb, Gate(2)), None, Ticking(bomb, Gate(2))],
        [Ticking(bomb, layer()) for _ in range(3)],
        [Ticking(bomb, layer()) for _ in range(3)],
        [Ticking(bomb, Add()) for _ in range(3)],
    )


MAKERS = (routed, subset, nested, nested_with_norms, chained)
ERRORS = (KeyboardInterrupt, SystemExit, MemoryError, RuntimeError, torch.OutOfMemoryError)
MODES = ("training", "selected", "masked", "no_grad", "inference", "autocast")


def enter(module: nn.Module, mode: str):
    module.train(mode in ("training", "selected", "masked"))
    module.gate_grad = "selected" if mode == "selected" else "straight_through"
    module.execution = "masked" if mode == "masked" else "routed"
    return {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(mode, torch.enable_grad)()


def settings() -> tuple[object, ...]:
    """What belongs to the process, not to the module."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    )


def state_of(module: nn.Module) -> dict[str, object]:
    """Every plain attribute of every part, hooks counted."""
    state: dict[str, object] = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, (bool, int, float, str, type(None))):
                state[f"{name}.{key}"] = value
            elif key.endswith("hooks"):
                state[f"{name}.{key}"] = len(value)
            elif key == "_buffers":
                state[f"{name}.{key}"] = [
                    key for key, buffer in value.items() if buffer is not None
                ]
    return state


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(12, WIDTH), torch.randn(12, WIDTH)


def results(module: nn.Module, mode: str) -> list[Tensor | None]:
    """Output, then gradients where there are any."""
    with enter(module, mode):
        output = module(*batch())
    if not output.requires_grad:
        return [output]
    module.zero_grad()
    output.float().square().sum().backward()
    return [output, *(parameter.grad for parameter in module.parameters())]


def explode(module: nn.Module, mode: str, bomb: Bomb, at: int, error: type[BaseException]) -> bool:
    """Runs the module until the bomb goes off; False where it never does."""
    bomb.arm(at, error)
    try:
        with enter(module, mode):
            inside = settings()
            try:
                module(*batch())
            except BaseException:
                assert settings() == inside
                raise
    except error as caught:
        return "the injected fault" in str(caught)
    finally:
        bomb.disarm()
    return False


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", MAKERS)
def test_an_exception_leaves_nothing_behind(make, mode):
    bomb = Bomb()
    torch.manual_seed(0)
    module = make(bomb)
    untouched = copy.deepcopy(module)
    outside = settings()
    at = 1
    while True:
        error = ERRORS[at % len(ERRORS)]
        hurt = copy.deepcopy(untouched)
        for part in hurt.modules():
            if isinstance(part, Ticking):
                part.bomb = (bomb,)
        enter(hurt, mode)
        before = state_of(hurt)
        if not explode(hurt, mode, bomb, at, error):
            break
        assert settings() == outside
        assert state_of(hurt) == before
        hurt.load_state_dict(untouched.state_dict())  # statistics recorded before the fault
        for mine, right in zip(
            results(hurt, mode), results(copy.deepcopy(untouched), mode), strict=True
        ):
            assert (mine is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(mine, right, rtol=0, atol=0)
        at += 1
    assert at > 4


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("at", [1, 2])
def test_a_fetch_that_fails_leaves_nothing_behind(error, at):
    bomb, store = Bomb(), torch.randn(12, WIDTH)

    def fetch(samples: Tensor) -> Tensor:
        bomb.tick()
        return store[samples]

    fusion = RoutedFusion(
        Branch(nn.Identity(), inputs=[0]), [Branch(layer(), inputs=[1]) for _ in range(3)]
    )
    logits, outside, before = torch.randn(12, 3), settings(), state_of(fusion)
    wanted = fusion(logits, store)
    bomb.arm(at, error)
    with pytest.raises(error, match="the injected fault"):
        fusion(logits, Lazy(fetch))
    bomb.disarm()
    assert settings() == outside
    assert state_of(fusion) == before
    torch.testing.assert_close(fusion(logits, Lazy(fetch)), wanted)


def test_a_fault_in_the_backward_pass():
    """The graph's own hook fails; the module serves and learns as before."""
    fusion = RoutedFusion(nn.Linear(WIDTH, 2), [layer(), layer()])
    x = torch.randn(9, WIDTH)

    def fail(grad: Tensor) -> Tensor:
        raise KeyboardInterrupt

    output = fusion(x)
    output.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        output.sum().backward()
    fusion.zero_grad()
    fusion(x).sum().backward()
    after = [parameter.grad for parameter in fusion.parameters()]
    fresh = copy.deepcopy(fusion)
    fresh.zero_grad()
    fresh(x).sum().backward()
    for mine, right in zip(after, fresh.parameters(), strict=True):
        torch.testing.assert_close(mine, right.grad, rtol=0, atol=0)


def in_threads(work: Callable[[], None], count: int) -> Iterator[BaseException]:
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield from failed


@pytest.mark.parametrize("make", [routed, nested, chained])
@pytest.mark.parametrize(("execution", "tolerance"), [("routed", 0), ("auto", 1e-5)])
def test_two_threads_agree(make, execution, tolerance):
    module = make(Bomb()).eval()
    module.execution = execution
    batches = [(torch.randn(n, WIDTH), torch.randn(n, WIDTH)) for n in range(1, 9)]
    with torch.no_grad():
        wanted = [module(*streams) for streams in batches]

    def serve() -> None:
        with torch.no_grad():
            for _ in range(25):
                for streams, right in zip(batches, wanted, strict=True):
                    torch.testing.assert_close(
                        module(*streams), right, rtol=tolerance, atol=tolerance
                    )

    assert not list(in_threads(serve, 2))


@pytest.mark.parametrize("learning", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", leaks.modules())
def test_calls_leave_nothing_behind(name, learning):
    tensors, kib = leaks.growth(leaks.modules()[name](), learning, 500)
    assert tensors <= 0
    assert kib < leaks.NOISE_KIB


def test_errors_leave_nothing_behind():
    """A traceback holds a forward pass only as long as somebody holds the traceback."""
    bomb = Bomb()
    fusion = routed(bomb)
    explode(fusion, "training", bomb, 3, RuntimeError)
    before = leaks.live_tensors()
    for _ in range(100):
        assert explode(fusion, "training", bomb, 3, RuntimeError)
    assert leaks.live_tensors() <= before
