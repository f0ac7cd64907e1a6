"""Builds vivace._C with CMake and hands the rest to setuptools; everything static is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("VIVACE_REQUIRE_EXT") == "1"

if not (ROOT / "python" / "vivace" / "engine").is_dir():
    sys.exit(
        "python/vivace/engine is not a directory: this checkout lacks its symbolic links. "
        "Clone again with links (git config core.symlinks true) or install the wheel."
    )


class CMakeBuild(build_ext):
    """Runs CMake in build/; without a compiler the package installs with its reference kernels and a warning."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        try:
            run("cmake", "-S", str(ROOT), "-B", str(tree), *configure_options())
            run("cmake", "--build", str(tree), "--parallel", str(os.cpu_count() or 1))
        except (OSError, subprocess.CalledProcessError) as error:
            if REQUIRED:
                raise
            self.warn(f"vivace._C was not built ({error}); kernels fall back to their torch reference")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(next(tree.glob("_C*.so"))), str(target))


def configure_options() -> list[str]:
    """Passed every time: the paths of an isolated build environment are gone at the next build."""
    import pybind11

    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DPYBIND11_FINDPYTHON=ON",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    try:
        import ninja
    except ImportError:
        return options
    return [*options, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]


def run(*command: str) -> None:
    """One build command; its output is pip's."""
    subprocess.run(command, cwd=ROOT, check=True)


setup(
    package_dir={"": "python"},
    packages=find_packages("python"),
    ext_modules=[Extension("vivace._C", sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": CMakeBuild},
)
