"""Tiny quantised model directories as the hub has them, each beside its decoded twin for transformers to load.

Every quantised matrix has random codes and scales from `tests/packers.py`, and its twin the values that the format's
definition gives them, in a plain fp32 directory of the same names that transformers can read.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import packers
from tests.family_blocks import find_blocks
from tests.family_cases import CASES
from tests.family_models import FamilyModel, build_family

Pieces = dict[str, Tensor]
Make = Callable[[int, int, np.random.Generator], tuple[Pieces, Tensor]]
"""(rows, columns, source of draws) -> pieces by the ending of their names, decoded matrix in fp32."""

_EXPERTS = r"\.experts\.|\.moe\.(?:gate|up|down)_proj\."
_LINEAR = r"(?:mlp|ffn|moe|share_expert|experts)\..*\b(?:(?:gate|up|down|gate_up)_proj|w1|w2|w3|w13_weight|w2_weight)\b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a model is quantised. `make` is used for modules that match `matching`, the first of several that does.

    Args:
        config: config.json's quantization_config; None to leave it out.
        make: by expression on tensor names; what no expression matches stays plain.
        words: what the model is to be described with.
        edit: a change of the whole config.json.
        unused: ending of pieces that no weight depends on.
    """

    config: Mapping[str, Any] | None
    make: Mapping[str, Make]
    words: str
    edit: Callable[[dict[str, Any]], object] = lambda config: None
    unused: str = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedModel:
    """`path` is the quantised directory, `twin` the decoded model as transformers loaded it."""

    path: Path
    twin: FamilyModel
    expert_bytes: int  # of all pieces of routed experts that decoding needs


@dataclass(slots=True)
class _Written:
    quantised: Pieces = field(default_factory=dict)
    decoded: Pieces = field(default_factory=dict)


def build_quantised(
    name: str,
    path: Path,
    method: Method,
    *,
    dtype: str = "float32",
    memory_layout: bool = False,
    sharded: bool = False,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> QuantisedModel:
    """Write the family case `name` quantised by `method`.

    Args:
        path: gets two directories, of the quantised model and of its twin.
        dtype: of the model: in config.json, and of all tensors that are not quantised.
        config: overrides of the tiny config (FP4 needs experts whose width 32 divides).
    """
    model, twin = path / "quantised", path / "twin"
    case = CASES[name]
    wider = type(case)(model_type=case.model_type, config={**case.config, **(config or {})}, router_std=case.router_std)
    with patch.dict(CASES, {name: wider}):
        build_family(name, twin, dtype=dtype, memory_layout=memory_layout, seed=seed)
    document = json.loads((twin / "config.json").read_text())
    written = _Written()
    model.mkdir()
    generator = np.random.default_rng(seed)
    for tensor_name, tensor in load_file(twin / "model.safetensors").items():
        matching = (make for pattern, make in method.make.items() if re.search(pattern, tensor_name))
        make = next(matching, None) if re.search(_LINEAR, tensor_name) else None
        if make is None:
            written.quantised[tensor_name] = written.decoded[tensor_name] = tensor
        else:
            _write(written, tensor_name, tensor.shape, make, generator, transposed=name == "gpt_oss")
    save_torch_state_dict(written.decoded, twin, max_shard_size="5GB")
    save_torch_state_dict(written.quantised, model, max_shard_size="40KB" if sharded else "5GB")
    if method.config is not None:
        document["quantization_config"] = dict(method.config)
    method.edit(document)
    (model / "config.json").write_text(json.dumps(document, indent=2))
    expert_bytes = sum(
        tensor.nbytes
        for tensor_name, tensor in written.quantised.items()
        if re.search(_EXPERTS, tensor_name) and not tensor_name.endswith(method.unused)
    )
    return QuantisedModel(path=model, twin=_load(name, twin, dtype), expert_bytes=expert_bytes)


def _load(name: str, path: Path, dtype: str) -> FamilyModel:
    document = json.loads((path / "config.json").read_text())
    model_class: Any = getattr(transformers, document["architectures"][0])
    model: nn.Module
    model, report = model_class.from_pretrained(
        path, dtype=dtype, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return FamilyModel(name=name, path=path, model=model.train(False), layers=find_blocks(model))


def _write(
    written: _Written, name: str, shape: torch.Size, make: Make, generator: np.random.Generator, *, transposed: bool
) -> None:
    if len(shape) == 2:
        pieces, written.decoded[name] = make(shape[0], shape[1], generator)
    else:
        rows, columns = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        made = [make(rows, columns, generator) for _ in range(shape[0])]
        value = torch.stack([value for _, value in made])
        written.decoded[name] = value.transpose(1, 2).contiguous() if transposed else value
        pieces = {ending: torch.stack([pieces[ending] for pieces, _ in made]) for ending in made[0][0]}
    for ending, piece in pieces.items():
        if name.endswith(".weight"):
            whole = f"{name.removesuffix('.weight')}.{ending}"
        else:
            whole = name if ending == "weight" else f"{name}_{ending.removeprefix('weight_')}"
        written.quantised[whole] = piece.contiguous()


# ---------------------------------------------------------------------- formats


def fp8(
    block: tuple[int, int], *, scale: str = "weight_scale_inv", dtype: torch.dtype = torch.float32, extra: str = ""
) -> Make:
    """E4M3 with a scale for each block of rows and columns, 0 for all of them.

    Args:
        scale: ending of the name of the scales.
        dtype: of the scales.
        extra: ending of one more scalar, of activations.
    """

    def make(rows: int, columns: int, generator: np.random.Generator) -> tuple[Pieces, Tensor]:
        code_RC = packers.random_codes(generator, rows, columns, 0, 254)
        code_RC += code_RC >= 0x7F  # 0x7F and 0xFF are NaN
        sizes = (block[0] or rows, block[1] or columns)
        scale_rc = _scales(generator, -(-rows // sizes[0]), -(-columns // sizes[1]), 0.008 * columns**-0.5, dtype)
        stored = scale_rc.reshape(()) if block == (0, 0) else scale_rc
        weight = torch.from_numpy(code_RC.astype(np.uint8)).view(torch.float8_e4m3fn)
        pieces = {"weight": weight, scale: stored} | ({extra: torch.tensor(0.5)} if extra else {})
        return pieces, packers.times_blocks(packers.E4M3[code_RC], scale_rc, sizes)

    return make


def fp4(*, scale: str, blocks: str = "weight", dtype: torch.dtype) -> Make:
    """E2M1, a scale for 32 of a row; blocks: "weight" is [rows, columns / 2] of int8, else a dimension for blocks."""

    def make(rows: int, columns: int, generator: np.random.Generator) -> tuple[Pieces, Tensor]:
        code_RC = packers.random_codes(generator, rows, columns, 0, 16)
        scale_RG = _scales(generator, rows, columns // 32, 0.3 * columns**-0.5, dtype)
        packed = packers.pack_e2m1(code_RC)
        packed = packed.view(torch.int8) if blocks == "weight" else packed.view(rows, columns // 32, 16)
        return {blocks: packed, scale: scale_RG}, packers.times_blocks(packers.E2M1[code_RC], scale_RG, (1, 32))

    return make


def gptq(
    *, bits: int = 4, group: int = 16, zeros: str = "less one", act_order: bool = False, bias: bool = False
) -> Make:
    """AutoGPTQ's tensors; bias: and the zeros that it gave layers without one."""

    def make(rows: int, columns: int, generator: np.random.Generator) -> tuple[Pieces, Tensor]:
        code_RC, zero_RG, scale_RG = _grouped(generator, rows, columns, bits, group)
        groups = [column // group for column in range(columns)]
        if act_order:
            groups = generator.permutation(groups).tolist()
        pieces = packers.pack_gptq(code_RC, zero_RG, scale_RG, groups, bits=bits, zeros=zeros)
        if bias:
            pieces["bias"] = torch.zeros(rows, dtype=torch.float16)
        return pieces, packers.grouped_value(code_RC, zero_RG, scale_RG, groups)

    return make


def awq(*, group: int = 16) -> Make:
    """AutoAWQ's "gemm" tensors."""

    def make(rows: int, columns: int, generator: np.random.Generator) -> tuple[Pieces, Tensor]:
        code_RC, zero_RG, scale_RG = _grouped(generator, rows, columns, 4, group)
        groups = [column // group for column in range(columns)]
        return packers.pack_awq(code_RC, zero_RG, scale_RG), packers.grouped_value(code_RC, zero_RG, scale_RG, groups)

    return make


def packed_int4(*, group: int = 16) -> Make:
    """compressed-tensors' "pack-quantized", symmetric, as Kimi-K2-Thinking has it."""

    def make(rows: int, columns: int, generator: np.random.Generator) -> tuple[Pieces, Tensor]:
        code_RC, zero_RG, scale_RG = _grouped(generator, rows, columns, 4, group)
        scale_RG = scale_RG.bfloat16()
        groups = [column // group for column in range(columns)]
        pieces = packers.pack_integers(code_RC - 8, None, scale_RG, bits=4)
        value = packers.grouped_value(code_RC - 8, np.zeros_like(zero_RG), scale_RG, groups)
        return {f"weight_{name}": piece for name, piece in pieces.items()}, value

    return make


def _grouped(
    generator: np.random.Generator, rows: int, columns: int, bits: int, group: int
) -> tuple[packers.Codes, packers.Codes, Tensor]:
    num_groups = -(-columns // group)
    top = 1 << bits
    code_RC = packers.random_codes(generator, rows, columns, 0, top)
    zero_RG = packers.random_codes(generator, rows, num_groups, top // 2 - 2, top // 2 + 3)
    return code_RC, zero_RG, _scales(generator, rows, num_groups, 3 / top * columns**-0.5, torch.float16)


def _scales(generator: np.random.Generator, rows: int, columns: int, typical: float, dtype: torch.dtype) -> Tensor:
    """Scales about `typical` [rows, columns]; powers of two where the dtype holds exponents."""
    scale = typical * 2.0 ** generator.uniform(-1, 1, size=(rows, columns))
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.from_numpy((np.round(np.log2(scale)) + 127).astype(np.uint8)).view(dtype)
    return torch.from_numpy(scale).to(dtype)
