"""Which backend serves: asked for by name, per thread, honoured or refused, given back."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from test_raw_ops import good_calls

import dynmm_kernels
from dynmm_kernels import ops
from dynmm_kernels.ops import reference

needs_cpu = pytest.mark.skipif(ops.compiled.reason is not None, reason="no compiled kernels")
SELECTION = torch.tensor([1, 0, 1])
ORDER = torch.tensor([1, 0], dtype=torch.int32)
ROWS = torch.arange(6.0).view(3, 2)


def serves_reference() -> bool:
    return ops.kernels().route is reference.route


def test_a_request_is_given_back():
    before = ops.kernels()
    with dynmm_kernels.backend("reference"):
        assert serves_reference()
    assert ops.kernels() is before


def test_a_request_is_given_back_when_the_block_raises():
    before = ops.kernels()
    with pytest.raises(ZeroDivisionError), dynmm_kernels.backend("reference"):
        raise ZeroDivisionError
    assert ops.kernels() is before


def test_overlapping_requests_of_two_threads():
    """The one who came first leaves first; each gives back what it found."""
    entered, left = threading.Event(), threading.Event()
    before, seen = ops.kernels(), []

    def other():
        seen.append(ops.kernels())
        with dynmm_kernels.backend("reference"):
            entered.set()
            left.wait(30)
        seen.append(ops.kernels())

    thread = threading.Thread(target=other)
    with dynmm_kernels.backend("reference"):
        thread.start()
        assert entered.wait(30)
    assert ops.kernels() is before
    left.set()
    thread.join()
    assert ops.kernels() is before
    assert seen == [before, before]


def test_kernels_captured_in_one_thread_serve_in_another():
    """As a backward pass on a thread of autograd uses them."""
    with dynmm_kernels.backend("reference"):
        captured = ops.kernels()
    seen = []

    def other():
        with ops.using(captured):
            seen.append(serves_reference())
        seen.append(serves_reference())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [True, serves_reference()]


@needs_cpu
@pytest.mark.parametrize(
    "arguments",
    [
        ([ROWS.to("meta")], [0], [2], ORDER, 1),
        ([ROWS, ROWS.to("meta")], [0, 0], [2, 2], ORDER, 1),
        ([ROWS], [0], [2], ORDER.to("meta"), 1),
        ([ROWS], [0], [2], ORDER, 1, torch.ones(2, device="meta")),
    ],
    ids=["first", "later", "index", "last"],
)
def test_tensors_of_another_device_are_refused(arguments):
    refused = pytest.raises(RuntimeError, match=r"'cpu' was requested, but gather_rows .* on meta")
    with dynmm_kernels.backend("cpu"), refused:
        ops.kernels().gather_rows(*arguments)


@needs_cpu
def test_tensors_of_another_device_are_refused_by_name_too():
    refused = pytest.raises(RuntimeError, match=r"'cpu' was requested, but gather_rows .* on meta")
    with dynmm_kernels.backend("cpu"), refused:
        ops.kernels().gather_rows([ROWS], [0], [2], order=ORDER.to("meta"), ranks=1)


@needs_cpu
def test_a_call_without_tensors_but_one():
    with dynmm_kernels.backend("cpu"):
        assert ops.kernels().gather_rows([], [], [], ORDER, 1) == []
        assert ops.kernels().gather_rows([ROWS], [0], [2], order=ORDER, ranks=1)[0].tolist() == [
            [2, 3],
            [0, 1],
        ]


def test_a_name_that_nobody_has():
    with pytest.raises(ValueError, match="got 'numpy', want one of 'reference'"):
        dynmm_kernels.backend("numpy").__enter__()


@pytest.mark.parametrize(("value", "served"), [("reference", True), ("", False), (None, False)])
@needs_cpu
def test_environment(value, served):
    code = (
        "from dynmm_kernels import ops; from dynmm_kernels.ops import reference;"
        "print(ops.kernels().route is reference.route)"
    )
    environment = {**os.environ, "DYNMM_BACKEND": value or ""}
    if value is None:
        del environment["DYNMM_BACKEND"]
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(served)


def gathered(x):
    """What torch.compile gets: the ops that serve when it traces."""
    return ops.kernels().gather_rows([x], [0], [2], ORDER, 1)[0]


def test_compiled_code_follows_the_backend():
    """One graph for the served ops, another where the reference is asked for; in each thread."""
    graphs = []

    def keep(graph, example):
        graphs.append(any("dynmm_kernels" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(gathered, backend=keep, fullgraph=True)
    assert torch.equal(compiled(ROWS), ROWS[[1, 0]])
    served = not serves_reference()
    assert graphs == [served]
    with dynmm_kernels.backend("reference"):
        assert torch.equal(compiled(ROWS), ROWS[[1, 0]])
        thread = threading.Thread(target=compiled, args=(ROWS,))
        thread.start()
        thread.join()
    assert compiled(ROWS).tolist() == ROWS[[1, 0]].tolist()
    assert graphs == ([served, False] if served else [False])
    torch._dynamo.reset()


@pytest.mark.parametrize("op", ops.schemas.OPS)
def test_vmap_is_refused(op):
    first, *others = good_calls(op)[0]
    called = getattr(torch.ops.dynmm_kernels, op)

    def call(x):
        return called([x, *first[1:]] if isinstance(first, list) else x, *others)

    batch = torch.stack([first[0] if isinstance(first, list) else first] * 2)
    with pytest.raises(RuntimeError, match=f"vmap over {op} is not offered; call it once"):
        torch.vmap(call)(batch)
