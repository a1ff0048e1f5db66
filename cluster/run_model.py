"""What `expertmesh layer` and `verify` do, on a model in this process or behind a router."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.arrays import read_states, read_token_ids, write_arrays
from cluster.local_layer import LocalLayer
from cluster.reference import load_reference
from cluster.verify import TOKEN_COUNTS, LayerError, packed_dtype, tolerance_of, verify_layers
from experts.packed import WeightDtype
from protos.checkpoint import Checkpoint
from protos.errors import DeadlineExceeded, InvalidRequest, Unavailable
from protos.model import ModelSpec
from protos.router_pb2 import DescribeResponse
from router.client import RouterClient, as_tensors
from router.gate import Routing
from router.ledger import LedgerTotals

LOCAL_BLOCK_TOKENS = 8192  # tokens computed at once in this process


async def run_layer(
    spec: ModelSpec, layer: str, *, input_path: Path, output_path: Path, router: str | None
) -> dict[str, Any]:
    """Run one MoE layer on the hidden states of a file; writes output, expert_ids and gate_weights.

    Args:
        router: "host:port", or None for this process.

    Raises:
        InvalidRequest: the layer, the file or its contents; or the router serves another model.
        ExpertmeshError: what the router answered.
    """
    if layer not in spec.layers:
        raise InvalidRequest(f"layer {layer!r} is not a MoE layer of this model ({', '.join(spec.layers)})")
    x_TD = read_states(input_path, "hidden_states", dim=spec.dim)
    ids_T = read_token_ids(input_path, len(x_TD)) if spec.blocks[layer].gate.needs_token_ids else None

    def ids_of(begin: int, count: int) -> npt.NDArray[np.int64] | None:
        return None if ids_T is None else ids_T[begin : begin + count]

    began_s = time.monotonic()
    totals = LedgerTotals()
    parts: list[tuple[Tensor, Routing]] = []
    if router is None:
        local = LocalLayer(spec, layer)
        block_tokens = _block_tokens(spec, layer, len(x_TD), LOCAL_BLOCK_TOKENS)
        for first in range(0, len(x_TD), block_tokens):
            x_BD = x_TD[first : first + block_tokens]
            parts.append(local(x_BD, token_ids_T=ids_of(first, len(x_BD))))
    else:
        async with RouterClient(router) as client:
            model = await _describe(client, spec)
            block_tokens = _block_tokens(spec, layer, len(x_TD), model.max_request_tokens)
            for first in range(0, len(x_TD), block_tokens):
                x_BD = x_TD[first : first + block_tokens]
                ids_B = ids_of(first, len(x_BD))
                answer = await client.forward(layer, x_BD, token_ids_T=ids_B, return_routing=True)
                assert answer.routing is not None, "it was asked for"
                totals.add(answer.ledger, num_tokens=len(x_BD))
                parts.append((answer.y_TD, answer.routing))
    seconds = time.monotonic() - began_s
    expert_TK, weight_TK = as_tensors(
        Routing(
            expert_TK=np.concatenate([routing.expert_TK for _, routing in parts]),
            weight_TK=np.concatenate([routing.weight_TK for _, routing in parts]),
        )
    )
    output_TD = torch.cat([y_BD for y_BD, _ in parts])
    write_arrays(output_path, {"output": output_TD, "expert_ids": expert_TK, "gate_weights": weight_TK})
    return {
        "model": str(spec.path),
        "layer": layer,
        "router": router,
        "output": str(output_path),
        "tokens": len(x_TD),
        "dtype": str(x_TD.dtype).removeprefix("torch."),
        "top_k": expert_TK.shape[1],
        "seconds": seconds,
        "ledger": asdict(totals) if router is not None else None,
    }


def _block_tokens(spec: ModelSpec, layer: str, num_tokens: int, limit: int) -> int:
    """Tokens to run at once. A layer with a capacity of its own sees all of them together, or none."""
    if spec.blocks[layer].gate.capacity is not None and num_tokens > limit:
        raise InvalidRequest(
            f"hidden_states has {num_tokens} tokens, limit is {limit}: the experts of layer {layer} have a capacity, "
            "so that tokens cannot be split into requests"
        )
    return limit


async def run_verify(
    spec: ModelSpec,
    *,
    router: str | None,
    weight_dtype: WeightDtype | None = None,
    on_layer: Callable[[LayerError, float], None],
) -> dict[str, Any]:
    """Compare every MoE layer with transformers; `ok` says whether all are within tolerance.

    Args:
        router: "host:port", or None for this process.
        weight_dtype: the experts are packed in it; sets the tolerance. A router says so itself.
        on_layer: called with each layer's result and the tolerance.

    Raises:
        UnsupportedModel: transformers cannot load the model.
        InvalidRequest: the router serves another model.
        ExpertmeshError: what the router answered.
    """
    if router is None:
        tolerance = tolerance_of(spec, weight_dtype)
        reference, checkpoint = load_reference(spec), Checkpoint(spec)
        local: dict[str, LocalLayer] = {}  # of the layer at hand

        async def compute(layer: str, x_TD: Tensor, token_ids_T: npt.NDArray[np.int64]) -> Tensor:
            if layer not in local:
                local.clear()
                local[layer] = LocalLayer(spec, layer, weight_dtype=weight_dtype, checkpoint=checkpoint)
            return local[layer](x_TD, token_ids_T=token_ids_T)[0]

        errors = await verify_layers(
            spec, reference, compute, on_layer=lambda error: on_layer(error, tolerance), checkpoint=checkpoint
        )
    else:
        async with RouterClient(router) as client:
            model = await _describe(client, spec)
            limit, weight_dtype = model.max_request_tokens, packed_dtype(model.weight_dtype) or weight_dtype
            tolerance = tolerance_of(spec, weight_dtype)
            for layer in spec.layers:
                _block_tokens(spec, layer, max(TOKEN_COUNTS), limit)  # what may not be split has to fit
            reference = load_reference(spec)

            async def compute(layer: str, x_TD: Tensor, token_ids_T: npt.NDArray[np.int64]) -> Tensor:
                parts = []
                for first in range(0, len(x_TD), limit):
                    rows = slice(first, first + limit)
                    parts.append((await client.forward(layer, x_TD[rows], token_ids_T=token_ids_T[rows])).y_TD)
                return torch.cat(parts)

            errors = await verify_layers(spec, reference, compute, on_layer=lambda error: on_layer(error, tolerance))
    return {
        "model": str(spec.path),
        "family": spec.family,
        "dtype": spec.dtype,
        "quantisation": spec.quantisation or None,
        "weight_dtype": weight_dtype,
        "router": router,
        "tolerance": tolerance,
        "layers": [asdict(error) for error in errors],
        "largest_error": max(error.error for error in errors),
        "largest_rms_error": max(error.rms_error for error in errors),
        "ok": all(error.error <= tolerance for error in errors),
    }


async def reach(client: RouterClient) -> DescribeResponse:
    """The model behind a router.

    Raises:
        Unavailable: nothing answers at its address.
    """
    try:
        return await client.describe()
    except (Unavailable, DeadlineExceeded) as err:
        raise Unavailable(f"router {client.address} cannot be reached: {err.message}") from err


async def _describe(client: RouterClient, spec: ModelSpec) -> DescribeResponse:
    """The served model, if it is `spec` as far as shapes tell."""
    model = await reach(client)
    for field, ours, theirs in (
        ("family", spec.family, model.family),
        ("dim", spec.dim, model.dim),
        ("num_experts", spec.num_experts, model.num_experts),
        ("top_k", spec.top_k, model.top_k),
        ("layers", spec.layers, tuple(model.layers)),
    ):
        if ours != theirs:
            raise InvalidRequest(f"router {client.address} serves another model: {field} is {theirs}, not {ours}")
    return model
