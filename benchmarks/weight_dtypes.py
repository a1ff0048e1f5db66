"""Packed expert weights: time, memory and error against plain fp32 and bf16 weights.

    python -m benchmarks.weight_dtypes [--rounds N] [--threads N] [--out FILE]

One expert's matrices in several sizes, multiplied with 1 to 512 rows. The arms take turns within every round on the
same rows, each on its own weights, and every round takes another copy: so weights come from memory, as with a server
that holds hundreds of experts. Reported are medians, over rounds, of the ratio to the plain product of that round.

    fp32, bf16                F.linear on plain weights
    int8, int4, fp8           experts.packed.linear, with fp32 and with bf16 activations
    torch int8, torch int4    torch's weight-only kernels alone, for all rows
    whole int8, whole fp8     the obvious way: weight.to(dtype) as a whole, then F.linear
    int8 x int8               activations quantised too, row by row (torch._int_mm): to know what we give up

The errors of an expert (SwiGLU, D=2048, F=1408) are norms relative to the fp32 result, for normal weights and for heavy
tails (Student's t with 4 degrees of freedom), the second being what makes quantisation hard.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.document import publish
from experts.packed import GROUP_SIZE, Matrix, PackedMatrix, WeightDtype, linear, pack, packed_bytes

SHAPES = {"gate+up 2x1408x2048": (2816, 2048), "down 2048x1408": (2048, 1408), "gate+up 2x384x2048": (768, 2048)}
LARGE_SHAPES = {"gate+up 2x14336x4096": (28672, 4096)}  # Mixtral 8x22B has 2x16384x6144
ROWS = (1, 8, 64, 512)
LARGE_ROWS = (1, 8)
RESIDENT_BYTES = 150_000_000  # of fp32 weights that a shape's copies have at least, beyond what caches keep
WEIGHT_DTYPES: tuple[WeightDtype, ...] = get_args(WeightDtype)

Arm = Callable[[Tensor, "Weights"], Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One matrix in every form the arms need."""

    plain: Tensor
    half: Tensor
    packed: dict[tuple[WeightDtype, torch.dtype], PackedMatrix]  # by the dtype of the activations, on shared memory

    @classmethod
    def random(cls, rows: int, columns: int) -> "Weights":
        plain = torch.randn(rows, columns) * columns**-0.5
        packed = {}
        for weight_dtype in WEIGHT_DTYPES:
            packed[weight_dtype, torch.bfloat16] = pack(plain, weight_dtype, dtype=torch.bfloat16)
            packed[weight_dtype, torch.float32] = replace(packed[weight_dtype, torch.bfloat16], dtype=torch.float32)
        return cls(plain=plain, half=plain.bfloat16(), packed=packed)


def ours(weight_dtype: WeightDtype, dtype: torch.dtype) -> Arm:
    return lambda x, weights: linear(x.to(dtype), weights.packed[weight_dtype, dtype])


def whole(weight_dtype: WeightDtype, dtype: torch.dtype) -> Arm:
    def arm(x: Tensor, weights: Weights) -> Tensor:
        packed = weights.packed[weight_dtype, dtype]
        return F.linear(x.to(dtype), packed.codes.to(dtype)) * packed.scales.to(dtype)

    return arm


def torch_int8(x: Tensor, weights: Weights) -> Tensor | None:
    packed = weights.packed["int8", x.dtype]
    if x.dtype is torch.float32 and len(x) > 8:
        return None  # seconds
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x, packed.codes, packed.scales.to(x.dtype))
    return y


def torch_int4(x: Tensor, weights: Weights) -> Tensor | None:
    packed = weights.packed["int4", x.dtype]
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or (x.dtype is torch.float32 and len(x) > 8):
        return None
    codes, scales = packed.codes.view(packed.shape[0], -1), packed.scales.to(x.dtype)
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, GROUP_SIZE, scales)
    return y


def int8_by_int8(x: Tensor, matrix: Matrix) -> Tensor:
    assert isinstance(matrix, PackedMatrix)
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / scale).round_().to(torch.int8)
    return torch._int_mm(codes, matrix.codes.t()) * scale * matrix.scales.float()


BASELINES: dict[str, Arm] = {
    "fp32": lambda x, weights: F.linear(x, weights.plain),
    "bf16": lambda x, weights: F.linear(x.bfloat16(), weights.half),
}
OURS: dict[str, Arm] = {
    f"{weight_dtype}, {name} activations": ours(weight_dtype, dtype)
    for weight_dtype in WEIGHT_DTYPES
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
}
OTHERS: dict[str, Arm] = {
    "torch int8, bf16 activations": lambda x, weights: torch_int8(x.bfloat16(), weights),
    "torch int8, fp32 activations": torch_int8,
    "torch int4, bf16 activations": lambda x, weights: torch_int4(x.bfloat16(), weights),
    "torch int4, fp32 activations": torch_int4,
    "whole int8, bf16 activations": whole("int8", torch.bfloat16),
    "whole int8, fp32 activations": whole("int8", torch.float32),
    "whole fp8, fp32 activations": whole("fp8", torch.float32),
    "int8 x int8": lambda x, weights: int8_by_int8(x, weights.packed["int8", torch.float32]),
}


def times(shape: tuple[int, int], rows: tuple[int, ...], arms: dict[str, Arm], rounds: int) -> dict[str, Any]:
    """Per number of rows: median milliseconds of the baselines, and every arm's median ratio to them."""
    copies = [Weights.random(*shape) for _ in range(max(2, -(-RESIDENT_BYTES // (4 * shape[0] * shape[1]))))]
    result: dict[str, Any] = {}
    for num_rows in rows:
        x = torch.randn(num_rows, shape[1])
        seconds: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for name, arm in arms.items():
                start = time.perf_counter()
                computed = arm(x, copies[turn % len(copies)]) is not None
                took = time.perf_counter() - start
                if computed and turn > 0:  # the first round warms up
                    seconds.setdefault(name, []).append(took)
        result[str(num_rows)] = {
            "p50_ms": {name: round(statistics.median(seconds[name]) * 1e3, 3) for name in BASELINES},
            "time / fp32": {name: ratio(took, seconds["fp32"]) for name, took in seconds.items()},
            "time / bf16": {name: ratio(took, seconds["bf16"]) for name, took in seconds.items() if name in OURS},
        }
        print(shape, num_rows, json.dumps(result[str(num_rows)]), flush=True)
    return result


def ratio(took: list[float], base: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(took, base, strict=True)), 2)


def errors() -> dict[str, dict[str, float]]:
    """Relative error of an expert's output for each way to keep its weights."""
    dim, hidden_dim = 2048, 1408
    tails = {"normal": torch.distributions.Normal(0, 1), "heavy tails": torch.distributions.StudentT(4.0)}
    result: dict[str, dict[str, float]] = {}
    for name, distribution in tails.items():
        plain = [distribution.sample((2 * hidden_dim, dim)), distribution.sample((dim, hidden_dim))]
        plain = [weight * weight.shape[1] ** -0.5 for weight in plain]
        x = torch.randn(64, dim)
        outputs = {"bf16, bf16 activations": expert(x.bfloat16(), [weight.bfloat16() for weight in plain])}
        for label, weight_dtype, group_size in formats():
            for activations, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                packed = [pack(weight, weight_dtype, dtype=dtype, group_size=group_size) for weight in plain]
                outputs[f"{label}, {activations} activations"] = expert(x.to(dtype), packed)
        packed = [pack(weight, "int8", dtype=torch.float32) for weight in plain]
        outputs["int8 x int8"] = expert(x, packed, linear=int8_by_int8)
        exact = expert(x, plain)
        result[name] = {key: round(float((y.float() - exact).norm() / exact.norm()), 5) for key, y in outputs.items()}
    return result


def expert(x: Tensor, matrices: Sequence[Matrix], linear: Callable[[Tensor, Matrix], Tensor] = linear) -> Tensor:
    gate, up = linear(x, matrices[0]).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, matrices[1])


def formats() -> Iterator[tuple[str, WeightDtype, int]]:
    """(label, weight dtype, group size) of everything `pack` can make."""
    for weight_dtype in WEIGHT_DTYPES:
        for group_size in (32, 64, 128) if weight_dtype == "int4" else (GROUP_SIZE,):
            yield (
                f"int4 in groups of {group_size}" if weight_dtype == "int4" else weight_dtype,
                weight_dtype,
                group_size,
            )


def bytes_per_parameter() -> dict[str, float]:
    rows, columns = SHAPES["gate+up 2x1408x2048"]
    sizes = {"fp32": 4.0, "bf16": 2.0}
    for label, weight_dtype, group_size in formats():
        sizes[label] = round(packed_bytes(rows, columns, weight_dtype, group_size=group_size) / rows / columns, 4)
    return sizes


@torch.no_grad()
def run(rounds: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {"relative_error_of_an_expert": errors(), "bytes_per_parameter": bytes_per_parameter()}
    result["rows"] = {name: times(shape, ROWS, BASELINES | OURS | OTHERS, rounds) for name, shape in SHAPES.items()}
    for name, shape in LARGE_SHAPES.items():
        result["rows"][name] = times(shape, LARGE_ROWS, BASELINES | OURS, max(3, rounds // 3))
    capabilities = torch.cpu.get_capabilities()
    return result | {
        "machine": {
            "cpu": f"{capabilities.get('cpu_name', platform.machine())}, {torch.backends.cpu.get_cpu_capability()}",
            **{name: bool(capabilities.get(name)) for name in ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni")},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "weight_dtypes.json")
    args = parser.parse_args()
    publish(run(args.rounds, args.threads), packages=("torch", "numpy"), out=args.out)


if __name__ == "__main__":
    main()
