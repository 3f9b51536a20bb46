"""The commands as a user types them: help, JSON, mistakes, and the words of `profile`."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dynmm_kernels import __main__ as command
from dynmm_kernels.cli import profile_words
from dynmm_kernels.cli.options import duration
from dynmm_kernels.measure.forecast import Curve, Forecast
from dynmm_kernels.measure.profiling import Check, Profile

MODELS = """
import torch
from torch import nn
from dynmm_kernels import Branch, NestedFusion, RoutedFusion

def fusion():
    return RoutedFusion(nn.Linear(6, 2), {"text": nn.Linear(6, 4), "both": nn.Linear(6, 4)})

class Net(nn.Module):
    def __init__(self, fusions=1, **options):
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.parts = nn.ModuleList(fusion() for _ in range(fusions))
        self.options = options

    def forward(self, x):
        x = self.stem(x)
        return [part(x, **self.options) for part in self.parts][:1]

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(6, 4)

    def forward(self, *, ids, mask):
        return self.own(ids) * mask

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        text = Branch(nn.Linear(6, 4), inputs={"input": "ids"})
        gate = Branch(nn.Linear(6, 2), inputs="ids")
        self.fusion = RoutedFusion(gate, {"text": text, "both": Words()})

    def forward(self, x):
        return self.fusion(ids=x, mask=torch.ones(len(x), 1))

x = torch.randn(8, 6)

def whole(): return fusion(), x
def given(): return fusion(), (x,), {"shares": [0.75, 0.25], "batch": 6}
def inside(): return Net(), (x,)
def named(): return Named(), (x,), {"shares": [0.5, 0.5]}
def two(): return Net(2), (x,)
def none(): return nn.Linear(6, 4), (x,)
def forced(): return Net(choice=torch.zeros(8, dtype=torch.long)), (x,)
def unused(): return nn.Sequential(nn.Linear(6, 4), nn.ModuleDict({"idle": fusion()}))[:1], (x,)
def ragged(): return fusion(), (x, torch.randn(3, 6))
def strange(): return fusion(), (x,), {"rounds": 3}
def nothing(): return fusion()
def stack():
    same = lambda: [nn.Identity()]
    return NestedFusion(nn.Linear(6, 2), same(), same(), same()), (x, x)
def broken(): return undefined
value = 3
"""
QUICK = ["--seconds=0.01", "--rounds=3", "--threads=1"]


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(textwrap.dedent(MODELS))
    (tmp_path / "missing_import.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    for name in ("their_models", "missing_import"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_is_worth_reading(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "examples:\n" in text
    assert f"  python -m dynmm_kernels {name}" in text.split("examples:")[1]
    assert "--json" in text
    assert all(ord(letter) < 128 for letter in text)
    assert max(map(len, text.splitlines())) <= 100


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in command.COMMANDS)


def parsed(capsys, *words):
    assert command.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_info_and_check_print_json(capsys, monkeypatch):
    assert parsed(capsys, "info")["torch"] == torch.__version__
    monkeypatch.setattr("dynmm_kernels.cli.check._cases", lambda dtypes: iter(()))
    assert command.main(["check", "--json"]) in (0, 1)  # nothing was compared, so 1 with kernels
    assert {*json.loads(capsys.readouterr().out)} == {"passed", "backends"}


def test_bench_and_its_plots(capsys, tmp_path):
    words = ["bench", "--workload=trivial", "--batch", "4", "8", "--shares", "0.25", "0.75", *QUICK]
    found = parsed(capsys, *words)
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 4
    assert {row["row"] for row in rows} == {"dense", "masked", "routed", "auto"}
    assert all(row["median_ms"] > 0 and row["error"] < 1e-4 for row in rows)
    assert all(row["speedup"] == 1 for row in rows if row["row"] == "masked")
    results = tmp_path / "bench.json"
    results.write_text(json.dumps(found))
    points = parsed(capsys, "plot", str(results))
    assert len(points) == len(rows)
    assert not (tmp_path / "bench.png").exists()
    pytest.importorskip("matplotlib")
    for words in ([], ["--time"]):
        assert command.main(["plot", str(results), *words]) == 0
        assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_bench_prints_a_table(capsys):
    assert command.main(["bench", "--workload=trivial", "--shares=0.5", "--training", *QUICK]) == 0
    text = capsys.readouterr().out
    assert "training step" in text
    assert all(word in text for word in ("batch", "masked", "routed x", "ceiling", "overhead"))


def test_profile_of_a_file_and_its_plot(capsys, models):
    found = parsed(capsys, "profile", "their_models.py:given", *QUICK)
    assert [profile["kind"] for profile in found["profiles"]] == ["forward", "training"]
    for profile in found["profiles"]:
        assert profile["batch"] == 6
        assert profile["shares"] == [0.75, 0.25]
        assert len(profile["checks"]) == 3
        assert profile["waits"] == 1
        assert "routing pays" in profile["words"]
    results = models / "profile.json"
    results.write_text(json.dumps(found))
    assert {row["row"] for row in parsed(capsys, "plot", str(results))} == {
        *("predicted", "routed", "masked")
    }
    pytest.importorskip("matplotlib")
    assert command.main(["plot", str(results)]) == 0


def test_profile_of_a_fusion_inside_a_model(capsys, models):
    words = ["--eval", "--batch=5", "--shares=0.5,0.5", *QUICK]
    assert command.main(["profile", "their_models:inside", *words]) == 0
    text = capsys.readouterr().out
    assert "parts.0, a RoutedFusion" in text
    assert "batch 5; shares as given: text 0.50, both 0.50" in text
    assert "EVAL" in text
    assert "TRAINING" not in text
    assert "the host waits for the device once per call" in text
    (profile,) = parsed(
        capsys, "profile", "their_models:two", "--fusion=parts.1", "--training", *QUICK
    )["profiles"]
    assert profile["gate_grad"] == "straight_through"


def test_profile_says_nothing_but_its_own_words(models):
    """Torch's profiler would, as soon as it starts in a process."""
    words = ["profile", "their_models:given", "--eval", *QUICK]
    ran = subprocess.run(
        [sys.executable, "-m", "dynmm_kernels", *words],
        env={**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "EVAL" in ran.stdout
    assert "profiler" not in ran.stderr


def test_profile_of_a_fusion_that_is_called_by_keyword(capsys, models):
    found = parsed(capsys, "profile", "their_models:named", *QUICK)
    assert found["fusion"] == "fusion"
    assert [profile["kind"] for profile in found["profiles"]] == ["forward", "training"]


MISTAKES = {
    "their_models": "wanted MODULE:FACTORY or FILE.py:FACTORY; got 'their_models'",
    "no_such_module:f": "no module 'no_such_module'",
    "no_such_file.py:f": "there is no file no_such_file.py",
    "their_models:absent": "has no 'absent'",
    "their_models:value": "is no callable; got int",
    "their_models:nothing": "must return (model, inputs)",
    "their_models:strange": "the options of their_models:strange may be batch",
    "their_models:none": "there is no RoutedFusion in the model, a Linear",
    "their_models:two": "choose with --fusion NAME: parts.0 (RoutedFusion), parts.1",
    "their_models:stack": "is a NestedFusion; only a RoutedFusion is taken apart",
    "their_models:forced": "calls 'parts.0' with a choice",
    "their_models:ragged": "every tensor must have the same number of samples",
    "their_models:whole --shares=0.5,0.6": "shares must be 2 numbers in 0..1, for text, both",
    "their_models:inside --fusion=other": "the model has no fusion 'other'; it has parts.0",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(words, capsys, models):
    assert command.main(["profile", *words.split(), *QUICK]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("dynmm_kernels profile: ")
    assert MISTAKES[words] in line


@pytest.mark.parametrize(
    ("place", "error"),
    [("their_models:broken", NameError), ("missing_import:f", ModuleNotFoundError)],
)
def test_their_own_exceptions_are_not_hidden(place, error, models):
    with pytest.raises(error):
        command.main(["profile", place])


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"benchmarks": []}'])
def test_plot_of_something_else(text, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(text)
    assert command.main(["plot", str(file)]) == 2
    assert command.main(["plot", str(tmp_path / "absent.json")]) == 2
    assert "dynmm_kernels plot: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["bench", "--batch=0"], ["bench", "--shares=2"], ["profile", "a:b", "--seconds=0"]]
)
def test_options_out_of_range(words, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2


def found(gain: float, routing: float = 1e-3) -> Profile:
    def straight(fixed: float, slope: float) -> Curve:
        return Curve(tuple((n, fixed + slope * n) for n in (1, 8, 32, 128)))

    branches = {"text": straight(1e-3, 1e-5), "both": straight(2e-3, 1e-4)}
    parts = straight(1e-4, 1e-6), branches, straight(routing, 0), straight(1e-4, 0)
    checks = (
        Check("routed", (0.8, 0.2), 1e-2, 1.1e-2),
        Check("routed", (0.2, 0.8), 2e-2, 2e-2),
        Check("masked", (0.8, 0.2), gain * 1e-2, 1e-2),
    )
    return Profile(
        training=False,
        batch=128,
        branches=("text", "both"),
        shares=(0.8, 0.2),
        several=False,
        learns=None,
        decided=True,
        phases={"gate": 1e-4},
        waits=2,
        forecast=Forecast(*parts),
        checks=checks,
        rounds=5,
    )


def test_the_answer_is_in_words():
    text = " ".join(profile_words.words(found(2.0)))
    assert "from batch" in text
    assert "% of the samples need both" in text or "every active share of both" in text
    assert "routed takes 10 ms, masked 20 ms; predicted 11 ms and 10 ms" in text
    assert 'Routed is 2.00 times as fast: take execution="routed"' in text
    assert 'execution="masked"' in profile_words.advice(found(0.5))
    assert "takes 2.00 times as long" in " ".join(profile_words.words(found(0.5)))
    assert 'execution="auto"' in profile_words.advice(found(1.05))
    never = " ".join(profile_words.words(found(0.5, routing=100.0)))
    assert "at no batch up to 8192" in never
    assert "at no active share of both" in never


def test_the_report_has_every_part():
    about = {"factory": "m:f", "fusion": "", "device": "cpu", "threads": 1, "torch": "2"}
    text = profile_words.text(about, [found(2.0)])
    for part in ("gate", "branch text", "branch both", "routing itself", "(masked: blending)"):
        assert part in text
    assert "2 times per call" in text
    assert "+10.0%" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (1.5e-6, "1.5 us"), (0.0, "0")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_labels_keep_clear_of_each_other():
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(4, 3))
    from dynmm_kernels.cli.labels import Label, place

    axes = figure.subplots()
    axes.plot([0, 1], [1, 1])
    axes.set_xlim(0, 1.2)
    labels = [Label(f"number {i}", (0.9 + i / 100, 1 + i / 1000), "black") for i in range(6)]
    place(axes, labels)
    boxes = [note.get_window_extent() for note in axes.texts]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    line = axes.transData.transform((0, 1))[1]
    assert not any(box.y0 < line < box.y1 for box in boxes)
    assert all(box.x1 <= axes.get_window_extent().x1 for box in boxes)
