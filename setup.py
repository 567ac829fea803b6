"""Bridge from pip to CMakeLists.txt, the one build definition."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 10)
# Taken from the environment: IUMAD_CUDA=auto|on|off, IUMAD_CUDA_ARCHITECTURES="80 90".
CMAKE_OPTIONS = ("IUMAD_CUDA", "IUMAD_CUDA_ARCHITECTURES")


def find_torch() -> Path:
    """Folder of the torch package of this environment; found without importing it, so that an isolated build sees it too."""
    folders = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *sys.path]
    for torch in (Path(folder) / "torch" for folder in folders):
        if not (torch / "version.py").exists():
            continue
        version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())[1]
        if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
            raise SystemExit(
                f"iumad needs torch >= 2.10 but found {version} in {torch}: upgrade it with `pip install -U torch`."
            )
        if not (torch / "include/torch/csrc/stable/library.h").exists():
            raise SystemExit(
                f"torch {version} in {torch} has no C++ headers: reinstall it from a wheel that carries them."
            )
        return torch
    raise SystemExit(
        "iumad builds against torch's headers but torch is not installed: install it into this environment first "
        "(CPU only: `pip install torch --index-url https://download.pytorch.org/whl/cpu`), then repeat the command."
    )


def find_tools() -> None:
    """A compiler, and what pip installs by itself unless the build is not isolated."""
    chosen = os.environ.get("CXX")
    if chosen and not shutil.which(chosen.split()[0]):
        raise SystemExit(
            f"the environment variable CXX is {chosen!r}, which is not found: correct or unset it."
        )
    if not chosen and not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise SystemExit(
            "iumad needs a C++20 compiler (g++ >= 11 or clang++ >= 15): on Debian or Ubuntu `apt install g++`."
        )
    missing = [tool for tool in ("cmake", "ninja") if not shutil.which(tool)]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if missing:
        raise SystemExit(
            f"iumad's build needs {', '.join(missing)}, not found here: `pip install {' '.join(missing)}`, "
            "or leave out --no-build-isolation and pip brings them itself."
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        find_tools()
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DIUMAD_TORCH={torch}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *(f"-D{name}={os.environ[name].replace(' ', ';')}" for name in CMAKE_OPTIONS if name in os.environ),
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", build]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(
                    "iumad: the C++ build failed; the compiler's messages are above (pip hides them without -v)."
                )
        if (
            self.editable_mode
        ):  # setuptools itself moves the extension named in setup() into the checkout, nothing else
            for library in output.glob("_cuda*.so"):
                shutil.copy(library, ROOT / "iumad_kernels")


version = re.search(r'__version__ = "(.+?)"', (ROOT / "iumad_kernels/version.py").read_text())[1]
setup(version=version, ext_modules=[Extension("iumad_kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
