"""What `describe` says of a model: its layers, gate, experts, bytes, and what a cluster of N servers would hold.

Nothing is measured or guessed: options are those of `read_model`, stored bytes are those of the tensors that would be
read, bytes in memory those that servers budget with (`bytes_per_copy`), and who holds what is the planner's own plan.
No weight is read.

Shapes: D model dim, L expert input dim, F expert hidden dim, E routed experts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from cluster.planner import PlannerInput, PlannerServer, plan
from cluster.words import block_words, layer_ranges
from experts.packed import WeightDtype
from experts.weights import bytes_per_copy
from protos.checkpoint import read_model
from protos.errors import InvalidRequest
from protos.model import BlockSpec, ModelSpec
from protos.stored import StoredLayer, read_stored

KeptAs = Literal["compute", "int8", "int4", "fp8"]  # experts.settings.weight_dtype
ComputeDtype = Literal["float32", "bfloat16"]

SERVER_COUNTS = (1, 2, 4, 8, 16, 32)
MAX_SERVERS = 4096  # beyond so many a plan takes minutes


def describe_model(
    path: Path,
    *,
    servers: Sequence[int] = SERVER_COUNTS,
    budget_bytes: int | None = None,
    weight_dtype: KeptAs = "compute",
    compute_dtype: ComputeDtype | None = None,
) -> dict[str, Any]:
    """Everything there is to say about the model in `path`, as one JSON document.

    Args:
        servers: sizes of the clusters to plan.
        budget_bytes: memory for expert copies on each server; None: as much as one copy of everything needs.
        weight_dtype: how servers keep the weights.
        compute_dtype: what they compute in; None: float32 for a float32 model, else bfloat16.

    Raises:
        InvalidRequest: a number of servers or a budget that cannot be.
        UnsupportedModel: no such directory, or something in it that is not understood.
        CorruptWeights: a weight file is truncated or has a bad header, a tensor is missing or of the wrong shape.
    """
    for num_servers in servers:
        if not 1 <= num_servers <= MAX_SERVERS:
            raise InvalidRequest(f"--servers is {num_servers}, it must be 1..{MAX_SERVERS}")
    if budget_bytes is not None and budget_bytes < 1:
        raise InvalidRequest(f"--budget-bytes is {budget_bytes}, it must be above 0")
    spec = read_model(path)
    stored = read_stored(path)
    return {
        "model": str(spec.path),
        "family": spec.family,
        "files": stored.num_files,
        "files_bytes": stored.num_bytes,
        "dtype": spec.dtype,
        "stored_as": _stored_as(stored.layers),
        "transformer_layers": stored.num_transformer_layers,
        "layers": list(spec.layers),
        "layer_ranges": layer_ranges(spec.layers),
        **_block(spec),
        "stored": _stored(stored.layers),
        "memory": _memory(spec),
        "cluster": _cluster(
            spec,
            servers=servers,
            budget_bytes=budget_bytes,
            weight_dtype=weight_dtype,
            compute_dtype=compute_dtype or ("float32" if spec.dtype == "float32" else "bfloat16"),
        ),
    }


def _block(spec: ModelSpec) -> dict[str, Any]:
    """The block most layers have, in numbers and words, and what the others have otherwise."""
    counted: Counter[BlockSpec] = Counter(spec.blocks.values())
    usual = max(counted, key=lambda block: counted[block])
    gate, words = usual.gate, block_words(usual)
    others = []
    for block in counted:
        if block != usual:
            layers = [layer for layer, its in spec.blocks.items() if its == block]
            others.append(
                {"layers": layers, "ranges": layer_ranges(layers), "words": list(block_words(block).differing(words))}
            )
    return {
        "experts": gate.num_experts,
        "identity_experts": gate.num_identity,
        "top_k": gate.top_k,
        "needs_token_ids": any(block.gate.needs_token_ids for block in counted),
        "dims": {
            "model": spec.dim,
            "expert_input": spec.expert_dim,
            "expert_hidden": spec.hidden_dim,
            "shared_hidden": usual.shared.hidden_dim if usual.shared else None,
            "latent": usual.latent_dim,
        },
        "gate": words.gate,
        "expert": words.expert,
        "shared": words.shared or None,
        "around": words.around or None,
        "differing_layers": others,
        "expert_params": spec.expert_params,
        "routed_params": spec.expert_params * gate.num_experts * len(spec.blocks),
    }


# ---------------------------------------------------------------- bytes


def _stored(layers: Mapping[str, StoredLayer]) -> dict[str, Any]:
    """Bytes of the tensors that servers and routers read."""
    sizes = [size for layer in layers.values() for size in layer.expert_bytes]
    return {
        "expert_bytes": {"smallest": min(sizes), "largest": max(sizes)},
        "bytes": sum(sizes),
        "router_bytes": sum(layer.router_bytes for layer in layers.values()),
        "layers": [
            {"layer": name, "experts_bytes": sum(layer.expert_bytes), "router_bytes": layer.router_bytes}
            for name, layer in layers.items()
        ],
    }


def _stored_as(layers: Mapping[str, StoredLayer]) -> str:
    """How the routed experts are stored; where layers differ, with their ranges."""
    names: dict[str, list[str]] = {}
    for name, layer in layers.items():
        names.setdefault(layer.stored_as, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"layers {layer_ranges(where)}: {kind}" for kind, where in names.items())


def _memory(spec: ModelSpec) -> list[dict[str, Any]]:
    """One copy of every expert in the memory of servers, for everything that they can be set to."""
    rows = []
    for weight_dtype in get_args(KeptAs):
        for compute_dtype in get_args(ComputeDtype):
            copy = _copy_bytes(spec, weight_dtype, compute_dtype)
            layer = copy * spec.num_experts
            rows.append(
                {
                    "weight_dtype": weight_dtype,
                    "compute_dtype": compute_dtype,
                    "expert_bytes": copy,
                    "layer_bytes": layer,
                    "bytes": layer * len(spec.layers),
                }
            )
    return rows


def _copy_bytes(spec: ModelSpec, weight_dtype: KeptAs, compute_dtype: ComputeDtype) -> int:
    packed: WeightDtype | None = None if weight_dtype == "compute" else weight_dtype
    return bytes_per_copy(spec, getattr(torch, compute_dtype), packed)


# ---------------------------------------------------------------- clusters


def _cluster(
    spec: ModelSpec,
    *,
    servers: Sequence[int],
    budget_bytes: int | None,
    weight_dtype: KeptAs,
    compute_dtype: ComputeDtype,
) -> dict[str, Any]:
    copy = _copy_bytes(spec, weight_dtype, compute_dtype)
    experts = spec.num_experts * len(spec.layers)
    fits = None if budget_bytes is None else budget_bytes // copy  # as a server registers: cluster/expert_replica.py
    return {
        "weight_dtype": weight_dtype,
        "compute_dtype": compute_dtype,
        "expert_bytes": copy,
        "experts": experts,
        "bytes": experts * copy,
        "budget_bytes": budget_bytes,
        "copies_per_server": fits,
        "servers_needed": -(-experts // fits) if fits else None,
        "sizes": [_size(spec, num_servers, copy, fits) for num_servers in servers],
    }


def _size(spec: ModelSpec, num_servers: int, copy_bytes: int, fits: int | None) -> dict[str, Any]:
    """A cluster of `num_servers` without load: one copy of every expert, where the planner puts it."""
    experts = spec.num_experts * len(spec.layers)
    held = held_experts(spec, num_servers, experts if fits is None else fits)
    missing = experts - sum(held)
    return {
        "servers": num_servers,
        "experts_per_server": {"smallest": min(held), "largest": max(held)},
        "bytes_per_server": max(held) * copy_bytes,
        "missing_experts": missing,
        "spare_copies": None if fits is None else num_servers * fits - sum(held),
    }


def held_experts(spec: ModelSpec, num_servers: int, max_copies: int) -> list[int]:
    """How many experts each server holds once the planner has placed one copy of each, before there is any load.

    Args:
        max_copies: what fits on each server.
    """
    if num_servers * max_copies < spec.num_experts * len(spec.layers):
        return [max_copies] * num_servers  # the planner fills them, and reports the rest as missing
    found = plan(
        PlannerInput(
            layers=spec.layers,
            load_LE=np.zeros((len(spec.layers), spec.num_experts)),
            servers=tuple(PlannerServer(server_id=str(s), max_copies=max_copies) for s in range(num_servers)),
            current={},
        )
    )
    held = Counter(copy.server_id for copies in found.copies.values() for copy in copies)
    return [held[str(s)] for s in range(num_servers)]
