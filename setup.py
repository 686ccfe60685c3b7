"""Builds the native core with CMake; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).parent.resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        forget_configuration(build)
        configure = ["cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPYMAPE_OUTPUT_DIRECTORY={output}"]
        ninja = shutil.which("ninja")
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([str(part) for part in configure], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


def forget_configuration(build: Path) -> None:
    """Delete what CMake found and was told before, and keep the objects, which `cmake --fresh` would delete too."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for compilers in (build / "CMakeFiles").glob("[0-9]*"):
        shutil.rmtree(compilers)


setup(ext_modules=[Extension("pymape._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
