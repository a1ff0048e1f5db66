"""What config.json means: one row of values per model family, read into a `GateSpec` and the block's sizes.

The rows state what the family's block in transformers 5.23 computes (models/<family>/modeling_<family>.py); defaults
are those of its configuration class. A new family is a new row.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from protos.errors import UnsupportedModel
from protos.model import GateSpec, GroupLimit, SharedSpec


@dataclass(frozen=True, slots=True)
class Setting:
    """A value of config.json: the names it goes by, and what it is where the file does not say (None: it must)."""

    keys: tuple[str, ...]
    default: int | float | bool | str | None = None


_NUM_EXPERTS = Setting(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))
_TOP_K = Setting(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"))
_WIDTH = Setting(("intermediate_size",))
_MOE_WIDTH = Setting(("moe_intermediate_size",))
_ALWAYS = Setting((), True)
ACTIVATION = Setting(("hidden_act",), "silu")
_DIM = Setting(("hidden_size",))
_NUM_LAYERS = Setting(("num_hidden_layers",))


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRow:
    """The shared expert: `width` wide, or as wide as `count` routed experts."""

    gated: bool
    width: Setting | None = None
    count: Setting = Setting((), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row: the options of `GateSpec`, fixed by the family or read from a key of its config.json."""

    hidden_dim: Setting
    score: Literal["softmax", "sigmoid"]
    logits_dtype: Literal["model", "float32"]
    weight_dtype: Literal["float32", "model"]
    renorm: Setting
    renorm_eps: float = 0.0
    scale: Setting = Setting((), 1.0)
    selection_bias: bool = False
    num_groups: Setting = Setting((), 1)
    top_groups: Setting = Setting((), 1)
    topk_method: str = "greedy"  # the one value that hub configs of this family may spell out
    shared: SharedRow | None = None


_QWEN_STYLE_RENORM = Setting(("norm_topk_prob",), False)

FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(  # weights stay fp32; jitter is for training only
        hidden_dim=_WIDTH, score="softmax", logits_dtype="model", weight_dtype="float32", renorm=_ALWAYS
    ),
    "qwen2_moe": Family(
        hidden_dim=_MOE_WIDTH,
        score="softmax",
        logits_dtype="model",
        weight_dtype="model",
        renorm=_QWEN_STYLE_RENORM,
        shared=SharedRow(gated=True, width=Setting(("shared_expert_intermediate_size",))),
    ),
    "qwen3_moe": Family(
        hidden_dim=_MOE_WIDTH, score="softmax", logits_dtype="model", weight_dtype="model", renorm=_QWEN_STYLE_RENORM
    ),
    "olmoe": Family(
        hidden_dim=_WIDTH, score="softmax", logits_dtype="model", weight_dtype="model", renorm=_QWEN_STYLE_RENORM
    ),
    "deepseek_v3": Family(
        hidden_dim=_MOE_WIDTH,
        score="sigmoid",
        logits_dtype="float32",
        weight_dtype="float32",
        renorm=Setting(("norm_topk_prob", "moe_renormalize"), True),
        renorm_eps=1e-20,
        scale=Setting(("routed_scaling_factor", "route_scale"), 2.5),
        selection_bias=True,
        num_groups=Setting(("n_group", "num_expert_group"), 8),
        top_groups=Setting(("topk_group",), 4),
        topk_method="noaux_tc",
        shared=SharedRow(gated=False, count=Setting(("n_shared_experts",), 1)),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The part of one config.json that describes the text model, with checked reads."""

    file: Path
    values: Mapping[str, Any]
    family: str

    @property
    def row(self) -> Family:
        return FAMILIES[self.family]

    @property
    def dim(self) -> int:
        return self._integer(_DIM)

    @property
    def hidden_dim(self) -> int:
        return self._integer(self.row.hidden_dim)

    @property
    def num_layers(self) -> int:
        return self._integer(_NUM_LAYERS)

    def gate(self) -> GateSpec:
        """The family's exact gate with this model's numbers.

        Raises:
            UnsupportedModel: a value is missing, of the wrong type, or the numbers contradict each other.
        """
        row = self.row
        num_experts, top_k = self._integer(_NUM_EXPERTS), self._integer(_TOP_K)
        if top_k > num_experts:
            raise self._unsupported(_TOP_K, top_k, f"at most the {num_experts} experts")
        for setting, supported in (
            (Setting(("scoring_func",), row.score), row.score),
            (Setting(("topk_method",), row.topk_method), row.topk_method),
        ):
            value = self._value(setting)
            if value != supported:
                raise self._unsupported(setting, value, repr(supported))
        return GateSpec(
            num_experts=num_experts,
            top_k=top_k,
            score=row.score,
            logits_dtype=row.logits_dtype,
            selection_bias=row.selection_bias,
            groups=self._groups(num_experts, top_k),
            renorm="sum" if self._flag(row.renorm) else "none",
            renorm_eps=row.renorm_eps if self._flag(row.renorm) else 0.0,
            scale=self._number(row.scale),
            weight_dtype=row.weight_dtype,
        )

    def shared(self) -> SharedSpec | None:
        """The shared expert's form, None where this model has none."""
        row = self.row.shared
        if row is None:
            return None
        width = self._integer(row.width) if row.width else self.hidden_dim
        count = self._integer(row.count, minimum=0)
        return SharedSpec(hidden_dim=width * count, gated=row.gated) if count else None

    def activation(self) -> Literal["silu"]:
        value = self._value(ACTIVATION)
        if value != "silu":
            raise self._unsupported(ACTIVATION, value, "'silu'")
        return "silu"

    def _groups(self, num_experts: int, top_k: int) -> GroupLimit | None:
        row = self.row
        num_groups, top_groups = self._integer(row.num_groups), self._integer(row.top_groups)
        if top_groups > num_groups:
            raise self._unsupported(row.top_groups, top_groups, f"at most the {num_groups} groups")
        if num_groups == top_groups:  # every group is allowed; n_group = 1 is how configs say "no groups"
            return None
        if num_experts % num_groups or num_experts // num_groups < 2:
            raise self._unsupported(
                row.num_groups, num_groups, f"a divisor of the {num_experts} experts that leaves two per group"
            )
        if top_k > num_experts // num_groups * top_groups:
            raise self._unsupported(_TOP_K, top_k, f"at most the experts of {top_groups} of {num_groups} groups")
        return GroupLimit(num_groups=num_groups, top_groups=top_groups)

    def _value(self, setting: Setting) -> Any:
        present = {key: self.values[key] for key in setting.keys if key in self.values}
        first = next(iter(present.values()), setting.default)
        for key, value in present.items():
            if value is not first and value != first:
                raise UnsupportedModel(f"{self.file}: {key} is {value!r}, but {next(iter(present))} is {first!r}")
        if not present and first is None:
            raise UnsupportedModel(f"{self.file}: {self.family} needs the key {' or '.join(setting.keys)}")
        return first

    def _integer(self, setting: Setting, minimum: int = 1) -> int:
        value = self._value(setting)
        if type(value) is not int or value < minimum:
            raise self._unsupported(setting, value, f"an integer of at least {minimum}")
        return value

    def _number(self, setting: Setting) -> float:
        value = self._value(setting)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._unsupported(setting, value, "a finite number")
        return float(value)

    def _flag(self, setting: Setting) -> bool:
        value = self._value(setting)
        if value is not None and type(value) is not bool:
            raise self._unsupported(setting, value, "true or false")
        return bool(value)

    def _unsupported(self, setting: Setting, value: object, supported: str) -> UnsupportedModel:
        key = next((key for key in setting.keys if key in self.values), "/".join(setting.keys))
        return UnsupportedModel(f"{self.file}: {key} is {value!r} (supported for {self.family}: {supported})")


def read_config(path: Path) -> Config:
    """Read `path`/config.json; a composite model's text model is described under its `text_config`.

    Raises:
        UnsupportedModel: not a model directory, an unknown model_type, or quantised weights.
    """
    if not path.is_dir():
        raise UnsupportedModel(f"{path}: not a directory")
    file = path / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise UnsupportedModel(f"{file}: cannot be read ({type(err).__name__}: {err})") from err
    if not isinstance(values, dict):
        raise UnsupportedModel(f"{file}: not a JSON object")
    text = values.get("text_config")
    section = text if isinstance(text, dict) and values.get("model_type") not in FAMILIES else values
    for level in (values, section):
        for key in ("quantization_config", "compression_config"):
            if level.get(key) is not None:
                raise UnsupportedModel(f"{file}: {key} is {str(level[key])[:200]} (supported: unquantised weights)")
    family = section.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedModel(f"{file}: model_type is {family!r} (supported: {', '.join(sorted(FAMILIES))})")
    return Config(file=file, values=section, family=family)
