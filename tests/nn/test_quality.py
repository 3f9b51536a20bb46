"""QMF's history and ranking loss against a loop over samples, in both orders of its update."""

import copy
import time

import numpy as np
import pytest
import torch
from torch import nn

from dynmm_kernels import QualityHistory, quality_rank_loss

SIZES = [1, 2, 127, 128, 129, 1000]


class Loop:
    """The same in NumPy, sample by sample and pair by pair."""

    def __init__(self, size: int, modalities: int):
        self.total = np.zeros((size, modalities))

    def update(self, indices, losses):
        for index, own in zip(indices.tolist(), losses.tolist(), strict=True):
            self.total[index] += own

    def quality(self, indices):
        low, span = self.total.min(0), np.ptp(self.total, 0)
        scaled = (self.total - low) / np.where(span > 0, span, 1)
        return scaled[indices.numpy()].tolist()

    def loss(self, confidence, indices):
        quality = self.quality(indices)
        results = [0.0] * confidence.shape[1]
        for i in range(len(quality)):
            j = (i + 1) % len(quality)
            for m, (own, other) in enumerate(zip(quality[i], quality[j], strict=True)):
                order = int(own > other) - int(own < other)
                gap = order * (confidence[i, m] - confidence[j, m]) - abs(own - other)
                results[m] = results[m] + gap.clamp_min(0) / len(quality)
        return results


@pytest.mark.parametrize("first", ["update", "loss"])
@pytest.mark.parametrize("size", SIZES)
def test_twelve_steps(size, first):
    history, loop = QualityHistory(size, 2).double(), Loop(size, 2)
    for _ in range(12):
        indices = torch.randperm(size)[: min(size, 16)]
        losses = torch.randn(len(indices), 2, dtype=torch.float64).exp()
        confidence = torch.randn(len(indices), 2, dtype=torch.float64, requires_grad=True)
        if first == "update":
            history.update(indices, losses)
            loop.update(indices, losses)
        actual = quality_rank_loss(confidence, indices, history)
        expected = torch.stack([torch.as_tensor(x) for x in loop.loss(confidence, indices)])
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        if expected.requires_grad:
            torch.testing.assert_close(
                *(torch.autograd.grad(x.sum(), confidence)[0] for x in (actual, expected)),
                rtol=1e-12,
                atol=1e-12,
            )
        if first == "loss":
            history.update(indices, losses)
            loop.update(indices, losses)
        everyone = torch.arange(size)
        expected = torch.tensor(loop.quality(everyone), dtype=torch.float64)
        torch.testing.assert_close(history.quality(everyone), expected, rtol=1e-12, atol=1e-12)


def test_extremes_are_exact_whatever_is_added():
    """Also where a loss is negative, so that the least sample is no longer the least."""
    history = QualityHistory(300, 3)
    for step in range(40):
        indices = torch.randint(300, (20,))
        history.update(indices, torch.randn(20, 3) * (step % 3))
        assert torch.equal(history.lowest.amin(1), history.total.amin(0))
        assert torch.equal(history.highest.amax(1), history.total.amax(0))


@pytest.mark.parametrize("size", [65, 100, 127, 129])
def test_extremes_of_the_last_block_forget_what_it_shares(size):
    """It ends with the last sample, so it begins within the block before."""
    history = QualityHistory(size, 1)
    shared, last = torch.tensor([size - 64]), torch.tensor([size - 1])
    for loss in (-5.0, 20.0, -10.0):
        history.update(shared, torch.tensor([[loss]]))
        assert history.lowest.amin() == history.total.amin()
        assert history.highest.amax() == history.total.amax()
        history.update(last, torch.zeros(1, 1))


def test_a_repeated_index_is_added_twice():
    history = QualityHistory(4, 1)
    history.update(torch.tensor([2, 2, 0]), torch.tensor([[1.0], [2.0], [4.0]]))
    assert history.total[:, 0].tolist() == [4, 0, 3, 0]


def test_before_the_first_update_there_is_no_order():
    """Where the published code divides 0 by 0."""
    confidence = torch.randn(5, 2, requires_grad=True)
    loss = quality_rank_loss(confidence, torch.arange(5), QualityHistory(9, 2))
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert not confidence.grad.any()


@pytest.mark.parametrize("size", [0, 1])
def test_batches_without_a_pair(size):
    history = QualityHistory(9, 2)
    history.update(torch.arange(9), torch.rand(9, 2))
    history.update(torch.arange(0), torch.rand(0, 2))
    confidence = torch.randn(size, 2, requires_grad=True)
    loss = quality_rank_loss(confidence, torch.arange(size), history)
    loss.sum().backward()
    assert loss.tolist() == [0, 0]


def test_state_dict_and_copies():
    history = QualityHistory(200, 2)
    history.update(torch.arange(200), torch.rand(200, 2))
    assert [*history.state_dict()] == ["total"]
    other = QualityHistory(200, 2)
    other.load_state_dict(history.state_dict())
    for twin in (other, copy.deepcopy(history)):
        assert torch.equal(twin.quality(torch.arange(200)), history.quality(torch.arange(200)))
    assert [*nn.ModuleList([history]).state_dict()] == ["0.total"]


def test_a_tensor_of_any_layout_may_be_assigned():
    rows = torch.rand(200, 2)
    history = QualityHistory(200, 2)
    history.load_state_dict({"total": rows}, assign=True)
    history.update(torch.tensor([0, 199]), torch.tensor([[-9.0, 9.0], [9.0, -9.0]]))
    assert torch.equal(history.lowest.amin(1), rows.amin(0))
    assert torch.equal(history.highest.amax(1), rows.amax(0))


def test_order_survives_a_confidence_in_half_precision():
    """A gap that fp16 rounds to 0 still has a sign."""
    history = QualityHistory(3, 1)
    history.update(torch.arange(3), torch.tensor([[0.0], [1e-6], [1e3]]))
    confidence = torch.tensor([[1.0], [5.0]], dtype=torch.float16)
    # Sample 1 is poorer than sample 0, and surer: both orders of the pair cost the difference.
    assert quality_rank_loss(confidence, torch.arange(2), history).tolist() == [4]


def test_the_history_gets_no_gradient():
    history = QualityHistory(4, 1)
    history.update(torch.arange(4), torch.rand(4, 1, requires_grad=True))
    assert not history.total.requires_grad
    assert not history.quality(torch.arange(4)).requires_grad


def together(rank, path, results):
    store = torch.distributed.FileStore(path, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    history = QualityHistory(6, 1)
    for epoch in range(2):
        own = torch.arange(rank, 6, 2)  # every process sees its own samples
        history.update(own, (own + 10.0 * epoch).unsqueeze(1))
        history.all_reduce()
        history.all_reduce()  # nothing is new, so nothing is added
        history.load_state_dict(copy.deepcopy(history.state_dict()))
        history.all_reduce()
    results[rank] = history.total[:, 0].tolist(), history.quality(torch.arange(6))[:, 0].tolist()
    torch.distributed.destroy_process_group()


def test_processes_share_what_each_of_them_saw(tmp_path):
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(together, (str(tmp_path / "store"), results), nprocs=2)
        whole = [2.0 * i + 10 for i in range(6)]
        assert results[0][0] == results[1][0] == whole
        assert results[0][1] == results[1][1] == pytest.approx([i / 5 for i in range(6)])


def test_a_step_does_not_read_the_data_set():
    """Of a million samples; a pass over them takes about a millisecond."""
    history, indices = QualityHistory(1_000_000, 2), torch.randint(1_000_000, (16,))
    losses = torch.rand(16, 2)

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    steps, passes = [], []
    for _ in range(20):
        steps.append(seconds(lambda: history.update(indices, losses)))
        passes.append(seconds(lambda: (history.total.amin(0), history.total.amax(0))))
    assert min(steps) < min(passes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.update(torch.tensor([0, 4]), torch.rand(2, 2)), r"in 0\.\.3; got 4"),
        (lambda h: h.quality(torch.tensor([-1])), r"indices must be in 0\.\.3; got -1"),
        (lambda h: h.quality(torch.tensor([1.0])), "indices must be int64"),
        (lambda h: h.quality([1]), "indices must be int64 .* got list"),
        (
            lambda h: h.update(torch.tensor([1]), torch.rand(1, 3)),
            r"losses must be \[n, M\] = ",
        ),
        (
            lambda h: quality_rank_loss(torch.rand(3), torch.arange(3), h),
            r"confidence must be \[n, M\]",
        ),
        (lambda h: QualityHistory(0, 2), "num_samples must be a positive integer; got 0"),
        (lambda h: QualityHistory(3, True), "num_modalities must be a positive integer; got True"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(QualityHistory(4, 2))
