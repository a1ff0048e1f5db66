"""A block's options in plain words: what `describe` prints, and the table of families in docs/models.md.

Everything is said from the `BlockSpec` that the router and the servers compute with, nothing from the family's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from protos.model import BlockSpec, ExpertForm, GateSpec

_GLU_NAMES = {
    "silu": "SwiGLU",
    "gelu": "GeGLU",
    "gelu_tanh": "GeGLU (tanh GELU)",
    "relu": "ReGLU",
    "relu2": "squared ReLU with a gate",
}
_ACTIVATION_NAMES = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "tanh GELU", "relu": "ReLU", "relu2": "squared ReLU"}
_SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrt_softplus": "sqrt(softplus)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWords:
    """One MoE block: scores, choice and weights of its gate, its experts, shared expert, and what surrounds them.

    `shared` and `around` are "" where there is nothing to say.
    """

    scores: str
    choice: str
    weights: str
    expert: str
    shared: str
    around: str

    @property
    def gate(self) -> str:
        """The gate in two sentences."""
        return f"{_sentence(f'{self.scores}; {self.choice}')} {_sentence(self.weights)}"

    def differing(self, other: "BlockWords") -> tuple[str, ...]:
        """What `self` has otherwise than `other`."""
        parts = [
            (self.scores, other.scores),
            (self.choice, other.choice),
            (self.weights, other.weights),
            (f"experts: {self.expert}", f"experts: {other.expert}"),
            (f"shared expert: {self.shared or 'none'}", f"shared expert: {other.shared or 'none'}"),
            (f"around them: {self.around or 'nothing'}", f"around them: {other.around or 'nothing'}"),
        ]
        return tuple(mine for mine, theirs in parts if mine != theirs)


def block_words(spec: BlockSpec, *, symbols: bool = False) -> BlockWords:
    """Say what a block computes.

    Args:
        spec: its options.
        symbols: E, K and the like in place of the model's sizes: for a family instead of a model.
    """
    return BlockWords(
        scores=_scores(spec.gate),
        choice=_choice(spec.gate, symbols),
        weights=_weights(spec.gate, spec.form, symbols),
        expert=form_words(spec.form),
        shared=_shared(spec, symbols),
        around=_around(spec, symbols),
    )


def form_words(form: ExpertForm) -> str:
    """What one expert computes between its projections."""
    limited = form.limit < inf
    bounds = f"gate at most {form.limit:g} and up within ±{form.limit:g}"
    if form.glu == "plain":
        words = f"{_ACTIVATION_NAMES[form.activation]} without a gate"
    elif form.glu == "gpt_oss":
        clamp = f", {bounds}" if limited else ""
        words = f"gate * sigmoid({form.alpha:g} * gate) * (up + 1){clamp}"
    elif form.glu == "softcapped":
        caps = f"gate soft-capped at {form.gate_cap:g} and up at {form.limit:g} by tanh"
        words = f"cap(gate) * sigmoid(gate) * cap(up), {caps}"
    elif form.glu == "clamped_after" and limited:
        name = _ACTIVATION_NAMES[form.activation]
        words = f"{_GLU_NAMES[form.activation]}, {name}(gate) at most {form.limit:g} and up within ±{form.limit:g}"
    elif form.glu == "clamped" and limited:
        words = f"{_GLU_NAMES[form.activation]}, {bounds} before the activation"
    else:
        words = _GLU_NAMES[form.activation]
    return f"{words}, with biases" if form.biases else words


def layer_ranges(layers: Sequence[str]) -> str:
    """Layer names as ranges: "0-2, 5, 8-20 in steps of 4, encoder.1"."""
    sides: dict[str, list[int]] = {}
    for layer in layers:
        side, _, number = layer.rpartition(".")
        sides.setdefault(f"{side}." if side else "", []).append(int(number))
    return ", ".join(part for side, numbers in sides.items() for part in _ranges(side, numbers))


def _ranges(side: str, numbers: list[int]) -> list[str]:
    parts = []
    while numbers:
        step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
        length = 1
        while length < len(numbers) and numbers[length] - numbers[length - 1] == step:
            length += 1
        if length == 1 or (length == 2 and step > 1):
            length = 1
            parts.append(f"{side}{numbers[0]}")
        else:
            steps = f" in steps of {step}" if step > 1 else ""
            parts.append(f"{side}{numbers[0]}-{numbers[length - 1]}{steps}")
        numbers = numbers[length:]
    return parts


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _dtype(name: str) -> str:
    return "fp32" if name == "float32" else "the model's dtype"


def _scores(gate: GateSpec) -> str:
    in_fp32 = "float32" in (gate.logits_dtype, gate.router_dtype)
    words = f"logits are computed in {_dtype('float32' if in_fp32 else 'model')}"
    if gate.input_norm_eps is not None:
        words += " from the RMS-normalised token times a learned vector"
    if gate.router_dtype == "float32":
        words += " with a router that is kept in fp32"
    steps = [words]
    if gate.logit_bias:
        steps.append("get a learned bias")
    if gate.logit_softcap is not None:
        steps.append(f"are soft-capped at {gate.logit_softcap:g} by tanh")
    score = "are the scores" if gate.score == "logits" else f"become scores by {_SCORES[gate.score]}"
    return f"{', '.join(steps)} and {score} in {_dtype(gate.score_dtype)}"


def _choice(gate: GateSpec, symbols: bool) -> str:
    experts = f"{'E' if symbols else gate.num_experts} experts"
    if gate.num_identity:
        experts += f" and {'Z' if symbols else gate.num_identity} identity experts (which return the token itself)"
    top_k = "K" if symbols and gate.capacity is None else str(gate.top_k)
    if gate.selection == "hash":
        return f"{top_k} of {experts} are looked up by token id"
    if gate.selection == "sparsemixer":
        return f"{top_k} of {experts} are chosen one after another, each the largest logit left (sparsemixer)"
    words = f"the {'best one' if top_k == '1' else f'{top_k} best'} of {experts}"
    if gate.selection_bias:
        words += " by score plus a learned bias (not in the weights)"
    if gate.groups is not None:
        counts = "best groups" if symbols else f"{gate.groups.top_groups} best of {gate.groups.num_groups} groups"
        best = "the sum of its two best" if gate.groups.score == "top2_sum" else "its best one"
        masked = ", excluded experts rank as 0" if gate.groups.excluded == "zero" else ""
        words += f" from the {counts} (a group counts as {best}{masked})"
    return f"{words} {'is' if top_k == '1' else 'are'} chosen{_capacity(gate, symbols)}"


def _capacity(gate: GateSpec, symbols: bool) -> str:
    """The capacity that belongs to the model, as router/selection.py applies it."""
    capacity = gate.capacity
    if capacity is None:
        return ""
    if capacity.kind == "batch" and capacity.token_fraction > 0:
        places = f"ceil({capacity.token_fraction:g} * T)"
    elif capacity.capacity is None:
        places = "2 * ceil(T / E)"
    else:
        places = "C" if symbols else str(capacity.capacity)
    first = "those with the highest probability first" if capacity.by_priority else "in their order"
    behind = ", second choices behind all first ones" if gate.top_k > 1 else ""
    return f", and every expert takes at most {places} of the T tokens of a request, {first}{behind}"


def _weights(gate: GateSpec, form: ExpertForm, symbols: bool) -> str:
    words = f"{_chosen(gate)}, "
    if gate.scale != 1.0 and gate.capacity is None:
        words += f"times {'1 / K' if symbols and gate.scale == 1 / gate.top_k else f'{gate.scale:g}'}, "
    words += "kept in fp32" if gate.weight_dtype == "float32" else "rounded to the model's dtype"
    if gate.per_expert_scale:
        words += ", times a learned factor of the expert"
    return f"{words}, and multiply the expert's {'input' if form.weighs_input else 'output'}"


def _chosen(gate: GateSpec) -> str:
    if gate.selection == "sparsemixer":
        margin = f"a relative margin of {2 * gate.jitter:g}"
        return f"weights are each the softmax over the logits left within {margin} of the chosen one"
    if gate.capacity is not None:
        words = "weights are the scores of the chosen"
        if gate.capacity.kind == "batch":
            words += " divided by their sum over "
            words += "both choices" if gate.capacity.normalise_before else "the choices that found a place"
        return words
    words = "weights are the scores of the chosen"
    if gate.chosen != "score":
        words = f"weights are the {gate.chosen} of the chosen logits"
    if gate.renorm == "norm":
        return f"{words} divided by their {gate.renorm_p:g}-norm"
    if gate.renorm == "clamp":
        return f"{words} divided by their sum, which counts as at least {gate.renorm_eps:g}"
    if gate.renorm == "sum":
        return f"{words} divided by their sum" + (f" + {gate.renorm_eps:g}" if gate.renorm_eps else "")
    return words if gate.chosen == "softmax" else f"{words}, not renormalised"


def _shared(spec: BlockSpec, symbols: bool) -> str:
    shared = spec.shared
    if shared is None:
        return ""
    words = f"{form_words(shared.form)}, {'S' if symbols else shared.hidden_dim} wide"
    if shared.gated:
        words += ", times the sigmoid of a learned projection of the token"
    joined = "the block returns the mean of it and the routed sum" if shared.combine == "average" else "added"
    return f"{words}; {joined}"


def _around(spec: BlockSpec, symbols: bool) -> str:
    parts = []
    if spec.latent_dim is not None:
        parts.append(f"tokens are projected to {'L' if symbols else spec.latent_dim} before the experts and back after")
    if spec.output_scale != 1.0:
        scale = "K" if symbols and spec.output_scale == spec.gate.top_k else f"{spec.output_scale:g}"
        parts.append(f"the routed sum is multiplied by {scale}")
    if spec.output_bias:
        parts.append("a learned bias is added")
    if spec.output_norm_eps is not None:
        parts.append("an RMS norm comes last")
    return ", ".join(parts)
