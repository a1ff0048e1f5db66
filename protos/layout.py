"""Checkpoint layouts: which tensor plays which part in an MoE block, told from names and shapes alone.

A layout is some rows of `_ROLES`; the family's name is never asked. Per-expert matrices and the stacked tensors that
transformers 5 holds in memory come out the same: three contiguous byte ranges per expert.

Shapes: D model dim, F expert hidden dim, S shared expert hidden dim, E experts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from protos.errors import CorruptWeights, UnsupportedModel
from protos.weightfiles import DTYPES, Extent

_PREFIXES = ("", "model.", "model.language_model.", "language_model.model.")
_IN_BLOCK = re.compile(
    rf"(?P<prefix>{'|'.join(map(re.escape, _PREFIXES))})"
    r"layers\.(?P<layer>0|[1-9]\d{0,5})\.(?:mlp|block_sparse_moe)\.(?P<rest>.+)"
)

# part -> names within the block, shape
_ROLES: tuple[tuple[str, re.Pattern[str], tuple[str, ...]], ...] = tuple(
    (part, re.compile(pattern), shape)
    for part, pattern, shape in (
        ("expert gate", r"experts\.(?P<expert>0|[1-9]\d{0,5})\.(?:gate_proj|w1)\.weight", ("F", "D")),
        ("expert up", r"experts\.(?P<expert>0|[1-9]\d{0,5})\.(?:up_proj|w3)\.weight", ("F", "D")),
        ("expert down", r"experts\.(?P<expert>0|[1-9]\d{0,5})\.(?:down_proj|w2)\.weight", ("D", "F")),
        ("stacked gate and up", r"experts\.gate_up_proj", ("E", "2F", "D")),
        ("stacked down", r"experts\.down_proj", ("E", "D", "F")),
        ("router", r"gate\.weight", ("E", "D")),
        ("selection bias", r"gate\.e_score_correction_bias", ("E",)),
        ("shared gate", r"shared_experts?\.gate_proj\.weight", ("S", "D")),
        ("shared up", r"shared_experts?\.up_proj\.weight", ("S", "D")),
        ("shared down", r"shared_experts?\.down_proj\.weight", ("D", "S")),
        ("shared output gate", r"shared_expert_gate\.weight", ("1", "D")),
    )
)
_SHAPE = {part: shape for part, _, shape in _ROLES}
_DENSE = re.compile(r"(?:gate_proj|up_proj|down_proj)\.weight")
_PER_EXPERT = ("expert gate", "expert up", "expert down")
_STACKED = ("stacked gate and up", "stacked down")
_SHARED = ("shared gate", "shared up", "shared down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """What config.json says of every MoE block; shared_hidden_dim is 0 where there is no shared expert."""

    num_experts: int
    dim: int
    hidden_dim: int
    shared_hidden_dim: int
    shared_gated: bool
    selection_bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """The three matrices of a SwiGLU: gate [F, D], up [F, D], down [D, F]."""

    gate: Extent
    up: Extent
    down: Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Where one MoE block's tensors lie."""

    experts: tuple[Projections, ...]
    router: Extent
    selection_bias: Extent | None
    shared: Projections | None
    shared_output_gate: Extent | None


# part -> expert (0 for parts that are not per expert) -> tensor
_Parts = dict[str, dict[int, Extent]]


def find_blocks(extents: Mapping[str, Extent], *, num_layers: int, dims: Dims) -> dict[int, Block]:
    """The MoE blocks among the first `num_layers` layers: a layer is sparse if its experts are in the checkpoint.

    Layers beyond (DeepSeek-V3's multi-token-prediction module is stored as one) are no part of the model.

    Raises:
        UnsupportedModel: no MoE layer, a tensor of a block that no layout knows, another number of experts.
        CorruptWeights: a tensor is missing or has another shape than the config says.
    """
    parts_by_layer: dict[int, _Parts] = {}
    unknown: dict[int, Extent] = {}
    dense_layers: set[int] = set()
    stack: tuple[str, str] | None = None  # prefix of the one stack of layers, and a tensor of it
    for name, extent in extents.items():
        match = _IN_BLOCK.fullmatch(name)
        if match is None or int(match["layer"]) >= num_layers:
            continue
        stack = stack or (match["prefix"], name)
        if match["prefix"] != stack[0]:
            raise UnsupportedModel(f"{extent.file.path}: more than one stack of layers: {stack[1]} and {name}")
        layer = int(match["layer"])
        if _DENSE.fullmatch(match["rest"]):
            dense_layers.add(layer)
        elif not _assign(parts_by_layer.setdefault(layer, {}), match["rest"], extent):
            unknown.setdefault(layer, extent)
    sparse = {layer: parts for layer, parts in parts_by_layer.items() if any(map(parts.get, _PER_EXPERT + _STACKED))}
    if not sparse:
        raise UnsupportedModel("no MoE layer: no tensor named like layers.N.mlp.experts.E.gate_proj.weight")
    for layer in range(num_layers):
        if layer in sparse and layer in unknown:
            extent = unknown[layer]
            raise UnsupportedModel(f"{extent.file.path}: tensor {extent.name} has no place in the known layouts")
        if (layer in sparse) == (layer in dense_layers):
            what = "both a dense block and experts" if layer in sparse else "neither a dense block nor experts"
            raise CorruptWeights(f"layer {layer} of {num_layers} has {what}")
    return {layer: _Resolver(layer, sparse[layer], dims).block() for layer in sorted(sparse)}


def expert_dtype(blocks: Mapping[int, Block]) -> str:
    """The one safetensors dtype of all expert tensors.

    Raises:
        UnsupportedModel: they differ, or are not F32, BF16 or F16.
    """
    first = next(iter(blocks.values())).experts[0].gate
    for block in blocks.values():
        for expert in block.experts:
            for extent in (expert.gate, expert.up, expert.down):
                if extent.dtype not in DTYPES or extent.dtype != first.dtype:
                    raise UnsupportedModel(
                        f"{extent.file.path}: tensor {extent.name} has dtype {extent.dtype} "
                        f"(supported: all experts in one of {', '.join(DTYPES)}; {first.name} has {first.dtype})"
                    )
    return first.dtype


def _assign(parts: _Parts, rest: str, extent: Extent) -> bool:
    for part, pattern, _ in _ROLES:
        match = pattern.fullmatch(rest)
        if match:
            expert = int(match.groupdict().get("expert") or 0)
            other = parts.setdefault(part, {}).setdefault(expert, extent)
            if other is not extent:
                raise UnsupportedModel(f"{extent.file.path}: tensors {other.name} and {extent.name} play the same part")
            return True
    return False


class _Resolver:
    """Checks one layer's parts against the config and lays them out as a `Block`."""

    def __init__(self, layer: int, parts: _Parts, dims: Dims) -> None:
        self._layer = layer
        self._parts = parts
        self._dims = dims
        self._sizes = {
            "E": dims.num_experts,
            "D": dims.dim,
            "F": dims.hidden_dim,
            "2F": 2 * dims.hidden_dim,
            "S": dims.shared_hidden_dim,
            "1": 1,
        }

    def block(self) -> Block:
        dims = self._dims
        has_shared = dims.shared_hidden_dim > 0
        wanted = {
            "selection bias": dims.selection_bias,
            "shared output gate": has_shared and dims.shared_gated,
        } | dict.fromkeys(_SHARED, has_shared)
        for part, is_wanted in wanted.items():
            if not is_wanted and part in self._parts:
                extent = self._parts[part][0]
                raise UnsupportedModel(
                    f"{extent.file.path}: tensor {extent.name}: config.json describes a model without {part}"
                )
        stacked = any(part in self._parts for part in _STACKED)
        if stacked and any(part in self._parts for part in _PER_EXPERT):
            raise UnsupportedModel(f"layer {self._layer} has stacked and per-expert tensors")
        experts = self._stacked() if stacked else self._per_expert()
        shared = Projections(**{part.split()[1]: self._one(part) for part in _SHARED}) if has_shared else None
        return Block(
            experts=experts,
            router=self._one("router"),
            selection_bias=self._one("selection bias") if dims.selection_bias else None,
            shared=shared,
            shared_output_gate=self._one("shared output gate") if wanted["shared output gate"] else None,
        )

    def _per_expert(self) -> tuple[Projections, ...]:
        num_experts = self._dims.num_experts
        found = {expert for part in _PER_EXPERT for expert in self._parts.get(part, ())}
        # every expert complete, only another number of them: the config and the weights are of different models
        complete = all(self._parts.get(part, {}).keys() == found for part in _PER_EXPERT)
        if max(found) >= num_experts or (complete and found == set(range(len(found))) and len(found) < num_experts):
            raise UnsupportedModel(
                f"config.json says {num_experts} experts, but layer {self._layer} has experts 0 to {max(found)}"
            )
        return tuple(
            Projections(**{part.split()[1]: self._one(part, expert) for part in _PER_EXPERT})
            for expert in range(num_experts)
        )

    def _stacked(self) -> tuple[Projections, ...]:
        gate_up, down = (self._one(part) for part in _STACKED)
        hidden_dim = self._dims.hidden_dim
        experts = []
        for expert in range(self._dims.num_experts):
            both = gate_up.item(expert)  # transformers concatenates [gate; up] along rows
            gate, up = both.rows(0, hidden_dim), both.rows(hidden_dim, 2 * hidden_dim)
            experts.append(Projections(gate=gate, up=up, down=down.item(expert)))
        return tuple(experts)

    def _one(self, part: str, expert: int = 0) -> Extent:
        extent = self._parts.get(part, {}).get(expert)
        if extent is None:
            which = f"{part} of expert {expert}" if part in _PER_EXPERT else part
            raise CorruptWeights(f"layer {self._layer}: the tensor for {which} is missing")
        expected = tuple(self._sizes[size] for size in _SHAPE[part])
        if extent.shape != expected:
            kind = UnsupportedModel if self._differs_in_experts(part, extent, expected) else CorruptWeights
            raise kind(
                f"{extent.file.path}: tensor {extent.name} has shape {extent.shape}, expected {expected} "
                f"({', '.join(_SHAPE[part])} of config.json)"
            )
        return extent

    def _differs_in_experts(self, part: str, extent: Extent, expected: tuple[int, ...]) -> bool:
        return _SHAPE[part][0] == "E" and len(extent.shape) == len(expected) and extent.shape[0] != expected[0]
