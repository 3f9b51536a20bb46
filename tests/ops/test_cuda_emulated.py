"""The CUDA kernels' own code, run thread by thread on the CPU (see cuda_emulator/)."""

import kernel_cases as cases
import pytest
import torch
from cuda_emulator import NAMESPACE, build
from tensors import FLOATS, LAYOUTS, SELECTIONS

from dynmm_kernels.ops.schemas import OPS


@pytest.fixture(scope="module")
def run(tmp_path_factory, proved):
    """Runs an op on the emulator."""
    library = build(tmp_path_factory.mktemp("emulated"))

    ran = {}  # in order

    def on_emulator(op: str, *arguments):
        ran[op] = True
        return getattr(getattr(torch.ops, NAMESPACE), op)(*arguments)

    yield on_emulator
    proved(f"CUDA kernels on the emulator: {', '.join(ran)}")
    del library


@pytest.mark.parametrize("op", OPS)
def test_good_calls(run, op):
    cases.check_good_calls(run, op)


@pytest.mark.parametrize("branches", [1, 2, 8, 256])
@pytest.mark.parametrize("rows", [rows for rows in cases.ROWS if rows < 65536])
def test_route(run, rows, branches):
    cases.check_route(run, rows, branches)


def test_route_with_more_branches_than_a_warp_counts_each(run):
    """Counters leave room for fewer warps."""
    cases.check_moves(run, "route", torch.randint(-1, 3000, (5000,)), 3000)


@pytest.mark.parametrize("rows", [1, 33, 1025, 20_000])
def test_faults(run, rows):
    cases.check_faults(run, rows)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [0, 1, 33, 1025, 20_000])
def test_route_argmax(run, dtype, rows):
    cases.check_argmax(run, dtype, rows)


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_movement(run, name, layout):
    cases.check_movement(run, name, layout)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("numel", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_entries_outside(run, dtype, numel, ranks):
    cases.check_entries(run, dtype, numel, ranks)


@pytest.mark.parametrize("numel", cases.NUMELS)
@pytest.mark.parametrize("rows", [1, 33])
def test_sizes(run, rows, numel):
    cases.check_sizes(run, rows, numel)


@pytest.mark.parametrize("numel", [1, 3, 64, 70_000])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_arithmetic(run, dtype, numel):
    cases.check_arithmetic(run, dtype, numel)


@pytest.mark.parametrize(("shape", "channels_last"), cases.MAPS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_se_add(run, dtype, shape, channels_last):
    for active in {0, min(1, shape[0]), shape[0]}:
        cases.check_se_add(run, dtype, shape, channels_last, active)


@pytest.mark.parametrize(("rows", "classes", "modalities"), cases.ENERGIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_energy_fuse(run, dtype, rows, classes, modalities):
    cases.check_energy_fuse(run, dtype, rows, classes, modalities)


def test_many_outputs(run):
    cases.check_many_outputs(run, 300)
