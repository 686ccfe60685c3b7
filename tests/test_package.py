"""The package as a whole: what importing it costs and loads, and what the native core depends on."""

from __future__ import annotations

import ast
import json
import platform
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pymape
from pymape.backends import native

HEAVY = ("transformers", "triton", "datasets", "peft", "matplotlib", "sklearn", "scipy", "pandas", "jsonargparse")


def fresh(code: str) -> str:
    """Run `code` in a new process and return what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def loaded_by(packages: str) -> str:
    return fresh(f"import sys, json, {packages}; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))")


def test_import_loads_nothing_heavy() -> None:
    loaded = json.loads(loaded_by("torch, pymape"))
    # torch itself may import some of these; what counts is what pymape adds.
    torchs_own = json.loads(loaded_by("torch"))
    assert set(loaded) <= set(torchs_own)


def test_import_starts_no_cuda_context() -> None:
    assert fresh("import pymape, torch; print(torch.cuda.is_initialized())").strip() == "False"


@pytest.mark.parametrize("name", pymape.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(pymape, name) is not None


@pytest.mark.parametrize("name", ["importance", "search"])
def test_functions_that_share_their_modules_name_stay_functions(name: str) -> None:
    code = f"import pymape, importlib; importlib.import_module('pymape.{name}'); print(callable(pymape.{name}))"
    assert fresh(code).strip() == "True"


def test_imports_go_down_only() -> None:
    """No module imports, not even inside a function, one that imports it; nor does any package, taken as a whole."""
    root = Path(pymape.__file__).parent
    places = {path: path.relative_to(root.parent).with_suffix("").parts for path in root.rglob("*.py")}
    files = {".".join(parts).removesuffix(".__init__"): path for path, parts in places.items()}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in files:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                # What a package re-exports comes from the package; `_C`, the native core, imports nothing.
                graph[name] |= (names & files.keys()) or ({node.module} if names != {"pymape._C"} else set())
    assert sum(map(len, graph.values())) > len(files)
    TopologicalSorter(graph).prepare()  # raises CycleError

    def whole(name: str) -> str:
        return ".".join(name.split(".")[:2])

    packages: dict[str, set[str]] = {}
    for name, imported in graph.items():
        packages.setdefault(whole(name), set()).update({whole(other) for other in imported} - {whole(name)})
    TopologicalSorter(packages).prepare()


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'pymape' has no attribute 'nothing'"):
        pymape.nothing  # noqa: B018


def test_native_core_needs_no_torch_library() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    needed = subprocess.run(["readelf", "-d", native().__file__], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert libraries
    assert not [name for name in libraries if "torch" in name or "c10" in name or "cudart" in name]


def test_one_openmp_runtime() -> None:
    code = (
        "import torch, pymape; from pymape.backends import native; native()\n"
        "x = torch.ones(4, 64, 64); from pymape.ops import module_scores; module_scores(x, x); x @ x\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "print('\\n'.join(path for path in maps if 'gomp' in path or 'iomp' in path or '/libomp' in path))"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    runtimes = fresh(code).split()
    assert len(runtimes) == 1, runtimes


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64")
@pytest.mark.parametrize(("version", "versions"), [(11, 0), (12, 1)])
def test_functions_have_versions_from_gcc_12_on(version: int, versions: int) -> None:
    header = Path(__file__).parents[1] / "csrc" / "tensor_view.h"
    command = ["g++", "-std=c++20", "-w", "-U__GNUC__", f"-D__GNUC__={version}", "-x", "c++", "-dM", "-E", str(header)]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (macro,) = (line for line in macros.splitlines() if line.startswith("#define PYMAPE_MULTIVERSION"))
    assert macro.count("target_clones") == versions


def test_core_sources_include_no_torch_header() -> None:
    sources = list((Path(__file__).parents[1] / "csrc").iterdir())
    assert sources
    for source in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source.name
