"""The architecture: who may import whom, and what no file may do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "surgery": {"diffprune", "export", "benchmarks"},
    "export": {"diffprune", "surgery", "benchmarks"},
    "diffprune": {"benchmarks"},
}
PACKAGES = ("surgery", "export", "diffprune", "benchmarks")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def unsafe_loads(tree: ast.AST) -> list[int]:
    """Lines that call torch.load without weights_only=True."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            given = {k.arg: k.value for k in node.keywords}.get("weights_only")
            if not (isinstance(given, ast.Constant) and given.value is True):
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_package_may_and_unpickles_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parts[0]
    assert imported(tree) & FORBIDDEN.get(package, set()) == set()
    assert imported(tree) & {"pickle", "dill", "joblib", "cloudpickle"} == set()
    assert unsafe_loads(tree) == []
    assert path.stem not in ("utils", "helpers", "common", "misc"), "name the idea of the file"


def test_the_checks_see_what_they_look_for() -> None:
    bad = ast.parse("def f():\n    import export.writing\n    from diffprune import x\n    torch.load(p)\n")
    assert imported(bad) == {"export", "diffprune"}
    assert unsafe_loads(bad) == [4]
    assert unsafe_loads(ast.parse("torch.load(p, weights_only=True)")) == []
    assert {p.relative_to(ROOT).parts[0] for p in SOURCES} >= {"surgery", "export", "diffprune"}
