"""What the pages and docstrings show runs as it stands there, and what they point to exists."""

import doctest
import re
import sys
from pathlib import Path

import pytest

import dynmm_kernels
from dynmm_kernels import RoutedFusion, combine, gather, route

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
WITH_CODE = [page for page, text in TEXTS.items() if "```python" in text]
FOLDERS = "|".join(("benchmarks", "csrc", "dynmm_kernels", "docs", "examples", "tests"))


def run(page: str) -> dict[str, object]:
    """The names that the page's Python blocks leave, run from top to bottom as one program."""
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


def anchors(text: str) -> set[str]:
    """What a link to a heading of the page says behind its #."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_readme(capsys):
    assert tuple(run("README.md")["output"].shape) == (128, 23)
    assert "(" in capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page != "README.md"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_page(page):
    assert run(page)


def test_pages_are_found():
    assert {"README.md", "docs/gates.md", "docs/faq.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("page", TEXTS)
def test_links(page):
    """Relative links lead to files, and to headings that these files have."""
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", TEXTS)
def test_paths(page):
    """Files and folders of the project that a page names are there; `<op>` stands for any."""
    for name in re.findall(rf"`((?:{FOLDERS})/[^\s`]*)`", TEXTS[page]):
        if "<" in name:
            name = name[: name.index("<")].rpartition("/")[0]
        assert (ROOT / name).exists(), name


def test_readme_names_every_page():
    assert set(TEXTS) - {"README.md"} <= set(re.findall(r"\]\(([^)#]+)", TEXTS["README.md"]))


@pytest.mark.parametrize("shown", [RoutedFusion, combine, gather, route], ids=lambda o: o.__name__)
def test_docstring(shown):
    """Each has an example, and the example gives what it says."""
    globs = dict(vars(sys.modules[shown.__module__]))
    tests = doctest.DocTestFinder(recurse=False).find(shown, shown.__name__, globs=globs)
    examples = [example for test in tests for example in test.examples]
    assert examples
    assert any(example.want for example in examples)
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def test_one_version():
    """What the version is stands in version.py, and nowhere else where it could fall behind."""
    version = re.escape(dynmm_kernels.__version__)
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "dynmm_kernels").rglob("*.py")]
    repeats = [file.name for file in sources if re.search(rf'"{version}"', file.read_text())]
    assert repeats == ["version.py"]
