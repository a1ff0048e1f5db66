"""config.json, read through its family's row: what every MoE block of the model is.

Nothing is guessed: a value that the row does not provide for, a missing key, and a gating key that the row does not
read but that is not neutral either (unread.py) are errors that name the key.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from protos.errors import UnsupportedModel
from protos.families import ALIASES, FAMILIES
from protos.model import Activation, BlockSpec, ExpertForm, GateSpec, GroupLimit, OwnCapacity, SharedSpec
from protos.settings import COMPOSITES, Family, Scalar, Setting, Variant, settings_of
from protos.unread import unread

_ACTIVATIONS: Mapping[object, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",  # the same formula
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

_CAPACITY_KEYS: Mapping[str, frozenset[str]] = {
    "sequence": frozenset({"expert_capacity"}),
    "batch": frozenset(
        {
            *("expert_capacity", "moe_eval_capacity_token_fraction", "batch_prioritized_routing"),
            *("normalize_router_prob_before_dropping", "moe_token_dropout"),
        }
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The part of one config.json that describes the text model, with checked reads.

    `values` is the text model's section, `document` the whole file.
    """

    file: Path
    values: Mapping[str, Any]
    family: str
    row: Family
    document: Mapping[str, Any]
    stacks: Mapping[str, int] = field(default_factory=dict)  # number of layers by prefix: "" or "encoder", "decoder"

    @property
    def dim(self) -> int:
        return self._integer(self.row.dim)

    @property
    def hidden_dim(self) -> int:
        return self._integer(self.row.hidden_dim)

    def block(self, layer: int, *, hashed: bool = False) -> BlockSpec:
        """The MoE block of one transformer layer.

        Args:
            layer: its index, for options that differ from layer to layer.
            hashed: its gate looks experts up by token id (it has a table in place of a selection bias).

        Raises:
            UnsupportedModel: a value is missing, of the wrong type, or the numbers contradict each other.
        """
        row = self.row
        output_scale = self._number(row.output_scale)
        if row.averages:
            output_scale *= self._integer(row.top_k, layer=layer)
        if row.capacity == "batch":
            output_scale *= 1 - self._number(Setting(("moe_token_dropout",), 0.2))
        latent_dim = None
        if row.latent_dim is not None and self._value(row.latent_dim) is not None:
            latent_dim = self._integer(row.latent_dim)
        form = ExpertForm(
            glu=row.glu,
            activation=self._activation(row.activation),
            biases=row.biases,
            limit=self._limit(row.limit, layer),
            alpha=self._number(row.alpha),
            gate_cap=self._number(row.gate_cap),
            weighs_input=row.weighs_input,
        )
        return BlockSpec(
            gate=self._gate(layer, hashed),
            form=form,
            shared=self._shared(form, layer),
            latent_dim=latent_dim,
            output_scale=output_scale,
            output_bias=row.output_bias,
            output_norm_eps=self._number(Setting(("rms_norm_eps",), 1e-6)) if row.output_norm else None,
        )

    def _gate(self, layer: int, hashed: bool) -> GateSpec:
        row = self.row
        num_experts, top_k = self._integer(row.num_experts), self._integer(row.top_k, layer=layer)
        num_identity = self._integer(row.num_identity, minimum=0)
        if top_k > num_experts + num_identity:
            raise self._unsupported(row.top_k, top_k, f"at most the {num_experts + num_identity} experts")
        renorm = self._flag(row.renorm)
        softcap = self._number(row.logit_softcap)
        jitter = self._number(row.jitter)
        return GateSpec(
            num_experts=num_experts,
            top_k=top_k,
            score=row.score,
            num_identity=num_identity,
            logits_dtype=row.logits_dtype,
            router_dtype=row.router_dtype,
            logit_bias=self._flag(row.logit_bias),
            logit_softcap=softcap if softcap > 0 else None,
            input_norm_eps=self._number(Setting(("rms_norm_eps",), 1e-6)) if row.input_norm else None,
            score_dtype=row.score_dtype,
            selection="hash" if hashed else row.selection,
            selection_bias=self._flag(row.selection_bias) and not hashed,
            groups=None if hashed else self._groups(num_experts, top_k),
            jitter=jitter,
            chosen=row.chosen,
            renorm=row.renorm_kind if renorm else "none",
            renorm_eps=self._number(row.renorm_eps) if renorm else 0.0,
            renorm_p=self._number(row.renorm_p) if renorm else 1.0,
            scale=self._number(row.scale) / (top_k if row.averages else 1),
            per_expert_scale=row.per_expert_scale,
            weight_dtype=row.weight_dtype,
            capacity=self._capacity(),
        )

    def _capacity(self) -> OwnCapacity | None:
        if self.row.capacity is None:
            return None
        capacity = self._value(Setting(("expert_capacity",), 64))
        if capacity is not None and (type(capacity) is not int or capacity < 1):
            raise self._unsupported(Setting(("expert_capacity",)), capacity, "an integer of at least 1")
        if self.row.capacity == "sequence":
            if capacity is None:
                raise self._unsupported(Setting(("expert_capacity",)), capacity, "an integer of at least 1")
            return OwnCapacity(kind="sequence", capacity=capacity)
        return OwnCapacity(
            kind="batch",
            capacity=capacity,
            token_fraction=self._number(Setting(("moe_eval_capacity_token_fraction",), 1.0)),
            by_priority=self._flag(Setting(("batch_prioritized_routing",), False)),
            normalise_before=self._flag(Setting(("normalize_router_prob_before_dropping",), False)),
        )

    def _groups(self, num_experts: int, top_k: int) -> GroupLimit | None:
        row = self.row
        if self._value(row.num_groups) is None and _may_be_null(row.num_groups):
            if self._value(row.top_groups) is not None:
                raise self._unsupported(row.top_groups, self._value(row.top_groups), "null where there are no groups")
            return None
        num_groups, top_groups = self._integer(row.num_groups), self._integer(row.top_groups)
        if top_groups > num_groups:
            raise self._unsupported(row.top_groups, top_groups, f"at most the {num_groups} groups")
        if num_groups == top_groups:  # every group is allowed; n_group = 1 is how configs say "no groups"
            return None
        per_group = num_experts // num_groups
        if num_experts % num_groups or (row.group_score == "top2_sum" and per_group < 2):
            raise self._unsupported(
                row.num_groups, num_groups, f"a divisor of the {num_experts} experts that leaves two per group"
            )
        if top_k > per_group * top_groups:
            raise self._unsupported(row.top_k, top_k, f"at most the experts of {top_groups} of {num_groups} groups")
        return GroupLimit(num_groups=num_groups, top_groups=top_groups, score=row.group_score, excluded=row.excluded)

    def _shared(self, form: ExpertForm, layer: int) -> SharedSpec | None:
        row = self.row.shared
        if row is None:
            return None
        count = self._integer(row.count, minimum=0)
        width = self._integer(row.width, minimum=0) if row.width else self.hidden_dim
        if not width * count:
            return None
        return SharedSpec(
            hidden_dim=width * count,
            gated=row.gated,
            combine=row.combine,
            form=replace(
                form,
                biases=False,
                weighs_input=False,
                limit=form.limit if row.limit is None else self._limit(row.limit, layer),
                activation=form.activation if row.activation is None else self._activation(row.activation),
            ),
        )

    def _activation(self, setting: Setting | Activation) -> Activation:
        value = self._value(setting)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise self._unsupported(setting, value, ", ".join(map(repr, _ACTIVATIONS)))
        return _ACTIVATIONS[value]

    def _limit(self, setting: Setting | float, layer: int) -> float:
        """A clamp: 0 in a list means none, and so does null where it is what an absent key stands for."""
        value = self._value(setting)
        if isinstance(setting, Setting) and setting.per_layer and isinstance(value, list):
            if layer >= len(value):
                raise self._unsupported(setting, value, f"an entry for layer {layer}")
            value = value[layer] or math.inf
        if value is None and _may_be_null(setting):
            return math.inf
        if type(value) not in (int, float) or not value > 0:
            raise self._unsupported(setting, value, "a number above 0")
        return float(value)

    # ------------------------------------------------------------------ checked reads

    def _value(self, setting: Setting | Scalar) -> Any:
        if not isinstance(setting, Setting):
            return setting
        present = {key: self.values[key] for key in setting.keys if key in self.values}
        first = next(iter(present.values()), setting.default)
        for key, value in present.items():
            if value is not first and value != first:
                raise UnsupportedModel(f"{self.file}: {key} is {value!r}, but {next(iter(present))} is {first!r}")
        if setting.required and first is None:
            raise UnsupportedModel(f"{self.file}: {self.family} needs the key {' or '.join(setting.keys)}")
        return first

    def _integer(self, setting: Setting | int, minimum: int = 1, layer: int | None = None) -> int:
        value = self._value(setting)
        if isinstance(value, list) and isinstance(setting, Setting):
            if layer is not None and setting.per_layer and layer < len(value):
                value = value[layer]
            elif value and all(entry == value[0] for entry in value):
                value = value[0]  # HunYuan may write one entry per layer
        if value is None and minimum == 0 and _may_be_null(setting):
            return 0
        if type(value) is not int or value < minimum:
            raise self._unsupported(setting, value, f"an integer of at least {minimum}")
        return value

    def _number(self, setting: Setting | float) -> float:
        value = self._value(setting)
        if not isinstance(setting, Setting):
            return float(value)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._unsupported(setting, value, "a finite number")
        return float(value)

    def _flag(self, setting: Setting | bool) -> bool:
        value = self._value(setting)
        if value is not None and type(value) is not bool:
            raise self._unsupported(setting, value, "true or false")
        return bool(value)  # null is false to every family's own code

    def _unsupported(self, setting: Setting | Scalar, value: object, supported: str) -> UnsupportedModel:
        keys = setting.keys if isinstance(setting, Setting) else ()
        key = next((key for key in keys if key in self.values), "/".join(keys) or "the family's row")
        return UnsupportedModel(f"{self.file}: {key} is {value!r} (supported for {self.family}: {supported})")


def _may_be_null(setting: Setting | Scalar) -> bool:
    """Whether null means what an absent key means. Elsewhere it could be that, or "none": refused."""
    return isinstance(setting, Setting) and setting.default is None


def read_config(path: Path) -> Config:
    """Read `path`/config.json; a composite model's text model is described under its `text_config`.

    Raises:
        UnsupportedModel: not a model directory, an unknown model_type, or an option that its row does not know.
    """
    if not path.is_dir():
        raise UnsupportedModel(f"{path}: not a directory")
    file = path / "config.json"
    if not file.exists():
        raise UnsupportedModel(f"{path}: no config.json: not a model directory")
    try:
        document = json.loads(file.read_bytes())
    except OSError as err:
        raise UnsupportedModel(f"{file}: cannot be read ({err.strerror or err})") from err
    except (ValueError, RecursionError) as err:
        raise UnsupportedModel(f"{file}: cannot be read: not JSON ({err})") from err
    if not isinstance(document, dict):
        raise UnsupportedModel(f"{file}: not a JSON object")
    family, values = _text_model(document)
    if family is None:
        raise UnsupportedModel(
            f"{file}: model_type is {document.get('model_type')!r} (supported: {', '.join(sorted(FAMILIES))})"
        )
    row = FAMILIES[family]
    if row.section:
        nested = values.get(row.section)
        if not isinstance(nested, dict):
            raise UnsupportedModel(f"{file}: {family} needs the object {row.section}")
        values = {**values, **nested}
        for name, entry in nested.items():
            if isinstance(entry, dict):
                values.update({f"{name}.{inner}": value for inner, value in entry.items()})
    config = Config(file=file, values=values, family=family, row=row, document=document)
    for variant in row.variants:
        config = replace(config, row=replace(config.row, **_chosen(config, variant)))
    _refuse_unread(config)
    return replace(config, stacks={side: _num_layers(config, setting) for side, setting in row.stacks.items()})


def _num_layers(config: Config, setting: Setting) -> int:
    """A number of layers; a list with the kind of every layer says it too (Nemotron-H)."""
    value = config._value(setting)
    return len(value) if isinstance(value, list | str) else config._integer(setting, minimum=0)


def _text_model(document: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The family and the section that describes the text model: the outermost one with a known type and experts."""
    candidates = [document]
    section: Mapping[str, Any] = document
    while nested := next((section[key] for key in COMPOSITES if isinstance(section.get(key), dict)), None):
        section = nested
        candidates.append(section)
    # A composite's own type names the family; its keys are in the innermost section. The type there may be another
    # family's (Kimi-K2.5 wraps deepseek_v3), which then counts.
    for candidate in reversed(candidates):
        family = _family(candidate.get("model_type"))
        if family is not None:
            return family, section
    return None, section


def _family(model_type: object) -> str | None:
    if not isinstance(model_type, str):
        return None
    for name in (model_type, model_type.removesuffix("_text")):
        name = ALIASES.get(name, name)
        if name in FAMILIES:
            return name
    return None


def _chosen(config: Config, variant: Variant) -> Mapping[str, Any]:
    value = config._value(variant.setting)
    if isinstance(value, str | bool | int | float | None) and value in variant.values:
        return variant.values[value]
    if ... in variant.values:
        return variant.values[...]
    raise config._unsupported(variant.setting, value, ", ".join(repr(known) for known in variant.values))


def _refuse_unread(config: Config) -> None:
    row = config.row
    read = {key for setting in settings_of(row) for key in setting.keys} | row.ignored
    if row.capacity is not None:
        read |= _CAPACITY_KEYS[row.capacity]
    renormalises = config._flag(row.renorm) or row.chosen == "softmax"
    for key, value, neutral in unread(
        config.values, read=read, renormalises=renormalises, routes_in_float32=row.logits_dtype == "float32"
    ):
        raise UnsupportedModel(
            f"{config.file}: {key} is {value!r}, an option that {config.family} does not have "
            f"(supported: {' or '.join(map(repr, neutral))})"
        )
