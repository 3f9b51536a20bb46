"""Two processes: data parallel, sharded, with branches that one of them does not choose."""

import time
from datetime import timedelta

import pytest
import torch
from models import relative_error
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dynmm_kernels import (
    Branch,
    CascadeFusion,
    ChainedFusion,
    EnergyFusion,
    NestedFusion,
    RoutedFusion,
)

FEATURES = 6
GATE_GRADS = ["straight_through", "selected"]
# The branches that the gate chooses on each rank: starved on one, opposite, all.
SPLITS = [[[0, 0, 0, 0], [0, 1, 1, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 0, 1, 0], [0, 1, 0, 0]]]
# A collective that the other process does not join; both processes together, on a busy machine.
WAIT, SECONDS = timedelta(seconds=120), 600
STACKS = (NestedFusion, ChainedFusion)


def mlp(hidden: int, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class Told(nn.Module):
    """A gate that learns; the first feature of a sample says what it decides."""

    def __init__(self, columns: int):
        super().__init__()
        self.linear = nn.Linear(FEATURES, columns)
        self.columns = columns

    def forward(self, *inputs):
        real = self.linear(inputs[0])
        told = nn.functional.one_hot(inputs[0][:, 0].long().abs() % self.columns, self.columns)
        return 2.0 * told + (real - real.detach())


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(FEATURES))

    def forward(self, main, aux):
        return main + torch.tanh(self.scale * aux)


class Keep(nn.Module):
    """A linear layer that hands on what the gate is told by."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        return torch.cat([x[:, :1], torch.tanh(self.linear(x))[:, 1:]], 1)


def routed(gate_grad: str, **settings) -> RoutedFusion:
    torch.manual_seed(1)
    return RoutedFusion(
        Told(2), [mlp(5), mlp(4)], execution="routed", gate_grad=gate_grad, **settings
    )


def stages() -> list[list[nn.Module]]:
    return [*([Keep(), Keep()] for _ in range(2)), [Sum(), Sum()]]


def nested(gate_grad: str, **settings) -> NestedFusion:
    torch.manual_seed(1)
    return NestedFusion(Told(3), *stages(), execution="routed", gate_grad=gate_grad, **settings)


def chained(gate_grad: str, **settings) -> ChainedFusion:
    torch.manual_seed(1)
    gates = [Told(2), Told(2)]
    return ChainedFusion(gates, *stages(), execution="routed", gate_grad=gate_grad, **settings)


class Sure(nn.Module):
    """Sure of the samples that say so."""

    def __init__(self, hidden: int):
        super().__init__()
        self.own = mlp(hidden)

    def forward(self, x):
        return torch.tanh(self.own(x)) + nn.functional.pad(9 * (x[:, :1] < 1).float(), (0, 2))


def cascade(fuse: str, **settings) -> CascadeFusion:
    torch.manual_seed(1)
    return CascadeFusion([Sure(5), Sure(4)], threshold=0.8, fuse=fuse, **settings).eval()


def samples(choice: list[int], seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.rand(len(choice), FEATURES)
    x[:, 0] = torch.tensor(choice) + 0.5
    return x


def steps() -> list[list[torch.Tensor]]:
    """For each step the samples of each rank."""
    return [
        [samples(own, 2 * i + rank) for rank, own in enumerate(s)] for i, s in enumerate(SPLITS)
    ]


def call(fusion: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return fusion(x, x) if isinstance(fusion, STACKS) else fusion(x)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model: nn.Module, fusion: nn.Module, rank: int) -> list:
    """Gradients after each step, and outputs in eval."""
    kept = []
    for step in steps():
        x = step[rank]
        out = model(x, x) if isinstance(fusion, STACKS) else model(x)
        out.square().mean().backward()
        kept.append([whole(p.grad).clone() for p in fusion.parameters()])
        fusion.zero_grad()
    fusion.eval()
    with torch.no_grad():
        kept.append([call(fusion, step[rank]) for step in steps()])
    return kept


def alone(fusion: nn.Module, rank: int) -> list:
    """The same in one process, which has the samples of both."""
    kept = []
    for step in steps():
        for x in step:
            (call(fusion, x).square().mean() / 2).backward()
        kept.append([p.grad.clone() for p in fusion.parameters()])
        fusion.zero_grad()
    fusion.eval()
    with torch.no_grad():
        kept.append([call(fusion, step[rank]) for step in steps()])
    return kept


def data_parallel(rank: int, mesh, results) -> None:
    for gate_grad in GATE_GRADS:
        for make in (routed, nested):
            fusion = make(gate_grad)
            parallel = DistributedDataParallel(fusion, broadcast_buffers=False)
            results[f"{make.__name__}, {gate_grad}"] = trained(parallel, fusion, rank)
    fusion = routed("straight_through", starved="run")
    results["run"] = trained(DistributedDataParallel(fusion), fusion, rank)


def sharded(rank: int, mesh, results) -> None:
    for gate_grad in GATE_GRADS:
        for of in ("modules", "branches", "all"):
            fusion = routed(gate_grad, starved="run")
            for branch in fusion.branches:
                fully_shard(branch if of == "branches" else branch.module, mesh=mesh)
            if of == "all":
                fully_shard(fusion, mesh=mesh)
            else:
                for p in fusion.gate.parameters():  # what is not sharded is averaged by hand
                    p.register_post_accumulate_grad_hook(average)
            results[f"{of}, {gate_grad}"] = trained(fusion, fusion, rank)
    fusion = routed("straight_through")  # one unit needs no setting
    fully_shard(fusion, mesh=mesh)
    results["one unit"] = trained(fusion, fusion, rank)


def sharded_stacks(rank: int, mesh, results) -> None:
    """Each stage, fusion and gate by itself."""
    for gate_grad in GATE_GRADS:
        for make in (nested, chained):
            fusion = make(gate_grad, starved="run")
            gates = [fusion.gate] if make is nested else fusion.gates.values()
            groups = fusion.main_stages, fusion.aux_stages, fusion.fusions, gates
            for group in groups:
                for branch in group:
                    fully_shard(branch.module, mesh=mesh)
            results[f"{make.__name__}, {gate_grad}"] = trained(fusion, fusion, rank)


def sharded_cascade(rank: int, mesh, results) -> None:
    """Whoever has no samples for a stage calls it all the same; whole and by scores."""
    for fuse in ("energy", "mean", "last"):
        fusion = cascade(fuse, starved="run")
        for stage in fusion.stages:
            fully_shard(stage.module, mesh=mesh)
        with torch.no_grad():
            results[fuse] = [fusion(step[rank]) for step in steps()]
            results[f"{fuse}, forced"] = [
                fusion(step[rank], exit=step[rank][:, 0].long()) for step in steps()
            ]


def average(parameter: nn.Parameter) -> None:
    distributed.all_reduce(parameter.grad)
    parameter.grad /= 2


def tensor_parallel(rank: int, mesh, results) -> None:
    """Both ranks have the same samples, and each a part of every last layer."""
    fusion = routed("straight_through", starved="run")
    refused = routed("straight_through")
    for each in (fusion, refused):
        for branch in each.branches:
            parallelize_module(
                branch.module, mesh, {"2": ColwiseParallel(output_layouts=Replicate())}
            )
    results["error"] = _error(lambda: refused(steps()[0][0]))
    out = [fusion(step[0]) for step in steps()]
    results["outputs"] = [y.detach() for y in out]


def _error(function) -> str:
    """Of a call that must not have waited for the other process."""
    with CommDebugMode() as collectives:
        try:
            function()
        except ValueError as error:
            return "late" if collectives.get_total_counts() else str(error)
    return "none"


def refused(rank: int, mesh, results) -> None:
    """Whatever the ranks choose, both are told, before anything is gathered."""
    x = steps()[1][rank]

    def told(fusion, parts, *inputs, **options):
        for part in parts:
            fully_shard(part, mesh=mesh)
        return _error(lambda: fusion(*inputs, **options))

    fusion = routed("straight_through")
    found = {"module": told(fusion, [b.module for b in fusion.branches], x)}
    fusion.eval()
    with torch.no_grad():
        found["eval"] = _error(lambda: fusion(x))
        fusion.execution = "auto"
        found["auto"] = _error(lambda: fusion(x))
    fusion = routed("straight_through")
    found["layer"] = told(fusion, [fusion.branches[1].module[2]], x)
    fusion = routed("straight_through")
    found["branch"] = told(fusion, [fusion.branches[0]], x)
    own = RoutedFusion(Told(2), [mlp(5), DistributedDataParallel(mlp(4))])
    results["data parallel"] = told(own, [], x)
    fusion = nested("straight_through")
    found["nested"] = told(fusion, [fusion.aux_stages[1].module], x, x)
    fusion = chained("straight_through")
    found["chained"] = told(fusion, [fusion.gates["1"].module], x, x)
    fusion = cascade("energy")
    found["cascade"] = told(fusion, [fusion.stages[1].module], x)
    energy = EnergyFusion([Branch(mlp(5), 0), Branch(mlp(4), 0)])
    present = torch.ones(4, 2, dtype=torch.bool)
    found["energy"] = told(energy, [energy.encoders[0].module], x, present=present)
    results["errors"] = found


JOBS = [data_parallel, sharded, sharded_stacks, sharded_cascade, tensor_parallel, refused]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=WAIT)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for job in JOBS:
            results: dict = {}
            job(rank, mesh, results)
            torch.save(results, f"{folder}/{job.__name__}-{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found in a job; they start once for all jobs."""
    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.spawn(
        worker, args=(str(folder),), nprocs=2, join=False, daemon=True
    )
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail("the two processes hang")
    finally:
        for process in context.processes:
            process.kill()
    return lambda job: [torch.load(folder / f"{job.__name__}-{rank}.pt") for rank in range(2)]


def assert_as_alone(actual: list, fusion: nn.Module, rank: int) -> None:
    for ours, theirs in zip(actual, alone(fusion, rank), strict=True):
        for a, e in zip(ours, theirs, strict=True):
            assert relative_error(a, e) <= 1e-6


def test_data_parallel(two):
    """No rank waits for gradients that never come; all parameters are used."""
    for rank, results in enumerate(two(data_parallel)):
        assert_as_alone(results.pop("run"), routed("straight_through"), rank)
        assert len(results) == 4
        for name, actual in results.items():
            kind, gate_grad = name.split(", ")
            assert_as_alone(actual, {"routed": routed, "nested": nested}[kind](gate_grad), rank)


def test_sharded_branches(two):
    for rank, results in enumerate(two(sharded)):
        assert_as_alone(results.pop("one unit"), routed("straight_through"), rank)
        assert len(results) == 6
        for name, actual in results.items():
            assert_as_alone(actual, routed(name.split(", ")[1]), rank)


def test_sharded_stages(two):
    made = {"nested": nested, "chained": chained}
    for rank, results in enumerate(two(sharded_stacks)):
        assert len(results) == 4
        for name, actual in results.items():
            kind, gate_grad = name.split(", ")
            assert_as_alone(actual, made[kind](gate_grad), rank)


def test_sharded_stages_of_a_cascade(two):
    for rank, results in enumerate(two(sharded_cascade)):
        assert len(results) == 6
        for name, outputs in results.items():
            fuse, _, forced = name.partition(", ")
            for actual, step in zip(outputs, steps(), strict=True):
                x = step[rank]
                exit = x[:, 0].long()
                expected, routing = cascade(fuse)(
                    x, exit=exit if forced else None, return_routing=True
                )
                assert torch.equal(routing.choice, exit)
                assert relative_error(actual, expected.detach()) <= 1e-6


def test_tensor_parallel_branches(two):
    fusion = routed("straight_through")
    for results in two(tensor_parallel):
        assert "branch '0' are held by several processes together (DTensor)" in results["error"]
        for actual, step in zip(results["outputs"], steps(), strict=True):
            assert relative_error(actual, fusion(step[0]).detach()) <= 1e-6


def test_without_the_setting_every_rank_is_told(two):
    for results in two(refused):
        errors = results["errors"]
        assert (
            "branch '1' are held by several processes together (Distr" in results["data parallel"]
        )
        assert len(errors) == 9
        for name, error in errors.items():
            assert "held by several processes together (fully_shard)" in error, name
        for name in ("module", "eval", "auto", "layer", "branch"):
            label = "branch '1'" if name == "layer" else "branch '0'"
            assert f"RoutedFusion: the weights of {label}" in errors[name]
            assert "set starved='run'" in errors[name]
        for name, label in {"nested": "aux stage 2", "chained": "gate 1"}.items():
            assert label in errors[name]
            assert "set starved='run'" in errors[name]
        assert "stage 1" in errors["cascade"]
        assert "set starved='run'" in errors["cascade"]
        assert "shard the fusion as one unit" in errors["energy"]
