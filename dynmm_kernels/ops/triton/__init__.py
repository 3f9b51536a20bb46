"""The ops as Triton kernels: the same results as the reference, for any GPU that Triton serves.

Importing this package imports triton, so that only the first call of a Triton op does. Kernels loop
with `while`: Triton 3.6 cannot interpret a `range` over arguments with NumPy 2.4.

What a file here calls by the name of an op serves that op.
"""

import importlib
import pkgutil

from ..schemas import OPS

for _file in list(pkgutil.iter_modules(__path__)):
    _here = vars(importlib.import_module(f"{__name__}.{_file.name}"))
    globals().update({op: _here[op] for op in OPS if op in _here})
