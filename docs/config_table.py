"""Writes the table of every ClusterConfig field into docs/operations.md, from the fields' own types and descriptions.

python -m docs.config_table          rewrite the table
tests/test_docs.py                   fails when the table is out of date
"""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig

PAGE = Path(__file__).parent / "operations.md"
BEGIN, END = "<!-- fields: begin (python -m docs.config_table) -->", "<!-- fields: end -->"
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def table(config: type[BaseModel] = ClusterConfig) -> str:
    """One row per field, nested models by dotted names."""
    rows = ["| field | type | default | what it is |", "|---|---|---|---|"]
    return "\n".join([*rows, *_rows(config, prefix="")])


def page_with_table(page: str) -> str:
    """The page with everything between the two markers replaced."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert tail, f"the page has no line {BEGIN!r} or {END!r}"
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def _rows(config: type[BaseModel], *, prefix: str) -> list[str]:
    rows: list[str] = []
    for name, field in config.model_fields.items():
        path = f"{prefix}{name}"
        if any(isinstance(part, type) and issubclass(part, BaseModel) for part in get_args(field.annotation)):
            rows.append(f"| `{path}` | list | `[]` | {_cell(field.description)} |")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows.append(f"| **`{path}`** | | | *{_cell(field.description)}* |")
            rows += _rows(field.annotation, prefix=f"{path}.")
        else:
            default = "required" if field.is_required() else f"`{_value(field.default)}`"
            rows.append(f"| `{path}` | {_cell(_type(field))} | {default} | {_cell(field.description)} |")
    return rows


def _type(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(entry, key)}"
        for entry in field.metadata
        for key, sign in _BOUNDS.items()
        if hasattr(entry, key)
    ]
    kind = _spell(field.annotation)
    null = " or null" if kind.endswith(" or null") else ""
    return " ".join([kind.removesuffix(null), " and ".join(bounds)]).strip() + null


def _spell(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_spell(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(f'"{part}"' for part in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {_spell(get_args(kind)[0]).replace(' or ', ', ')}"
    if get_origin(kind) is dict:
        return f"mapping of {' to '.join(_spell(part) for part in get_args(kind))}"
    return str({"str": "text", "bool": "true or false", "int": "integer", "float": "number"}[kind.__name__])


def _value(value: Any) -> str:
    """As it would stand in the YAML file."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _cell(text: str | None) -> str:
    assert text, "every field has a description"
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
