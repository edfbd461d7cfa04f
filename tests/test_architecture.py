"""The import rule: services share `herald` and never one another; TensorFlow stays inside serving."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICES = ("receiver", "router", "serving", "notifier", "webui")
COMPOSERS = {
    "herald/node.py",
    "herald/cli.py",
    "herald/demo.py",
    "herald/check.py",
    "herald/page.py",
    "herald/setup.py",
}
"""The modules that put the node together, and so may know the services."""

STUB_USERS = {"router/inference.py"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who is imported"
            yield node.module or ""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service(service: str) -> None:
    others = set(SERVICES) - {service}
    files = sources(service)
    assert files
    broken = [(relative(p), name) for p in files for name in imports(p) if name.split(".")[0] in others]
    assert broken == []


def test_herald_imports_no_service_but_where_the_node_is_put_together() -> None:
    broken = [
        (relative(path), name)
        for path in sources("herald")
        for name in imports(path)
        if name.split(".")[0] in SERVICES and relative(path) not in COMPOSERS
    ]
    assert broken == []


@pytest.mark.parametrize("package", ["herald", *SERVICES])
def test_tensorflow_and_keras_are_imported_in_serving_only(package: str) -> None:
    if package == "serving":
        assert any(name.split(".")[0] == "tensorflow" for p in sources(package) for name in imports(p))
        return
    broken = [
        (relative(p), n) for p in sources(package) for n in imports(p) if n.split(".")[0] in ("tensorflow", "keras")
    ]
    assert broken == []


def test_the_stubs_of_tensorflow_serving_are_imported_in_the_router_s_client_and_serving_only() -> None:
    users = {
        relative(path)
        for package in ("herald", *SERVICES)
        for path in sources(package)
        for name in imports(path)
        if name.split(".")[0] == "tensorflow_serving"
    }
    assert {user for user in users if not user.startswith("serving/")} == STUB_USERS


def test_tests_lie_flat_so_that_no_folder_shadows_a_package() -> None:
    assert [relative(p) for p in (ROOT / "tests").rglob("*.py") if p.parent != ROOT / "tests"] == []


@pytest.mark.parametrize("word", ["utils", "helpers", "helper", "manager", "common", "misc"])
def test_no_module_has_a_name_that_says_nothing(word: str) -> None:
    assert [
        relative(p) for package in ("herald", *SERVICES) for p in sources(package) if word in p.stem.split("_")
    ] == []


def test_every_promise_of_the_readme_names_a_test_that_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", readme)
    assert len(named) >= 17
    for file, test in named:
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text("utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, f"README.md promises {file}::{test}"
