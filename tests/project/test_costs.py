"""branch_costs against counts by hand, and what becomes of the module it measures."""

import pytest
import torch
from torch import nn

from dynmm_kernels import Branch, branch_costs


def test_branch_costs_count_by_hand():
    x = torch.randn(5, 6)
    assert branch_costs(nn.Linear(6, 7), x) == 42
    assert branch_costs(nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2)), (x,)) == 56
    convolution = nn.Conv1d(4, 8, 3, bias=False)
    assert branch_costs(convolution, torch.randn(2, 4, 10)) == 8 * 4 * 3 * 8
    assert branch_costs(Branch(nn.Linear(3, 2), inputs=[1]), (x, torch.randn(5, 3))) == 6
    assert branch_costs(nn.Linear(6, 7), x, unit="ms") > 0


@pytest.mark.parametrize("training", [False, True])
def test_branch_costs_count_attention(training):
    """Projections 4*T*d*d, scores and values 2*T*T*d, feed-forward 2*T*d*f."""
    layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True, dropout=0)
    steps = 5
    macs = 4 * steps * 8 * 8 + 2 * steps * steps * 8 + 2 * steps * 8 * 16
    assert branch_costs(layer.train(training), torch.randn(3, steps, 8)) == macs
    assert layer.training is training


def test_branch_costs_count_recurrent_and_bilinear_layers():
    """Whatever fused kernels torch has for them."""
    steps, x = 5, torch.randn(4, 5, 6)
    assert branch_costs(nn.LSTM(6, 7, batch_first=True), x) == steps * 4 * 7 * (6 + 7)
    assert branch_costs(nn.GRU(6, 7, batch_first=True), x) == steps * 3 * 7 * (6 + 7)
    pair = (torch.randn(4, 3), torch.randn(4, 6))
    assert branch_costs(nn.Bilinear(3, 6, 2), pair) == 3 * 6 * 2


@pytest.mark.parametrize("unit", ["macs", "ms"])
def test_branch_costs_leave_the_module_as_it_was(unit):
    module = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Dropout())
    module[2].eval()
    flags = [part.training for part in module.modules()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    backends = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    assert branch_costs(module, torch.randn(1, 6), unit) > 0
    assert [part.training for part in module.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == backends
