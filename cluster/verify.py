"""Is what we compute what the model computes? Every MoE layer against transformers' own block, on random inputs."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.reference import Reference
from experts.packed import WeightDtype
from protos.checkpoint import Checkpoint
from protos.model import ModelSpec

# Sizes that take different paths: one token, a few, more than a power of two.
TOKEN_COUNTS = (1, 7, 257)

# Largest |difference| over the largest |reference|. 16-bit models: transformers adds the experts' outputs in 16 bits,
# we in fp32 and round once, so that some units in the last place (2^-8, 2^-11) of its own remain.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}
# Weights that are packed on load are other weights: what remains is the error of the packing. Two to three
# times what random weights show (benchmarks/results/weight_dtypes.json).
PACKED_TOLERANCE = {"int8": 0.05, "int4": 0.35, "fp8": 0.15}

Compute = Callable[[str, Tensor, npt.NDArray[np.int64]], Awaitable[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """How far one layer is from the reference, for the input that shows it most.

    error: largest |difference| over largest |reference|; rms_error: root mean square of the difference over that of
    the reference.
    """

    layer: str
    error: float
    rms_error: float
    num_tokens: int


def packed_dtype(name: str) -> WeightDtype | None:
    """The packed dtype of that name; None for any other, such as "compute"."""
    known: dict[str, WeightDtype] = {"int8": "int8", "int4": "int4", "fp8": "fp8"}
    return known.get(name)


def tolerance_of(spec: ModelSpec, weight_dtype: str | None) -> float:
    """Largest error that passes: of the model's dtype, or of the dtype that its weights were packed in."""
    own = TOLERANCE[spec.dtype]
    return own if weight_dtype is None else max(own, PACKED_TOLERANCE[weight_dtype])


async def verify_layers(
    spec: ModelSpec,
    reference: Reference,
    compute: Compute,
    *,
    on_layer: Callable[[LayerError], None],
    checkpoint: Checkpoint | None = None,
) -> list[LayerError]:
    """Compare every MoE layer.

    Args:
        reference: transformers' own blocks, see `load_reference`.
        compute: (layer, x [T, D], token ids [T]) to the whole block's output [T, D]: in this process or through a
            router.
        on_layer: called with each layer's result.
        checkpoint: of `spec`, if the caller has it open.
    """
    checkpoint = checkpoint or Checkpoint(spec)
    tables = [checkpoint.gate(layer).table_VK for layer, block in spec.blocks.items() if block.gate.needs_token_ids]
    num_ids = min((len(table_VK) for table_VK in tables if table_VK is not None), default=1)
    results = []
    for layer in spec.layers:
        worst = LayerError(layer=layer, error=0.0, rms_error=0.0, num_tokens=0)
        for x_TD, token_ids_T in inputs(spec, num_ids=num_ids):
            reference_TD = reference.output(layer, x_TD, token_ids_T)
            y_TD = await compute(layer, x_TD, token_ids_T.numpy())
            error = relative_error(y_TD, reference_TD)
            if not error <= worst.error:  # a NaN is the worst of all
                rms = relative_rms(y_TD, reference_TD)
                worst = LayerError(layer=layer, error=error, rms_error=rms, num_tokens=len(x_TD))
        on_layer(worst)
        results.append(worst)
    return results


def relative_error(y_TD: Tensor, reference_TD: Tensor) -> float:
    """Largest |difference| relative to the largest |reference|; inf where anything is not finite."""
    difference = (y_TD.double() - reference_TD.double()).abs().max()
    error = float(difference / reference_TD.double().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def relative_rms(y_TD: Tensor, reference_TD: Tensor) -> float:
    """Root mean square of the difference relative to that of the reference; inf where anything is not finite."""
    difference = (y_TD.double() - reference_TD.double()).pow(2).mean().sqrt()
    error = float(difference / reference_TD.double().pow(2).mean().sqrt().clamp(min=1e-30))
    return error if error == error else float("inf")


def inputs(spec: ModelSpec, *, num_ids: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Random hidden states of unit RMS, as a block receives them behind its norm, in the model's dtype; token ids."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens in TOKEN_COUNTS:
        x_TD = torch.randn(num_tokens, spec.dim, generator=generator).to(getattr(torch, spec.dtype))
        yield x_TD, torch.randint(0, num_ids, (num_tokens,), generator=generator)
