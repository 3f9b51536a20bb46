"""Fixtures for every test: seeds, poisoned memory, one run per CPU backend."""

import functools
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["DYNMM_POISON"] = "1"  # before they load: C++ kernels fill what they allocate

import dynmm_kernels

CPU_BACKENDS = ("reference", "cpu")
# Installed without a compiler, and told so: then the reference is all there is to test.
WITHOUT_COMPILER = (dynmm_kernels.ops.compiled.reason or "").startswith("the build failed")


@functools.cache
def why_unusable(name: str) -> str | None:
    try:
        with dynmm_kernels.backend(name):
            dynmm_kernels.route(torch.zeros(1, dtype=torch.int64), 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def tested_backends() -> tuple[str, ...]:
    """All of them: one that was built but cannot be used fails its tests."""
    return CPU_BACKENDS[:1] if WITHOUT_COMPILER else CPU_BACKENDS


def pytest_report_header() -> list[str]:
    lines = []
    for name in CPU_BACKENDS:
        problem = why_unusable(name)
        consequence = "NOT TESTED" if WITHOUT_COMPILER else "will fail"
        lines.append(f"backend {name}: " + (f"{consequence}: {problem}" if problem else "tested"))
    return lines


PROVED = pytest.StashKey[list[str]]()


def pytest_configure(config) -> None:
    config.stash[PROVED] = []


@pytest.fixture(scope="session")
def proved(request):
    """`proved(line)`: what was shown without a GPU, printed at the end of the run."""
    return request.config.stash[PROVED].append


def pytest_terminal_summary(terminalreporter, config) -> None:
    for line in config.stash[PROVED]:
        terminalreporter.write_line(line)


@pytest.fixture(params=tested_backends())
def backend(request) -> Iterator[str]:
    """Runs the test once per CPU backend."""
    with dynmm_kernels.backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def backends() -> tuple[str, ...]:
    """The CPU backends, for a test that runs all of them on each case it generates."""
    return tested_backends()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Each generator by itself: torch.manual_seed takes milliseconds where CUDA is not there."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


WAYS = {
    "training": torch.enable_grad,
    "serving": torch.no_grad,
    "inference mode": torch.inference_mode,
}


@pytest.fixture(params=WAYS)
def call(request) -> Callable[..., Any]:
    """Calls a fusion as a training step does, and as a deployed model is: in eval, no graph."""

    def call(fusion: nn.Module, *inputs: Any, **options: Any) -> Any:
        with WAYS[request.param]():
            return fusion.train(request.param == "training")(*inputs, **options)

    return call


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic algorithms, under which torch also fills what its own `empty` gives."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    logging.disable(logging.DEBUG)  # of each step
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path and torch.__version__ >= "2.11")
    yield
    torch.backends.mha.set_fastpath_enabled(fast_path)
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


@pytest.fixture
def cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        pytest.skip(f"Inductor needs a C++ compiler: {error}")


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def poison(tensor: Tensor) -> None:
    with torch.no_grad():
        if tensor.dtype is torch.bool:
            tensor.fill_(True)
        elif tensor.dtype.itemsize == 1:  # 0x7f is NaN in float8_e4m3fn
            tensor.view(torch.uint8).fill_(0x7F)
        elif tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(int.from_bytes(b"\x7f" * tensor.dtype.itemsize, "little"))


def poisoned(create):
    @functools.wraps(create)
    def wrapper(*args, **kwargs):
        tensor = create(*args, **kwargs)
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] == "dynmm_kernels":
                poison(tensor)
        return tensor

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def poisoned_empty() -> Iterator[None]:
    """Uninitialised memory that the package asks for from Python holds NaN or 0x7f bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(Tensor, name, poisoned(getattr(Tensor, name)))
        yield
