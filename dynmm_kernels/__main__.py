"""python -m dynmm_kernels: what is installed, is it right, what it does, does it help me?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "info": "ops, backends and how they were built",
    "check": "compare every backend with the reference, a few seconds",
    "demo": "train a small DynMM on digits; dense, masked, routed",
    "profile": "your own model: where its time goes, and whether routing pays",
    "bench": "small models routed, masked, dense and auto, over batches and shares",
    "plot": "draw what bench, profile or the benchmarks measured",
}


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="dynmm_kernels",
        description=__doc__,
        epilog="python -m dynmm_kernels COMMAND --help says more, with examples",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == next(iter(words), None):  # the others stay unloaded
            module = import_module(f".cli.{name}", __package__)
            command.description, command.epilog = module.__doc__, module.EXAMPLES
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    from .cli.options import Mistake

    try:
        return arguments.run(arguments)
    except Mistake as error:
        print(f"dynmm_kernels {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
