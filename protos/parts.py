"""The tensors of one layer, sorted by the parts that they play in its MoE block."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from protos.errors import UnsupportedModel
from protos.tensornames import Place
from protos.weightfiles import Extent

# beginnings of the names of those parts that are routed experts
EXPERT_PARTS = ("expert gate", "expert up", "expert down", "stacked ", "flat ", "interleaved ")


@dataclass(slots=True)
class FoundParts:
    """The parts of one layer: part -> piece -> expert -> tensor, and names of the same block that have no part."""

    parts: dict[str, dict[str, dict[int, Extent]]] = field(default_factory=dict)
    blocks: dict[str, set[str]] = field(default_factory=dict)  # block as written -> of "sparse", "dense"
    unknown: list[tuple[str, Extent]] = field(default_factory=list)

    def add(self, where: Place, extent: Extent) -> None:
        """Note a tensor.

        Raises:
            UnsupportedModel: another tensor plays the same part.
        """
        block, part, piece, own = where.role
        kinds = self.blocks.setdefault(block, set()) if block else set()
        if part == "dense":
            kinds.add("dense")
            return
        if not part:
            if block or own:
                self.unknown.append((block, extent))
            return
        if part.startswith(EXPERT_PARTS):
            kinds.add("sparse")
        other = self.parts.setdefault(part, {}).setdefault(piece, {}).setdefault(where.expert, extent)
        if other is not extent:
            raise UnsupportedModel(f"{extent.file.path}: tensors {other.name} and {extent.name} play the same part")

    def has(self, part: str) -> bool:
        return part in self.parts

    def first(self, part: str) -> Extent:
        """A tensor of a part that is there."""
        return next(iter(next(iter(self.parts[part].values())).values()))

    def piece(self, part: str, piece: str) -> Mapping[int, Extent]:
        """The tensors of one piece by expert; none if the piece is not there."""
        return self.parts.get(part, {}).get(piece, {})

    @property
    def is_sparse(self) -> bool:
        return any(part.startswith(EXPERT_PARTS) for part in self.parts)
