"""Package discovery and the C++ extension ``gen3r_engine._C``; the rest stands in pyproject.toml.

The folder ``x/`` holds the package ``gen3r_x`` (see the README's layout). Run through pip:

    pip install -e .                        # builds the extension where a C++ compiler is found
    python setup.py build_ext --inplace     # the extension alone, into engine/gen3r_engine/

Without a compiler or pybind11 the install goes on: every function of the extension has an
equivalent in Python, and ``gen3r-engine doctor`` says which of the two is used and why.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
FLOORS = {
    "gen3r": ".",
    "gen3r_kernels": "kernels",
    "gen3r_engine": "engine",
    "gen3r_export": "export",
    "gen3r_training": "training",
}
SOURCES = sorted(str(p.relative_to(HERE)) for p in (HERE / "engine/csrc").glob("*.cpp"))
HEADERS = sorted(str(p.relative_to(HERE)) for p in (HERE / "engine/csrc").glob("*.h"))
WARNING = """
gen3r_engine._C, the C++ extension, was not built:
  {reason}
The package works without it: slower Python code fuses point clouds, packs and writes files.
To build it: install a C++17 compiler with OpenMP (Debian: apt-get install g++), then
  pip install pybind11 setuptools && pip install --no-build-isolation --no-deps -e .
"""


def packages() -> list[str]:
    """The five packages and everything under them."""
    found: list[str] = []
    for name, folder in FLOORS.items():
        found += find_packages(folder, include=[name, f"{name}.*"])
    return found


def _compiles(compiler: list[str], code: str, flags: list[str]) -> bool:
    """Whether a small program compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(code, encoding="utf-8")
        command = [*compiler, str(source), "-o", str(source.with_suffix("")), *flags]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _outdated(built: str, source: str) -> bool:
    """Whether an object file is older than its source or any header."""
    if not os.path.exists(built):
        return True
    newest = max(os.path.getmtime(path) for path in (source, *HEADERS))
    return os.path.getmtime(built) < newest


class OptionalExtension(build_ext):
    """Builds the extension, or says why it could not and lets the install go on."""

    def build_extension(self, ext: Extension) -> None:
        """Fill in what the machine has, and compile."""
        try:
            import pybind11
            from pybind11.setup_helpers import ParallelCompile

            compiler = [self.compiler.compiler_so_cxx[0]] if self.compiler.compiler_so_cxx else []
            compiler = compiler or [self.compiler.compiler_so[0]]
            if shutil.which(compiler[0]) is None:
                raise FileNotFoundError(f"no C++ compiler: {compiler[0]} is not there")
            ext.include_dirs += [pybind11.get_include(), str(HERE / "engine/csrc")]
            ext.extra_compile_args += ["-O3", "-std=c++17", "-fvisibility=hidden"]
            ext.extra_compile_args += ["-ffp-contract=off", "-fno-trapping-math"]
            ext.extra_compile_args += ["-Wall", "-Wextra", "-g0"]
            if _compiles(compiler, "#include <omp.h>\nint main() {}", ["-fopenmp"]):
                ext.extra_compile_args += ["-fopenmp"]
                ext.extra_link_args += ["-fopenmp"]
            # deflate for npz; without it only stored arrays are written in C++
            if _compiles(compiler, "#include <zlib.h>\nint main() {}", ["-lz"]):
                ext.define_macros += [("GEN3R_ZLIB", "1")]
                ext.libraries += ["z"]
            with ParallelCompile(needs_recompile=_outdated):
                super().build_extension(ext)
        except Exception as error:  # compilers fail in their own many ways
            print(WARNING.format(reason=f"{type(error).__name__}: {error}"), file=sys.stderr)


setup(
    packages=packages(),
    package_dir={
        name: name if folder == "." else f"{folder}/{name}" for name, folder in FLOORS.items()
    },
    package_data={
        "": ["py.typed", "*.json", "*.txt", "*.safetensors", "*.html", "*.js"],
        "gen3r": ["embedded/*.json", "embedded/*/*"],
    },
    ext_modules=[
        Extension("gen3r_engine._C", SOURCES, depends=HEADERS, language="c++", optional=True)
    ],
    cmdclass={"build_ext": OptionalExtension},
)
