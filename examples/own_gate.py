"""A gate of your own, which draws and decides by itself, and learns as in masked execution.

python examples/own_gate.py
"""

import torch
from torch import Tensor, nn

from dynmm_kernels import RoutedFusion

FEATURES, BRANCHES, STEPS = 8, 3, 150


class HardGumbel(nn.Module):
    """Returns weights, not logits: one-hot rows of a Gumbel-softmax, with its gradient.

    In eval the most likely branch. Any module will do that returns zeros and ones [N, B].
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.score = nn.Linear(FEATURES, BRANCHES)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        logits = self.score(x)
        if self.training:
            return nn.functional.gumbel_softmax(logits, self.temperature, hard=True)
        return nn.functional.one_hot(logits.argmax(1), BRANCHES).to(x.dtype)


def model() -> RoutedFusion:
    """`gate_returns` says what the gate's answers are; the library adds no softmax of its own."""
    branches = {name: nn.Linear(FEATURES, 1) for name in ("first", "second", "third")}
    return RoutedFusion(HardGumbel(), branches, gate_returns="weights")


def gradients(fusion: RoutedFusion, execution: str, x: Tensor, wanted: Tensor) -> Tensor:
    """All gradients of one step, with the same draws every time."""
    fusion.execution = execution
    torch.manual_seed(1)
    loss = nn.functional.mse_loss(fusion(x), wanted)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*fusion.parameters()])])


def main() -> None:
    torch.manual_seed(0)
    truth = torch.randn(BRANCHES, FEATURES)
    x = torch.randn(512, FEATURES)
    kind = x[:, :BRANCHES].argmax(1)  # which line a sample follows
    wanted = (truth[kind] * x).sum(1, keepdim=True)
    fusion = model()

    routed, masked = (gradients(fusion, way, x, wanted) for way in ("routed", "masked"))
    print(f"gradients, routed and masked, differ by {(routed - masked).abs().max().item():.0e}")

    fusion.execution = "routed"
    optimizer = torch.optim.Adam(fusion.parameters(), lr=3e-2)
    for step in range(STEPS):
        loss = nn.functional.mse_loss(fusion(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.no_grad():
        output, routing = fusion.eval()(x, return_routing=True)
    shares = zip((branch.name for branch in fusion.branches), routing.fractions, strict=True)
    ran = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    print(f"eval: loss {nn.functional.mse_loss(output, wanted).item():.3f}; {ran}")


if __name__ == "__main__":
    main()
