"""The one place where kernels are launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **options: Any) -> None:
    """Runs `programs` programs on the device of `like`, in the order of its current stream.

    Products and sums are not contracted to FMA: the same bits as the reference.
    """
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*args, enable_fp_fusion=False, **options)
