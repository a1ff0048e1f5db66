"""Names of the tensors of an MoE block: which part of which layer's block a tensor is, told from its name alone.

The family's name is never asked. A name is taken apart into the stack of layers it belongs to, the layer, the block
within the layer, and then: a part ("expert gate", "router", ...), the expert where there is one tensor per expert, and
the piece of the stored matrix: "weight", "bias", or the ending that a quantised format gives the name.

Shapes (in layout.py): E experts, D model dim, L expert input dim, F expert hidden dim, S shared hidden dim.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

# Prefix of the stack of layers in the tensor names -> prefix of our layer names. What begins otherwise (vision towers,
# a talker beside the thinker) is no part of the text model.
STACKS: Mapping[str, str] = dict.fromkeys(
    (
        "",
        "model.",
        "model.language_model.",
        "language_model.model.",
        "language_model.",
        "language.model.",
        "backbone.",
        "transformer.",
        "thinker.model.",
        "thinker.model.language_model.",
        "model.llm.",
    ),
    "",
) | {
    f"{prefix}{side}.": side for prefix in ("", "model.") for side in ("encoder", "decoder")
}  # longest first is not needed: a full match decides

_NAME = re.compile(
    rf"(?P<stack>{'|'.join(map(re.escape, STACKS))})(?:layers|blocks|block)\.(?P<layer>0|[1-9]\d{{0,5}})\.(?P<rest>.+)"
)
_BLOCK = re.compile(
    r"(?P<block>(?:layer\.\d\.)?(?:mlp|block_sparse_moe|feed_forward|ffn|mixer|moe_block|moe))\.(?P<rest>.+)"
)
_NUMBERED = re.compile(r"(?<![^.])experts\.(?:expert_)?(0|[1-9]\d{0,5})\.")
_ANY_EXPERT = "experts.*."  # in place of a match of _NUMBERED: what follows is the same for all experts and layers
_ONE_EXPERT = re.escape(_ANY_EXPERT)
_SHARED = r"(?:shared_experts?|share_expert|shared_mlp)\."

# part -> stem of its names within the block, without the suffix of the piece
_STEMS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(stem))
    for part, stem in (
        ("expert gate", _ONE_EXPERT + r"(?:gate_proj|w1|linear)"),
        ("expert up", _ONE_EXPERT + r"(?:up_proj|w3|linear_v|fc1|wi)"),
        ("expert down", _ONE_EXPERT + r"(?:down_proj|w2|linear_1|fc2|wo)"),
        ("stacked gate and up", r"experts\.gate_up_proj|input_linear|experts\.fc1"),
        ("interleaved gate and up", r"experts\.w13"),
        ("stacked gate", r"(?:experts\.)?gate_proj"),
        ("stacked up", r"(?:experts\.)?up_proj"),
        ("stacked down", r"(?:experts\.)?down_proj|output_linear|experts\.fc2|experts\.w2"),
        ("flat gate", r"experts\.mlp\.w1"),
        ("flat up", r"experts\.mlp\.v1"),
        ("flat down", r"experts\.mlp\.w2"),
        ("shared gate", _SHARED + r"(?:gate_proj|w1|linear_gate)"),
        ("shared up", _SHARED + r"(?:up_proj|w3)"),
        ("shared down", _SHARED + r"(?:down_proj|w2)"),
        ("shared gate and up", _SHARED + r"gate_up_proj"),
        ("latent in", r"fc1_latent_proj"),
        ("latent out", r"fc2_latent_proj"),
    )
)
# part -> whole names of tensors that are never quantised
_WHOLE: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(names))
    for part, names in (
        ("router", r"gate\.weight|gate\.wg\.weight|router\.(?:(?:layer|gate|classifier|proj)\.)?weight"),
        ("router bias", r"router\.(?:classifier\.)?bias"),
        (
            "selection bias",
            r"(?:(?:gate|router|experts)\.)?e_score_correction_bias|(?:(?:gate|router)\.)?expert_bias|gate\.bias|"
            r"router_bias|(?:gate\.)?moe_statics\.e_score_correction_bias",
        ),
        ("token table", r"gate\.tid2eid"),
        ("router input scale", r"router\.scale"),
        ("expert scale", r"router\.per_expert_scale"),
        ("shared output gate", r"shared_expert_gate\.weight"),
        ("output bias", r"bias"),
        ("output norm", r"post_mlp_layernorm\.weight"),
    )
)
_PLAIN_SUFFIXES = ((".weight", "weight"), ("", "weight"), ("_weight", "weight"), (".bias", "bias"), ("_bias", "bias"))
_OWN = re.compile(r"(?:experts|router|gate|shared_expert)")
_DENSE = re.compile(r"(?:gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3|wi(?:_\d)?|wo|fc1|fc2)\.\w+")


class Role(NamedTuple):
    """What a name says beside layer and expert: `part` is "" if no known layout has it, "dense" for a dense MLP's."""

    block: str  # as written, "" for a tensor of the layer itself
    part: str
    piece: str
    own: bool  # a name of the layer itself that looks like a part of an MoE block


class Place(NamedTuple):
    """Where a tensor belongs. (Tuples: a big checkpoint has a hundred thousand names.)"""

    stack: str  # the prefix as written
    layer: int
    expert: int  # 0 where one tensor is for all
    role: Role

    @property
    def side(self) -> str:
        """ "", "encoder" or "decoder" (which a model with one stack may call it too)."""
        return STACKS[self.stack]


def place(name: str, *, num_dims: int, endings: tuple[str, ...]) -> Place | None:
    """Where a tensor belongs; None if it is no part of the text model's layers.

    Args:
        num_dims: of its shape: a dense MLP's gate_proj has two, one for a stack of experts three, and so have their
            scales.
        endings: of the pieces of the checkpoint's quantised formats, longest first.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    stack, layer, rest = match.groups()
    expert = 0
    if numbered := _NUMBERED.search(rest):
        expert = int(numbered[1])
        rest = rest[: numbered.start()] + _ANY_EXPERT + rest[numbered.end() :]
    return Place(stack, int(layer), expert, _role(rest, num_dims < 3, endings))


@lru_cache(maxsize=4096)
def _role(rest: str, is_flat: bool, endings: tuple[str, ...]) -> Role:
    block, own = "", _OWN.match(rest) is not None
    if in_block := _BLOCK.fullmatch(rest):
        block, rest, own = in_block["block"], in_block["rest"], False
    part, piece = _part(rest, is_flat, endings)
    return Role(block, "" if part == "output bias" and not block else part, piece, own)


def _part(rest: str, is_flat: bool, endings: tuple[str, ...]) -> tuple[str, str]:
    for part, pattern in _WHOLE:
        if pattern.fullmatch(rest):
            return part, "weight"
    for suffix, piece in (*zip(endings, endings, strict=True), *_PLAIN_SUFFIXES):
        if not rest.endswith(suffix):
            continue
        stem = rest.removesuffix(suffix)
        for part, pattern in _STEMS:
            if pattern.fullmatch(stem) is None:
                continue
            if part.startswith("stacked") and not stem.startswith("experts.") and is_flat and piece != "bias":
                break  # a dense MLP
            return part, piece
    return ("dense" if _DENSE.fullmatch(rest) else ""), "weight"
