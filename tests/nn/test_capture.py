"""Captured branches give what eager ones give, and what cannot be replayed is not."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from models import Function, assert_close, mlp, toy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynmm_kernels import Branch, RoutedFusion
from dynmm_kernels.functional.tree import Lazy, Shared
from dynmm_kernels.nn import CudaGraphReplay, EagerReplay, Usage

EAGER = EagerReplay()
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def fused(*branches: nn.Module, **options) -> RoutedFusion:
    """Sample n goes to branch 0 where its first feature is negative, else to branch 1."""
    gate = Function(lambda x, *rest: torch.stack([-x[:, 0], x[:, 0]], 1))
    return RoutedFusion(gate, branches, **options).eval()


def rows(count: int, first: int | None = None) -> Tensor:
    """Samples of which the first ones, by default half, go to branch 0."""
    x = torch.randn(count, 6, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() + 0.1
    x[: count // 2 if first is None else first, 0] *= -1
    return x


def reasons(fusion: RoutedFusion) -> str:
    return " ".join(fusion.captured.read().reasons)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], autouse=True)
def serving(request):
    with request.param():
        yield


@pytest.mark.parametrize("execution", ["routed", "masked", "dense"])
@pytest.mark.parametrize("ahead", [True, False])
def test_replayed_equals_eager(backend, ahead, execution):
    gate, branches = toy()
    fusion = RoutedFusion(gate, branches, execution=execution).eval()
    inputs = [torch.randn(n, 6, dtype=torch.float64) for n in (1, 2, 3, 7, 8, 11, 3)]
    wanted = [fusion(x) for x in inputs]
    capture = fusion.capture(*inputs[:1] * ahead, max_rows=11, replay=EAGER)
    recorded = capture.read().recorded
    assert recorded == (15 if ahead else 0)  # 1, 2, 4, 8 and 11, of three branches
    for _ in range(2):
        for x, want in zip(inputs, wanted, strict=True):
            assert_close(fusion(x), want)
    report = capture.read()
    assert report.hits
    assert not report.misses
    assert not ahead or report.recorded == recorded


def test_structures(backend):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, pair, table, scale):
            out = self.net(pair["a"]) * scale + table
            return {"out": out, "more": (pair["b"].argmax(1), out.sum(1)), "name": "net"}

    branches = [Branch(Net(), lambda x, *rest: rest) for _ in range(2)]
    fusion, table = fused(*branches), torch.randn(3, dtype=torch.float64)
    calls = [
        (rows(n), {"a": rows(n), "b": rows(n)}, Shared(table + n), 2.0) for n in (2, 9, 6, 9, 5)
    ]
    wanted = [fusion(*call) for call in calls]
    capture = fusion.capture(max_rows=8, replay=EAGER)
    for call, want in zip(calls, wanted, strict=True):
        got = fusion(*call)
        assert got.pop("name") == want.pop("name") == "net"
        assert_close(got, want)
    assert capture.read().hits == 10
    x = rows(4)
    for other in ((x, {"a": x, "b": rows(4)}, 3.0), (x, {"a": x, "b": x}, 2.0)):  # q = k
        *tensors, scale = other
        want = fused(*branches)(*tensors, Shared(table), scale)
        assert_close(fusion(*tensors, Shared(table), scale)["out"], want["out"])
    assert capture.read().hits == 10
    assert "another kind of inputs" in reasons(fusion)


def test_padded_with_a_row_of_its_own():
    seen = []
    branch = Function(lambda x: (seen.append(x.clone()), 2 * x)[1])
    fusion, x = fused(branch, mlp(6)), rows(9, 5)
    capture = fusion.capture(max_rows=16, replay=EAGER)
    fusion(rows(14, 7))
    seen.clear()
    assert_close(fusion(x)[:5], 2 * x[:5])
    (padded,) = seen
    assert torch.equal(padded, torch.cat([x[:5], x[:1].expand(3, -1)]))
    assert capture.read().rows == 7 + 7 + 5 + 4
    assert capture.read().padding == 1 + 1 + 3 + 0
    assert capture.read().held == {"0": (8,), "1": (4, 8)}


@pytest.mark.parametrize("branch", [nn.Identity(), nn.Linear(6, 6).double()])
def test_outputs_are_copies(branch):
    fusion, x = fused(branch, mlp(6)), rows(6, 6)  # all to one: the output of the branch itself
    fusion.capture(max_rows=8, replay=EAGER)
    first = fusion(x)
    kept = first.clone()
    first_again = fusion(rows(6, 6))
    assert torch.equal(first, kept)
    assert not torch.equal(first_again, kept)
    first.fill_(float("nan"))
    assert_close(fusion(x), kept)
    assert x.isfinite().all()


def test_in_place_branch():
    relu = nn.Sequential(nn.ReLU(inplace=True), mlp(6))
    fusion, x = fused(relu, mlp(6)), rows(7)
    kept, want = x.clone(), fusion(x)
    fusion.capture(x, max_rows=4, replay=EAGER)
    for _ in range(3):
        assert_close(fusion(x), want)
    assert torch.equal(x, kept)


def test_one_tensor_stays_one():
    """q = k = v: modules ask for it, and it is copied once."""
    same = []
    branch = Function(lambda q, k, v: (same.append(q is k and k is v), q + k + v)[1])
    fusion, x = fused(Branch(branch, [0, 0, 0]), Branch(branch, [0, 0, 0])), rows(6)
    fusion.capture(max_rows=4, replay=EAGER)
    assert_close(fusion(x), 3 * x)
    assert all(same)


def test_layouts():
    layouts = []

    def look(x):
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return x.sum((2, 3))

    fusion = RoutedFusion(Function(lambda x: x.sum((2, 3))), [Function(look)] * 3).eval()
    maps = torch.randn(4, 3, 5, 5)
    last = maps.to(memory_format=torch.channels_last)
    for x, is_last in ((maps, False), (last, True)):
        fusion.capture(max_rows=4, replay=EAGER)
        layouts.clear()
        assert_close(fusion(x, choice=1), x.sum((2, 3)), 1e-6)
        assert set(layouts) == {is_last}
    fusion(maps, choice=1)
    assert "another kind of inputs" in reasons(fusion)


def test_empty_batch_and_beyond_the_largest_bucket():
    fusion = fused(mlp(), mlp())
    x = rows(20)
    want = fusion(x)
    capture = fusion.capture(max_rows=9, replay=EAGER)
    assert_close(fusion(x), want)
    assert fusion(x[:0]).shape == (0, 3)
    assert capture.counts() == (0, 4)
    assert "more than max_rows=9 rows" in reasons(fusion)
    assert "no rows" in reasons(fusion)


def test_usage_counts():
    fusion, usage = fused(mlp(), mlp()), Usage()
    usage.add(fusion(rows(4), return_routing=True)[1])
    assert usage.replays == (0, 0)
    fusion.capture(max_rows=4, replay=EAGER)
    fusion(rows(4))  # not reported, so not counted there
    for count, first in ((4, 2), (9, 4), (9, 0)):
        routing = fusion(rows(count, first), return_routing=True)[1]
        usage.add(routing)
    assert routing.replays == (0, 1)
    assert usage.replays == (3, 2)
    assert fusion.captured.counts() == (5, 2)
    usage.reset()
    assert usage.replays == (0, 0)


class Writes(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.register_buffer("count", torch.zeros(1, dtype=torch.float64))
        self.other = torch.zeros(1)
        self.calls = 0

    def forward(self, x):
        match self.kind:
            case "buffer":
                self.count.add_(1)
            case "new buffer":
                self.count = self.count + 1
            case "tensor":
                self.other[0] += 1
            case "attribute":
                self.calls += 1
            case "random":
                return x + torch.rand(())
            case "rows":
                return x[:1].sum(1)
        return x


DURING = {
    "writes into its module.0.count": Writes("buffer"),
    "sets module.0.count": Writes("new buffer"),
    r"writes into a tensor \[1\]": Writes("tensor"),
    "sets module.0.calls": Writes("attribute"),
    "draws random numbers": Writes("random"),
    r"returns \[1\] for 4 rows": Writes("rows"),
}


@pytest.mark.parametrize("reason", DURING)
def test_side_effects_are_refused(reason):
    """With an example an error; at first use a warning, and it runs as ever."""
    module = nn.Sequential(DURING[reason])
    fusion, x = fused(module, nn.Identity()), rows(8)
    with pytest.raises(ValueError, match=f"capture: branch '0' {reason}"):
        fusion.capture(x, max_rows=4, replay=EAGER)
    assert fusion.captured is None
    if reason.startswith("returns"):
        return
    capture = fusion.capture(max_rows=4, replay=EAGER)
    with pytest.warns(UserWarning, match=f"branch '0' {reason}.* runs eagerly"):
        fusion(x)
    module[0].calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            fusion(x)
    assert module[0].calls == (3 if "calls" in reason else 0)
    assert capture.counts() == (4, 4)


def test_train_mode():
    fusion, x = fused(nn.Sequential(nn.Dropout(0.5), mlp()), mlp()), rows(6)
    with pytest.raises(ValueError, match=r"branch '0' is in train mode; call eval\(\)"):
        fusion.train().capture(max_rows=4, replay=EAGER)
    fusion.eval().capture(x, max_rows=4, replay=EAGER)
    want = fusion(x)
    fusion.branches[0].module[0].train()
    assert not torch.equal(fusion(x), want)
    assert "branch '0' is in train mode" in reasons(fusion)
    fusion.eval()
    assert_close(fusion(x), want)


@torch.inference_mode(False)
def test_training_goes_on():
    """Between two evaluations nothing is replayed; then what was learnt is in use."""
    fusion, plain = fused(mlp(), mlp()), fused(mlp(), mlp())
    plain.load_state_dict(fusion.state_dict())
    capture, x = fusion.capture(max_rows=8, replay=EAGER), rows(6)
    for _ in range(2):
        for model in (fusion, plain):
            with torch.enable_grad():
                model.train()(x).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        with torch.no_grad():
            assert_close(fusion.eval()(x), plain.eval()(x))
    assert capture.counts() == (4, 4)
    assert capture.read().recorded == 2
    with torch.enable_grad():
        assert fusion(x).requires_grad  # in eval mode as well
    assert "gradients recorded" in reasons(fusion)


@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm(tracked):
    norm = nn.BatchNorm1d(6, track_running_stats=tracked, affine=False).double()
    fusion, x = fused(norm, nn.Identity()), rows(6)
    if tracked:
        want = fusion(x)
        fusion.capture(x, max_rows=4, replay=EAGER)
        assert_close(fusion(x), want)
        assert fusion.captured.hits == 2
    else:
        with pytest.raises(ValueError, match="branch '0' has a BatchNorm over the batch"):
            fusion.capture(max_rows=4, replay=EAGER)


@pytest.mark.parametrize("where", ["branch", "inside", "everywhere"])
def test_hooks(where):
    fusion, x, seen = fused(mlp(), mlp()), rows(6), []
    want = fusion(x)
    capture = fusion.capture(x, max_rows=4, replay=EAGER)
    branch = fusion.branches[0]
    register = {
        "branch": branch.register_forward_hook,
        "inside": branch.module[1].register_forward_pre_hook,
        "everywhere": nn.modules.module.register_module_forward_hook,
    }[where]
    handle = register(lambda *_: seen.append(1))
    try:
        assert_close(fusion(x), want)
        assert seen
        assert "branch '0' has forward hooks" in reasons(fusion)
        with pytest.raises(ValueError, match="forward hooks, which a replay would not call"):
            fusion.capture(max_rows=4, replay=EAGER)
    finally:
        handle.remove()
    capture = fusion.capture(max_rows=4, replay=EAGER)
    fusion(x)
    assert capture.counts() == (2, 0)


def test_lazy():
    store = rows(8)
    lazy = Lazy(lambda indices: store[indices])
    fusion = fused(Branch(nn.Identity(), [1]), Branch(nn.Identity(), [0]))
    with pytest.raises(ValueError, match="branch '0' reads a Lazy input"):
        fusion.capture(store, lazy, max_rows=8, replay=EAGER)
    capture = fusion.capture(max_rows=8, replay=EAGER)
    assert_close(fusion(store, lazy), store)
    assert capture.counts() == (1, 1)
    assert "branch '0' reads a Lazy input" in reasons(fusion)


class Odd:
    pass


class Subclass(Tensor):
    pass


def test_other_inputs_are_refused():
    branches = [Branch(Function(lambda x, odd: x), [0, 1]), Branch(nn.Identity(), [0])]
    with pytest.raises(ValueError, match="branch '0' reads a Odd, which may change unseen"):
        fused(*branches).capture(rows(4), Odd(), max_rows=4, replay=EAGER)
    with pytest.raises(ValueError, match="branch '0' reads a Subclass, not a plain tensor"):
        fused(*branches).capture(rows(4), rows(4).as_subclass(Subclass), max_rows=4, replay=EAGER)
    there = Shared(torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="branch '0' reads a tensor on meta"):
        fused(*branches).capture(rows(4), there, max_rows=4, replay=EAGER)


def test_arguments():
    fusion, x = fused(mlp(), mlp()), rows(4)
    for wrong in (0, -1, 2.0, True, "8"):
        with pytest.raises(ValueError, match=rf"max_rows must be .*; got {wrong!r}"):
            fusion.capture(max_rows=wrong, replay=EAGER)
    with pytest.raises(ValueError, match="at least one sample"):
        fusion.capture(x[:0], max_rows=4, replay=EAGER)
    scripted = fused(torch.jit.script(nn.Linear(6, 3).double()), mlp())
    with pytest.raises(ValueError, match="branch '0' holds a ScriptModule"):
        scripted.capture(max_rows=4, replay=EAGER)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"no GPU.*replay=EagerReplay\(\)"):
            fusion.capture(max_rows=4)
    with pytest.raises(ValueError, match=r"branch '0' cannot be recorded: .*a GPU; got cpu"):
        fusion.capture(x, max_rows=4, replay=CudaGraphReplay())


def test_what_cannot_be_recorded_runs_eagerly():
    fusion, x = fused(mlp(), mlp()), rows(4)
    want = fusion(x)
    capture = fusion.capture(max_rows=4, replay=CudaGraphReplay())
    with pytest.warns(UserWarning, match=r"branch '[01]' cannot be recorded"):
        assert_close(fusion(x), want)
    assert_close(fusion(x), want)
    assert capture.counts() == (0, 4)


def test_errors_of_a_branch_are_its_own():
    """And a call that fails does not decide about the next."""

    def picky(x):
        if (x[:, 1] > 100).any():
            raise KeyError("too large")
        return x

    fusion, x = fused(Function(picky), nn.Identity()), rows(4)
    capture = fusion.capture(max_rows=4, replay=EAGER)
    with pytest.raises(KeyError, match="too large") as error:
        fusion(x + 1000 * (torch.arange(6) == 1))
    assert error.value.__notes__ == ["in branch '0'"]
    assert_close(fusion(x), x)
    assert capture.counts() == (2, 0)


def moved(branch: Branch) -> None:
    branch.module.float()
    branch.module.double()


def assigned(branch: Branch) -> None:
    state = {name: tensor + 1 for name, tensor in branch.module.state_dict().items()}
    branch.module.load_state_dict(state, assign=True)


def loaded(branch: Branch) -> None:
    state = {name: tensor + 1 for name, tensor in branch.module.state_dict().items()}
    branch.module.load_state_dict(state)


def layer_replaced(branch: Branch) -> None:
    branch.module[0] = nn.Linear(6, 8).double()


def layer_added(branch: Branch) -> None:
    branch.module.append(nn.Tanh())


def module_replaced(branch: Branch) -> None:
    branch.module = mlp().eval()


CHANGES = [moved, assigned, loaded, layer_replaced, layer_added, module_replaced]


@torch.inference_mode(False)
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_change(change):
    fusion, x = fused(mlp(), mlp()), rows(6)
    capture = fusion.capture(x, max_rows=4, replay=EAGER)
    fusion(x)
    old = fusion.branches[0].module
    change(fusion.branches[0])
    fusion.branches[0].eval()
    again = 0 if change is loaded else 1
    for _ in range(2):
        assert_close(fusion(x), fused(fusion.branches[0].module, fusion.branches[1].module)(x))
    assert capture.read().recorded == 6 + again
    assert capture.counts() == (6, 0)
    if change is loaded:  # what reads the old tensors must read the new values
        assert fusion.branches[0].module is old


def test_another_branch_is_not_replayed():
    fusion, x = fused(mlp(), mlp()), rows(6)
    capture = fusion.capture(max_rows=4, replay=EAGER)
    fusion.branches[0] = nn.Linear(6, 3).double().eval()
    assert_close(fusion(x)[:3], fusion.branches[0].module(x[:3]))
    assert capture.counts() == (1, 0)


def test_tensors_elsewhere_are_kept():
    """A table that is made anew for every number of rows: a recording reads its own."""

    class Positions(nn.Module):
        table = None

        def forward(self, x):
            if self.table is None or len(self.table) != len(x):
                self.table = torch.zeros(len(x), 1, dtype=x.dtype)
            return x + self.table

    fusion, (small, large) = fused(Positions(), nn.Identity()), (rows(2), rows(8))
    capture = fusion.capture(max_rows=4, replay=EAGER)
    for x in (small, large, small, large):
        assert_close(fusion(x), x)
    assert capture.read().recorded == 4
    watch = fusion.branches[0].replay._watch
    assert sorted(len(tensor) for tensor in watch._tensors) == [1, 4]


def test_buffers_made_late():
    class Made(nn.Module):
        def forward(self, x):
            if "late" not in self._buffers:
                self.register_buffer("late", torch.ones(6, dtype=x.dtype))
            return x * self.late

    fusion, x = fused(Made(), nn.Identity()), rows(6)
    capture = fusion.capture(x, max_rows=4, replay=EAGER)
    assert_close(fusion(x), x)
    assert capture.read().recorded == 6


def test_buffers_made_for_every_size():
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("ones", torch.ones(0))

        def forward(self, x):
            if len(self.ones) != len(x):
                self.ones = torch.ones(len(x), 1, dtype=x.dtype)
            return x * self.ones

    fusion = fused(Made(), nn.Identity())
    capture = fusion.capture(max_rows=4, replay=EAGER)
    assert_close(fusion(x := rows(8)), x)
    with pytest.warns(UserWarning, match="branch '0' replaces buffers whenever"):
        assert_close(fusion(x := rows(2)), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (8, 2, 8):
            assert_close(fusion(x := rows(count)), x)
    assert capture.read().recorded == 3


def test_autocast():
    fusion = fused(mlp(dtype=torch.float32), mlp(dtype=torch.float32))
    x = rows(6).float()
    capture = fusion.capture(max_rows=4, replay=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        want = fusion(x)
        assert want.dtype == torch.bfloat16
        fusion.branches[0].module[0].weight.add_(1)
        changed = fusion(x)
        assert not torch.equal(changed, want)  # a cast weight would be an old one
    assert capture.counts() == (4, 0)
    assert fusion(x).dtype == torch.float32
    assert capture.counts() == (4, 2)


def test_modes_see_the_operations():
    fusion, x = fused(mlp(), mlp()), rows(6)
    capture = fusion.capture(x, max_rows=4, replay=EAGER)
    with FlopCounterMode(display=False) as flops:
        fusion(x)
    assert flops.get_total_flops() == 2 * 6 * (6 * 8 + 8 * 3)
    assert capture.counts() == (0, 2)


def test_release_and_copies():
    fusion, x = fused(mlp(), mlp()), rows(6)
    want, capture = fusion(x), fusion.capture(max_rows=4, replay=EAGER)
    fusion(x)
    for other in (copy.deepcopy(fusion.branches), pickle.loads(pickle.dumps(fusion.branches))):
        assert [branch.replay for branch in other] == [None, None]
    assert copy.deepcopy(mlp()) is not None
    assert copy.deepcopy(capture) is None
    again = fusion.capture(max_rows=4, replay=EAGER)
    fusion(x)
    assert (capture.counts(), again.counts()) == ((2, 0), (2, 0))
    assert not any(capture.read().held.values())
    fusion.release()
    fusion.release()
    assert fusion.captured is None
    assert_close(fusion(x), want)
    assert again.counts() == (2, 0)
    assert fusion(x, return_routing=True)[1].replays is None


def test_a_branch_elsewhere():
    """Where another fusion calls the same branch, it does not say which inputs are rows."""
    shared = Branch(mlp(), name="mlp")
    fusion, x = fused(shared, mlp()), rows(6)
    outer = fused(Function(lambda x: fusion(x)), shared)
    fusion.capture(max_rows=4, replay=EAGER)
    want = torch.cat([mlp_out(fusion, x, 0), mlp_out(outer, x, 1)])
    assert_close(outer(x), want)


def mlp_out(fusion: RoutedFusion, x: Tensor, part: int) -> Tensor:
    half = x[:3] if part == 0 else x[3:]
    return fusion.branches[part].module(half)


def test_threads():
    fusion = fused(mlp(), mlp())
    inputs = [rows(n) for n in (3, 6, 8, 5)]
    wanted = [fusion(x) for x in inputs]
    fusion.capture(max_rows=4, replay=EAGER)
    wrong = []

    @torch.no_grad()
    def serve(i):
        for _ in range(30):
            if not torch.allclose(fusion(inputs[i]), wanted[i], atol=1e-12):
                wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def gpu_fusion() -> RoutedFusion:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.Sequential(nn.TransformerEncoder(layer, 3), nn.Flatten(), nn.Linear(160, 7))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(160, 64), nn.ReLU(inplace=True), nn.Linear(64, 7))
    gate = nn.Sequential(nn.Flatten(), nn.Linear(160, 2))
    return RoutedFusion(gate, [encoder, plain]).cuda().eval()


@on_gpu
@pytest.mark.parametrize("ahead", [True, False])
def test_graphs_equal_eager(ahead):
    fusion = gpu_fusion()
    inputs = [torch.randn(n, 5, 32, device="cuda") for n in (3, 64, 17, 200, 1)]
    wanted = [fusion(x) for x in inputs]
    capture = fusion.capture(*inputs[:1] * ahead, max_rows=64)
    outputs = [fusion(x) for _ in range(3) for x in inputs]
    for got, want in zip(outputs, wanted * 3, strict=True):  # none was overwritten by a later one
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert capture.hits
    assert "more than max_rows" in reasons(fusion)
    fusion.release()


@on_gpu
def test_graphs_share_memory_and_streams():
    """Interleaved branches, buckets and streams give the same bits; replays do not wait."""
    fusion = gpu_fusion()
    inputs = [torch.randn(n, 5, 32, device="cuda") for n in (9, 64, 2)]
    fusion.capture(*inputs[:1], max_rows=64)
    first = [fusion(x) for x in inputs]
    stream = torch.cuda.Stream()
    for attempt in range(200):
        with torch.cuda.stream(stream if attempt % 2 else torch.cuda.current_stream()):
            x = inputs[attempt % 3]
            got = fusion(x)
            x.record_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        assert torch.equal(got, first[attempt % 3]), attempt
    replay = fusion.branches[0].replay
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert replay(fusion.branches[0], (inputs[0],), range(1)) is not None
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
@torch.inference_mode(False)
@torch.no_grad()
def test_graphs_follow_parameters():
    fusion, x = gpu_fusion(), torch.randn(24, 5, 32, device="cuda")
    capture = fusion.capture(x, max_rows=32)
    recorded = capture.recorded
    fusion.load_state_dict({name: 0.5 * value for name, value in fusion.state_dict().items()})
    torch.testing.assert_close(fusion(x), copy.deepcopy(fusion)(x), rtol=1e-4, atol=1e-5)
    assert capture.recorded == recorded
    fusion.cpu().cuda()
    torch.testing.assert_close(fusion(x), copy.deepcopy(fusion)(x), rtol=1e-4, atol=1e-5)
    half = fusion.half()
    torch.testing.assert_close(half(x.half()), copy.deepcopy(half)(x.half()), rtol=0.01, atol=0.01)
    assert not fusion.captured.missed


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graphs_under_autocast(dtype):
    fusion, x = gpu_fusion(), torch.randn(24, 5, 32, device="cuda")
    with torch.autocast("cuda", dtype):
        want = fusion(x)
        fusion.capture(max_rows=32)
        for _ in range(2):
            torch.testing.assert_close(fusion(x), want, rtol=0.02, atol=0.02)
    assert fusion.captured.hits


@on_gpu
def test_a_branch_that_waits_for_the_device_is_refused():
    waits = Function(lambda x: x * float(x.sum().item() > 0))
    fusion = RoutedFusion(Function(lambda x: x[:, :2]), [waits, nn.Linear(8, 8)]).cuda().eval()
    x, stream = torch.randn(16, 8, device="cuda"), torch.cuda.current_stream()
    want = fusion(x)
    with pytest.raises(ValueError, match="branch '0' waits for the device"):
        fusion.capture(x, max_rows=16)
    assert torch.cuda.current_stream() == stream
    capture = fusion.capture(max_rows=16)
    with pytest.warns(UserWarning, match="branch '0' waits for the device"):
        torch.testing.assert_close(fusion(x), want)
    torch.testing.assert_close(fusion(x), want)
    assert capture.hits == 2


@on_gpu
def test_an_aborted_recording_is_left_behind():
    """The stream is the one before, and other calls can be recorded."""
    replay, device = CudaGraphReplay(), torch.device("cuda", torch.cuda.current_device())
    x, stream = torch.ones(4, device=device), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        replay.record(lambda: x.sum().item(), device)
    assert torch.cuda.current_stream() == stream
    play = replay.record(lambda: 2 * x, device)
    replay.follow(device)
    x.fill_(3)
    assert play().tolist() == [6] * 4
    replay.finish(device)


@on_gpu
def test_dropout_on_a_gpu_is_refused():
    noisy = Function(lambda x: nn.functional.dropout(x, 0.5, training=True))
    fusion = RoutedFusion(Function(lambda x: x[:, :2]), [noisy, nn.Linear(8, 8)]).cuda().eval()
    with pytest.raises(ValueError, match="branch '0' draws random numbers"):
        fusion.capture(torch.randn(16, 8, device="cuda"), max_rows=16)
