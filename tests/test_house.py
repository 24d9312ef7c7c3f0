"""The house: which way imports point, no cycles, nothing without its rule, its row and its place in the docs."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest
import tables

import certify
import certify.rules
import lipnet
from certify.bound import Assumption
from certify.registry import known_types
from lipnet import layers

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("lipnet", "certify", "sdp")


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports(path, at_import):
    """The modules that a file imports; with `at_import`, only those that are imported with it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    deferred = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing_only:
            deferred.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        if at_import and id(node) in deferred:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(path, at_import=False):
    return {name.split(".")[0] for name in imports(path, at_import)}


def test_imports_point_one_way():
    for name, path in modules():
        used = tops(path)
        package = name.split(".")[0]
        if package == "sdp":
            assert not used & {"torch", "lipnet", "certify"}, name
        if package == "lipnet":
            assert not used & {"sdp", "certify"}, name


def test_heavy_imports_wait_until_they_are_used():
    heavy = {"cvxpy", "scs", "matplotlib", "jinja2", "sklearn", "PIL", "triton", "onnx", "onnxruntime", "openvino", "foolbox", "pyautoattack", "auto_LiRPA"}
    homes: dict[str, set[str]] = {}
    for name, path in modules():
        for module in tops(path) & heavy:
            homes.setdefault(module, set()).add(name)
        assert not tops(path, at_import=True) & (heavy - {"matplotlib", "jinja2", "triton"}), name
    assert all(len(files) == 1 for files in homes.values()), homes


def test_there_are_no_import_cycles():
    graph = {name: set() for name, _ in modules()}
    for name, path in modules():
        graph[name] = {next((m for m in (used, used.rpartition(".")[0]) if m in graph), name) for used in imports(path, at_import=True)} - {name}
    done: set[str] = set()

    def visit(name, chain):
        assert name not in chain, " -> ".join((*chain, name))
        if name not in done:
            for used in graph[name]:
                visit(used, (*chain, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_layer_has_a_rule_a_rule_file_and_a_row():
    names = {type(row.make()).__name__ for row in tables.LAYERS}
    for name in layers.__all__:
        assert getattr(layers, name) in known_types(), f"{name} has no rule"
        assert name in names, f"{name} has no row in tests/tables.py"
        assert getattr(lipnet, name) is getattr(layers, name)
    families = {path.stem for path in (ROOT / "lipnet/layers").glob("*.py")} - {"__init__", "base"}
    rules = {path.stem for path in (ROOT / "certify/rules").glob("*.py")} - {"__init__"}
    assert families <= rules
    imported = set(re.findall(r"from certify.rules import (\w+) as", (ROOT / "certify/rules/__init__.py").read_text()))
    assert imported == rules


def test_docs_are_complete():
    table = (ROOT / "docs/layers.md").read_text()
    for name in layers.__all__:
        assert f"`{name}`" in table, f"docs/layers.md has no row for {name}"
    listed = set(re.findall(r"^## `?([A-Z0-9_]+)`?$", (ROOT / "docs/assumptions.md").read_text(), flags=re.MULTILINE))
    assert listed == {assumption.name for assumption in Assumption}
    commands = (ROOT / "docs/cli.md").read_text()
    from certify.cli import COMMANDS

    for command in COMMANDS:
        assert f"certify {command}" in commands


def test_public_names_are_there_and_documented():
    for name in certify.__all__:
        assert getattr(certify, name).__doc__, name
    for name in dir(lipnet):
        found = getattr(lipnet, name)
        if name[0].isupper() or (callable(found) and not name.startswith("_")):
            assert found.__doc__, name


@pytest.mark.parametrize("code", ["import certify.cli; certify.cli._parser()", "import sdp", "import certify.report", "import certify.results"])
def test_these_imports_are_fast(code):
    slow = "{'torch', 'cvxpy', 'matplotlib', 'jinja2', 'sklearn', 'PIL'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", f"{code}\nimport sys; sys.exit(str(s) if (s := {slow}) else 0)"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_importing_prints_nothing_and_starts_no_gpu():
    code = "import lipnet, certify, sdp, torch; certify.lipschitz; assert not torch.cuda.is_initialized()"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_no_star_imports_and_no_prints():
    for name, path in modules():
        assert "import *" not in path.read_text(), name
