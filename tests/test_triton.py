"""The Triton kernels under Triton's interpreter, which is chosen before Triton is imported.

Plain `pytest` runs this file in a process of its own (test_interpreter.py). Arithmetic in bf16 is
left to a GPU: the interpreter rounds it otherwise.
"""

import os

import kernel_cases as cases
import pytest
import torch
from tensors import LAYOUTS, SELECTIONS

import dynmm_kernels
from dynmm_kernels import ops

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs TRITON_INTERPRET=1 from the start; test_interpreter.py runs it so",
)


def run(op: str, *arguments):
    with dynmm_kernels.backend("triton"):
        return getattr(ops.kernels(), op)(*arguments)


@pytest.mark.parametrize("branches", [1, 2, 8, 256])
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 32, 33, 127, 128, 129, 1025])
def test_route(rows, branches):
    cases.check_route(run, rows, branches)


def test_route_with_more_tiles_than_a_scan_step():
    cases.check_moves(run, "route", torch.randint(-1, 3, (140_000,)), 3)


@pytest.mark.parametrize("rows", [1, 33, 1025])
def test_faults(rows):
    cases.check_faults(run, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 33, 1025])
def test_route_argmax(dtype, rows):
    cases.check_argmax(run, dtype, rows)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement(name, layout):
    cases.check_movement(run, name, layout)


@pytest.mark.parametrize("numel", cases.NUMELS)
@pytest.mark.parametrize("rows", [1, 33])
def test_sizes(rows, numel):
    cases.check_sizes(run, rows, numel)


@pytest.mark.parametrize("numel", [1, 3, 64, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.complex64])
def test_arithmetic(dtype, numel):
    cases.check_arithmetic(run, dtype, numel)


def test_many_outputs():
    cases.check_many_outputs(run, 50)
