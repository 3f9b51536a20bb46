"""benchmarks/gpu.sh without a GPU: the order of its stages, when it stops, what it packs.

The shell runs with a stand-in for Python whose stages end as a test wants; `--rehearse`, which
`.ci/run` runs, executes the stages themselves.
"""

import json
import os
import subprocess
import sys
import tarfile

import pytest
import torch

from benchmarks.gpu import cases, host, kernels, report, sanitize, smoke, stub, suite
from benchmarks.gpu.harvest import ROOT, Harvest
from dynmm_kernels import ops
from dynmm_kernels.ops.schemas import OPS

STAGES = ["build", "smoke", "correct", "kernels", "roofs", "host", "models", "sanitize", "triton"]
STAND_IN = """#!/usr/bin/env bash
module=${2#benchmarks.gpu.} stage=${2#benchmarks.gpu.}
[ "$module" = report ] && exec "$REAL_PYTHON" "$@"
[ "$module" = suite ] && stage=$3
echo "$stage ${*:3}" >>"$CALLS"
folder="${!#}"
[ "$stage" = "$ENDS" ] || exit 0
echo "{\\"stage\\": \\"$stage\\", \\"op\\": \\"route\\", \\"result\\": \\"not right\\"}" \
  >>"$folder/harvest.jsonl"
$HOW
"""


@pytest.fixture
def harvest(tmp_path):
    """`harvest(stage, how, ...)`: runs the script; `stage` ends as the shell command `how` says."""
    stand_in, out, calls = tmp_path / "python", tmp_path / "out", tmp_path / "calls"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    calls.touch()

    def run(stage: str = "", how: str = "", *options: str):
        names = {"PYTHON": stand_in, "REAL_PYTHON": sys.executable, "CALLS": calls}
        environment = {**os.environ, **{name: str(path) for name, path in names.items()}}
        ended = subprocess.run(
            ["bash", str(ROOT / "benchmarks/gpu.sh"), "-o", str(out), *options],
            env={**environment, "ENDS": stage, "HOW": how},
            capture_output=True,
            text=True,
        )
        lines = [json.loads(line) for line in (out / "harvest.jsonl").read_text().splitlines()]
        states = {line["stage"]: line["state"] for line in lines if "state" in line}
        with tarfile.open(out / "harvest.tgz") as packed:
            names = packed.getnames()
        assert {"harvest.jsonl", "harvest.log", "table.txt"} <= {*names}
        assert len([*out.iterdir()]) <= 8
        return ended, states, calls.read_text().split("\n")[:-1]

    return run


def test_every_stage_runs_once_and_in_order(harvest):
    ended, states, calls = harvest()
    assert ended.returncode == 0, ended.stderr
    assert [call.split()[0] for call in calls] == STAGES
    assert states == dict.fromkeys(STAGES, "ok")


def test_after_a_wrong_result_only_its_op_is_sanitised(harvest):
    ended, states, calls = harvest("smoke", "exit 3")
    assert ended.returncode == 1
    assert states["smoke"] == "WRONG"
    assert states["sanitize"] == "ok"
    left_out = {stage for stage, state in states.items() if state == "skipped"}
    assert left_out == {*STAGES} - {"build", "smoke", "sanitize"}
    assert calls[-1].startswith("sanitize --only route ")
    assert "smoke route: not right" in ended.stdout


def test_nothing_runs_on_kernels_that_were_not_built(harvest):
    ended, states, calls = harvest("build", "exit 1")
    assert ended.returncode == 1
    assert len(calls) == 1
    assert {states[stage] for stage in STAGES[1:]} == {"skipped"}


def test_a_stage_over_its_limit_is_cut_and_the_rest_goes_on(harvest):
    """Of 21 s, 15 stay for packing: the stage gets what is left."""
    ended, states, _ = harvest("kernels", "exec sleep 60", "-t", "21", "kernels", "triton")
    assert states == {"kernels": "cut", "triton": "no time"}
    assert ended.returncode == 2
    assert "kernels cut" in ended.stdout


def test_a_failed_stage_does_not_stop_the_others(harvest):
    ended, states, _ = harvest("host", "exit 1")
    assert ended.returncode == 1
    assert [stage for stage, state in states.items() if state != "ok"] == ["host"]


@pytest.mark.parametrize("arguments", [["paint"], ["-o"], ["--rehearsal"]])
def test_what_it_does_not_know_it_refuses(arguments):
    script = str(ROOT / "benchmarks/gpu.sh")
    ended = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "gpu.sh [--rehearse]" in ended.stderr


@pytest.mark.parametrize("op", OPS)
def test_smoke_sees_what_is_wrong(op):
    run = getattr(ops.kernels(), op)

    def spoilt(how):
        def call(*arguments):
            results = run(*arguments)
            last = [*cases.tensors_in(results)][-1]
            how(last.view(torch.uint8) if last.dtype.itemsize > 1 else last)
            return results

        return call

    assert smoke.problem_of(op, "cpu", run) is None
    assert smoke.problem_of(op, "cpu", spoilt(lambda last: last.fill_(0xFF)))  # nan, or -1
    assert smoke.problem_of(op, "cpu", spoilt(lambda last: last.zero_()))
    assert smoke.problem_of(op, "cpu", lambda *arguments: [])


def test_every_op_has_cases():
    """One that nobody thought of here gets its good calls."""
    assert {*cases.MAKERS} <= {*OPS}
    for small in (True, False):
        assert {case.op for case in cases.cases("cpu", small)} == {*OPS}
    assert [*cases.good_cases("route", "cpu")]


def test_plain_pytorch_does_the_same():
    """What each op is timed against gives its first results."""
    compared = 0
    for case in cases.cases("cpu", small=True):
        if case.torch is None:
            continue
        arguments = case.make()
        theirs = [*cases.tensors_in(case.torch(*arguments))]
        ours = [*cases.tensors_in(getattr(ops.kernels(), case.op)(*arguments))]
        for mine, other in zip(ours, theirs, strict=False):
            torch.testing.assert_close(other.to(mine.dtype), mine, rtol=0.1, atol=0.1)
            compared += 1
    assert compared > len(OPS)


def test_every_kernel_of_the_sources_is_watched():
    texts = [path.read_text() for path in (ROOT / "csrc/cuda").iterdir()]
    found = [name for text in texts for name in kernels.KERNEL.findall(text)]
    assert len(found) == sum(text.count("__global__") for text in texts)
    assert {"gather_bytes", "channel_sums", "place_tiles"} <= {*kernels.kernel_names()}


LONG = """==PROF== Profiling
route: N=67: ran
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","making_arguments","gpu__time_duration.sum","ns","9"
"1","spin_kernel(long)","gpu__time_duration.sum","ns","1"
"2","gather_bytes(Moves)","gpu__time_duration.sum","ns","1,234,500"
"2","gather_bytes(Moves)","launch__registers_per_thread","","60"
"3","spin_kernel(long)","gpu__time_duration.sum","ns","1"
"4","spin_kernel(long)","gpu__time_duration.sum","ns","1"
"5","count_tiles(Plan)","gpu__time_duration.sum","ns","n/a"
"""
WIDE = """"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","ns",""
"1","spin_kernel(long)","1","8"
"2","gather_bytes(Moves)","1,234,500","60"
"3","spin_kernel(long)","1","8"
"4","spin_kernel(long)","1","8"
"5","count_tiles(Plan)","n/a","8"
"""


@pytest.mark.parametrize("table", [LONG, WIDE], ids=["long", "wide"])
def test_launches_are_told_apart_by_marks(table):
    first, second = kernels.launches(table.splitlines())
    assert first == (0, {"kernel": "gather_bytes", "ns": 1_234_500.0, "registers": 60.0})
    assert second[0] == 1
    assert second[1]["kernel"] == "count_tiles"
    assert second[1]["ns"] is None


def test_stubs_take_the_flags_of_the_stages_and_no_others(tmp_path, monkeypatch, capfd):
    rehearsal = Harvest("sanitize", tmp_path, rehearsal=True)
    asked = [kernels.command(["stub", "ncu"], rehearsal=True)]
    tool = ["stub", "compute-sanitizer"]
    asked += [sanitize.command(name, tool, rehearsal, "route") for name in sanitize.TOOLS]
    for command in asked:
        start = command.index(sys.executable)
        monkeypatch.setattr(sys, "argv", [*command[:start], sys.executable, "-c", "print('ran')"])
        assert stub.main() == 0
        said = capfd.readouterr().out
        assert said.startswith(f"STUB of {command[1]}")
        assert "ran" in said
    monkeypatch.setattr(sys, "argv", ["stub", "ncu", "--kernel", "x", "true"])
    with pytest.raises(SystemExit):
        stub.main()


@pytest.mark.parametrize("part", suite.CHOSEN)
def test_the_suite_chooses_tests(part):
    command = [*suite.command(part), "--collect-only"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_phases_within_others_count_once():
    clock = host.Clock()
    inner = clock.around("inner", lambda: torch.randn(10))
    clock.around("outer", lambda: [inner() for _ in range(3)])()
    assert set(clock.spent) == {"inner", "outer"}
    assert min(clock.spent.values()) > 0
    assert not clock.inside


def test_idle_time_of_the_gpu():
    spans = [
        ("gather", 30.0, 40.0),
        ("route", 0.0, 5.0),
        ("Memcpy DtoH", 6.0, 10.0),
        ("overlapping", 35.0, 38.0),
        ("combine", 41.0, 42.0),
    ]
    assert host.idle_us(spans) == {"idle_us": 22.0, "idle_after_copy_us": 20.0, "gpu_us": 42.0}
    assert host.idle_us([]) == {}


def test_the_table_fits_on_a_screen():
    """However much was found; and it says what is none of a GPU's."""
    measured = {"us": 5.0, "gb_per_s": 700.0, "torch_us": 10.0}
    roofs = [{"stage": "roofs", "roof": "copy", "gb_per_s": 1000.0}]
    roofs += [
        {"stage": "roofs", "op": f"op{i}", "case": f"{j}", **measured}
        for i in range(20)
        for j in range(5)
    ]
    models = [
        {"stage": "models", "setting": f"{i}", "dtype": "float32", "row": row, "ms": ms}
        for i in range(50)
        for row, ms in (("masked", 2.0), ("routed", 1.0), ("loop", 1.5))
    ]
    failed = [{"stage": "host", "failed": f"{i}", "error": "x" * 400} for i in range(99)]
    lines = report.report({"roofs": roofs, "models": models, "host": failed, "build": []})
    assert len(lines) <= 60
    assert max(map(len, lines)) <= report.WIDTH
    text = "\n".join(lines)
    assert "70%" in text
    assert "1.50" in text
    assert "more in harvest.jsonl" in text
    assert "REHEARSAL" not in text
    roofs[0]["rehearsal"] = True
    assert "REHEARSAL" in report.report({"roofs": roofs, "build": []}, 60)[0]
