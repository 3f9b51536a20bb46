"""Which libraries of kernels are loaded: those of this package and no others, in any state."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynmm_kernels import __main__ as command
from dynmm_kernels import __version__, ops
from dynmm_kernels.ops import libraries
from dynmm_kernels.ops.fingerprint import fingerprint, stamp

LIBRARY, NOTE = "_C.abi3.so", "build_failure.txt"
SOURCES = "0123456789abcdef"


def put_library(folder: Path, text: str, info: str = "") -> None:
    """A stand-in for a library of that stamp, and a _build_info that runs `info`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIBRARY).write_bytes(b"\x7fELF\x00" + text.encode() + b"\x00")
    (folder / "_build_info.py").write_text(f"# {text}\n{info}\n")


def put_distribution(site: Path) -> None:
    name = f"dynmm_kernels-{__version__}"
    (site / f"{name}.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: dynmm_kernels\nVersion: {__version__}\n"
    (site / f"{name}.dist-info" / "METADATA").write_text(metadata)


@pytest.fixture
def loaded(monkeypatch) -> list[Path]:
    """The libraries that were given to torch."""
    paths: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", lambda path: paths.append(Path(path)))
    return paths


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The folder of an installed package without libraries."""
    folder = tmp_path / "site" / "dynmm_kernels"
    folder.mkdir(parents=True)
    (folder / "sources.txt").write_text(f"{SOURCES}\n")
    monkeypatch.setattr(libraries, "PACKAGE", folder)
    return folder


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The folder of a package with its sources beside it, and a site-packages of its own."""
    folder = tmp_path / "checkout" / "dynmm_kernels"
    folder.mkdir(parents=True)
    (tmp_path / "checkout" / "csrc").mkdir()
    (tmp_path / "checkout" / "csrc" / "kernel.cpp").write_text("int one;")
    monkeypatch.setattr(libraries, "PACKAGE", folder)
    monkeypatch.setattr(libraries.site, "getsitepackages", lambda: [str(tmp_path / "site")])
    monkeypatch.setattr(libraries.site, "ENABLE_USER_SITE", False)
    return folder


def load() -> libraries.Compiled:
    return libraries.load(LIBRARY, NOTE)


def test_the_library_of_the_package_is_loaded(package, loaded):
    put_library(package, stamp(__version__, SOURCES), "compiler = 'a compiler'")
    compiled = load()
    assert compiled.reason is None
    assert compiled.refused == ()
    assert compiled.build_info.compiler == "a compiler"
    assert loaded == [package / LIBRARY]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (stamp("0.0.9", SOURCES), "0.0.9"),
        (stamp(__version__, "fedcba9876543210"), "fedcba9876543210"),
        ("", "is no library of this package"),
    ],
    ids=["another version", "other sources", "foreign"],
)
def test_nothing_of_another_library_runs(package, loaded, tmp_path, text, told):
    put_library(package, text, f"open({str(tmp_path / 'ran')!r}, 'w')")
    compiled = load()
    assert str(package / LIBRARY) in compiled.reason
    assert told in compiled.reason
    assert compiled.refused == (compiled.reason,)
    assert loaded == []
    assert not (tmp_path / "ran").exists()


def test_nothing_of_another_build_info_runs(package, loaded, tmp_path):
    put_library(package, stamp(__version__, SOURCES))
    (package / "_build_info.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "_build_info.py is no library of this package" in load().reason
    assert loaded == []
    assert not (tmp_path / "ran").exists()


def test_a_library_that_is_broken_is_named(package):
    put_library(package, stamp(__version__, SOURCES))
    assert f"{package / LIBRARY} does not load: " in load().reason


@pytest.mark.parametrize("error", ["AttributeError", "UnicodeError", "OSError", "SyntaxError"])
def test_a_build_info_that_is_broken_is_named(package, loaded, error):
    put_library(package, stamp(__version__, SOURCES), f"raise {error}('what went wrong')")
    assert "what went wrong" in load().reason
    assert loaded == []


def test_a_note_in_another_encoding(package):
    (package / NOTE).write_bytes(b"g++: \xe4\xf6\xfc\n")
    assert load().reason.startswith("the build failed: g++: ")


def test_sources_beside_the_package_are_compared(checkout, loaded):
    csrc = checkout.parent / "csrc"
    put_library(checkout, stamp(__version__, fingerprint(csrc)))
    assert load().reason is None
    (csrc / "kernel.cpp").write_text("int two;")
    assert "reinstall" in load().reason
    assert loaded == [checkout / LIBRARY]


def test_a_checkout_takes_the_library_of_the_installed_package(checkout, loaded, tmp_path):
    """Also where its own is stale, which is named."""
    installed, csrc = tmp_path / "site" / "dynmm_kernels", checkout.parent / "csrc"
    put_library(installed, stamp(__version__, fingerprint(csrc)))
    assert load().reason == "no compiled library was found; reinstall with a C++ compiler: " + (
        "pip install ."
    )  # a folder is no installation
    put_distribution(tmp_path / "site")
    put_library(checkout, stamp(__version__, SOURCES))
    compiled = load()
    assert compiled.reason is None
    assert loaded == [installed / LIBRARY]
    assert [SOURCES in refused for refused in compiled.refused] == [True]


def test_a_checkout_refuses_an_installed_library_of_other_sources(checkout, loaded, tmp_path):
    put_distribution(tmp_path / "site")
    put_library(tmp_path / "site" / "dynmm_kernels", stamp(__version__, SOURCES))
    assert SOURCES in load().reason
    assert loaded == []


def test_info_names_what_was_refused(monkeypatch, capsys):
    compiled = libraries.Compiled(None, None, ("that library is stale",))
    monkeypatch.setattr(ops, "compiled", compiled)
    assert command.main(["info"]) == 0
    assert "not loaded: that library is stale" in capsys.readouterr().out


def import_from(site: Path, planted: Path) -> str:
    """What an installation in `site` says, started in `planted`, which is on sys.path twice."""
    code = "from dynmm_kernels import ops; print(ops.__file__, ops.compiled.reason)"
    path = os.pathsep.join([str(site), str(planted)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    environment.pop("DYNMM_BACKEND", None)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=planted, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(site))
    return run.stdout


@pytest.mark.parametrize("beside", ["nothing", "a broken library", "a note that is no UTF-8"])
def test_planted_libraries_do_not_run(tmp_path, beside):
    """Not in the current directory, not on PYTHONPATH, whatever is amiss beside the package."""
    site, planted = tmp_path / "site", tmp_path / "planted"
    source = Path(ops.__file__).parents[1]
    ignored = shutil.ignore_patterns("*.so", "*.txt", "__pycache__")
    shutil.copytree(source, site / "dynmm_kernels", ignore=ignored)
    (site / "dynmm_kernels" / "sources.txt").write_text(SOURCES)
    ran = f"open({str(tmp_path / 'ran')!r}, 'w')"
    put_library(planted / "dynmm_kernels", stamp(__version__, SOURCES), ran)
    put_distribution(planted)
    told = "no compiled library was found"
    if beside == "a broken library":
        put_library(site / "dynmm_kernels", stamp(__version__, SOURCES))
        told = "does not load"
    elif beside == "a note that is no UTF-8":
        (site / "dynmm_kernels" / NOTE).write_bytes(b"\xff\xfe")
        told = "the build failed"
    assert told in import_from(site, planted)
    assert not (tmp_path / "ran").exists()
