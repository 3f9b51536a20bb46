"""Every Triton kernel in every configuration compiles for GPUs that need not be there, and is lean.

The ops run as on a GPU, with all that Triton specialises on, but compile where they would launch.
"""

import importlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensors import random_selection

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from dynmm_kernels.ops import reference, weight_dtype  # noqa: E402
from dynmm_kernels.ops import triton as ops  # noqa: E402
from dynmm_kernels.ops.schemas import OPS  # noqa: E402
from dynmm_kernels.ops.triton import configs, rows  # noqa: E402
from dynmm_kernels.ops.triton import launch as launching  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one block can have
CLASSES = (*configs.CLASSES, configs.Tile(1, 512, 8))  # the last for eight modalities in fp64
LOSSES = (None, "classes", "labels")
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


class Compiled:
    """What the ops asked for on one architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.kernels: dict[str, object] = {}
        self.configs: set[tuple] = set()
        self.ops: set[str] = set()

    def noted(self, op: str, call: Callable) -> Callable:
        def asked(*arguments):
            self.ops.add(op)
            return call(*arguments)

        return asked

    def launch(self, kernel, programs, like, *args, **options) -> None:
        assert programs > 0
        compiled = kernel.run(*args, grid=(1,), warmup=True, enable_fp_fusion=False, **options)
        shape = ("TILE", "SCAN", "ROWS", "UNITS", "COLUMNS")
        tile = tuple(options[name] for name in shape if name in options)
        self.configs.add((kernel.fn.__name__, *tile))
        self.kernels[f"{kernel.fn.__name__} {options} {compiled.hash[:8]}"] = compiled


@contextmanager
def compiling(arch: int, cache: Path) -> Iterator[Compiled]:
    """Within the block the ops compile for a GPU of that architecture and launch nothing."""
    driver = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    result = Compiled(arch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(cache))
        patch.setattr(triton.runtime.driver, "_active", driver)
        for op in OPS:
            call = getattr(ops, op)
            patch.setattr(importlib.import_module(call.__module__), "launch", result.launch)
            patch.setattr(ops, op, result.noted(op, call))
        yield result


@pytest.fixture(scope="module", params=sorted(SHARED_MEMORY), ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    with compiling(request.param, tmp_path_factory.mktemp("triton")) as result:
        run_all()
    return result


def sources(dtype: torch.dtype, numel: int) -> torch.Tensor:
    return torch.zeros(64, numel, dtype=dtype)


def run_all() -> None:
    selection = random_selection(64, 2, 2, holes=0.0)
    order, inverse, _ = reference.route(selection, 2)
    top1, starts = inverse[:, :1], list(range(0, 16 * 64, 64))

    def gather(dtype, numel, weights=None):
        ops.gather_rows([sources(dtype, numel)], [0], [32], order, 2, weights)

    def combine(dtype, numel, inverse, weights=None, outputs=2):
        parts = [sources(dtype, numel)] * outputs
        ops.combine_rows(parts, starts[:outputs], inverse, weights)

    weights = torch.ones(64, 2)
    for tile in configs.MOVE:
        gather(torch.int64, tile.units)
        combine(torch.int64, tile.units, top1)
    gather(torch.uint8, 4097)
    combine(torch.uint8, 4097, top1)
    combine(torch.int64, 4096, top1, outputs=16)
    for tile in configs.SUM:
        gather(torch.float16, tile.units, weights)
        combine(torch.bfloat16, tile.units, inverse, weights)
    for dtype in (torch.float64, torch.float32):
        gather(dtype, 1000, weights.to(dtype))
        combine(dtype, 1000, inverse, weights.to(dtype))
    combine(torch.int64, 1000, inverse)
    combine(torch.float16, 1000, inverse, outputs=16)
    for tile in configs.DOT:
        parts = [sources(torch.bfloat16, tile.units)] * 2
        ops.row_dots(sources(torch.bfloat16, tile.units), parts, starts[:2], inverse)
    for dtype in (torch.float32, torch.float64):
        ops.row_dots(sources(dtype, 1000), [sources(dtype, 1000)] * 16, starts, inverse)
    ops.route(selection, 8)
    ops.route(torch.ones(64, 8, dtype=torch.bool), 8)
    for tile in configs.ARGMAX:
        ops.route_argmax(torch.zeros(64, tile.units, dtype=torch.bfloat16))
    ops.route_argmax(torch.zeros(64, 300, dtype=torch.float64))
    for tile in (*configs.SUM, *configs.DOT):
        se_add(torch.zeros(4, 3, tile.units, dtype=torch.bfloat16))
    for tile in configs.SPAN:
        maps = torch.zeros(4, tile.units, 8, 8, dtype=torch.float16)
        se_add(maps.contiguous(memory_format=torch.channels_last))
    for dtype in (torch.float32, torch.float64):
        maps = torch.zeros(4, 1024, 2, 3, dtype=dtype)
        se_add(maps.contiguous(memory_format=torch.channels_last))
        se_add(torch.zeros(4, 3, 1000, dtype=dtype))
    for i, tile in enumerate(configs.CLASSES):
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        energy_fuse(2, tile.units, dtype, LOSSES[i % 3], weighting=i % 4, absent=i % 2 == 0)
    energy_fuse(3, 32_000, torch.float16, "classes", weighting=1, absent=True)
    energy_fuse(3, 32_000, torch.float32, "labels", weighting=0)
    energy_fuse(8, 2048, torch.float32, "classes", weighting=1)
    energy_fuse(2, 1024, torch.float64, "labels", weighting=3)
    energy_fuse(8, 32_000, torch.float64, "classes", weighting=1, absent=True)


def se_add(maps: torch.Tensor, active: int = 2) -> None:
    """All four ops on samples of which the first few are active."""
    factors = [torch.zeros(active, maps.shape[1], dtype=weight_dtype(maps.dtype))] * 4
    ops.se_add(maps, maps[:active], *factors[:2])
    ops.se_add_grads(maps, *factors)
    ops.se_add_means(maps[:active])
    ops.se_add_dots(maps, maps, maps[:active])


def energy_fuse(
    modalities: int,
    classes: int,
    dtype: torch.dtype,
    loss: str | None,
    weighting: int = 0,
    absent: bool = False,
    rows: int = 4,
) -> None:
    """Forward and backward, with all gradients that there can be."""
    wide = weight_dtype(dtype)
    logits = [torch.zeros(rows, classes, dtype=dtype)] * modalities
    each, losses = (torch.zeros(rows, modalities + more, dtype=wide) for more in (0, 1))
    targets = None if loss is None else torch.zeros(rows, dtype=torch.int64)
    if loss == "labels":
        targets = torch.zeros(rows, classes, dtype=wide)
    present = each.bool() if absent else None
    arguments = logits, targets, present, each if weighting == 3 else None, weighting, 0.1
    ops.energy_fuse(*arguments)
    of_losses = None if loss is None else losses
    ops.energy_fuse_grads(*arguments, False, losses, logits[0], each, of_losses)


def wanted_configs() -> set[tuple]:
    tables = {
        "gather_tile": (*configs.MOVE, *configs.SUM),
        "move_tile": configs.MOVE,
        "sum_tile": configs.SUM,
        "dot_tile": configs.DOT,
        "argmax_tile": configs.ARGMAX,
        "scale_and_add": configs.SUM,
        "both_grads": configs.SUM,
        "channel_sums": (*configs.DOT, *configs.SPAN),
        "fuse_tile": CLASSES,
        "grads_tile": CLASSES,
    }
    tiles = {(kernel, t.rows, t.units) for kernel, table in tables.items() for t in table}
    entries = (configs.ROUTE_ENTRIES, configs.ROUTE_BRANCHES)
    return tiles | {
        ("count_tile", *entries),
        ("write_tile", *entries),
        ("scan_tiles", configs.ROUTE_SCAN),
    }


def test_all_configurations_compile(compiled, proved):
    assert compiled.ops == set(OPS)
    assert compiled.configs == wanted_configs()
    kernels = {name for name, *_ in compiled.configs}
    proved(
        f"Triton ahead of time, sm_{compiled.arch}: {len(kernels)} kernels, "
        f"{len(compiled.configs)} configurations, {len(compiled.kernels)} binaries"
    )


def test_kernels_stay_in_registers_and_shared_memory(compiled, tmp_path):
    """No local memory: neither spilled registers nor arrays indexed at run time."""
    for name, kernel in compiled.kernels.items():
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", binary], check=True, capture_output=True, text=True
        ).stdout
        stack, local = re.search(r"STACK:(\d+)", usage), re.search(r"LOCAL:(\d+)", usage)
        assert stack, usage
        assert int(stack[1]) == 0, (name, usage)
        assert local is None or int(local[1]) == 0, (name, usage)
        assert kernel.metadata.shared <= SHARED_MEMORY[compiled.arch], name


@pytest.mark.parametrize(
    "kernel",
    [
        *("gather_tile", "move_tile", "sum_tile", "dot_tile"),
        *("scale_and_add", "both_grads", "channel_sums", "fuse_tile", "grads_tile"),
    ],
)
def test_long_aligned_rows_are_read_16_bytes_at_a_time(compiled, kernel):
    units = {"gather_tile": 2048, "move_tile": 2048}.get(kernel, 1024)
    found = [
        re.search(r"ld\.global\.(v2\.b64|v4\.b32)", k.asm["ptx"])
        for name, k in compiled.kernels.items()
        if name.startswith(kernel) and f"'UNITS': {units}" in name
    ]
    assert any(found)


def test_nothing_is_contracted(compiled):
    """fma would give other bits than the reference: product and sum are rounded one by one.

    But within log, and exp in fp64, which are made of it.
    """
    for name, kernel in compiled.kernels.items():
        if re.search(r"math\.log|math\.exp .*f64", kernel.asm["ttir"]):
            continue
        assert not re.search(r"\bfma\.rn\.f(32|64)", kernel.asm["ptx"]), name


def test_batches_of_other_counts_need_no_other_kernel(tmp_path):
    x, top1 = torch.zeros(96, 8), torch.zeros(64, 1, dtype=torch.int32)
    order = torch.zeros(64, dtype=torch.int32)
    with compiling(90, tmp_path) as result:
        for split in (31, 1, 15, 16, 17, 32):
            outputs, starts = [x[:split], x[split:]], [0, split]
            ops.gather_rows([x], [split], [split + 1], order, 1)
            ops.combine_rows(outputs, starts, top1[:split])
            ops.combine_rows(outputs, starts, top1[:split], torch.ones(split, 1))
            ops.row_dots(x[:split], outputs, starts, top1[:split])
            ops.route(order[:split], 3)
            ops.route_argmax(x[:split])
            se_add(x[:split], split)
            energy_fuse(2, 8, torch.float32, "classes", rows=split)
    names = [name.split()[0] for name in result.kernels]
    wanted = sorted({name for name, *_ in wanted_configs()})
    assert sorted(names) == sorted([*wanted, "channel_sums"])  # of means and of dots


def test_other_classes_and_strides_need_no_other_kernel(tmp_path):
    table = torch.zeros(4, 64)
    with compiling(90, tmp_path) as result:
        for start, classes in ((0, 17), (0, 31), (0, 23), (0, 25)):
            logits = [table[:, start : start + classes], torch.zeros(4, classes)]
            energies = ops.energy_fuse(logits, None, None, None, 0, 0.1)[3]
            gradient = torch.zeros(4, classes)
            ops.energy_fuse_grads(
                logits, None, None, None, 0, 0.1, False, energies, gradient, None, None
            )
    assert len(result.kernels) == 2


def test_launch_itself_asks_for_that():
    asked = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: asked.update(options, grid=grid)

    launching.launch(Kernel(), 3, torch.zeros(1), num_warps=4)
    assert asked == {"grid": (3,), "enable_fp_fusion": False, "num_warps": 4}


def test_more_outputs_than_a_kernel_reads_need_no_larger_kernel():
    parts = [torch.zeros(2, 3) for _ in range(configs.MAX_OUTPUTS + 1)]
    starts = list(range(0, 2 * len(parts), 2))
    pool, begins, _ = rows.rows_by_slot(parts, starts, torch.zeros(4, 1), parts[0])
    assert len(pool) == len(begins) == 1
