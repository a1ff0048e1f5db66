"""The expert copies one server holds: a byte budget, loads that read only those experts, an atomic swap.

Shapes: D model dim, F expert hidden dim.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protos.checkpoint import Checkpoint
from protos.errors import Overloaded, StalePlacement
from protos.model import ModelSpec

CopyKey = tuple[str, int]  # (layer, expert)


@dataclass(slots=True, kw_only=True, eq=False)
class ExpertCopy:
    """One loaded expert. w13_2FD stacks the gate and up projections, so that one GEMM computes both."""

    w13_2FD: Tensor
    w2_DF: Tensor
    tokens: int = 0  # routed pairs computed since it was loaded


@dataclass(slots=True)
class ExpertShard:
    """All copies of one server. Readers take `held`, an immutable mapping; loads and unloads replace it whole.

    A queued call keeps the copies it will use, so an unload never takes weights away from work that was accepted:
    their memory is freed when the last such call is done.
    """

    spec: ModelSpec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    budget_bytes: int
    held: Mapping[CopyKey, ExpertCopy] = field(default_factory=dict)
    _loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def copy_bytes(self) -> int:
        """Memory of one copy in the compute dtype."""
        return self.spec.expert_params * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return len(self.held) * self.copy_bytes

    def load(self, keys: Iterable[CopyKey]) -> None:
        """Read copies from the checkpoint and make them available. Copies already held are kept as they are.

        Each copy becomes visible as soon as it is read, so a long load serves its first experts early.

        Raises:
            Overloaded: the copies would exceed budget_bytes; nothing is loaded.
            CorruptWeights: the checkpoint's tensors are missing, truncated or not finite; copies read before stay.
        """
        with self._loading:
            wanted = sorted(set(keys) - self.held.keys())
            needed = (len(self.held) + len(wanted)) * self.copy_bytes
            if needed > self.budget_bytes:
                raise Overloaded(
                    f"{len(wanted)} more copies need {needed} bytes in all, above budget_bytes ({self.budget_bytes})"
                )
            for key in wanted:
                copy = self._read(*key)
                self.held = {**self.held, key: copy}

    def unload(self, keys: Iterable[CopyKey]) -> None:
        """Forget copies; work already accepted for them still completes."""
        with self._loading:
            gone = set(keys)
            self.held = {key: copy for key, copy in self.held.items() if key not in gone}

    def find(self, layer: str, experts: Iterable[int]) -> dict[int, ExpertCopy]:
        """The copies of some experts of a layer.

        Raises:
            StalePlacement: one of them is not held here.
        """
        held = self.held
        found = {}
        for expert in experts:
            copy = held.get((layer, expert))
            if copy is None:
                raise StalePlacement(f"expert {expert} of layer {layer} is not held by this server")
            found[expert] = copy
        return found

    def _read(self, layer: str, expert: int) -> ExpertCopy:
        weights = self.checkpoint.expert(layer, expert)
        w13_2FD = torch.cat((weights.gate_FD, weights.up_FD))
        return ExpertCopy(
            w13_2FD=w13_2FD.to(self.device, self.dtype), w2_DF=weights.down_DF.to(self.device, self.dtype).contiguous()
        )
