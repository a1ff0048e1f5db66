"""The shape of the code: who imports whom, how long a module is, what a package exports."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("protos", "experts", "router", "cluster")

# package -> our packages it may import, itself left out (docs/adr/0001-top-level-packages.md)
ARROWS = {"protos": set(), "experts": {"protos"}, "router": {"protos"}, "cluster": {"protos", "experts", "router"}}
# third-party package -> ours that may import it
ONLY_IN = {"ray": {"cluster"}, "transformers": {"cluster"}, "typer": {"cluster"}, "rich": {"cluster"}}
MAX_MODULE_LINES = 400

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).glob("**/*.py") if "_pb2" not in path.name)
SOURCES = sorted(path for folder in (*PACKAGES, "benchmarks", "examples") for path in (ROOT / folder).glob("**/*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(imported module, line) of every import statement, also those inside functions and type-checking blocks."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_packages_import_along_the_arrows_only() -> None:
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in MODULES
        for module, line in imports(path)
        if (package := module.partition(".")[0]) in PACKAGES
        and package != (own := path.relative_to(ROOT).parts[0])
        and package not in ARROWS[own]
    ]
    assert not wrong


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_in_the_packages_they_belong_to(library: str) -> None:
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in MODULES
        for module, line in imports(path)
        if module.partition(".")[0] == library and path.relative_to(ROOT).parts[0] not in ONLY_IN[library]
    ]
    assert not wrong


def test_product_code_does_not_import_tests_benchmarks_or_examples() -> None:
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in MODULES
        for module, line in imports(path)
        if module.partition(".")[0] in {"tests", "benchmarks", "examples", "pytest", "hypothesis"}
    ]
    assert not wrong


def test_imports_are_absolute() -> None:
    wrong = [where(path, line) for path in MODULES for module, line in imports(path) if module.startswith(".")]
    assert not wrong


def test_no_module_of_a_package_imports_itself_in_a_circle() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    graph = {
        name: {module for module, _ in imports(path) if module in names and module != name}
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"import circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize(
    ("start", "forbidden"),
    [
        ("import experts.service, experts.__main__", {"ray", "transformers", "router", "cluster"}),
        ("import router.service, router.client, router.__main__", {"ray", "transformers", "experts", "cluster"}),
        ("import cluster.app", {"transformers", "typer", "rich", "matplotlib"}),  # replicas must start fast
        ("import cluster.cli", {"ray", "transformers", "torch", "matplotlib"}),  # and --help must answer at once
    ],
)
def test_what_an_import_really_loads(start: str, forbidden: set[str]) -> None:
    """The arrows again, as a fresh interpreter sees them: what an import really pulls in."""
    code = f"{start}; import sys; print(*sorted({forbidden!r} & sys.modules.keys()))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.split() == [], f"{start} pulls in {found.stdout}"


def test_modules_hold_one_idea() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in MODULES
        if (lines := len(path.read_text().splitlines())) > MAX_MODULE_LINES
    }
    assert not long, f"more than {MAX_MODULE_LINES} lines: {long}"


def test_modules_say_what_they_own() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.stat().st_size and "_pb2" not in path.name and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"no module docstring: {silent}"


def exports(package: str) -> list[str]:
    """`__all__` of a package: the names of its modules that others may import."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return [str(name) for name in ast.literal_eval(node.value)]
    raise AssertionError(f"{package}/__init__.py has no __all__")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_list_their_public_modules_in_order(package: str) -> None:
    names = exports(package)
    assert names == sorted(set(names))
    assert all((ROOT / package / f"{name}.py").is_file() for name in names)


def test_packages_import_only_public_modules_of_each_other() -> None:
    public = {package: set(exports(package)) for package in PACKAGES}
    wrong = [
        f"{where(path, line)} imports {module}"
        for path in MODULES
        for module, line in imports(path)
        if (parts := module.split("."))[0] in PACKAGES
        and parts[0] != path.relative_to(ROOT).parts[0]
        and len(parts) > 1
        and parts[1] not in public[parts[0]]
    ]
    assert not wrong


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b|NotImplementedError")
    found = [
        where(path, number)
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if later.search(line)
    ]
    assert not found


def test_no_test_is_skipped() -> None:
    marks = re.compile(r"pytest\.skip|mark\.skip|mark\.xfail|importorskip")
    found = [
        where(path, number)
        for path in sorted((ROOT / "tests").glob("*.py"))
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if marks.search(line) and "cuda" not in line.lower() and "gpu" not in line.lower()
    ]
    assert not found, f"only tests that need a GPU may be skipped, and say so on the same line: {found}"
