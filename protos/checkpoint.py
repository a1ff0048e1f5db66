"""Model reading: a Hugging Face directory becomes a `ModelSpec`, and weights are read one expert at a time.

config.json is read by `families`, tensor names by `layout`, bytes by `weightfiles`.

Shapes: D model dim, F expert hidden dim (the shared expert's own for the shared expert), E experts.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from protos.errors import CorruptWeights, InvalidRequest
from protos.families import read_config
from protos.layout import Block, Dims, Projections, expert_dtype, find_blocks
from protos.model import GateSpec, ModelSpec, SharedSpec
from protos.weightfiles import DTYPES, Extent, index_directory, read_extent

_DTYPE_NAMES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}
_CODES = {name: code for code, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    """One routed expert: y = (silu(x gate^T) * (x up^T)) down^T, in the checkpoint's dtype."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateWeights:
    """One layer's router, in the model dtype; the selection bias, where the family has one, in fp32."""

    weight_ED: Tensor
    bias_E: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedWeights:
    """One layer's shared expert, in the model dtype; output_gate_1D where the spec says `gated`."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    output_gate_1D: Tensor | None


def read_model(path: Path) -> ModelSpec:
    """Describe the model in `path` from its config.json and safetensors headers; no weight is read.

    Args:
        path: a Hugging Face directory: config.json and *.safetensors, sharded or not.

    Raises:
        UnsupportedModel: no such directory, or a config, dtype or tensor layout that we do not understand.
        CorruptWeights: a weight file is truncated or has a bad header, a tensor is missing or of the wrong shape.
    """
    config = read_config(path)
    activation, gate, shared = config.activation(), config.gate(), config.shared()
    dims = _dims(gate, shared, dim=config.dim, hidden_dim=config.hidden_dim)
    blocks = find_blocks(index_directory(path), num_layers=config.num_layers, dims=dims)
    return ModelSpec(
        path=path.absolute(),  # the spec travels to processes with other working directories
        family=config.family,
        dtype=_DTYPE_NAMES[expert_dtype(blocks)],
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        layers=tuple(map(str, blocks)),
        gate=gate,
        shared=shared,
        activation=activation,
    )


class Checkpoint:
    """Reads the weights of `spec`, only those asked for; safe to use from several threads.

    Every tensor returned owns its memory and has been checked for NaN and infinity.

    Raises:
        UnsupportedModel, CorruptWeights: the directory no longer holds what `spec` describes.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        blocks = find_blocks(
            index_directory(spec.path),
            num_layers=int(spec.layers[-1]) + 1,
            dims=_dims(spec.gate, spec.shared, dim=spec.dim, hidden_dim=spec.hidden_dim),
        )
        self._blocks = {str(layer): block for layer, block in blocks.items()}
        if tuple(self._blocks) != spec.layers or expert_dtype(blocks) != _CODES[spec.dtype]:
            raise CorruptWeights(f"{spec.path}: the weights changed since the model was described")
        self._lock = threading.Lock()
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the files so far."""
        return self._bytes_read

    def expert(self, layer: str, expert: int) -> ExpertWeights:
        """Read one expert: three matrices and not a byte more.

        Raises:
            InvalidRequest: the model has no such layer or expert.
            CorruptWeights: the file is gone, changed or truncated, or a value is not finite.
        """
        block = self._block(layer)
        if not 0 <= expert < len(block.experts):
            raise InvalidRequest(
                f"expert {expert} of layer {layer}: the model has experts 0 to {len(block.experts) - 1}"
            )
        gate_FD, up_FD, down_DF = self._projections(block.experts[expert])
        return ExpertWeights(gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF)

    def gate(self, layer: str) -> GateWeights:
        """Read one layer's router weight and selection bias; raises as `expert` does."""
        block = self._block(layer)
        bias = block.selection_bias
        return GateWeights(
            weight_ED=self._read_as_model(block.router), bias_E=None if bias is None else self._read(bias).float()
        )

    def shared(self, layer: str) -> SharedWeights | None:
        """Read one layer's shared expert, None if the model has none; raises as `expert` does."""
        block = self._block(layer)
        if block.shared is None:
            return None
        gate_FD, up_FD, down_DF = self._projections(block.shared)
        gate = block.shared_output_gate
        output_gate_1D = None if gate is None else self._read_as_model(gate)
        return SharedWeights(gate_FD=gate_FD, up_FD=up_FD, down_DF=down_DF, output_gate_1D=output_gate_1D)

    def _block(self, layer: str) -> Block:
        block = self._blocks.get(layer)
        if block is None:
            raise InvalidRequest(
                f"layer {layer!r} is not an MoE layer of the model (MoE layers: {', '.join(self._blocks)})"
            )
        return block

    def _projections(self, extents: Projections) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self._read_as_model(extents.gate),
            self._read_as_model(extents.up),
            self._read_as_model(extents.down),
        )

    def _read_as_model(self, extent: Extent) -> Tensor:
        # transformers loads a router or shared expert stored in another dtype in the model's; experts are in it already
        return self._read(extent).to(DTYPES[_CODES[self._spec.dtype]])

    def _read(self, extent: Extent) -> Tensor:
        tensor = read_extent(extent)
        with self._lock:
            self._bytes_read += extent.nbytes
        return tensor


def _dims(gate: GateSpec, shared: SharedSpec | None, *, dim: int, hidden_dim: int) -> Dims:
    return Dims(
        num_experts=gate.num_experts,
        dim=dim,
        hidden_dim=hidden_dim,
        shared_hidden_dim=shared.hidden_dim if shared else 0,
        shared_gated=shared.gated if shared else False,
        selection_bias=gate.selection_bias,
    )
