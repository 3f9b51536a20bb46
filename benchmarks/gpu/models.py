"""The published models at sizes that fill a large GPU, each row checked before it is timed."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import nested, problem
from benchmarks.contest import Contest, Outcome, Row
from benchmarks.gpu.harvest import FAILED, Harvest, begin
from benchmarks.nested import StackSetting
from benchmarks.problem import Setting
from dynmm_kernels.measure.timing import ONCE, Effort

ROWS = ("static", "static_e2", "masked", "loop", "routed", "bare")
EFFORT = Effort(seconds=0.6, rounds=(7, 50), sample=5e-3)
FLOATS = (torch.float32, torch.bfloat16)
SIZES = {
    "imdb": ((1024, 128, 8192), (0.036, 0.5, 1.0)),
    "mosei": ((512, 32, 2048), (0.164, 0.646)),
}
MIXES = ("a", "uniform", "all-0")


def settings(rehearsal: bool) -> Iterator[Setting | StackSetting]:
    """What is worth most comes first, for the time may be up before the last."""
    if rehearsal:
        yield Setting("imdb", 8, 0.5, training=False)
        yield Setting("imdb", 8, 0.5, training=True, dtype=torch.bfloat16)
        yield StackSetting("R50", 1, 64, "all-4", training=False)
        return
    for dtype in FLOATS:
        for training in (False, True):
            for name, (batches, shares) in SIZES.items():
                for n in batches:
                    for p in shares[: 1 if training else None]:
                        yield Setting(name, n, p, training, "cuda", dtype)
            if not training:
                for mix in MIXES:
                    yield StackSetting("R50", 8, 480, mix, training, "cuda", dtype)


def contest_of(setting: Setting | StackSetting) -> Contest:
    """Of the rows that are compared here, without counting memory."""
    kind = problem if isinstance(setting, Setting) else nested
    whole = kind.contest(setting)
    rows = {
        name: Row(row.call, row.compares_to, row.ceiling)
        for name, row in whole.rows.items()
        if name in ROWS
    }
    errors = {name: whole.errors[name] for name in rows}
    return Contest(rows, errors, whole.tolerance, whole.device)


def lines(setting: Setting | StackSetting, outcome: Outcome) -> Iterator[dict[str, Any]]:
    """One per row."""
    dtype = str(setting.dtype).removeprefix("torch.")
    for row, error in outcome.errors.items():
        named = {"setting": str(setting), "dtype": dtype, "row": row, "error": error}
        if row not in outcome.seconds:
            yield named | {"wrong": "not timed"}
            continue
        gains = {"realised": outcome.ratio("masked", row), "ceiling": outcome.ceilings[row]}
        if outcome.compares_to[row]:
            gains["overhead"] = outcome.ratio(row, outcome.compares_to[row])
        rounds = len(outcome.seconds[row])
        yield named | {"ms": 1e3 * outcome.median(row), **gains, "rounds": rounds}


def main(harvest: Harvest) -> int:
    fine, drawn = True, []
    for setting in settings(harvest.rehearsal):

        def run(setting=setting) -> None:
            nonlocal fine
            with torch.set_grad_enabled(setting.training):
                outcome = contest_of(setting).run(ONCE if harvest.rehearsal else EFFORT)
            for line in lines(setting, outcome):
                harvest.write(**line)
                fine &= "wrong" not in line
            if isinstance(setting, Setting) and setting.dtype == torch.float32:
                drawn.extend(for_plot(setting, outcome))
                (harvest.folder / "results.json").write_text(json.dumps({"benchmarks": drawn}))

        done = harvest.attempt(str(setting), run)
        fine = fine and done
        if harvest.device == "cuda":
            torch.cuda.empty_cache()
    return 0 if fine else FAILED


def for_plot(setting: Setting, outcome: Outcome) -> Iterator[dict[str, Any]]:
    """As `python -m dynmm_kernels plot` reads it."""
    for row in outcome.seconds:
        yield {
            "extra_info": setting.info(outcome, row),
            "stats": {"median": outcome.median(row)},
        }


if __name__ == "__main__":
    sys.exit(main(begin("models")))
