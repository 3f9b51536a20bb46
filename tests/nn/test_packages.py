"""AOTInductor: packages that run in a process without the model's Python code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import N, modalities, splits, unlike
from torch.export import Dim

import dynmm_kernels

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "cpp_compiler"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
]

RUN = """
import sys
import torch
IMPORTS
run = torch._inductor.aoti_load_package("model.pt2")
torch.save([run(x) for x in torch.load("batches.pt")], "outputs.pt")
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"compiling", "dynmm_kernels"}))
"""


@pytest.mark.parametrize("execution", ["masked", "routed"])
def test_a_package_runs_in_a_fresh_process(execution, tmp_path):
    """The masked one without this library, too; the routed one with its operators."""
    fusion = unlike(execution=execution).eval()
    sizes = [N, 2, 5, 17]
    inputs = [modalities(logits) for size in sizes for logits in splits(4, size)]
    size = Dim("size", min=2, max=64)
    shapes = (({key: {0: size} for key in inputs[0]},),)
    with torch.no_grad():
        program = torch.export.export(fusion, (inputs[0],), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"layout_optimization": False},
        )
        expected = [fusion(x) for x in inputs]
    torch.save(inputs, tmp_path / "batches.pt")
    routed = execution == "routed"
    command = RUN.replace("IMPORTS", "import dynmm_kernels" if routed else "")
    root = Path(dynmm_kernels.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root) if routed else ""}
    run = subprocess.run(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == (["dynmm_kernels"] if routed else [])
    for actual, wanted in zip(torch.load(tmp_path / "outputs.pt"), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
