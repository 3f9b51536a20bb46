"""The settings that every fusion has, checked whenever they change."""

from __future__ import annotations

import math
import warnings
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from ..functional import autograd
from ..functional.deferred import has_values
from .branch import as_branch, in_place_of
from .calling import as_module
from .tracing import MASKED, refuse_jit

_CHOICES: dict[str, tuple[Any, ...]] = {
    "execution": ("auto", "dense", "masked", "routed"),
    "gate_grad": ("straight_through", "selected", "none"),
    "noise": (None, "gumbel", "gumbel_always"),
    "batch_norm": ("masked", "subset"),
    "gates_read": ("cells", "stages"),
    "gate_returns": ("logits", "probabilities", "weights"),
    "starved": ("skip", "run"),
    "outputs": ("sum", "stack", "concat", "dict"),
}


_FEW = 8  # logits that may lie in 0..1 by chance

# Fusions whose gate was seen to learn, so that each is warned about once.
_looked_at: WeakSet[Settings] = WeakSet()


class Settings(nn.Module):
    """How a fusion decides, runs and learns; apart from parameters and state_dict."""

    def __init__(
        self,
        execution: str,
        gate_grad: str,
        temperature: float,
        noise: str | None,
        batch_norm: str,
        gate_returns: str,
    ) -> None:
        super().__init__()
        self.execution = execution
        self.gate_grad = gate_grad
        self.temperature = temperature
        self.noise = noise
        self.batch_norm = batch_norm
        self.gate_returns = gate_returns

    def __setattr__(self, name: str, value: Any) -> None:
        label = type(self).__name__
        if name in _CHOICES and value not in _CHOICES[name]:
            wanted = ", ".join(map(repr, _CHOICES[name]))
            raise ValueError(f"{label}: {name} must be one of {wanted}; got {value!r}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "temperature" and not (number and value > 0):
            raise ValueError(f"{label}: temperature must be a positive number; got {value!r}")
        if name == "fill" and not (number and math.isfinite(value)):
            raise ValueError(f"{label}: fill must be a finite number; got {value!r}")
        if name in ("gate", "layer") and value is not None:
            title = f"the {name}"
            value = in_place_of(self._modules.get(name), as_module(value, title))
            value = as_branch(value, name, title)
        super().__setattr__(name, value)

    @property
    def draws(self) -> bool:
        """Whether decisions are sampled now."""
        if self.noise is None:
            return False
        if self.gate_returns == "weights":
            raise ValueError(
                f"{type(self).__name__}: noise must be None where gate_returns='weights': such a "
                f"gate draws its own; got {self.noise!r}"
            )
        return self.noise == "gumbel_always" or (self.noise == "gumbel" and self.training)

    def learns(self, logits: Tensor) -> bool:
        """Whether the gate that gave these logits gets a gradient."""
        learns = self.gate_grad != "none" and autograd.is_followed(logits)
        if learns and has_values(logits) and self not in _looked_at:
            self._look_at(logits.detach())
        return learns

    def _look_at(self, logits: Tensor) -> None:
        """Warns, the first time that a gate learns, where its gradient would be another one."""
        if not self.training:
            return
        _looked_at.add(self)
        if self.gate_returns != "logits" or not logits.numel() or (logits < 0).any():
            return
        if getattr(self, "select", 1) == "multi_hot":
            if logits.numel() < _FEW or (logits > 1).any():
                return
            looks = "all lie in 0..1, as sigmoids do, and so choose every branch"
        elif ((logits.sum(1) - 1).abs() < 1e-3).all():
            looks = "are >= 0 and sum to 1, as probabilities do"
        else:
            return
        warnings.warn(
            f"{type(self).__name__}: the gate's logits {looks}; if they are probabilities, say "
            "gate_returns='probabilities' (or 'weights'), or the gradient of the gate is wrong",
            stacklevel=4,
        )

    def _slow_forward(self, *inputs: Any, **options: Any) -> Any:
        """What torch.jit.trace calls in place of `forward`."""
        if self.execution in ("auto", "routed"):
            refuse_jit(self, MASKED)
        return super()._slow_forward(*inputs, **options)

    def extra_repr(self) -> str:
        return f"execution={self.execution!r}, gate_grad={self.gate_grad!r}"
