"""Hypothesis strategies for the pure core: routings with their gate, placements, overflow policies.

Shapes: T tokens, K experts per token, E experts, S servers, C copies.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from hypothesis import strategies as st

from protos.checkpoint import GateWeights
from protos.model import GateSpec
from router.config import Keep, OverflowConfig, Step, UnavailableStep
from router.gate import Gate, Routing
from router.table import CopyShare, LayerPlacement, PlacementTable, ServerAddress

torch.set_num_threads(1)  # tensors of a few elements: more threads only wait for each other


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """A batch that a gate has routed, with its scores."""

    gate: Gate
    routing: Routing
    num_experts: int

    @property
    def num_tokens(self) -> int:
        return len(self.routing.expert_TK)

    @property
    def top_k(self) -> int:
        return self.routing.top_k


@st.composite
def routed(draw: st.DrawFn, *, max_tokens: int = 24, max_experts: int = 9) -> Routed:
    """A batch routed by a random gate, skewed towards some experts, with ties (quantised inputs)."""
    num_experts = draw(st.integers(2, max_experts))
    top_k = draw(st.integers(1, min(4, num_experts)))
    spec = GateSpec(
        num_experts=num_experts,
        top_k=top_k,
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        selection_bias=draw(st.booleans()),
        renorm=draw(st.sampled_from(["none", "sum"])),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    skew_E = torch.linspace(0, draw(st.sampled_from([0.0, 3.0])), num_experts)
    weight_ED = torch.randint(-2, 3, (num_experts, 4), generator=generator) / 4
    weight_ED[:, 0] = skew_E
    x_TD = torch.randint(-2, 3, (draw(st.integers(1, max_tokens)), 4), generator=generator) / 2
    x_TD[:, 0] = 1.0
    bias_E = torch.randint(-2, 3, (num_experts,), generator=generator) / 8 if spec.selection_bias else None
    gate = Gate(spec, GateWeights(weight_ED=weight_ED, bias_E=bias_E))
    return Routed(gate=gate, routing=gate(x_TD, with_scores=True), num_experts=num_experts)


@st.composite
def tables(
    draw: st.DrawFn, num_experts: int, *, min_copies: int = 0, max_copies: int = 3, max_servers: int = 5
) -> PlacementTable:
    """A table of layer "0" in which every expert has between min_copies and max_copies live copies."""
    num_servers = draw(st.integers(max(1, min_copies), max_servers))
    names = [f"s{i}" for i in range(num_servers)]
    # Drawn by seed, not entry by entry: ten times faster, and there is little to shrink in a placement.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = min(max_copies, num_servers)
    copies = {
        ("0", expert): tuple(
            CopyShare(server_id=names[server], share=float(rng.choice([0.1, 0.5, 1.0])))
            for server in rng.permutation(num_servers)[: rng.integers(min_copies, most + 1)]
        )
        for expert in range(num_experts)
    }
    servers = tuple(ServerAddress(server_id=name, address=f"{name}:1") for name in names)
    return PlacementTable(epoch=1, servers=servers, copies=copies, num_experts=num_experts)


def placements(num_experts: int, *, min_copies: int = 0, max_copies: int = 3) -> st.SearchStrategy[LayerPlacement]:
    """The arrays of one layer (at most 5 servers)."""
    return tables(num_experts, min_copies=min_copies, max_copies=max_copies).map(lambda table: table.layer("0"))


def _chains(steps: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    """Any valid chain: distinct steps, at most one of drop and fail, and that one last."""
    open_steps = [step for step in steps if step not in ("drop", "fail")]
    heads = st.lists(st.sampled_from(open_steps), unique=True).map(tuple)
    ends = st.sampled_from([(), ("drop",), ("fail",)])
    return st.tuples(heads, ends).map(lambda pair: (*pair[0], *pair[1])).filter(bool)


def policies(
    *, chain: st.SearchStrategy[tuple[str, ...]] | None = None, dropless: bool = True
) -> st.SearchStrategy[OverflowConfig]:
    """Overflow policies; those with a capacity factor only if not `dropless`."""
    factors = st.sampled_from([0.01, 0.25, 0.5, 1.0, 1.5])
    return st.builds(
        OverflowConfig,
        chain=_chains(get_args(Step)) if chain is None else chain,
        unavailable_chain=_chains(get_args(UnavailableStep)),
        capacity_factor=st.none() | factors if dropless else factors,
        min_capacity=st.integers(1, 4),
        keep=st.sampled_from(get_args(Keep)),
        max_score_gap=st.none() | st.sampled_from([0.0, 0.05, 0.2]),
        renormalize=st.booleans(),
    )


def generators() -> st.SearchStrategy[np.random.Generator]:
    """Seeded numpy generators."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)
