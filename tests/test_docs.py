"""The documentation keeps up with the code: every field, module, ledger count and link it names is there."""

import re
from pathlib import Path

import pytest

from docs import model_table
from docs.config_table import PAGE, page_with_table
from protos import errors, router_pb2
from protos.families import FAMILIES
from router.config import OverflowConfig

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
    ROOT / "k8s" / "README.md",
]
PACKAGES = ("protos", "experts", "router", "cluster")


def section(text: str, name: str) -> str:
    """What stands between the markers `name: begin` and `name: end`."""
    found = re.search(rf"<!-- {name}: begin.*?-->(.*)<!-- {name}: end -->", text, re.S)
    assert found is not None, name
    return found[1]


def test_the_configuration_table_is_that_of_the_code() -> None:
    page = PAGE.read_text()
    assert page == page_with_table(page), "run `python -m docs.config_table`"


def test_the_table_of_families_is_that_of_the_code() -> None:
    page = model_table.PAGE.read_text()
    assert page == model_table.page_with_table(page), "run `python -m docs.model_table`"
    named = re.findall(r"`([\w-]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", section(page, "families"), re.M)))
    assert sorted(named) == sorted(FAMILIES)


def test_families_that_are_said_to_be_refused_have_no_row() -> None:
    _, _, refused = model_table.PAGE.read_text().partition("## Refused families")
    names = re.findall(r"^\| `(\w+)`", refused.partition("\n## ")[0], re.M)
    assert len(names) >= 5
    assert not FAMILIES.keys() & set(names)


def test_every_module_has_its_line_in_the_architecture() -> None:
    named = re.findall(r"^\| `([^`]+)` \|", section((ROOT / "docs/architecture.md").read_text(), "modules"), re.M)
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).glob("*.py")
        if path.name != "__init__.py" and "_pb2" not in path.name
    }
    assert set(named) == there
    assert len(named) == len(set(named))


def test_every_ledger_field_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/operations.md").read_text(), re.M)
    assert {field.name for field in router_pb2.Ledger.DESCRIPTOR.fields} <= set(explained)


def test_every_overflow_step_and_default_chain_is_explained() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    policy = OverflowConfig()
    for step in ("copy", "wait", "next_expert", "drop", "fail"):
        assert f"| `{step}` |" in text
    for name, chain in (("chain", policy.chain), ("unavailable_chain", policy.unavailable_chain)):
        assert re.search(rf"\| `{name}` \| `\[{', '.join(chain)}\]` \|", text), name


def test_every_error_class_is_in_the_table() -> None:
    table = (ROOT / "docs/operations.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    for kind in kinds:
        if kind not in (errors.ExpertmeshError, errors.Unauthenticated):  # the base; and nobody checks credentials yet
            assert f"`{kind.__name__}`" in table, kind.__name__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{target} is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    pattern = rf"`((?:{'|'.join((*PACKAGES, 'tests', 'docs', 'k8s', 'benchmarks', 'examples'))})/[\w./]+\.\w+)`"
    for name in re.findall(pattern, page.read_text()):
        assert (ROOT / name).exists(), f"{name} is not there"


def test_decision_records_are_numbered_and_complete() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(record.name[:4]) for record in records] == list(range(1, len(records) + 1))
    for record in records:
        text = record.read_text()
        assert text.startswith(f"# {record.name[:4]}: "), record.name
        headings = re.findall(r"^## (.+)$", text, re.M)
        assert headings == ["Context", "Decision", "Consequences"], record.name
        assert len(text.split()) <= 500, f"{record.name}: one page at most"
