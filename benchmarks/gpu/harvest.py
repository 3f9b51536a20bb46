"""What the stages of gpu.sh share: their arguments, their lines of JSON, how they end."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FAILED, WRONG = 1, 3  # exit statuses; after WRONG nothing is timed


@dataclass(frozen=True)
class Harvest:
    stage: str
    folder: Path
    rehearsal: bool
    """No GPU: small sizes on the CPU, stubs for the tools. No figure is one of a GPU."""

    def write(self, **values: Any) -> None:
        """One line in the harvest, and in the log."""
        marks = {"rehearsal": True} if self.rehearsal else {}
        at = round(time.time(), 1)
        line = json.dumps({"stage": self.stage, "at": at, **marks, **values}, default=str)
        with (self.folder / "harvest.jsonl").open("a") as lines:
            lines.write(line + "\n")
        print(line, flush=True)

    def attempt(self, what: str, call: Callable[[], object]) -> bool:
        """Whether the call went well; what went wrong becomes a line, and the stage goes on."""
        try:
            call()
        except Exception as error:
            self.write(failed=what, error=f"{type(error).__name__}: {error}"[:500])
            return False
        return True

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def tool(self, name: str) -> list[str] | None:
        """How the command of a CUDA toolkit is called: in a rehearsal its stub; None: not there."""
        if self.rehearsal:
            return [sys.executable, "-m", "benchmarks.gpu.stub", name]
        for candidate in (name, f"/usr/local/cuda/bin/{name}"):
            if shutil.which(candidate):
                return [candidate]
        return None


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("folder", type=Path, help="where harvest.jsonl stands")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small")
    return parser


def begin(stage: str, parsed: argparse.Namespace | None = None) -> Harvest:
    """The harvest that the command line names.

    Raises:
        SystemExit: torch sees no GPU, and this is no rehearsal.
    """
    parsed = parsed or options(argparse.ArgumentParser()).parse_args()
    if not parsed.rehearse and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --rehearse runs every stage without one")
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    return Harvest(stage, parsed.folder, parsed.rehearse)
