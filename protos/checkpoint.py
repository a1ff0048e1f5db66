"""Model reading: a Hugging Face directory becomes a `ModelSpec`, and weights are read one expert at a time.

config.json is read by `configfile`, tensor names by `tensornames` and `layout`, bytes by `weightfiles`, quantised
formats by `quantised`. Whatever the layout, weights come out in one form.

Shapes: D model dim, L expert input dim, F expert hidden dim (the shared expert's own for the shared expert), I = 2F
rows of gate and up (F without a gate), E routed experts, C = E + identity choices, V vocabulary, K top-k.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from protos.blocks import Block, StoredMatrix, StoredMlp
from protos.configfile import Config, read_config
from protos.errors import CorruptWeights, InvalidRequest, UnsupportedModel
from protos.layout import find_blocks, plain_dtype
from protos.model import ModelSpec
from protos.pages import paged_tensors
from protos.quant_config import read_quantisation
from protos.quant_floats import Mxfp4
from protos.weightfiles import DTYPES, Extent, index_directory, read_extent

_DTYPE_NAMES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}
SAMPLE_BYTES = 4096  # of one expert of each layer, in the fingerprint
_CODES = {name: code for code, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    """One expert: up_IL stacks gate over up, so that one GEMM computes both. In the model's dtype."""

    up_IL: Tensor
    down_LF: Tensor
    up_bias_I: Tensor | None = None
    down_bias_L: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateWeights:
    """One layer's router, in the model dtype unless the spec keeps it in fp32; selection bias and factors in fp32.

    `dtype`: the model's; None for that of weight_ED. table_VK names the experts of every token id.
    """

    weight_ED: Tensor
    bias_E: Tensor | None = None
    logit_bias_E: Tensor | None = None
    input_scale_D: Tensor | None = None
    expert_scale_E: Tensor | None = None
    table_VK: Tensor | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedWeights:
    """One layer's shared expert, in the model dtype; output_gate_1D where the spec says `gated`."""

    mlp: ExpertWeights
    output_gate_1D: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AroundWeights:
    """What surrounds the routed experts of one layer, in the model dtype; see `BlockSpec`."""

    latent_in_LD: Tensor | None = None
    latent_out_DL: Tensor | None = None
    output_bias_D: Tensor | None = None
    output_norm_D: Tensor | None = None


def read_model(path: Path) -> ModelSpec:
    """Describe the model in `path` from its config.json and safetensors headers; no weight is read.

    Args:
        path: a Hugging Face directory: config.json and *.safetensors, sharded or not.

    Raises:
        UnsupportedModel: no such directory, or a config, dtype or tensor layout that we do not understand.
        CorruptWeights: a weight file is truncated or has a bad header, a tensor is missing or of the wrong shape.
    """
    return _describe(path)[0]


def _describe(path: Path) -> tuple[ModelSpec, Mapping[str, Block]]:
    config = read_config(path)
    quantisation = read_quantisation(config.document, file=config.file)
    blocks = find_blocks(index_directory(path), config, quantisation)
    matrices = (m for block in blocks.values() for expert in block.experts for m in (*expert.ups, expert.down))
    stored = next((matrix.format for matrix in matrices if matrix.format is not None), None)
    spec = ModelSpec(
        path=path.absolute(),  # the spec travels to processes with other working directories
        family=config.family,
        dtype=_model_dtype(config, blocks),
        dim=config.dim,
        hidden_dim=config.hidden_dim,
        blocks={name: block.spec for name, block in blocks.items()},
        quantisation="" if stored is None else stored.words,
    )
    return spec, blocks


class Checkpoint:
    """Reads the weights of `spec`, only those asked for; safe to use from several threads.

    Every tensor returned owns its memory and has been checked for NaN and infinity.

    Raises:
        UnsupportedModel, CorruptWeights: the directory no longer holds what `spec` describes.
    """

    def __init__(self, spec: ModelSpec) -> None:
        found, blocks = _describe(spec.path)
        if found.blocks != spec.blocks or found.dtype != spec.dtype:
            raise CorruptWeights(f"{spec.path}: the weights changed since the model was described")
        self._set(spec, blocks)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """`Checkpoint(read_model(path))` for half the time: with a large model that is seconds of a server's start.

        Raises:
            UnsupportedModel, CorruptWeights: as `read_model` does.
        """
        checkpoint = cls.__new__(cls)
        checkpoint._set(*_describe(path))
        return checkpoint

    def _set(self, spec: ModelSpec, blocks: Mapping[str, Block]) -> None:
        self.spec = spec
        self._blocks = blocks
        self._dtype = DTYPES[_CODES[spec.dtype]]
        self._lock = threading.Lock()
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the files so far."""
        return self._bytes_read

    def expert_bytes(self, layer: str, expert: int) -> int:
        """Bytes that `expert` reads."""
        return sum(extent.nbytes for extent in self.expert_extents(layer, expert))

    def expert_extents(self, layer: str, expert: int) -> tuple[Extent, ...]:
        """Where the bytes that `expert` reads lie."""
        mlp = self._block(layer).experts[expert]
        matrices = [extent for matrix in (*mlp.ups, mlp.down) for extent in matrix.pieces.values()]
        return (*matrices, *mlp.up_biases, *([mlp.down_bias] if mlp.down_bias else []))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell experts of different weights apart, wherever their files lie; read once.

        It covers how all experts are stored, and SAMPLE_BYTES of one expert of each layer: training changes all layers.

        Raises:
            CorruptWeights: as `expert` does.
        """
        digest = hashlib.sha256()
        for number, (layer, block) in enumerate(self._blocks.items()):
            for expert in range(len(block.experts)):
                for extent in self.expert_extents(layer, expert):
                    digest.update(f"{extent.name} {extent.dtype} {extent.shape}\n".encode())
            sample = self.expert_extents(layer, number % len(block.experts))[0]
            num_bytes = min(SAMPLE_BYTES, sample.nbytes)
            begin = sample.begin + (sample.nbytes - num_bytes) // 2
            piece = replace(sample, dtype="U8", shape=(num_bytes,), begin=begin, nbytes=num_bytes)
            digest.update(read_extent(piece).numpy().data)
        return digest.hexdigest()[:16]

    def expert(self, layer: str, expert: int) -> ExpertWeights:
        """Read one expert: its matrices and not a byte more.

        Raises:
            InvalidRequest: the model has no such layer or expert.
            CorruptWeights: the file is gone, changed or truncated, or a value is not finite.
        """
        block = self._block(layer)
        if not 0 <= expert < len(block.experts):
            raise InvalidRequest(
                f"expert {expert} of layer {layer}: the model has experts 0 to {len(block.experts) - 1}"
            )
        return self._mlp(block.experts[expert])

    def gate(self, layer: str) -> GateWeights:
        """Read one layer's router; raises as `expert` does."""
        block = self._block(layer)
        weight_ED = self._read(block.others["router"])
        in_fp32 = block.spec.gate.router_dtype == "float32"

        def optional(part: str, dtype: torch.dtype) -> Tensor | None:
            extent = block.others.get(part)
            return None if extent is None else self._read(extent).to(dtype)

        bias_E = optional("selection bias", torch.float32)
        return GateWeights(
            weight_ED=weight_ED.to(torch.float32 if in_fp32 else self._dtype),
            bias_E=None if bias_E is None else bias_E.reshape(-1),
            logit_bias_E=optional("router bias", self._dtype),
            input_scale_D=optional("router input scale", self._dtype),
            expert_scale_E=optional("expert scale", self._dtype),
            table_VK=optional("token table", torch.int64),
            dtype=self._dtype,
        )

    def shared(self, layer: str) -> SharedWeights | None:
        """Read one layer's shared expert, None if the model has none; raises as `expert` does."""
        block = self._block(layer)
        if block.shared is None:
            return None
        gate = block.others.get("shared output gate")
        return SharedWeights(
            mlp=self._mlp(block.shared), output_gate_1D=None if gate is None else self._read(gate).to(self._dtype)
        )

    def around(self, layer: str) -> AroundWeights:
        """Read what surrounds one layer's routed experts; raises as `expert` does."""
        block = self._block(layer)
        bias, norm = block.others.get("output bias"), block.others.get("output norm")
        latent_in, latent_out = block.latent or (None, None)
        return AroundWeights(
            latent_in_LD=None if latent_in is None else self._matrix(latent_in).to(self._dtype),
            latent_out_DL=None if latent_out is None else self._matrix(latent_out).to(self._dtype),
            output_bias_D=None if bias is None else self._read(bias).to(self._dtype),
            output_norm_D=None if norm is None else self._read(norm).to(self._dtype),
        )

    def unquantised(self, layer: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one MoE block as a checkpoint that was never quantised would have them, by name.

        Raises:
            CorruptWeights: as `expert` does.
        """
        block = self._block(layer)
        mlps = [*block.experts, *([block.shared] if block.shared is not None else [])]
        stacks: dict[str, list[Tensor]] = {}
        for name, tensor in self._unquantised(mlps, block):
            stack, is_item, _ = name.partition("[")
            if is_item:
                stacks.setdefault(stack, []).append(tensor)
            else:
                yield name, tensor
        for name, tensors in stacks.items():
            yield name, torch.stack(tensors)

    def _unquantised(self, mlps: list[StoredMlp], block: Block) -> Iterator[tuple[str, Tensor]]:
        for mlp in mlps:
            for matrix in (*mlp.ups, mlp.down):
                tensor = self._matrix(matrix).to(self._dtype)
                stored_as_used = not (matrix.transposed or isinstance(matrix.format, Mxfp4))
                yield matrix.plain_name, tensor if stored_as_used else tensor.T
            for bias in (*mlp.up_biases, *([] if mlp.down_bias is None else [mlp.down_bias])):
                yield bias.name, self._read(bias).to(self._dtype)
        for matrix in block.latent or ():
            yield matrix.plain_name, self._matrix(matrix).to(self._dtype)
        for extent in block.others.values():
            yield extent.name, self._read(extent)

    def _block(self, layer: str) -> Block:
        block = self._blocks.get(layer)
        if block is None:
            raise InvalidRequest(
                f"layer {layer!r} is not an MoE layer of the model (MoE layers: {', '.join(self._blocks)})"
            )
        return block

    def _mlp(self, mlp: StoredMlp) -> ExpertWeights:
        """The projections in one form: gate rows, then up rows."""
        rows, columns = sum(matrix.rows for matrix in mlp.ups), mlp.ups[0].columns
        bias_shapes = [(rows,), (mlp.down.rows,)] if mlp.down_bias is not None else []
        shapes = [(rows, columns), (mlp.down.rows, mlp.down.columns), *bias_shapes]
        up_IL, down_LF, *bias_tensors = paged_tensors(*((shape, self._dtype) for shape in shapes))
        up_bias_I, down_bias_L = bias_tensors or (None, None)
        if up_bias_I is not None and down_bias_L is not None and mlp.down_bias is not None:
            bias_I = torch.cat([self._read(bias) for bias in mlp.up_biases])
            up_bias_I.copy_(torch.cat((bias_I[::2], bias_I[1::2])) if mlp.interleaved else bias_I)
            down_bias_L.copy_(self._read(mlp.down_bias))
        if mlp.interleaved:
            fused_IL = self._matrix(mlp.ups[0])
            up_IL[: rows // 2].copy_(fused_IL[::2])
            up_IL[rows // 2 :].copy_(fused_IL[1::2])
            del fused_IL
        else:
            first = 0
            for matrix in mlp.ups:
                self._fill(up_IL[first : first + matrix.rows], matrix)
                first += matrix.rows
        self._fill(down_LF, mlp.down)
        return ExpertWeights(up_IL=up_IL, down_LF=down_LF, up_bias_I=up_bias_I, down_bias_L=down_bias_L)

    def _fill(self, weight_RC: Tensor, matrix: StoredMatrix) -> None:
        """Read `matrix` into memory that is there, directly if it is stored as it is used."""
        if matrix.format is None and not matrix.transposed and self._is_model(matrix.pieces["weight"]):
            self._read(matrix.pieces["weight"], into=weight_RC)
        else:
            weight_RC.copy_(self._matrix(matrix))

    def _matrix(self, matrix: StoredMatrix) -> Tensor:
        """[rows, columns], in the stored dtype if it is plain, else dequantised to fp32."""
        pieces = {piece: self._read(extent) for piece, extent in matrix.pieces.items()}
        if matrix.format is None:
            return pieces["weight"].T if matrix.transposed else pieces["weight"]
        file = next(iter(matrix.pieces.values())).file
        return matrix.format.decode(pieces, matrix.rows, matrix.columns, name=f"{file.path}: {matrix.name}")

    def _is_model(self, extent: Extent) -> bool:
        return DTYPES.get(extent.dtype) is self._dtype

    def _read(self, extent: Extent, into: Tensor | None = None) -> Tensor:
        tensor = read_extent(extent, into)
        with self._lock:
            self._bytes_read += extent.nbytes
        return tensor


def _model_dtype(config: Config, blocks: Mapping[str, Block]) -> Literal["float32", "bfloat16", "float16"]:
    """The dtype the model computes in: what config.json says, as transformers takes it, whatever the stored one is.

    Where config.json does not say: that of the stored experts, or if those are quantised the router's.

    Raises:
        UnsupportedModel: the stored experts have several dtypes, or one that is none of these.
    """
    code = plain_dtype(blocks)
    for values in (config.values, config.document):
        for key in ("dtype", "torch_dtype"):
            name = values.get(key)
            if isinstance(name, str) and name.removeprefix("torch.") in _CODES:
                return _DTYPE_NAMES[_CODES[name.removeprefix("torch.")]]  # type: ignore[index]
    router = next(iter(blocks.values())).others["router"]
    code = code or router.dtype
    if code not in _DTYPE_NAMES:
        raise UnsupportedModel(f"{router.file.path}: tensor {router.name} has dtype {router.dtype}")
    return _DTYPE_NAMES[code]
