"""python -m dynmm_kernels info: what is installed, and how it was built.

Which ops every backend has; and of a backend that is not there, why.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

from .. import ops
from ..version import __version__
from .options import add_json

EXAMPLES = """\
examples:
  python -m dynmm_kernels info
  python -m dynmm_kernels info --json | jq .backends
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    facts = _facts()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"dynmm_kernels {__version__}   torch {torch.__version__}   {facts['python']}")
    print(f"threads {facts['threads']}   {facts['machine']}")
    print(f"\n{'op':<14}" + "".join(f"{name:<12}" for name in ops.BACKENDS))
    for op in ops.schemas.OPS:
        row = ("yes" if facts["backends"][name] == "available" else "no" for name in ops.BACKENDS)
        print(f"{op:<14}" + "".join(f"{answer:<12}" for answer in row))
    for name, status in facts["backends"].items():
        if status != "available":
            print(f"\nbackend {name!r} is not available: {status}")
    for refused in facts["refused"]:
        print(f"\nnot loaded: {refused}")
    if facts["build"]:
        print("\nbuild   " + ", ".join(f"{key}: {value}" for key, value in facts["build"].items()))
    return 0


def _facts() -> dict[str, Any]:
    build = ops.compiled.build_info
    names = ("compiler", "torch", "cuda", "cuda_architectures", "stable_abi", "sources")
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": f"Python {platform.python_version()}",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "ops": list(ops.schemas.OPS),
        "backends": {name: ops.why_not(name) or "available" for name in ops.BACKENDS},
        "refused": [*ops.compiled.refused, *ops.compiled_cuda.refused],
        "build": {name: getattr(build, name) for name in names} if build else None,
    }
