"""Writes the table of model families into docs/models.md, from the families' own rows.

python -m docs.model_table           rewrite the table
tests/test_docs.py                   fails when the table is out of date

Families whose blocks are the same share a line. Words come from the block that a config.json with nothing but sizes
describes, so that every other option has its default.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from cluster.words import block_words
from protos.configfile import read_config
from protos.families import FAMILIES
from protos.model import BlockSpec
from protos.settings import Family, Setting

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- families: begin (python -m docs.model_table) -->", "<!-- families: end -->"
_SIZES = {"dim": 1024, "hidden_dim": 512, "num_experts": 256, "top_k": 8, "width": 512, "count": 2, "layers": 2}
_NO_OPTIONS = {*_SIZES, "num_identity", "activation"}
_BATCH_CAPACITY = ("batch_prioritized_routing", "moe_eval_capacity_token_fraction", "moe_token_dropout")


def table() -> str:
    """One line for all families with the same block and the same options."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for family, row in FAMILIES.items():
        words = block_words(default_block(family, row), symbols=True)
        beside = "; ".join(part for part in (words.shared, words.around) if part)
        options = ", ".join(f"`{key}`" for key in option_keys(row))
        lines.setdefault((words.gate, words.expert, beside or "none", options or "none"), []).append(family)
    cells = [(", ".join(f"`{name}`" for name in names), *rest) for rest, names in lines.items()]
    head = ["| families | gate | expert | shared expert, around | options read |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in cells)])


def page_with_table(page: str) -> str:
    """The page with everything between the two markers replaced."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert tail, f"the page has no line {BEGIN!r} or {END!r}"
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def default_block(family: str, row: Family) -> BlockSpec:
    """The block of a model of this family whose config.json has sizes only."""
    sizes = {
        setting.keys[0]: _SIZES[name]
        for name, setting in _settings(row)
        if name == "count" or (setting.required and name in _SIZES)
    }
    for variant in row.variants:  # which may know some sizes only
        if variant.setting.keys[0] in sizes and ... not in variant.values:
            sizes[variant.setting.keys[0]] = next(iter(variant.values))
    document = {"model_type": family, **({row.section: sizes} if row.section else {}), **sizes}
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(document))
        return read_config(Path(folder)).block(0)


def option_keys(row: Family) -> list[str]:
    """Keys of config.json that decide what the family's block computes: no sizes, and not the activation."""
    sizes = {setting.keys[0] for name, setting in _settings(row) if name in _NO_OPTIONS}
    keys = {setting.keys[0] for _, setting in _settings(row)} - sizes
    if row.capacity is not None:
        keys.add("expert_capacity")
    if row.capacity == "batch":
        keys |= {*_BATCH_CAPACITY, "normalize_router_prob_before_dropping"}
    return sorted(keys)


def _settings(row: Family) -> Iterator[tuple[str, Setting]]:
    """Every setting by the option it sets, those of the shared expert and of variants included."""
    for name in row.__dataclass_fields__:
        yield from _found(name, getattr(row, name))
    for setting in row.stacks.values():
        yield "layers", setting
    if row.shared is not None:
        for name in row.shared.__dataclass_fields__:
            yield from _found(name, getattr(row.shared, name))
    for variant in row.variants:
        yield "variant", variant.setting
        for replaced in variant.values.values():
            for name, value in replaced.items():
                yield from ((f"variant's {found}", setting) for found, setting in _found(name, value))


def _found(name: str, value: object) -> Iterator[tuple[str, Setting]]:
    if isinstance(value, Setting):
        yield name, value


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
