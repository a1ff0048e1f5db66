"""Is what we compute what the model computes? Every MoE layer against transformers' own block, on random inputs."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cluster.reference import moe_block, run_block
from protos.model import ModelSpec

# Sizes that take different paths: one token, a few, more than a power of two.
TOKEN_COUNTS = (1, 7, 257)

# Largest |difference| over the largest |reference|. 16-bit models: transformers adds the experts' outputs in 16 bits,
# we in fp32 and round once, so that some units in the last place (2^-8, 2^-11) of its own remain.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}

Compute = Callable[[str, Tensor], Awaitable[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """The largest relative error of one layer, and the number of tokens of the input that showed it."""

    layer: str
    error: float
    num_tokens: int


async def verify_layers(
    spec: ModelSpec, model: nn.Module, compute: Compute, *, on_layer: Callable[[LayerError], None]
) -> list[LayerError]:
    """Compare every MoE layer.

    Args:
        model: transformers' own, see `load_reference`.
        compute: (layer, x [T, D]) to the whole block's output [T, D]: in this process or through a router.
        on_layer: called with each layer's result.
    """
    results = []
    for layer in spec.layers:
        block = moe_block(model, layer)
        worst = LayerError(layer=layer, error=0.0, num_tokens=0)
        for x_TD in inputs(spec):
            reference_TD = run_block(block, x_TD)
            error = relative_error(await compute(layer, x_TD), reference_TD)
            if not error <= worst.error:  # a NaN is the worst of all
                worst = LayerError(layer=layer, error=error, num_tokens=len(x_TD))
        on_layer(worst)
        results.append(worst)
    return results


def relative_error(y_TD: Tensor, reference_TD: Tensor) -> float:
    """Largest |difference| relative to the largest |reference|; inf where anything is not finite."""
    difference = (y_TD.double() - reference_TD.double()).abs().max()
    error = float(difference / reference_TD.double().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def inputs(spec: ModelSpec) -> Iterator[Tensor]:
    """Random hidden states of unit RMS, as a block receives them behind its norm, in the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    for num_tokens in TOKEN_COUNTS:
        yield torch.randn(num_tokens, spec.dim, generator=generator).to(getattr(torch, spec.dtype))
