"""Builds the compiled kernels; without a compiler it installs the reference and says so."""

import runpy
import sys
import warnings
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FAILURE_NOTE = "build_failure.txt"
fingerprint = runpy.run_path(str(ROOT / "dynmm_kernels/ops/fingerprint.py"))["fingerprint"]


def extensions() -> list:
    """The stable-ABI kernels, and the build information (pybind11, no torch headers)."""
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CppExtension

    kernels = CppExtension(
        "dynmm_kernels._C",
        sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp")),
        include_dirs=[str(ROOT / "csrc")],
        depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
        # One library for every torch >= 2.10: only the stable ABI of that version is used.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        # No contraction to FMA: the same bits as the reference on every processor.
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
        py_limited_api=True,
    )
    build_info = Pybind11Extension(
        "dynmm_kernels._build_info",
        ["csrc/build_info.cpp"],
        define_macros=[
            ("DYNMM_TORCH_VERSION", f'"{torch.__version__}"'),
            ("DYNMM_SOURCES", f'"{fingerprint(ROOT / "csrc")}"'),
        ],
        cxx_std=17,
    )
    return [kernels, build_info]


def base_command() -> tuple[type[build_ext], list, str]:
    try:
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension, extensions(), ""
    except ImportError as error:
        return build_ext, [], f"{error} (needed at build time)"


Base, modules, missing = base_command()


class BuildOrExplain(Base):  # type: ignore[misc,valid-type]
    """A failed build leaves a note beside the package instead of stopping the installation."""

    def run(self) -> None:
        reason = missing
        if not reason:
            try:
                super().run()
                self.note().unlink(missing_ok=True)
                return
            except (Exception, SystemExit) as error:
                reason = f"{type(error).__name__}: {error}".strip()
        self.extensions = []
        message = f"dynmm_kernels was installed without compiled kernels ({reason})"
        warnings.warn(f"{message}; the PyTorch reference serves.", stacklevel=1)
        print(message, file=sys.stderr)
        self.note().parent.mkdir(parents=True, exist_ok=True)
        self.note().write_text(reason + "\n")

    def note(self) -> Path:
        root = ROOT if self.inplace else Path(self.build_lib)
        return root / "dynmm_kernels" / FAILURE_NOTE


setup(ext_modules=modules, cmdclass={"build_ext": BuildOrExplain})
