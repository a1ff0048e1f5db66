"""One MoE block, resolved: the parts found by name become matrices of known shapes, or one clear error.

Shapes: D model dim, L expert input dim, F expert hidden dim, S shared expert hidden dim, E routed experts, E+ all
choices of the gate, V vocabulary, K top-k.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from protos.configfile import Config
from protos.errors import CorruptWeights, UnsupportedModel
from protos.model import BlockSpec
from protos.parts import EXPERT_PARTS, FoundParts
from protos.quantised import Quantisation, WeightFormat
from protos.weightfiles import DTYPES, Extent

_PLAIN_ENDINGS = {"weight": ("", ".weight", "_weight"), "bias": (".bias",)}  # of names, by piece


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """One [rows, columns] matrix (out, in) as it is stored: plain, or in the pieces of a quantised format."""

    pieces: Mapping[str, Extent]
    rows: int
    columns: int
    transposed: bool = False  # stored as [columns, rows]
    format: WeightFormat | None = None

    @property
    def name(self) -> str:
        return next(iter(self.pieces.values())).name

    @property
    def plain_name(self) -> str:
        """What the matrix would be called if it were not quantised; ends in "[e]" where it is one of a stack."""
        name, is_item, index = self.name.partition("[")
        for piece in self.format.pieces if self.format is not None else ():
            for endings, plain in ((piece.linear, ".weight"), (piece.stacked, "")):
                for ending in sorted(endings, key=len, reverse=True):
                    if ending and name.endswith(ending):
                        return name.removesuffix(ending) + plain + is_item + index
        return self.name

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.pieces.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMlp:
    """The projections of one expert: `ups` is [gate, up], [up], or one fused [gate; up] of 2F rows.

    `interleaved`: the rows of the fused matrix (and its bias) alternate gate, up. Biases match `ups` one to one.
    """

    ups: tuple[StoredMatrix, ...]
    down: StoredMatrix
    up_biases: tuple[Extent, ...] = ()
    down_bias: Extent | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Where one MoE block's tensors lie. `others`: the parts that are single tensors, by name of the part."""

    spec: BlockSpec
    experts: tuple[StoredMlp, ...]
    shared: StoredMlp | None
    latent: tuple[StoredMatrix, StoredMatrix] | None
    others: Mapping[str, Extent]


class BlockResolver:
    """Checks one layer's parts against the config and lays them out as a `Block`."""

    def __init__(
        self, layer: str, found: FoundParts, spec: BlockSpec, config: Config, quantisation: Quantisation | None
    ) -> None:
        self._layer, self._found, self._spec, self._quantisation = layer, found, spec, quantisation
        self._interleaved = config.row.interleaved
        self._names: dict[tuple[object, ...], Mapping[str, str]] = {}
        gate = spec.gate
        self._sizes = {
            "E": gate.num_experts,
            "E+": gate.num_choices,
            "K": gate.top_k,
            "D": config.dim,
            "L": spec.latent_dim or config.dim,
            "F": config.hidden_dim,
            "S": spec.shared.hidden_dim if spec.shared else 0,
            "1": 1,
        }

    def block(self) -> Block:
        spec, gate = self._spec, self._spec.gate
        experts = self._experts()
        others = {"router": self._single("router", "E+", "D")}
        for part, wanted, sizes in (
            ("router bias", gate.logit_bias, ("E+",)),
            ("selection bias", gate.selection_bias, ("E+",)),
            ("token table", gate.needs_token_ids, ("V", "K")),
            ("router input scale", gate.input_norm_eps is not None, ("D",)),
            ("expert scale", gate.per_expert_scale, ("E",)),
            ("shared output gate", spec.shared is not None and spec.shared.gated, ("1", "D")),
            ("output bias", spec.output_bias, ("D",)),
            ("output norm", spec.output_norm_eps is not None, ("D",)),
        ):
            if wanted:
                others[part] = self._single(part, *sizes)
            elif self._found.has(part) and part != "output norm":  # which may be the decoder layer's own
                raise self._not_described(part)
        shared = self._shared()
        latent = None
        if spec.latent_dim is not None:
            latent = (self._matrix("latent in", "L", "D"), self._matrix("latent out", "D", "L"))
        elif self._found.has("latent in"):
            raise self._not_described("latent in")
        blocks = {name for name, kinds in self._found.blocks.items() if "sparse" in kinds}
        for name, extent in self._found.unknown:
            if name in blocks or not name:
                raise UnsupportedModel(f"{extent.file.path}: tensor {extent.name} has no place in the known layouts")
        return Block(spec=spec, experts=experts, shared=shared, latent=latent, others=others)

    def _not_described(self, part: str) -> UnsupportedModel:
        extent = self._found.first(part)
        return UnsupportedModel(
            f"{extent.file.path}: tensor {extent.name}: config.json describes a model without {part}"
        )

    # ------------------------------------------------------------------ experts

    def _experts(self) -> tuple[StoredMlp, ...]:
        kinds = [
            kind
            for kind, parts in {
                "per-expert": ("expert gate", "expert up", "expert down"),
                "stacked": (
                    "stacked gate and up",
                    "interleaved gate and up",
                    "stacked gate",
                    "stacked up",
                    "stacked down",
                ),
                "flat": ("flat gate", "flat up", "flat down"),
            }.items()
            if any(map(self._found.has, parts))
        ]
        if len(kinds) > 1:
            raise UnsupportedModel(f"layer {self._layer} has {' and '.join(reversed(kinds))} tensors")
        if kinds == ["flat"]:
            return self._flat()
        return self._per_expert() if kinds == ["per-expert"] else self._stacked()

    @property
    def _up_parts(self) -> tuple[str, ...]:
        return ("gate", "up") if self._spec.form.gated else ("up",)

    def _per_expert(self) -> tuple[StoredMlp, ...]:
        parts = [f"expert {part}" for part in (*self._up_parts, "down")]
        if not self._spec.form.gated and self._found.has("expert gate"):
            raise self._not_described("expert gate")
        experts = {part: set().union(*self._found.parts.get(part, {}).values()) for part in parts}
        found = set().union(*experts.values())
        num_experts = self._sizes["E"]
        # every expert complete, only another number of them: the config and the weights are of different models
        complete = all(experts[part] == found for part in parts)
        if max(found) >= num_experts or (complete and found == set(range(len(found))) and len(found) < num_experts):
            raise UnsupportedModel(
                f"config.json says {num_experts} experts, but layer {self._layer} has experts 0 to {max(found)}"
            )
        biased = self._spec.form.biases
        return tuple(
            StoredMlp(
                ups=tuple(self._matrix(f"expert {part}", "F", "L", expert) for part in self._up_parts),
                down=self._matrix("expert down", "L", "F", expert),
                up_biases=tuple(self._bias(f"expert {part}", ("F",), expert) for part in self._up_parts)
                if biased
                else (),
                down_bias=self._bias("expert down", ("L",), expert) if biased else None,
            )
            for expert in range(num_experts)
        )

    def _stacked(self) -> tuple[StoredMlp, ...]:
        fused = next((p for p in ("interleaved gate and up", "stacked gate and up") if self._found.has(p)), None)
        if fused and not self._spec.form.gated:
            raise self._not_described(fused)
        parts = [fused] if fused else [f"stacked {part}" for part in self._up_parts]
        rows = "2F" if fused else "F"
        transposed = self._is_transposed(parts[0], rows)
        biased = self._spec.form.biases
        interleaved = fused == "interleaved gate and up" or (fused is not None and self._interleaved)
        return tuple(
            StoredMlp(
                ups=tuple(self._slice(part, rows, "L", expert, transposed) for part in parts),
                down=self._slice("stacked down", "L", "F", expert, transposed),
                up_biases=tuple(self._bias(part, ("E", rows)).item(expert) for part in parts) if biased else (),
                down_bias=self._bias("stacked down", ("E", "L")).item(expert) if biased else None,
                interleaved=interleaved,
            )
            for expert in range(self._sizes["E"])
        )

    def _is_transposed(self, up: str, rows: str) -> bool:
        """Whether stacks are (E, in, out). The down projection tells, unless L = F, and then the other one does.

        With L = F and gate and up apart no shape tells: such stacks are (E, out, in), as in every family that has them.
        """
        for part, straight in (("stacked down", ("L", "F")), (up, (rows, "L"))):
            extent = self._found.piece(part, "weight").get(0)
            sizes = tuple(self._size(size) for size in straight)
            if extent is not None and sizes[0] != sizes[1]:
                return extent.shape[1:] == sizes[::-1]
        return False

    def _flat(self) -> tuple[StoredMlp, ...]:
        num_experts, hidden = self._sizes["E"], self._sizes["F"]
        stacks = {part: self._single(f"flat {part}", "E*F", "L") for part in ("gate", "up", "down")}

        def matrix(part: str, expert: int, *, transposed: bool) -> StoredMatrix:
            rows, columns = hidden, self._sizes["L"]
            piece = stacks[part].rows(expert * hidden, (expert + 1) * hidden)
            if transposed:
                return StoredMatrix(pieces={"weight": piece}, rows=columns, columns=rows, transposed=True)
            return StoredMatrix(pieces={"weight": piece}, rows=rows, columns=columns)

        return tuple(
            StoredMlp(
                ups=(matrix("gate", expert, transposed=False), matrix("up", expert, transposed=False)),
                down=matrix("down", expert, transposed=True),  # x @ w2[e], so [F, L]
            )
            for expert in range(num_experts)
        )

    def _shared(self) -> StoredMlp | None:
        spec = self._spec.shared
        for part in ("shared gate", "shared up", "shared down", "shared gate and up"):
            if spec is None and self._found.has(part):
                raise self._not_described(part)
        if spec is None:
            return None
        if self._found.has("shared gate and up"):
            ups: tuple[StoredMatrix, ...] = (self._matrix("shared gate and up", "2S", "D"),)
        else:
            names = ("gate", "up") if spec.form.gated else ("up",)
            ups = tuple(self._matrix(f"shared {name}", "S", "D") for name in names)
        return StoredMlp(ups=ups, down=self._matrix("shared down", "D", "S"))

    # ------------------------------------------------------------------ tensors

    def _size(self, size: str) -> int:
        if size == "E*F":
            return self._sizes["E"] * self._sizes["F"]
        return 2 * self._sizes[size[1:]] if size.startswith("2") else self._sizes[size]

    def _matrix(self, part: str, rows: str, columns: str, expert: int = 0) -> StoredMatrix:
        """A matrix with tensors of its own."""
        pieces = self._pieces(part, expert)
        if self._is_plain(pieces):
            extent = self._checked(part, pieces["weight"], (rows, columns))
            return StoredMatrix(pieces={"weight": extent}, rows=self._size(rows), columns=self._size(columns))
        ending, extent = next(iter(pieces.items()))
        module = extent.name.removesuffix(".weight" if ending == "weight" else ending)
        return self._packed(module, pieces, rows, columns)

    def _slice(self, part: str, rows: str, columns: str, expert: int, transposed: bool) -> StoredMatrix:
        """One expert's matrix of a stacked tensor."""
        pieces = self._pieces(part, 0)
        sizes = (self._size(rows), self._size(columns))
        for extent in pieces.values():
            if extent.shape[:1] not in ((self._sizes["E"],), (self._sizes["E+"],)):
                raise UnsupportedModel(
                    f"{extent.file.path}: tensor {extent.name} has shape {extent.shape}, expected "
                    f"{(self._sizes['E'], *sizes)} (E, {rows}, {columns} of config.json)"
                )
        if self._is_plain(pieces):
            shape = ("E", columns, rows) if transposed else ("E", rows, columns)
            whole = pieces["weight"]
            if whole.shape[0] == self._sizes["E"]:
                self._checked(part, whole, shape)
            else:
                self._checked(part, whole, ("E+", *shape[1:]))
            return StoredMatrix(
                pieces={"weight": whole.item(expert)}, rows=sizes[0], columns=sizes[1], transposed=transposed
            )
        module = next(iter(pieces.values())).name.rpartition(".")[0].removesuffix(".gate_up_proj")
        return self._packed(module, {ending: extent.item(expert) for ending, extent in pieces.items()}, rows, columns)

    def _packed(self, module: str, found: Mapping[str, Extent], rows: str, columns: str) -> StoredMatrix:
        """A matrix in the pieces of a quantised format; `found` maps the endings of their names to them."""
        first = next(iter(found.values()))
        if self._quantisation is None:
            raise UnsupportedModel(
                f"{first.file.path}: tensor {first.name} has dtype {first.dtype}, "
                "but config.json has no quantization_config"
            )
        weight_format = self._quantisation.format_of(module)
        if weight_format is None:
            raise UnsupportedModel(
                f"{first.file.path}: tensor {first.name} has dtype {first.dtype}, but quantization_config leaves "
                f"{module} out"
            )
        described = tuple((ending, extent.dtype, extent.shape) for ending, extent in found.items())
        known = (weight_format, rows, columns, described)
        if known not in self._names:  # experts are alike, and there are tens of thousands
            self._names[known] = self._piece_names(weight_format, found, rows, columns)
        pieces = {name: found[ending] for ending, name in self._names[known].items()}
        return StoredMatrix(pieces=pieces, rows=self._size(rows), columns=self._size(columns), format=weight_format)

    def _piece_names(
        self, weight_format: WeightFormat, found: Mapping[str, Extent], rows: str, columns: str
    ) -> Mapping[str, str]:
        """What `weight_format` calls the tensors that are its pieces, by ending; without the unused ones."""
        pieces: dict[str, str] = {}
        for ending, extent in found.items():
            endings = _PLAIN_ENDINGS.get(ending, (ending,))
            piece = next((p for p in weight_format.pieces if {*endings} & {*p.linear, *p.stacked}), None)
            if piece is None:
                raise UnsupportedModel(f"{extent.file.path}: tensor {extent.name} is no part of {weight_format.words}")
            if piece.use != "unused":
                pieces[ending] = piece.name
        if len(set(pieces.values())) < len(pieces):
            names = " and ".join(extent.name for ending, extent in found.items() if ending in pieces)
            raise UnsupportedModel(f"{extent.file.path}: tensors {names} play the same part in {weight_format.words}")
        described = {name: (found[ending].dtype, found[ending].shape) for ending, name in pieces.items()}
        wrong = weight_format.check(described, self._size(rows), self._size(columns))
        if wrong is not None:
            first = next(iter(found.values()))
            raise CorruptWeights(f"{first.file.path}: tensor {first.name}: {wrong}")
        return pieces

    def _pieces(self, part: str, expert: int) -> dict[str, Extent]:
        experts = self._found.parts.get(part, {})
        # "weight" first: the name by which messages call the matrix
        names = sorted((piece for piece in experts if piece != "bias"), key=lambda piece: piece != "weight")
        pieces = {piece: experts[piece][expert] for piece in names if expert in experts[piece]}
        bias = self._found.piece(part, "bias").get(expert)
        if pieces and bias is not None and not (self._spec.form.biases and part.startswith(EXPERT_PARTS)):
            pieces["bias"] = bias  # some formats know one that is zero
        if not pieces:
            which = f"{part} of expert {expert}" if part.startswith("expert ") else part
            raise CorruptWeights(f"layer {self._layer}: the tensor for {which} is missing")
        return pieces

    def _is_plain(self, pieces: Mapping[str, Extent]) -> bool:
        plain = "weight" in pieces and pieces["weight"].dtype in DTYPES
        if plain and "bias" in pieces:
            extent = pieces["bias"]
            raise UnsupportedModel(
                f"{extent.file.path}: tensor {extent.name}: config.json describes experts without biases"
            )
        return plain and len(pieces) == 1

    def _bias(self, part: str, sizes: tuple[str, ...], expert: int = 0) -> Extent:
        extent = self._found.piece(part, "bias").get(expert)
        if extent is None:
            raise CorruptWeights(f"layer {self._layer}: the bias for {part} of expert {expert} is missing")
        return self._checked(f"{part} bias", extent, sizes)

    def _single(self, part: str, *sizes: str) -> Extent:
        extent = self._found.piece(part, "weight").get(0)
        if extent is None:
            raise CorruptWeights(f"layer {self._layer}: the tensor for {part} is missing")
        return self._checked(part, extent, sizes)

    def _checked(self, part: str, extent: Extent, sizes: tuple[str, ...]) -> Extent:
        expected = tuple(extent.shape[i] if size == "V" else self._size(size) for i, size in enumerate(sizes))
        shape = extent.shape
        if part == "selection bias" and shape[:1] == (1,):
            shape = shape[1:]  # Ernie stores (1, E)
        if extent.dtype not in DTYPES and part != "token table":
            raise UnsupportedModel(
                f"{extent.file.path}: tensor {extent.name} has dtype {extent.dtype} (supported: {', '.join(DTYPES)})"
            )
        if len(shape) != len(sizes) or shape != expected:
            differs_in_experts = sizes[0] in ("E", "E+") and len(shape) == len(expected) and shape[0] != expected[0]
            kind = UnsupportedModel if differs_in_experts else CorruptWeights
            raise kind(
                f"{extent.file.path}: tensor {extent.name} has shape {extent.shape}, expected {expected} "
                f"({', '.join(sizes)} of config.json)"
            )
        return extent
