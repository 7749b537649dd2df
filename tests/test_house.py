"""The house: which file may import what, in which order, and that every file has its tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "resnet_func"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the bottom to the top: a file imports only from those before it.
ORDER = [
    "types",
    "tree",
    "autodiff",
    "config",
    "layers",
    "resnet",
    "zoo",
    "interop",
    "winograd",
    "losses",
    "schedules",
    "updates",
    "muon",
    "optim",
    "per_sample.ghost",
    "per_sample.contract",
    "per_sample.capture",
    "per_sample.plan",
    "per_sample.quantity",
    "per_sample.noise",
    "per_sample.projections",
    "per_sample.reference",
    "per_sample.engine",
    "per_sample.kernel",
    "per_sample.transforms",
    "per_sample.reduction",
    "per_sample",
    "assertions",
    "testing",
    "train",
    "augment",
    "streaming",
    "data",
    "checkpoint",
    "runtime",
    "summary",
    "plots",
    "recipes",
    "run_folder",
    "experiment",
    "run",
    "inference",
    "report",
    "console",
    "options",
    "cli",
    "__main__",
]
TORCHVISION = {"interop", "data"}
ATEN = {"per_sample.contract"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """`(module, name)` of every import in a file that runs; those for type checkers alone are left out."""
    source = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {id(inner) for node in ast.walk(source) if is_type_checking(node) for inner in ast.walk(node)}
    for node in ast.walk(source):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from ((node.module or "", alias.name) for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def internal_imports(path: Path) -> set[str]:
    found = set()
    for module, name in imports(path):
        if module == "resnet_func" or module.startswith("resnet_func."):
            inner = f"{module}.{name}".removeprefix("resnet_func.")
            found.add(inner if inner in ORDER else module.removeprefix("resnet_func."))
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if module_name(p)], ids=module_name)
def test_imports_flow_down(path: Path) -> None:
    name = module_name(path)
    assert name in ORDER, f"give {name} its place in ORDER"
    later = {other for other in internal_imports(path) if ORDER.index(other) >= ORDER.index(name)}
    assert not later, f"{name} imports from above: {later}"


def test_the_order_names_only_what_exists() -> None:
    assert set(ORDER) == {module_name(path) for path in SOURCES} - {""}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path) or "resnet_func")
def test_each_dependency_has_its_place(path: Path) -> None:
    name, modules = module_name(path), {module for module, _ in imports(path)}
    roots = {module.partition(".")[0] for module in modules}
    assert "functorch" not in roots
    assert "torchvision" not in roots or name in TORCHVISION
    assert "torch.ops.aten" not in path.read_text(encoding="utf-8") or name in ATEN


def test_every_source_file_has_its_test_file() -> None:
    def tests_of(name: str) -> str:
        return f"test_{name.strip('_').replace('.', '_')}.py"

    # types are only names, schedules and updates are optim's; per_sample is tested as a whole, by promise
    elsewhere = {"types", "schedules", "updates", "__main__"}
    names = [name for name in ORDER if name not in elsewhere and not name.startswith("per_sample.")]
    missing = [tests_of(name) for name in names if not (ROOT / "tests" / tests_of(name)).is_file()]
    assert not missing


def test_no_test_tests_nothing() -> None:
    """An early `return` in a property test makes it vacuous without a word: `assume` counts."""
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert not any(map(returns, node.body)), f"{path.name}: {node.name} returns early"


def returns(node: ast.AST) -> bool:
    """Whether a statement of a function makes it return; the functions defined in it do not count."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return False
    return isinstance(node, ast.Return) or any(map(returns, ast.iter_child_nodes(node)))


def test_no_machine_is_named() -> None:
    """No absolute path of a machine in what is shipped."""
    files = [*SOURCES, *(ROOT / "tests").glob("*.py"), *ROOT.glob("*.md"), ROOT / "pyproject.toml"]
    pattern = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/")
    named = [
        path.name
        for path in files
        if path.name != "test_house.py" and pattern.search(path.read_text("utf-8"))
    ]
    assert not named
