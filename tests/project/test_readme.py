"""The README's code runs as it stands there, from top to bottom, and its files exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert tuple(names["output"].shape) == (128, 23)
    assert tuple(names["features"].shape) == (16, 8, 32, 32)
    assert "(" in capsys.readouterr().out


def test_files_exist():
    named = re.findall(r"\]\(([\w./]+)\)", TEXT) + re.findall(
        r"`((?:benchmarks|tests)/[\w./]+)`", TEXT
    )
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
