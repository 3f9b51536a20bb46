"""The C++ kernels make the same bits on every instruction set, and those of the reference."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kernel_cases as cases
import pytest
import torch
from conftest import WITHOUT_COMPILER
from tensors import FLOATS, random_values

import dynmm_kernels
from dynmm_kernels import ops

pytestmark = pytest.mark.skipif(WITHOUT_COMPILER, reason="built without a compiler")


@pytest.fixture(autouse=True)
def on_cpu_kernels() -> Iterator[None]:
    with dynmm_kernels.backend("cpu"):
        yield


def run(op: str, *arguments):
    return getattr(ops.kernels(), op)(*arguments)


def energies(dtype: torch.dtype, rows: int, classes: int, modalities: int) -> list[torch.Tensor]:
    """All that both ops return, in every weighting, for classes and for labels."""
    wide = ops.weight_dtype(dtype)
    logits = [5 * random_values((rows, classes), dtype) for _ in range(modalities)]
    for values, place in ((-torch.inf, 0), (1000.0, 1), (-1000.0, 2), (1e-6, 3)):
        logits[0].view(-1)[place::7] = values
    present = torch.rand(rows, modalities) < 0.8
    targets = torch.randint(0, classes, (rows,)), torch.rand(rows, classes, dtype=wide)
    weights = torch.randn(rows, modalities, dtype=wide)
    grads = random_values((rows, classes), dtype), *torch.randn(2, rows, modalities + 1, dtype=wide)
    made = []
    for aims, weighting in itertools.product(targets, range(4)):
        given = weights if weighting == 3 else None
        arguments = logits, aims, present, given, weighting, 0.1
        forward = run("energy_fuse", *arguments)
        incoming = grads[0], grads[1][:, :-1], grads[2]
        of_logits, of_weights = run("energy_fuse_grads", *arguments, False, forward[3], *incoming)
        made += [*forward, *of_logits, of_weights]
    return made


SHAPES = [(1, 10, 2), (37, 2, 3), (50, 10, 2), (19, 32, 1), (5, 101, 2), (3, 1500, 2)]


def sums(dtype: torch.dtype, numel: int) -> list[torch.Tensor]:
    """All that weighted rows and scaled maps come to, of values that are no numbers, too."""
    wide, rows = ops.weight_dtype(dtype), 9
    grad, main, aux = (random_values((rows, numel, 5, 3), dtype) for _ in range(3))
    odd = torch.inf, -torch.inf, torch.nan, 0.0, -0.0, torch.finfo(dtype).max, 1e-6, -3e-8
    for place, value in enumerate(odd):
        main.view(-1)[2 * place :: 31] = value
    weights, factors = torch.randn(rows, 2, dtype=wide), torch.randn(4, rows, numel, dtype=wide)
    order = torch.randperm(2 * rows).int()
    order[3] = -1
    made = run("gather_rows", [main], [0], [2 * rows], order, 2, weights)
    made.append(run("combine_rows", [main, aux], [0, rows], order.view(rows, 2), weights))
    made.append(run("combine_rows", [main, aux], [0, rows], order.view(rows, 2), None))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        g, m, a = (maps.contiguous(memory_format=memory_format) for maps in (grad, main, aux))
        made += [run("se_add", m, a, *factors[:2]), run("se_add_means", m)]
        made += [*run("se_add_dots", g, m, a), *run("se_add_grads", m, *factors)]
    return made


def all_arithmetic() -> list[torch.Tensor]:
    torch.manual_seed(3)
    made = [t for dtype in FLOATS for shape in SHAPES for t in energies(dtype, *shape)]
    numels = 1, 2, 5, 8, 15, 16, 17, 33, 300
    return made + [t for dtype in FLOATS for numel in numels for t in sums(dtype, numel)]


@pytest.mark.parametrize("numel", [1, 2, 7, 16, 19, 300])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_are_those_of_the_reference(dtype, numel):
    """Values that are no numbers included; bit for bit but for what is added up over pixels."""
    torch.manual_seed(5)
    made = sums(dtype, numel)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "run", cases.reference)
        wanted = sums(dtype, numel)
    for got, theirs in zip(made, wanted, strict=True):
        if got.shape == (9, numel):
            scale = float(theirs.nan_to_num(0, 0, 0).abs().max())
            rounding = 64 * torch.finfo(got.dtype).eps * scale
            torch.testing.assert_close(got, theirs, rtol=0, atol=rounding, equal_nan=True)
        else:
            cases.assert_same(without_payload(got), without_payload(theirs))


def without_payload(tensor: torch.Tensor) -> torch.Tensor:
    """One nan for all: which of two operands gives its bits to a sum is nobody's promise."""
    return tensor.nan_to_num(nan=123.0, posinf=torch.inf, neginf=-torch.inf)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_the_same_bits_on_every_instruction_set(level, tmp_path):
    """Tested as far as this machine goes: its best one against lesser ones."""
    script = (
        "import sys, torch, dynmm_kernels, test_cpu_levels as here\n"
        "with dynmm_kernels.backend('cpu'): torch.save(here.all_arithmetic(), sys.argv[1])"
    )
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    environment = {**os.environ, "DYNMM_CPU_LEVEL": level, "PYTHONPATH": path}
    file = tmp_path / "made.pt"
    subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=True)
    for ours, theirs in zip(all_arithmetic(), torch.load(file), strict=True):
        cases.assert_same(without_payload(ours), without_payload(theirs))


@pytest.mark.parametrize("shape", [(70_001, 10, 2), (3001, 101, 2), (301, 1500, 1)])
def test_energies_do_not_depend_on_threads(shape, restored_threads):
    def made(threads: int) -> list[torch.Tensor]:
        torch.manual_seed(4)
        torch.set_num_threads(threads)
        return energies(torch.float32, *shape)

    first = made(1)
    for threads in (2, 3, 3):
        for got, wanted in zip(made(threads), first, strict=True):
            cases.assert_same(without_payload(got), without_payload(wanted))
