"""What pyproject.toml, the README, CI and docs/architecture.md promise about each other and about the code."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import meshgpt

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = sorted((ROOT / "meshgpt").rglob("*.py"))
TEST_COMMAND = "pip install -e '.[test]' && pytest"


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def canonical(requirement: str) -> str:
    """The distribution that a requirement names, as PyPI spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def test_whatever_the_package_imports_is_declared():
    lists = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    declared = {canonical(requirement) for requirements in lists for requirement in requirements}
    providers = importlib.metadata.packages_distributions()
    for path in MODULES:
        for name in imported(ast.parse(path.read_text())) - sys.stdlib_module_names - {"meshgpt"}:
            distributions = {canonical(d) for d in providers.get(name, [name])}
            assert distributions & declared, f"{path.name} imports {name}, which pyproject.toml does not declare"


def test_the_core_needs_no_extra():
    """Modules import what an extra brings inside functions only."""
    core = {canonical(requirement) for requirement in PROJECT["project"]["dependencies"]}
    providers = importlib.metadata.packages_distributions()
    for path in MODULES:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        at_top = ast.Module(body=top, type_ignores=[])
        for name in imported(at_top) - sys.stdlib_module_names - {"meshgpt"}:
            assert {canonical(d) for d in providers.get(name, [name])} & core, f"{path.name} imports {name} at its top"


def test_the_console_command_starts():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="meshgpt")
    assert command.value == "meshgpt.cli:main"
    assert callable(command.load())


def test_versions_agree():
    assert importlib.metadata.version("meshgpt") == meshgpt.__version__
    assert f"## {meshgpt.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_type_checkers_find_the_annotations_of_an_installed_package():
    """PEP 561: without this file in the wheel, mypy and pyright see every name of the package as Any."""
    assert (ROOT / "meshgpt" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["meshgpt"]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == meshgpt.__version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_ci_runs_the_readmes_own_command_and_the_workflow_runs_ci():
    assert TEST_COMMAND in (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    assert TEST_COMMAND in script
    assert "pre-commit run --all-files" in script
    assert "mkdocs build --strict" in script
    assert "python3.13" in script
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0
    assert "run: bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_import_contract_and_the_architecture_name_the_same_rooms():
    (contract,) = PROJECT["tool"]["importlinter"]["contracts"]
    in_contract = [re.findall(r"\w+", layer) for layer in contract["layers"] if layer != "__main__"]
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[2]) for line in section.splitlines() if line.startswith("| ")]
    assert [sorted(row) for row in rows if row] == [sorted(layer) for layer in in_contract]
    described = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"\*\*(.*?)\*\*", section))))
    assert described >= {room for layer in in_contract for room in layer} - {"train"}
