"""The functional floor against the PyTorch calls it replaces."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.contest import Contest, Outcome, Row
from benchmarks.reference import disagreement
from benchmarks.replay import replayed
from benchmarks.workloads import planned_choice
from dynmm_kernels import combine, gather, route
from dynmm_kernels.nn import SEAdd

ROWS = ("dynmm_kernels", "torch")
ROW_BYTES = (16, 1024, 65536, 1 << 20)
TOTAL_BYTES = 1 << 25
# The maps that DynMM fuses: stem and stages of ResNet-50 on NYU Depth V2 (W5).
MAPS = ((64, 120, 160), (256, 120, 160), (512, 60, 80), (1024, 30, 40), (2048, 15, 20))
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

both = pytest.mark.parametrize("row", ROWS)


@dataclass(frozen=True)
class Race:
    name: str
    moved_bytes: int | None

    def __str__(self) -> str:
        return self.name

    def info(self, outcome: Outcome, row: str) -> dict[str, Any]:
        info = {
            "torch_over_ours": outcome.ratio("torch", "dynmm_kernels"),
            "threads": torch.get_num_threads(),
        }
        if self.moved_bytes is not None:
            info["gb_per_s"] = self.moved_bytes / outcome.median(row) / 1e9
        return info


@pytest.fixture
def compare(race, row, device):
    """Checks that the contestants agree, times them together, reports one of them.

    Agreement is exact; where sums are taken in another order, to `tolerance` of the largest value.
    """

    def run(
        group: str,
        contestants: dict[str, Callable],
        moved_bytes: int | None = None,
        tolerance: float = 0.0,
    ):
        def contest() -> Contest:
            rows = {name: Row(call) for name, call in contestants.items()}
            error = disagreement(*(rows[name].call() for name in ROWS))
            return Contest(rows, dict.fromkeys(ROWS, error), tolerance, device)

        race(Race(group, moved_bytes), row, contest)

    return run


def batch_of(row_bytes: int) -> int:
    return min(4096, TOTAL_BYTES // row_bytes)


def rows_by_branch(choice):
    return [(choice == b).nonzero().squeeze(1) for b in range(2)]


@replayed
@both
@pytest.mark.parametrize("branches", [2, 8])
@pytest.mark.parametrize("n", [32, 1024, 65536])
def test_route(compare, device, n, branches):
    """A plan whose counts the host knows, as every routed forward needs it."""
    choice = torch.randint(0, branches, (n,), generator=torch.Generator().manual_seed(0))
    choice = choice.to(device)

    def ours():
        plan = route(choice, branches)
        assert sum(plan.counts) == n
        return plan.order, plan.offsets

    def theirs():
        order = torch.sort(choice, stable=True).indices.int()
        offsets = torch.bincount(choice, minlength=branches).cumsum(0)
        offsets = torch.nn.functional.pad(offsets, (1, 0)).int()
        assert offsets.tolist()[-1] == n
        return order, offsets

    compare(f"route N={n} B={branches}", {"dynmm_kernels": ours, "torch": theirs})


@replayed
@both
@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_gather(compare, device, row_bytes):
    """Three modalities of different dtype, two branches, half of the rows each."""
    n = batch_of(row_bytes)
    choice = planned_choice(n, 0.5).to(device)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, row_bytes // 4, generator=generator).to(device),
        torch.randn(n, row_bytes // 2, generator=generator).to(device, torch.float16),
        torch.randint(0, 1000, (n, row_bytes // 8), generator=generator).to(device),
    ]
    plan = route(choice, 2)
    rows = rows_by_branch(choice)

    def ours():
        return [tensor for branch in gather(plan, tensors) for tensor in branch]

    def theirs():
        return [tensor.index_select(0, own) for own in rows for tensor in tensors]

    compare(
        f"gather 3 modalities, {row_bytes} B a row, N={n}",
        {"dynmm_kernels": ours, "torch": theirs},
        moved_bytes=2 * 3 * n * row_bytes,
    )


@replayed
@both
@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_combine(compare, device, row_bytes):
    """The outputs of two branches, back in sample order."""
    n = batch_of(row_bytes)
    choice = planned_choice(n, 0.5).to(device)
    plan = route(choice, 2)
    rows = rows_by_branch(choice)
    outputs = [torch.randn(len(own), row_bytes // 4, device=device) for own in rows]

    def ours():
        return [combine(plan, outputs)]

    def theirs():
        out = outputs[0].new_empty(n, row_bytes // 4)
        for own, output in zip(rows, outputs, strict=True):
            out.index_copy_(0, own, output)
        return [out]

    compare(
        f"combine {row_bytes} B a row, N={n}",
        {"dynmm_kernels": ours, "torch": theirs},
        moved_bytes=2 * n * row_bytes,
    )


def excited(maps: torch.Tensor, excite: torch.nn.Module) -> torch.Tensor:
    return maps * excite(maps.mean((2, 3)))[:, :, None, None]


def pytest_generate_tests(metafunc):
    """`se_add`: (maps, layout, active samples); the quick profile takes two sizes."""
    if "maps" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("full")
    sizes, fused = (MAPS, (2, 4, 8)) if full else (MAPS[2::2], (4, 8))
    cases = [*itertools.product(sizes, FORMATS, fused)]
    metafunc.parametrize(("maps", "layout", "active"), cases, ids="{}".format)


@replayed
@both
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_se_add(compare, device, maps, layout, active, direction):
    """Eight samples, of which the first `active` are fused; against the eager sequence."""
    torch.manual_seed(0)
    fusion = SEAdd(maps[0]).to(device)
    main, aux, grad = (
        torch.randn(n, *maps, device=device).to(memory_format=FORMATS[layout])
        for n in (8, active, 8)
    )

    def eager():
        head = excited(main[:active], fusion.excite_main) + excited(aux, fusion.excite_aux)
        return head if active == 8 else torch.cat([head, main[active:]])

    calls = {"dynmm_kernels": lambda: fusion(main, aux), "torch": eager}
    if direction == "forward":
        contestants = {name: torch.no_grad()(lambda f=f: [f()]) for name, f in calls.items()}
    else:
        leaves = [main.requires_grad_(), aux.requires_grad_(), *fusion.parameters()]
        outputs = {name: call() for name, call in calls.items()}
        contestants = {
            name: lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True)
            for name, out in outputs.items()
        }
    size = main[0].numel() * main.element_size()
    passes = {"forward": 3 * active + 2 * (8 - active), "backward": 5 * active + 2 * (8 - active)}
    compare(
        f"se_add {direction} {'x'.join(map(str, maps))} {layout}, {active} of 8",
        contestants,
        moved_bytes=passes[direction] * size,
        tolerance=1e-4,
    )
