"""Checkpoint layouts: where every matrix of an MoE block lies, told from names and shapes alone.

Per-expert matrices, stacks of experts in both orders, gate and up fused or apart, rows of gate and up one after the
other or alternating, flat stacks, plain or quantised: all come out as one `StoredMatrix` per projection and expert.

Shapes: D model dim, L expert input dim, F expert hidden dim, S shared expert hidden dim, E experts.
"""

from collections.abc import Mapping

from protos.blocks import Block, BlockResolver
from protos.configfile import Config
from protos.errors import CorruptWeights, UnsupportedModel
from protos.parts import FoundParts
from protos.quantised import Quantisation
from protos.tensornames import place
from protos.weightfiles import DTYPES, Extent


def find_blocks(extents: Mapping[str, Extent], config: Config, quantisation: Quantisation | None) -> dict[str, Block]:
    """The MoE blocks: a layer is sparse if its experts are in the checkpoint.

    Layers beyond those of the config (DeepSeek-V3's multi-token-prediction module is stored as one) are no part of
    the model.

    Args:
        extents: every tensor of the checkpoint by name.
        config: what config.json says.
        quantisation: what it says of quantised tensors.

    Raises:
        UnsupportedModel: no MoE layer, a tensor of a block that no layout knows, another number of experts.
        CorruptWeights: a tensor is missing or has another shape than the config says.
    """
    endings = () if quantisation is None else _endings(quantisation)
    layers: dict[tuple[str, int], FoundParts] = {}
    stacks: dict[str, tuple[str, str]] = {}  # side -> prefix of its tensor names, and the first of them
    for name, extent in extents.items():
        where = place(name, num_dims=len(extent.shape), endings=endings)
        if where is None:
            continue
        side = where.side if where.side in config.stacks else ""
        if where.layer >= config.stacks.get(side, 0):
            continue
        stack, first = stacks.setdefault(side, (where.stack, name))
        if where.stack != stack:
            raise UnsupportedModel(f"{extent.file.path}: more than one stack of layers: {first} and {name}")
        layers.setdefault((side, where.layer), FoundParts()).add(where, extent)
    sparse = {at: found for at, found in sorted(layers.items()) if found.is_sparse}
    if not sparse:
        raise UnsupportedModel(_no_layer(extents))
    _check_complete(layers, config)
    blocks = {}
    for (side, layer), found in sparse.items():
        name = f"{side}.{layer}" if side else str(layer)
        spec = config.block(layer, hashed=found.has("token table"))
        blocks[name] = BlockResolver(name, found, spec, config, quantisation).block()
    return blocks


def plain_dtype(blocks: Mapping[str, Block]) -> str | None:
    """The one safetensors dtype of all expert tensors; None where some are quantised.

    Raises:
        UnsupportedModel: they differ, or are not F32, BF16 or F16.
    """
    matrices = [m for block in blocks.values() for expert in block.experts for m in (*expert.ups, expert.down)]
    if any(matrix.format is not None for matrix in matrices):
        return None
    first = matrices[0].pieces["weight"]
    for matrix in matrices:
        extent = matrix.pieces["weight"]
        if extent.dtype not in DTYPES or extent.dtype != first.dtype:
            raise UnsupportedModel(
                f"{extent.file.path}: tensor {extent.name} has dtype {extent.dtype} "
                f"(supported: all experts in one of {', '.join(DTYPES)}; {first.name} has {first.dtype})"
            )
    return first.dtype


def _endings(quantisation: Quantisation) -> tuple[str, ...]:
    """Endings of the names of quantised pieces, longest first; those of plain weights are known anyway."""
    found = {
        ending
        for weight_format in quantisation.formats
        for piece in weight_format.pieces
        for ending in (*piece.linear, *piece.stacked)
    }
    return tuple(sorted(found - {"", ".weight", ".bias"}, key=len, reverse=True))


def _check_complete(layers: Mapping[tuple[str, int], FoundParts], config: Config) -> None:
    """Every layer of the model has some block, and no block is dense and sparse at once."""
    for side in {side for side, _ in layers}:
        for layer in range(config.stacks[side]):
            where = f"layer {layer} of {config.stacks[side]}"
            found = layers.get((side, layer))
            if found is None or not (found.blocks or found.is_sparse):
                raise CorruptWeights(f"{where} has neither a dense block nor experts")
            if {"sparse", "dense"} <= set().union(*found.blocks.values()):
                raise CorruptWeights(f"{where} has both a dense block and experts")
            if found.has("router") and not found.is_sparse:
                raise CorruptWeights(f"{where} has a router, but its experts are missing")


def _no_layer(extents: Mapping[str, Extent]) -> str:
    likely = next((name for name in extents if "expert" in name and ".layers." in name), None)
    if likely is None:
        return "no MoE layer: no tensor named like layers.N.mlp.experts.E.gate_proj.weight"
    return f"no MoE layer: tensor {likely} has no place in the known layouts (supported: layers.N.mlp.experts.E...)"
