"""python -m dynmm_kernels: info (what is installed), check (is it right), demo, plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "info": "ops, backends and how they were built",
    "check": "compare every backend with the reference, a few seconds",
    "demo": "train a small DynMM on digits; dense, masked, routed",
    "plot": "draw what the benchmarks measured: speed-up against the share of costly samples",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="dynmm_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in words:  # the others stay unloaded
            module = import_module(f".cli.{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
