"""python -m dynmm_kernels profile MODULE:FACTORY: does routing pay for your model, here?

FACTORY is a callable of an importable module, or of a file, without arguments. It returns
(model, inputs) or (model, inputs, options):

  model    a RoutedFusion, or a module that has one in it
  inputs   the arguments of one call, a tuple of tensors [N, ...] in any nesting
  options  a dict with any of batch, shares, fusion: defaults of the options below

Each part is timed by itself, gate and branches on several numbers of rows, then the whole:
routed, with the gate's shares and with others, and masked. What the parts predict stands beside
what was measured. Nothing in the model changes.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
from torch import Tensor

from ..functional import tree
from ..measure.memory import keep_heap
from ..measure.profiling import Profile, SharesError, profile_fusion
from ..measure.timing import Effort
from .loading import find_fusion, fusion_inputs, make
from .options import Mistake, add_json, add_timing, positive, shares
from .profile_words import facts, text
from .progress import progress

EXAMPLES = """\
examples:
  python -m dynmm_kernels profile my_project.models:build
  python -m dynmm_kernels profile train.py:example --batch 256 --shares 0.8,0.2 --training
  python -m dynmm_kernels profile train.py:example --json > profile.json

a factory:
  def example():
      fusion = RoutedFusion(gate, {"cheap": text_net, "costly": both_nets})
      return fusion, (torch.randn(128, 300), torch.randn(128, 4096)), {"shares": [0.8, 0.2]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="or path/to/file.py:FACTORY")
    parser.add_argument("--fusion", metavar="NAME", help="which, as in model.named_modules()")
    parser.add_argument(
        "--batch", type=positive, metavar="N", help="repeat or trim the inputs to N samples"
    )
    parser.add_argument(
        "--shares",
        type=shares,
        metavar="A,B,..",
        help="of the samples that take each branch; default: as the gate decides",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--eval", action="store_true", help="inference only")
    modes.add_argument(
        "--training", action="store_true", help="forward and backward only; default: both"
    )
    add_timing(parser, 30, 20.0, "of each of eval and training")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    # Else torch's profiler tells stderr whenever it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    made = make(arguments.factory)
    name, fusion = find_fusion(made.model, arguments.fusion or made.options.get("fusion"))
    batch = arguments.batch or made.options.get("batch")
    inputs = fusion_inputs(made.model, made.inputs, batch, name, fusion)
    wanted = arguments.shares or made.options.get("shares")
    keep_heap()
    effort = Effort(
        arguments.seconds, (3, max(3, arguments.rounds)), sample=min(2e-2, arguments.seconds / 500)
    )
    modes = [False] * (not arguments.training) + [True] * (not arguments.eval)
    found: list[Profile] = []
    with progress(len(modes) * effort.rounds[1], quiet=arguments.json) as advance:
        for training in modes:
            try:
                found.append(profile_fusion(fusion, inputs, wanted, training, effort, advance))
            except SharesError as error:
                raise Mistake(str(error)) from None
    about = _about(arguments.factory, name, inputs)
    if arguments.json:
        print(json.dumps(about | {"profiles": [facts(p) for p in found]}, indent=2))
    else:
        print(text(about, found))
    return 0


def _about(factory: str, name: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    tensors = [leaf for leaf in tree.flatten(inputs)[0] if isinstance(leaf, Tensor)]
    return {
        "factory": factory,
        "fusion": name,
        "device": str(tensors[0].device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
