"""The programs in examples/ run by themselves, and what they print is right."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dynmm_kernels
from dynmm_kernels.ops.backends import compiled

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

# Every warning is an error but this one, and only where nothing was compiled.
SLOWER = "dynmm_kernels runs on its PyTorch reference"


def printed(name: str, *trainers: str) -> list[str]:
    """The lines that the program prints, with the package that is tested.

    `trainers`: other packages that it needs. What these warn of and log is their own affair.
    """
    for trainer in trainers:
        if importlib.util.find_spec(trainer) is None:
            pytest.skip(f"{trainer} is not installed")
    package = str(Path(dynmm_kernels.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    tolerated = ["-W", f"ignore:{SLOWER}:UserWarning"] if compiled.reason else []
    warnings = ["-W", "ignore"] if trainers else ["-W", "error", *tolerated]
    run = subprocess.run(
        [sys.executable, *warnings, EXAMPLES / f"{name}.py"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert trainers or not run.stderr
    return run.stdout.splitlines()


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells]


def shares(line: str) -> dict[str, float]:
    """By name, out of "text 36%, image 64%"."""
    return {name: int(share) / 100 for name, share in re.findall(r"(\S+) (\d+)%", line)}


def epochs(lines: list[str]) -> tuple[list[float], list[dict[str, float]]]:
    """Losses and shares out of lines such as "epoch 1: loss 0.250; text 36%, image 64%"."""
    lines = [line for line in lines if line.startswith("epoch ")]
    return [float(re.search(r"loss ([\d.]+);", line)[1]) for line in lines], [*map(shares, lines)]


def check_gate(lines: list[str]) -> None:
    """The loss falls, and the image is read where it tells the class, in a third of the samples."""
    losses, ran = epochs(lines)
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 2
    assert ran[-1]["image"] == pytest.approx(1 / 3, abs=0.1)
    assert sum(ran[-1].values()) == pytest.approx(1, abs=0.011)


def test_lightning_training():
    check_gate(printed("lightning_training", "lightning"))


def test_huggingface_training():
    check_gate(printed("huggingface_training", "transformers", "accelerate"))


def test_accelerate_training():
    """The loss falls, and each encoder runs on the two thirds that have its modality."""
    losses, ran = epochs(printed("accelerate_training", "accelerate"))
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    assert ran == [{"text": 0.67, "image": 0.67}] * 4


def test_serving():
    """Each request gets its own rows back, and images are decoded where they are needed."""
    *batches, last = printed("serving")
    assert batches == ["(1, 4) (3, 4) (2, 4)", "(4, 4)", " ".join(["(1, 4)"] * 8)]
    rows, images = map(int, re.findall(r"\d+", last))
    assert rows == 18
    assert 0 < images < rows


def test_serving_answers_as_the_whole_model_does():
    spec = importlib.util.spec_from_file_location("serving", EXAMPLES / "serving.py")
    serving = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serving)
    server = serving.TritonPythonModel()
    server.initialize({"model_instance_kind": "CPU"})
    sizes, draw = [2, 1, 5], np.random.default_rng(1)
    texts = [draw.normal(size=(n, serving.WORDS)).astype(np.float32) for n in sizes]
    images = [draw.integers(0, 256, (n, 3, 32, 32), np.uint8) for n in sizes]
    tensor = serving.backend.Tensor
    requests = [
        {"text": tensor("text", text), "image": tensor("image", image)}
        for text, image in zip(texts, images, strict=True)
    ]
    server.fusion.execution = "masked"
    pixels = torch.from_numpy(np.concatenate(images)).float() / 255
    with torch.no_grad():
        wanted = server.fusion(torch.from_numpy(np.concatenate(texts)), pixels)
    server.fusion.execution = "routed"
    answers = [response.output_tensors[0] for response in server.execute(requests)]
    assert [answer.name for answer in answers] == ["logits"] * 3
    got = [torch.from_numpy(answer.as_numpy()) for answer in answers]
    assert [*map(len, got)] == sizes
    torch.testing.assert_close(torch.cat(got), wanted)


def test_cascade():
    """Who lets samples go earlier pays less; what calibration promised holds."""
    guarantee, heading, *lines = printed("cascade")
    assert guarantee.startswith("With probability at least 0.9")
    assert heading.split()[:3] == ["threshold", "accuracy", "cost"]
    rows = {row[0]: numbers(row[1:3]) for row in map(str.split, lines)}
    (all_right, most), (_, less), (calibrated, least) = (
        rows[threshold] for threshold in ("inf", "0.9", "calibrated")
    )
    assert most / 2 > less > least
    assert all_right > 0.95
    assert calibrated > all_right - 0.08
    assert "strip 0%, border 0%, image 100%" in lines[0]


def test_early_exit():
    """The surer a sample must be, the fewer leave; most may leave at no loss."""
    _, *lines = printed("early_exit")
    accuracy, left, layers = zip(
        *([float(cell.rstrip("%")) for cell in line.split()[1:]] for line in lines), strict=True
    )
    assert left[0] == 100
    assert left[-1] == 0
    assert [*left] == sorted(left, reverse=True)
    assert layers == pytest.approx([4 * (1 - share / 100) for share in left], abs=0.03)
    assert accuracy[-1] > accuracy[0] + 0.05
    assert accuracy[2] > accuracy[-1] - 0.03


def test_fusion_level():
    """Auxiliary stages run on the dark third; both ways give the same."""
    masked, routed, results = printed("fusion_level")
    assert masked.endswith("(600, 600, 600)")
    main, first, second = numbers(re.findall(r"\d+", routed))
    assert main == 600
    assert second <= first < 300
    assert float(re.search(r"accuracy ([\d.]+)", results)[1]) > 0.9
    assert float(results.split()[-1]) < 1e-5


def test_missing_modality():
    """Both fusions run each encoder on the samples that have its modality."""
    energy, *_ = lines = printed("missing_modality")
    assert energy.startswith("EnergyFusion")
    for line in (lines[1], lines[3]):
        assert "rows of 6: text 4, image 2, audio 2;" in line
        assert float(line.split()[-1]) < 1e-5


def test_modality_level():
    """Nearly as good as both modalities for all, for less; masked computes the same for more."""
    rows = {
        line.split(":")[0]: numbers(re.findall(r"[\d,.]*\d", line))
        for line in printed("modality_level")
    }
    (right, cost), (_, most) = rows["routed"], rows["both"]
    assert rows["masked"][0] == right > rows["both"][0] - 0.03
    assert right > rows["text"][0] + 0.1
    assert cost < 0.8 * most < most < rows["masked"][1]


def test_own_gate():
    """Routed gradients are those of masked execution; with them the gate learns."""
    gap, *steps, end = printed("own_gate")
    assert float(gap.split()[-1]) < 1e-5
    losses = [float(line.split()[-1]) for line in steps]
    assert losses[-1] < losses[0] / 3
    assert float(re.search(r"loss ([\d.]+)", end)[1]) < losses[0] / 3
    assert all(share > 0.1 for share in shares(end).values())


def test_qmf_training():
    """Both trainings work, and noise hurts."""
    heading, *lines = printed("qmf_training")
    assert heading.startswith("ranking loss  noise")
    rows = [numbers(line.split()) for line in lines]
    assert [weight for weight, *_ in rows] == [0.0, 1.0]
    for _, clean, *noisy in rows:
        assert clean > 0.9
        assert clean > noisy[0] > noisy[1] > 0.5


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_short_and_tested(file):
    assert len(file.read_text().splitlines()) < 80
    assert f"test_{file.stem}" in globals()
