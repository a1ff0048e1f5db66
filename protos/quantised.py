"""Quantised checkpoints: which matrix is stored in which format, and what every such format can say and do.

`Quantisation` is what config.json says of the whole model (`protos/quant_config.py` reads it), a `WeightFormat` how one
matrix of a linear layer is stored: as several tensors, its pieces. The formats are in `protos/quant_floats.py` and
`protos/quant_integers.py`. Everything here is a value: nothing reads a file, everything can be pickled.

What the tensors' names say goes before `is_converted`: quantisers also leave modules alone that their config does not
list (most router gates), but no format stores a quantised and a plain weight of one module.

Shapes: a matrix is [rows, columns] = [out, in], as torch.nn.Linear holds it.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from protos.errors import CorruptWeights

# safetensors codes of the pieces, beyond the dtypes of plain weights
PIECE_DTYPES: dict[str, torch.dtype] = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
PLAIN_FLOATS = ("F32", "BF16", "F16")
_DOT = re.compile(r"\.")
# Elements that a decoder has in its temporaries: measured fastest, and small beside the matrix.
CHUNK_ELEMENTS = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One of the tensors that a matrix is stored as.

    linear: endings that take the place of ".weight" in the name of a linear layer's weight; a checkpoint has one of
        them. They also apply to a stacked tensor whose own name ends in ".weight".
    stacked: endings put after the name of a stacked tensor [experts, ...]; element e is the piece of expert e. None
        where the format does not stack.
    use: an "optional" piece may be absent; an "unused" one may be present and changes no weight (scales of
        activations, which computing with decoded weights does not quantise). It is not given to `check` or `decode`.
    """

    name: str
    linear: tuple[str, ...]
    stacked: tuple[str, ...] = ()
    use: Literal["required", "optional", "unused"] = "required"


@dataclass(frozen=True, slots=True)
class Expected:
    """The dtypes (safetensors codes) and shapes that a piece may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat(ABC):
    """How one matrix is stored."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The format for a person, e.g. "FP8, one scale for 128 x 128 weights"."""

    @property
    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """The tensors of one matrix."""

    @abstractmethod
    def expected(self, rows: int, columns: int) -> Mapping[str, Expected]:
        """What the pieces of a [rows, columns] matrix look like, by piece name."""

    @abstractmethod
    def decode(self, pieces: Mapping[str, Tensor], rows: int, columns: int, *, name: str) -> Tensor:
        """The weights [rows, columns] in float32, exactly as the format defines them.

        Needs one float32 copy of the matrix and small temporaries. Any number of threads may decode at once.

        Args:
            pieces: by piece name; `check` has found nothing wrong with their dtypes and shapes.
            name: what messages call the matrix, with its file.

        Raises:
            CorruptWeights: a scale or a weight is NaN or infinite, or an index points nowhere.
        """

    def check(self, pieces: Mapping[str, tuple[str, tuple[int, ...]]], rows: int, columns: int) -> str | None:
        """A sentence on what is wrong with the pieces of a [rows, columns] matrix, or None.

        Args:
            pieces: (safetensors dtype code, shape) by piece name; of a stacked tensor the shape of one element.
        """
        matrix = f"a {rows} x {columns} matrix in {self.words}"
        expected = self.expected(rows, columns)
        for piece in self.pieces:
            if piece.use == "required" and piece.name not in pieces:
                return f"{matrix} has no {piece.name} ({' or '.join(piece.linear + piece.stacked)})"
        for name, (dtype, shape) in pieces.items():
            if name not in expected:
                return f"{matrix} has no piece called {name} (supported: {', '.join(expected)})"
            if dtype not in expected[name].dtypes:
                return f"{matrix}: its {name} has dtype {dtype} (supported: {', '.join(expected[name].dtypes)})"
            if tuple(shape) not in expected[name].shapes:
                shapes = " or ".join(str(list(shape)) for shape in expected[name].shapes)
                there = f"{matrix}: its {name} has shape {list(shape)}"
                return (
                    f"{there}, expected {shapes}" if shapes else f"{there}, but the format has no matrix of this size"
                )
        return None


@dataclass(frozen=True, slots=True)
class Rule:
    """Some modules, by their full names, are stored in `format`; None: not quantised.

    pattern: an expression that matches from the name's beginning (`re.match`).
    names, beginnings, endings: these names; those that start so, up to a dot or their end; those that end so. They are
        here beside `pattern` because configs list hundreds, and models have tens of thousands of modules.
    """

    format: WeightFormat | None
    pattern: str | None = None
    names: frozenset[str] = frozenset()
    beginnings: frozenset[str] = frozenset()
    endings: tuple[str, ...] = ()

    def matches(self, module: str) -> bool:
        """Whether the rule is about this module."""
        if module in self.names or module in self.beginnings or module.endswith(self.endings):
            return True
        if self.beginnings and any(module[: dot.start()] in self.beginnings for dot in _DOT.finditer(module)):
            return True
        return self.pattern is not None and re.match(self.pattern, module) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """What config.json says of a quantised model: the first rule that matches a module decides, else `default`."""

    method: str  # as config.json names it, e.g. "gptq"
    rules: tuple[Rule, ...]
    default: WeightFormat | None

    def format_of(self, module: str) -> WeightFormat | None:
        """The format of a linear layer, e.g. "model.layers.3.mlp.experts.7.gate_proj"; None: not quantised.

        For stacked experts, ask for what their tensors' names have in common: "model.layers.3.mlp.experts".
        """
        for rule in self.rules:
            if rule.matches(module):
                return rule.format
        return self.default

    def is_converted(self, module: str) -> bool:
        """Whether config.json has this linear layer quantised; see the module's docstring on what decides."""
        return self.format_of(module) is not None

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """Every format that occurs, each once."""
        found = [*(rule.format for rule in self.rules), self.default]
        return tuple(dict.fromkeys(format for format in found if format is not None))


def row_chunks(rows: int, columns: int, *, multiple: int = 1) -> list[slice]:
    """Slices of rows, each of about CHUNK_ELEMENTS elements and a multiple of `multiple` rows but for the last."""
    step = max(CHUNK_ELEMENTS // max(columns, 1) // multiple, 1) * multiple
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def finite_float32(scale: Tensor, *, name: str) -> Tensor:
    """Scales in float32; bytes are E8M0 exponents, 2^(byte - 127) with 255 for NaN (OCP MX v1.0, section 5.4.1).

    Raises:
        CorruptWeights: one of them is NaN or infinite.
    """
    values = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
    if not values.isfinite().all():
        raise CorruptWeights(f"{name}: the scales hold NaN or infinity")
    return values


def subtract_blocks(values_NC: Tensor, operand_NG: Tensor, width: int) -> None:
    """Subtract in place: `operand_NG[:, g]` from columns [g * width, (g + 1) * width)."""
    for part, operand in _column_blocks(values_NC, operand_NG, width):
        part.sub_(operand)


def multiply_blocks(values_NC: Tensor, operand_NG: Tensor, width: int) -> None:
    """Multiply in place: columns [g * width, (g + 1) * width) by `operand_NG[:, g]`."""
    for part, operand in _column_blocks(values_NC, operand_NG, width):
        part.mul_(operand)


def _column_blocks(values_NC: Tensor, operand_NG: Tensor, width: int) -> list[tuple[Tensor, Tensor]]:
    """The whole blocks and the narrower last one as broadcasting views: an expanded operand would double the memory."""
    num_whole = values_NC.shape[1] // width
    split = num_whole * width
    parts = [(values_NC[:, :split].view(len(values_NC), num_whole, width), operand_NG[:, :num_whole, None])]
    return parts if split == values_NC.shape[1] else [*parts, (values_NC[:, split:], operand_NG[:, num_whole:])]
