"""The expert copies one server holds: a byte budget, loads that read only those experts, an atomic swap.

Shapes: D width of the rows, F expert hidden dim, I = 2F rows of gate over up (F without a gate).
"""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from experts.packed import Matrix, WeightDtype, pack, packed_bytes
from protos.checkpoint import Checkpoint
from protos.errors import Overloaded, StalePlacement
from protos.model import ExpertForm, ModelSpec
from protos.pages import paged_tensors

CopyKey = tuple[str, int]  # (layer, expert)
BAR_AFTER_S = 1.0
KeyT = TypeVar("KeyT")


@dataclass(slots=True, kw_only=True, eq=False)
class ExpertCopy:
    """One loaded expert. `up` stacks gate over up projection, so that one GEMM computes both."""

    up: Matrix  # [I, D]
    down: Matrix  # [D, F]
    form: ExpertForm
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    tokens: int = 0  # routed pairs computed since it was loaded
    checksum: int | None = None  # of its bytes, once another server asked for it (experts/copyform.py)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations it computes on."""
        return self.up.dtype

    @property
    def device(self) -> torch.device:
        return self.up.device


def load_expert(
    checkpoint: Checkpoint,
    layer: str,
    expert: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: WeightDtype | None = None,
) -> ExpertCopy:
    """Read one expert.

    Args:
        dtype: of the activations, and of the weights unless they are packed.
        weight_dtype: keep the matrices packed in it; None: plain.

    Raises:
        CorruptWeights: its tensors are missing, truncated or not finite.
    """
    weights = checkpoint.expert(layer, expert)
    bias, last_bias = weights.up_bias_I, weights.down_bias_L

    def keep(weight: Tensor) -> Matrix:
        if weight_dtype is not None:
            return pack(weight.to(device), weight_dtype, dtype=dtype)
        if weight.dtype is dtype:
            return weight.to(device)
        return paged_tensors((tuple(weight.shape), dtype), device=device)[0].copy_(weight)

    return ExpertCopy(
        up=keep(weights.up_IL),
        down=keep(weights.down_LF),
        form=checkpoint.spec.blocks[layer].form,
        up_bias=None if bias is None else bias.to(device, dtype, copy=True),
        down_bias=None if last_bias is None else last_bias.to(device, dtype, copy=True),
    )


def progress(keys: Sequence[KeyT], what: str) -> Iterable[KeyT]:
    """Go through experts to read, with a bar for a person at a terminal once it has taken BAR_AFTER_S."""
    bar: Iterable[KeyT] = tqdm(keys, desc=what, unit="expert", delay=BAR_AFTER_S, leave=False, disable=None)
    return bar


def bytes_per_copy(spec: ModelSpec, dtype: torch.dtype, weight_dtype: WeightDtype | None = None) -> int:
    """Memory of one expert: its matrices, packed or plain, and its biases."""
    block = next(iter(spec.blocks.values()))
    rows = spec.hidden_dim * (2 if block.form.gated else 1)
    matrices = ((rows, spec.expert_dim), (spec.expert_dim, spec.hidden_dim))
    biases = (rows + spec.expert_dim) * dtype.itemsize if block.form.biases else 0
    if weight_dtype is None:
        return sum(math.prod(shape) for shape in matrices) * dtype.itemsize + biases
    return sum(packed_bytes(*shape, weight_dtype) for shape in matrices) + biases


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
    weight_dtype: WeightDtype | None = None
    held: Mapping[CopyKey, ExpertCopy] = field(default_factory=dict)
    _loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def form(self) -> tuple[str, str]:
        """How copies are held, in the words of the settings: (compute_dtype, weight_dtype)."""
        return str(self.dtype).removeprefix("torch."), self.weight_dtype or "compute"

    @property
    def copy_bytes(self) -> int:
        """Memory of one copy."""
        return bytes_per_copy(self.spec, self.dtype, self.weight_dtype)

    @property
    def num_bytes(self) -> int:
        return len(self.held) * self.copy_bytes

    def read(self, key: CopyKey) -> ExpertCopy:
        """One copy from the checkpoint; raises as `load_expert` does."""
        return load_expert(self.checkpoint, *key, device=self.device, dtype=self.dtype, weight_dtype=self.weight_dtype)

    def load(self, keys: Iterable[CopyKey], read: Callable[[CopyKey], ExpertCopy] | None = None) -> None:
        """Read copies and make them available. Copies already held are kept as they are.

        Each copy becomes visible as soon as it is read, so a long load serves its first experts early.

        Args:
            read: where a copy comes from; None: the checkpoint.

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
            for key in progress(wanted, "experts"):
                copy = (read or self.read)(key)
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
