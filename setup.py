"""Builds the compiled kernels; what cannot be built is left out, with a note that says why."""

import os
import runpy
import sys
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CPU, CUDA, INFO = (f"dynmm_kernels.{name}" for name in ("_C", "_C_cuda", "_build_info"))
NOTES = {CPU: "build_failure.txt", CUDA: "cuda_failure.txt"}
# One library for every torch >= 2.10: only the stable ABI of that version is used.
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")
marks = runpy.run_path(str(ROOT / "dynmm_kernels/ops/fingerprint.py"))
toolkit = runpy.run_path(str(ROOT / "dynmm_kernels/ops/toolkit.py"))
VERSION = runpy.run_path(str(ROOT / "dynmm_kernels/version.py"))["__version__"]
SOURCES = marks["fingerprint"](ROOT / "csrc")
STAMP = ("DYNMM_STAMP", f'"{marks["stamp"](VERSION, SOURCES)}"')


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        CPU,
        sources("cpu/*.cpp") + sources("stamp.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=sources("*.h") + sources("ops/*.h") + sources("cpu/*.h"),
        define_macros=[STABLE_ABI, STAMP],
        # No contraction to FMA: the same bits as the reference on every processor.
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
        py_limited_api=True,
    )


def cuda_extension():
    """Built where torch is a CUDA build and a toolkit of its major version is found, GPU or not."""
    import torch

    if torch.version.cuda is None:
        raise LookupError(f"torch {torch.__version__} at build time has no CUDA")
    home = toolkit["find_toolkit"](int(torch.version.cuda.split(".")[0]))
    os.environ["CUDA_HOME"] = str(home)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        CUDA,
        sources("cuda/*.cu") + sources("stamp.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=sources("*.h") + sources("ops/*.h") + sources("cuda/*.h"),
        define_macros=[STABLE_ABI, STAMP, ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-fvisibility=hidden"],
            "nvcc": ["-O3", "--fmad=false", "-Xcompiler=-fvisibility=hidden"],
        },
        py_limited_api=True,
    )


def build_info():
    """What was built, for pybind11, without torch headers."""
    import torch
    from pybind11.setup_helpers import Pybind11Extension

    facts = {
        "DYNMM_TORCH_VERSION": torch.__version__,
        "DYNMM_SOURCES": SOURCES,
        "DYNMM_CUDA": os.environ.get("CUDA_HOME", "") if CUDA not in missing else "",
        "DYNMM_CUDA_ARCHITECTURES": os.environ.get("TORCH_CUDA_ARCH_LIST", "of the visible GPU"),
    }
    macros = [STAMP, *((name, f'"{value}"') for name, value in facts.items())]
    return Pybind11Extension(INFO, ["csrc/build_info.cpp"], define_macros=macros, cxx_std=17)


missing: dict[str, str] = {}
modules = []
Base: type = build_ext
try:
    try:
        modules.append(cuda_extension())
    except LookupError as error:
        missing[CUDA] = str(error)
    from torch.utils.cpp_extension import BuildExtension as Base

    modules += [cpu_extension(), build_info()]
except ImportError as error:
    missing[CPU] = missing[CUDA] = f"{error} (needed at build time)"


class BuildOrExplain(Base):  # type: ignore[misc,valid-type]
    """A failed build leaves a note beside the package instead of stopping the installation."""

    def run(self) -> None:
        inplace, compiler = self.inplace, self.compiler  # a failed run leaves both changed
        while self.extensions:
            self.inplace, self.compiler = inplace, compiler
            try:
                super().run()
                break
            except (Exception, SystemExit) as error:
                # CUDA is given up first: the CPU kernels may build without it.
                failed = [e for e in self.extensions if e.name == CUDA] or list(self.extensions)
                missing.update({e.name: f"{type(error).__name__}: {error}" for e in failed})
                self.extensions = [e for e in self.extensions if e not in failed]
        self.inplace = inplace
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not self.inplace:
            (folder / "sources.txt").write_text(SOURCES + "\n")
        for name, note in NOTES.items():
            path = folder / note
            path.unlink(missing_ok=True)
            if name in missing:
                path.write_text(missing[name] + "\n")
        if CPU in missing:
            message = f"dynmm_kernels was installed without compiled kernels ({missing[CPU]})"
            warnings.warn(f"{message}; the PyTorch reference serves.", stacklevel=1)
            print(message, file=sys.stderr)

    def folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "dynmm_kernels"


setup(ext_modules=modules, cmdclass={"build_ext": BuildOrExplain})
