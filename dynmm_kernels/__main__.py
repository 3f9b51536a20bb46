"""python -m dynmm_kernels: info (what is installed), check (is it right), demo (what it does)."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, check, demo, ops


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dynmm_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="ops, backends and how they were built")
    info.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("check", help="compare every backend with the reference, a few seconds")
    demo.add_arguments(
        commands.add_parser("demo", help="train a small DynMM on digits; dense, masked, routed")
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return _info(arguments.json)
    if arguments.command == "check":
        return check.run()
    return demo.run(arguments)


def _info(as_json: bool) -> int:
    facts = _facts()
    if as_json:
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


if __name__ == "__main__":
    sys.exit(main())
