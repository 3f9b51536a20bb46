"""route against the routing metadata of other libraries on a GPU; absent ones are skipped."""

import pytest
import torch

from benchmarks.peers import PEERS
from benchmarks.timing import interleave, replay
from dynmm_kernels import route


@pytest.mark.benchmark(timer=replay.now)
@pytest.mark.parametrize(("n", "branches"), [(1024, 4), (16384, 8), (65536, 64), (1_000_000, 256)])
@pytest.mark.parametrize("peer", PEERS)
def test_route(benchmark, effort, device, peer, n, branches):
    if not device.startswith("cuda"):
        pytest.skip(f"{peer}: needs a GPU")
    choice = torch.randint(0, branches, (n,), device=device)
    try:
        theirs = PEERS[peer](choice, branches)
        theirs()
    except ImportError as absent:
        pytest.skip(f"{peer}: {absent}")
    plan = route(choice, branches)
    counts = torch.bincount(choice, minlength=branches).tolist()
    assert list(plan.counts) == counts
    assert torch.equal(plan.order.long(), torch.sort(choice, stable=True).indices)

    seconds = interleave(
        {"ours": lambda: route(choice, branches), "theirs": theirs}, effort, device
    )
    ratio = sorted(a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True))
    benchmark.group = f"route N={n} B={branches}"
    benchmark.extra_info["theirs_over_ours"] = ratio[len(ratio) // 2]
    replay(benchmark, seconds["theirs"])
