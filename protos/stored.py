"""What of a model lies on disk: bytes and formats of its MoE blocks, from config.json and the files' headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from protos.blocks import Block, StoredMlp
from protos.configfile import read_config
from protos.layout import find_blocks
from protos.quant_config import read_quantisation
from protos.weightfiles import index_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """One MoE layer.

    Args:
        expert_bytes: what each routed expert reads, in order.
        router_bytes: what the router reads: gate, shared expert, and what surrounds the routed experts.
        stored_as: how the experts' matrices are stored, for people: "plain BF16", or the words of a quantised format.
    """

    expert_bytes: tuple[int, ...]
    router_bytes: int
    stored_as: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """The MoE layers by name, in order; the files they and everything else of the model lie in; all its layers."""

    layers: Mapping[str, StoredLayer]
    num_files: int
    num_bytes: int
    num_transformer_layers: int


def read_stored(path: Path) -> StoredModel:
    """Look at the model in `path`; no weight is read.

    Raises:
        UnsupportedModel, CorruptWeights: as `read_model` does.
    """
    config = read_config(path)
    extents = index_directory(path)
    blocks = find_blocks(extents, config, read_quantisation(config.document, file=config.file))
    files = {extent.file for extent in extents.values()}
    return StoredModel(
        layers={name: _layer(block) for name, block in blocks.items()},
        num_files=len(files),
        num_bytes=sum(file.size_bytes for file in files),
        num_transformer_layers=sum(config.stacks.values()),
    )


def _layer(block: Block) -> StoredLayer:
    kinds = {
        f"plain {next(iter(matrix.pieces.values())).dtype}" if matrix.format is None else matrix.format.words
        for expert in block.experts
        for matrix in (*expert.ups, expert.down)
    }
    shared = 0 if block.shared is None else _num_bytes(block.shared)
    latent = sum(matrix.nbytes for matrix in block.latent or ())
    return StoredLayer(
        expert_bytes=tuple(map(_num_bytes, block.experts)),
        router_bytes=shared + latent + sum(extent.nbytes for extent in block.others.values()),
        stored_as=" and ".join(sorted(kinds)),
    )


def _num_bytes(mlp: StoredMlp) -> int:
    biases = [*mlp.up_biases, *([mlp.down_bias] if mlp.down_bias else [])]
    return sum(matrix.nbytes for matrix in (*mlp.ups, mlp.down)) + sum(bias.nbytes for bias in biases)
