"""Every Triton kernel and configuration compiles ahead of time, without a GPU, within its budget.

No spills and no local memory; shared memory within the architecture. cuobjdump is in the wheel.
"""

import importlib.util
import os
import re
import subprocess
from itertools import product
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynmm_kernels.ops.triton import configs
from dynmm_kernels.ops.triton.combine_rows import combine_units
from dynmm_kernels.ops.triton.gather_rows import gather_units
from dynmm_kernels.ops.triton.route import choose_rows, count_tiles, place_tiles, scan_tiles
from dynmm_kernels.ops.triton.row_dots import dot_entries

ARCHITECTURES = (80, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OUTPUTS = (1, configs.MOST_OUTPUTS)
TILES = configs.TILES


def case(kernel, name, warps=4, **arguments):
    """Strings are types of run-time arguments, everything else is a constant."""
    return pytest.param(kernel, arguments, warps, id=f"{kernel.__name__}-{name}")


def rows_case(kernel, name, kind, outputs, **arguments):
    table = {
        "outputs": (f"*{kind}",) * outputs,
        "starts": ("i32",) * outputs,
        "stops": ("i32",) * outputs,
        "strides": ("i32",) * outputs,
    }
    return case(kernel, f"{name}-{kind}-{outputs}", **table, **arguments)


def cases():
    for tile, kind in product(TILES, ("i64", "i32", "i16", "i8")):
        yield gather_case(tile, kind, scaled=False, kind_of_sum="fp32")
    for tile, (kind, wide) in product(
        TILES, (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64"))
    ):
        yield gather_case(tile, kind, scaled=True, kind_of_sum=wide)
        for outputs in OUTPUTS:
            yield combine_case(tile, kind, outputs, ranks=2, kind_of_sum=wide)
    for tile, kind, outputs in product(TILES, ("i64", "i8"), OUTPUTS):
        yield combine_case(tile, kind, outputs, ranks=1, kind_of_sum="int64")
    for kind, outputs in product(("fp32", "bf16", "fp64"), OUTPUTS):
        wide = "fp64" if kind == "fp64" else "fp32"
        yield rows_case(
            dot_entries,
            "dots",
            kind,
            outputs,
            left=f"*{kind}",
            inverse="*i32",
            dots=f"*{wide}",
            units="i32",
            left_stride="i32",
            ranks="i32",
            BLOCK=configs.DOT_BLOCK,
            SUM=getattr(tl, wide.replace("fp", "float")),
        )
    sort = {"entries": "i32", "branches": "i32", "tiles": "i32", "TILE": configs.ROUTE_TILE}
    for (kind, mask), bins in product((("i64", False), ("i32", False), ("u8", True)), (32, 512)):
        name, selection = f"{kind}-{bins}", f"*{kind}"
        shape = {**sort, "MASK": mask, "BINS": bins}
        counts = {"selection": selection, "counts": "*i32"}
        yield case(count_tiles, name, **counts, faults="*i32", **shape)
        placed = {"totals": "*i32", "order": "*i32", "inverse": "*i32", "header": "*i32"}
        yield case(place_tiles, name, **counts, **placed, **shape)
    scanned = dict.fromkeys(("counts", "totals", "faults", "header"), "*i32")
    sizes = {"branches": "i32", "tiles": "i32", "BLOCK": configs.SCAN_BLOCK}
    yield case(scan_tiles, "scan", **scanned, **sizes)
    for (kind, wide), columns in product(
        (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")), (4, 256)
    ):
        yield case(
            choose_rows,
            f"{kind}-{columns}",
            logits=f"*{kind}",
            choice="*i64",
            marked="*i32",
            rows="i32",
            branches="i32",
            ROWS=configs.LOGITS_PER_PROGRAM // columns,
            COLUMNS=columns,
            WIDE=getattr(tl, wide.replace("fp", "float")),
        )


def gather_case(tile, kind, scaled, kind_of_sum):
    return case(
        gather_units,
        f"{'scaled' if scaled else 'moved'}-{kind}-{tile.units}",
        tile.warps,
        source=f"*{kind}",
        out=f"*{kind}",
        entries="*i32",
        weights=f"*{kind_of_sum}",
        rows="i32",
        units="i32",
        stride="i32",
        ranks="i32",
        ROWS=tile.rows,
        UNITS=tile.units,
        SCALED=scaled,
        SUM=getattr(tl, kind_of_sum.replace("fp", "float")),
    )


def combine_case(tile, kind, outputs, ranks, kind_of_sum):
    return rows_case(
        combine_units,
        f"{tile.units}",
        kind,
        outputs,
        inverse="*i32",
        weights="*fp64" if kind == "fp64" else "*fp32",
        out=f"*{kind}",
        rows="i32",
        units="i32",
        RANKS=ranks,
        ROWS=tile.rows,
        UNITS=tile.units,
        MOVE=ranks == 1,
        SCALED=ranks > 1,
        SUM=getattr(tl, kind_of_sum.replace("fp", "float")),
    )


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory, proved):
    """Compiles anew, and says how much."""
    compiled: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield compiled
    kernels = {name.split("-")[0] for name in compiled}
    proved(
        f"triton: {len(kernels)} kernels in {len(compiled)} configurations for sm_80, sm_90 and "
        "sm_100, no spills"
    )


@pytest.mark.parametrize(("kernel", "arguments", "warps"), list(cases()))
def test_compiles_within_budget(request, fresh_cache, tmp_path, kernel, arguments, warps):
    fresh_cache.append(request.node.callspec.id)
    for architecture in ARCHITECTURES:
        compiled = compile_for(architecture, kernel, arguments, warps)
        assert compiled.metadata.shared <= SHARED_BYTES[architecture]
        usage = resources(compiled.asm["cubin"], tmp_path / f"sm_{architecture}.cubin")
        # STACK holds spills; LOCAL holds arrays the compiler could not keep in registers.
        assert usage["STACK"] == 0, usage
        assert usage["LOCAL"] == 0, usage


def compile_for(architecture, kernel, arguments, warps):
    def is_type(value):
        return isinstance(value, (str, tuple))

    names = kernel.arg_names
    assert sorted(names) == sorted(arguments), "the case does not match the kernel's parameters"
    signature = {n: arguments[n] if is_type(arguments[n]) else "constexpr" for n in names}
    constants = {(names.index(n),): v for n, v in arguments.items() if not is_type(v)}
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, name in enumerate(names):
        kinds = signature[name]
        if isinstance(kinds, str) and kinds.startswith("*"):
            attributes[(i,)] = aligned
        if isinstance(kinds, tuple) and kinds[0].startswith("*"):
            attributes.update({(i, j): aligned for j in range(len(kinds))})
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, **configs.EXACT}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one kernel in a cubin."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
