"""What the distribution promises: its names, its version, exact constraints, type information, fresh generated code."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from protos.generate import generate

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ["cluster", "experts", "protos", "router"]


def constraints() -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name((entry := Requirement(line)).name): entry for line in lines if line}


def direct_dependencies() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [Requirement(line) for line in (*PROJECT["project"]["dependencies"], *(line for e in extras for line in e))]


def test_the_four_import_packages_belong_to_this_distribution_alone() -> None:
    owners = metadata.packages_distributions()
    assert {name: set(owners.get(name, ())) for name in PACKAGES} == {name: {"expertmesh"} for name in PACKAGES}


def test_the_distribution_brings_no_other_top_level_name() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == PACKAGES
    owners = metadata.packages_distributions()
    # setuptools' finder for editable installs is a module of its own
    ours = {name for name, held in owners.items() if "expertmesh" in held and not name.startswith("__editable__")}
    assert ours == set(PACKAGES)


def test_the_distribution_cannot_be_uploaded_by_accident() -> None:
    assert "Private :: Do Not Upload" in PROJECT["project"]["classifiers"]


def test_the_installed_command_is_the_declared_one() -> None:
    scripts = metadata.distribution("expertmesh").entry_points.select(group="console_scripts", name="expertmesh")
    assert [script.value for script in scripts] == [PROJECT["project"]["scripts"]["expertmesh"]]
    assert callable(next(iter(scripts)).load())


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_ship_their_type_information(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


def test_the_version_is_the_newest_of_the_changelog_and_the_installed_one() -> None:
    headings = re.findall(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [(Version(version), date) for version, date in headings if version != "Unreleased"]
    assert released == sorted(released, reverse=True), "newest first"
    assert all(date for _, date in released), "every release has its date"
    assert str(released[0][0]) == PROJECT["project"]["version"] == metadata.version("expertmesh")


def test_constraints_pin_every_direct_dependency_exactly_and_within_its_range() -> None:
    pins = constraints()
    for wanted in direct_dependencies():
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin is not None, f"{wanted.name} is not in constraints.txt"
        operators = [specifier.operator for specifier in pin.specifier]
        assert operators == ["=="], f"{pin} is not an exact version"
        version = next(iter(pin.specifier)).version
        assert wanted.specifier.contains(version, prereleases=True), f"{pin} is outside {wanted}"


def test_the_tests_run_against_the_constrained_versions() -> None:
    pins = constraints()
    for wanted in direct_dependencies():
        if wanted.marker is None or wanted.marker.evaluate():
            installed = Version(metadata.version(wanted.name))
            pinned = next(iter(pins[canonicalize_name(wanted.name)].specifier)).version
            assert installed.public == pinned, f"{wanted.name} {installed} is installed, constraints.txt has {pinned}"


def test_generated_protobuf_code_is_up_to_date(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "protos").glob("*_pb2.py*")}
    assert fresh.keys() == committed.keys()
    stale = [name for name in sorted(fresh) if fresh[name] != committed[name]]
    assert not stale, "run `make protos`"


def test_every_proto_field_is_documented_or_named_by_its_neighbours() -> None:
    """.proto files are the wire's documentation: messages of arrays state shapes and units."""
    for path in sorted((ROOT / "protos").glob("*.proto")):
        text = path.read_text()
        assert text.startswith("//"), f"{path.name} opens with what it is"
        for line in text.splitlines():
            if re.match(r"\s+bytes ", line):
                assert re.search(r"//.*\[[TRPDKB, ]+\]", line), f"{path.name}: no shape: {line.strip()}"
            if re.match(r"\s+(?:float|double) (?!\w+_per_s)\w+_s ", line):
                assert "second" in line, f"{path.name}: no unit: {line.strip()}"
