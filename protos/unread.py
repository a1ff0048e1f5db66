"""Keys of config.json that sound like gating but that the family's row does not read: harmless, neutral, or refused.

A key that nobody looks at could change every number, so the list here is of keys known to change none, not of those
that do. Written from the configuration classes of all families in transformers 5.23 and from published config.json
files.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

# Words that name gates and experts, and words that attention uses for itself too.
_SOUNDS_LIKE_MOE = re.compile(
    r"rout|expert|moe|swiglu|shared|capacity|(?<!p)renorm|norm_topk|zero_expert|^n_group$|group_limit|limited_group",
    re.I,
)
_SOUNDS_LIKE_GATING = re.compile(r"top_?k|scor|(?:^|_)gat(?:e|ing)(?:$|_)|softcap", re.I)
_ATTENTION = re.compile(r"attn|attention|kda|mla|index|sparse|candidate|linear|mamba|final_logit|use_output_gate", re.I)

_HARMLESS = re.compile(
    # training
    r".*_loss(?:_.*)?|.*jitter.*|(?:.*_)?init(?:ializer)?(?:_(?:std|range|method|noise))?|.*bias_update_(?:rate|speed)"
    # outputs, kernels, the sampler, and what quant_config.py reads
    r"|output_router_logits|output_scores|_?experts_implementation|top_k|expert_dtype"
    # parallelism and scheduling
    r"|(?:num_)?expert_(?:model_)?parallel.*|moe_group|moe_world_size|.*dispatcher.*|.*dispatch_use_allgather"
    r"|.*grouped_(?:gemm|mm)|moe_\w*fusion|moe_shared_expert_overlap|moe_router_(?:force_)?load_balancing(?:_type)?"
    # which layers have experts: tensors say it
    r"|(?:is_|num_)?moe_layers?(?:_(?:freq|interval|offset|enum|list|start_index|end_index|num_skipped|pattern))?"
    r"|expert_layer_(?:offset|period)|interleave_moe_layer_step|moe_every_n_layers?|use_moe|enable_moe_block"
    r"|.*_layer_types"
    # sizes that a family names twice: shapes say them
    r"|moe_intermediate_size|expert_(?:hidden_dim|intermediate_size)"
    # how shared experts are joined where there are any, which another key says
    r"|shared_moe_mode"
    # what layers share
    r"|num_kv_shared_layers|(?:use_)?shared_(?:kv|key|value|embed)\w*",
    re.I,
)
_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
_ONE: tuple[Any, ...] = (*_EMPTY, 1)  # a factor, or a number of groups: none
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n_group": _ONE,
    "num_expert_group": _ONE,
    "num_expert_groups": _ONE,
    "num_limited_groups": _ONE,
    "topk_group": _ONE,
    "routed_scaling_factor": _ONE,
    "route_scale": _ONE,
    "router_scaling_factor": _ONE,
    "moe_routed_scaling_factor": _ONE,
    "moe_router_scaling_factor": _ONE,
    "topk_method": (*_EMPTY, "greedy"),
}
_RENORMALISATIONS = ("norm_topk_prob", "moe_renormalize", "route_norm", "norm_expert_weight")
_ROUTER_DTYPES = ("router_dtype", "moe_router_dtype")


def unread(
    values: Mapping[str, Any], *, read: Set[str], renormalises: bool, routes_in_float32: bool
) -> Iterator[tuple[str, Any, Iterable[Any]]]:
    """The keys of a model that nobody has read although they may change what a gate or an expert computes.

    Args:
        values: config.json's section for the text model.
        read: the keys that the family's row reads, or knows to be without effect.
        renormalises: whether the family's weights are divided by their sum, which keys may say again.
        routes_in_float32: whether the family computes logits in float32, which keys may say again.

    Yields:
        key, value, and the values with which it would change nothing.
    """
    for key, value in values.items():
        if key in read or not _is_relevant(key) or _HARMLESS.fullmatch(key):
            continue
        neutral = _NEUTRAL.get(key, _EMPTY)
        if key in _RENORMALISATIONS:
            neutral = (None, renormalises)
        elif key in _ROUTER_DTYPES and routes_in_float32:
            neutral = (None, "float32", "fp32")
        if value not in neutral and not (isinstance(value, list) and all(entry in neutral for entry in value)):
            yield key, value, neutral


def _is_relevant(key: str) -> bool:
    if _SOUNDS_LIKE_MOE.search(key):
        return True
    return _SOUNDS_LIKE_GATING.search(key) is not None and not _ATTENTION.search(key)
