"""Quantised matrices written from the formats' definitions, one element at a time, for the decoders to read.

Nothing here comes from `protos`: values are computed in float64, where a small code times a float32 scale is exact, and
rounded to float32 once; words are packed with Python's integers.

Shapes: R rows (out), C columns (in), G groups of a row, r and c rows and columns of a grid of scales.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pieces = dict[str, Tensor]
Codes = NDArray[np.int64]

_SAFETENSORS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


def described(pieces: Pieces) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a safetensors header says of the pieces: dtype code and shape."""
    return {name: (_SAFETENSORS[piece.dtype], tuple(piece.shape)) for name, piece in pieces.items()}


def float_value(code: int, *, exponent_bits: int, mantissa_bits: int) -> float:
    """A small float: sign, exponent biased by 2^(bits - 1) - 1, mantissa; subnormal where the exponent is 0."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    magnitude = math.ldexp(1 + mantissa, exponent - bias) if exponent else math.ldexp(mantissa, 1 - bias)
    return math.copysign(magnitude, sign)


E4M3 = np.array([float_value(code, exponent_bits=4, mantissa_bits=3) for code in range(256)])  # NaN codes apart
E2M1 = np.array([float_value(code, exponent_bits=2, mantissa_bits=1) for code in range(16)])


def times_blocks(value_RC: NDArray[np.float64], scale_rc: Tensor, block: tuple[int, int]) -> Tensor:
    """Element (i, j) times the scale of block (i // rows, j // columns); bytes are exponents of 2, biased by 127."""
    if scale_rc.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = np.ldexp(1.0, scale_rc.view(torch.uint8).numpy().astype(np.int64) - 127)
    else:
        scale = scale_rc.double().numpy()
    rows, columns = value_RC.shape
    return to_float32(
        np.array([[value_RC[i, j] * scale[i // block[0], j // block[1]] for j in range(columns)] for i in range(rows)])
    )


def to_float32(value: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(value).to(torch.float32)


def pack_e2m1(code_RC: Codes) -> Tensor:
    """Bytes [R, C / 2]: the even column in the low half."""
    low, high = code_RC[:, 0::2], code_RC[:, 1::2]
    return torch.from_numpy((low + high * 16).astype(np.uint8))


def pack_words(code_NM: Codes, bits: int, *, position: Sequence[int] | None = None) -> Tensor:
    """int32 [N, ceil(M * bits / 32)]: code m of a word at bit m * bits, or at position[m] * bits; 0 beyond the end."""
    per_word = 32 // bits
    rows = []
    for codes in code_NM.tolist():
        words = [0] * math.ceil(len(codes) / per_word)
        for index, code in enumerate(codes):
            place = position[index % per_word] if position else index % per_word
            words[index // per_word] |= code << place * bits
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)  # keeps the low 32 bits


def grouped_value(code_RC: Codes, zero_RG: Codes, scale_RG: Tensor, group_of_column: Sequence[int]) -> Tensor:
    """(code - zero point) x scale, those of the column's group."""
    scale = scale_RG.double().numpy()
    group = np.asarray(group_of_column)
    return to_float32((code_RC - zero_RG[:, group]) * scale[:, group])


def pack_gptq(
    code_RC: Codes, zero_RG: Codes, scale_RG: Tensor, group_of_column: Sequence[int] | None, *, bits: int, zeros: str
) -> Pieces:
    """AutoGPTQ's tensors. zeros: "plain" (v2), "less one" (v1), "borrowed" (v2 words minus ...0001 0001)."""
    if zeros == "borrowed":
        ones = sum(1 << place for place in range(0, 32, bits))
        plain = pack_words(zero_RG.T, bits)
        qzeros = ((plain.to(torch.int64) - ones) & 0xFFFFFFFF).to(torch.int32)
    else:
        qzeros = pack_words(zero_RG.T - (1 if zeros == "less one" else 0), bits)
    pieces = {
        "qweight": pack_words(code_RC, bits).T.contiguous(),
        "qzeros": qzeros,
        "scales": scale_RG.T.contiguous(),
    }
    if group_of_column is not None:
        pieces["g_idx"] = torch.tensor(group_of_column, dtype=torch.int32)
    return pieces


def pack_awq(code_RC: Codes, zero_RG: Codes, scale_RG: Tensor) -> Pieces:
    """AutoAWQ's "gemm" tensors: nibble i of a word is row order[i] of its eight."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    position = [order.index(row) for row in range(8)]
    return {
        "qweight": pack_words(code_RC.T, 4, position=position),
        "qzeros": pack_words(zero_RG.T, 4, position=position),
        "scales": scale_RG.T.contiguous(),
    }


def pack_integers(signed_RC: Codes, zero_RG: Codes | None, scale_RG: Tensor, *, bits: int) -> Pieces:
    """compressed-tensors' "pack-quantized": signed codes, stored from 0; zero points packed along the rows."""
    offset = 1 << bits - 1
    pieces = {
        "packed": pack_words(signed_RC + offset, bits),
        "scale": scale_RG,
        "shape": torch.tensor(signed_RC.shape, dtype=torch.int64),
    }
    if zero_RG is not None:
        pieces["zero_point"] = pack_words((zero_RG + offset).T, bits).T.contiguous()
    return pieces


def random_codes(generator: np.random.Generator, rows: int, columns: int, low: int, high: int) -> Codes:
    """Integers in [low, high)."""
    return generator.integers(low, high, size=(rows, columns), dtype=np.int64)


def random_scales(generator: np.random.Generator, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Scales over many magnitudes, some negative; for dtypes of exponents, exponents."""
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = generator.integers(0, 240, size=(rows, columns), dtype=np.uint8)
        return torch.from_numpy(exponents).view(dtype)
    magnitude: Callable[..., NDArray[np.float64]] = generator.uniform
    scale = generator.choice([-1.0, 1.0], size=(rows, columns)) * 2.0 ** magnitude(-12, 3, size=(rows, columns))
    return torch.from_numpy(scale).to(dtype)
