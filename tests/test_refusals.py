"""What we do not understand is refused with a sentence, and never guessed.

Config keys: every variant of every row, every gating key that other families have, and each key of each family's
config.json changed in turn and compared with what transformers makes of it. Tensors: each part of a block removed,
renamed, transposed, doubled or of a dtype that only a quantised checkpoint has.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from cluster.local_layer import LocalLayer
from protos.checkpoint import read_model
from protos.configfile import read_config
from protos.errors import CorruptWeights, UnsupportedModel
from protos.families import FAMILIES as ROWS
from protos.settings import settings_of
from tests.family_blocks import find_blocks
from tests.family_cases import CASES
from tests.family_models import FamilyModel, block_output, build_family, model_class
from tests.test_family_parity import SUPPORTED, error, theirs, tokens

# Keys of some family that change its gate or its experts; all others have to refuse them.
GATING_KEYS = {
    *("n_group", "num_expert_group", "topk_group", "topk_method", "norm_topk_prob", "moe_renormalize", "route_norm"),
    *("routed_scaling_factor", "route_scale", "router_scaling_factor", "moe_routed_scaling_factor"),
    *("moe_router_scaling_factor", "scoring_func", "score_func", "expert_selection_fn", "router_bias"),
    *("use_expert_bias", "moe_router_logit_softcapping", "moe_apply_router_weight_on_input", "swiglu_limit"),
    *("swiglu_limits", "swiglu_limits_shared", "swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap"),
    *("moe_latent_size", "moe_hidden_size", "zero_expert_num", "n_shared_experts", "num_shared_experts"),
    *("moe_num_shared_experts", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("moe_token_dropout", "router_temperature", "expert_capacity_factor", "gate_norm", "top_k_of_tomorrow"),
}
FIRST_CASES = tuple({CASES[name].model_type: name for name in reversed(SUPPORTED)}.values())
_COMPOSITES = ("text_config", "thinker_config")
# Every name with a word that could matter to a block; sizes are among them and show up as shapes that no longer fit.
_RELEVANT = re.compile(
    r"moe|expert|topk|top_k|scal|shared|group|router|score|scoring|limit|cap|swiglu|alpha|jitter|renorm|route|zero|"
    r"token_dropout|latent|act_fn|hidden_act|activation_function|rms_norm_eps|fraction|prioritized|policy|per_tok"
)
_OTHER = {"softmax": "sigmoid", "sigmoid": "softmax", "silu": "gelu", "sum": "average", "average": "sum"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_section(document: dict[str, Any]) -> dict[str, Any]:
    for key in _COMPOSITES:
        if isinstance(document.get(key), dict):
            return text_section(document[key])
    return document


def write_config(path: Path, document: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(document))


def assert_refused(path: Path, *words: str, read: Callable[[Path], object] = read_model) -> None:
    with pytest.raises((UnsupportedModel, CorruptWeights)) as refusal:
        read(path)
    assert "\n" not in refusal.value.message
    for word in words:
        assert word in refusal.value.message


# ---------------------------------------------------------------- config keys


@pytest.mark.parametrize(
    ("family", "index"),
    [
        (family, i)
        for family, row in ROWS.items()
        for i, variant in enumerate(row.variants)
        if ... not in variant.values
    ],
)
def test_an_unknown_value_of_a_known_option_is_refused(family: str, index: int, tmp_path: Path) -> None:
    row = ROWS[family]
    setting = row.variants[index].setting
    value: Any = {"model_type": family, setting.keys[0]: "tomorrow's"}
    head, _, tail = setting.keys[0].partition(".")
    if row.section:
        value = {"model_type": family, row.section: {head: {tail: "tomorrow's"} if tail else "tomorrow's"}}
    write_config(tmp_path, value)
    assert_refused(tmp_path, setting.keys[0], '"tomorrow\'s"', "supported for", read=read_config)


def minimal_config(family: str, **values: Any) -> dict[str, Any]:
    """Layers and known values of a family's options: what read_config looks at."""
    row = ROWS[family]
    known = {s.keys[0]: next(iter(v)) for s, v in ((x.setting, x.values) for x in row.variants) if ... not in v}
    document = {"model_type": family} | known | {"num_hidden_layers": 1, "num_layers": 1, "num_decoder_layers": 1}
    return document | ({row.section: {}} if row.section else {}) | values


@pytest.mark.parametrize("family", ROWS)
def test_an_option_that_the_family_does_not_have_is_refused(family: str, tmp_path: Path) -> None:
    row = ROWS[family]
    read = {key for setting in settings_of(row) for key in setting.keys} | row.ignored | {"moe_token_dropout"}
    for key in GATING_KEYS - read:
        write_config(tmp_path, minimal_config(family, **{key: 7}))
        assert_refused(tmp_path, f"{key} is 7, an option that {family} does not have", "supported: ", read=read_config)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, [0, None]])
def test_an_option_that_says_nothing_is_no_option(value: Any, tmp_path: Path) -> None:
    write_config(tmp_path, minimal_config("mixtral", router_temperature=value, moe_of_tomorrow=value))
    assert read_config(tmp_path).family == "mixtral"


def test_an_option_in_the_row_s_own_section_is_refused_too(tmp_path: Path) -> None:
    write_config(tmp_path, minimal_config("dbrx", ffn_config={"uniform_expert_assignment": True}))
    assert_refused(tmp_path, "uniform_expert_assignment is True", "supported: ", read=read_config)


@pytest.mark.parametrize("key", ["router_dtype", "moe_router_dtype"])
def test_a_router_s_dtype_may_be_the_one_that_the_family_computes_in(key: str, tmp_path: Path) -> None:
    write_config(tmp_path, minimal_config("bailing_hybrid", **{key: "fp32"}))
    assert read_config(tmp_path).row.logits_dtype == "float32"
    write_config(tmp_path, minimal_config("bailing_hybrid", **{key: "bf16"}))
    assert_refused(tmp_path, f"{key} is 'bf16'", "supported: None or 'float32' or 'fp32'", read=read_config)
    write_config(tmp_path, minimal_config("qwen3_moe", **{key: "fp32"}))
    assert_refused(tmp_path, f"{key} is 'fp32'", read=read_config)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v4", "topk_method", "greedy"),
        ("minimax_m2", "scoring_func", "softmax"),
        ("minimax_m2", "use_routing_bias", False),
        ("minimax_m3_vl", "scoring_func", "softmax"),
        ("minimax_m3_vl", "n_shared_experts", 2),
        ("dots1", "scoring_func", "softmax"),
        ("dots1", "topk_method", "greedy"),
        ("step3p5", "moe_router_activation", "softmax"),
        ("step3p5", "norm_expert_weight", False),
        ("step3p5", "use_moe_router_bias", False),
        ("hunyuan_v1_moe", "group_limited_greedy", True),
        ("hunyuan_v1_moe", "moe_drop_tokens", True),
        ("hunyuan_v1_moe", "norm_topk_prob", False),
        ("kimi_linear", "moe_router_activation_func", "softmax"),
        ("kimi_linear", "use_grouped_topk", False),
        ("hy_v3", "moe_router_use_sigmoid", False),
        ("hy_v3", "moe_router_enable_expert_bias", False),
        ("laguna", "moe_router_use_sigmoid", False),
        ("ernie4_5_moe", "moe_gate", "top2"),
        ("ernie4_5_moe", "moe_gate_act", "sigmoid"),
        ("ernie4_5_moe", "moe_use_aux_free", False),
    ],
)
def test_a_value_with_which_the_family_would_be_another_is_refused(
    family: str, key: str, value: Any, tmp_path: Path
) -> None:
    document = minimal_config("step3p7" if family == "step3p5" else family) | {"model_type": family}
    write_config(tmp_path, document)
    read_config(tmp_path)
    write_config(tmp_path, document | {key: value})
    assert_refused(tmp_path, f"{key} is {value!r}", "supported", read=read_config)


def _changed(value: Any) -> Any:
    """Another value of the same type; None for what has none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.1
    return _OTHER.get(value, "tomorrow's") if isinstance(value, str) else None


def _with_weights_of(fm: FamilyModel, document: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The blocks that transformers builds from another config, with the same weights; None where they do not fit."""
    write_config(path, document)
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = model_class(config)._from_config(config, dtype=torch.float32, experts_implementation="eager")
    except Exception:  # whatever its own checks raise: transformers does not take this config either
        return None
    blocks = find_blocks(model.eval())
    for name, block in fm.layers.items():
        state = block.state_dict()
        if name not in blocks or {k: v.shape for k, v in blocks[name].state_dict().items()} != {
            k: v.shape for k, v in state.items()
        }:
            return None
        blocks[name].load_state_dict(state, assign=True)
        for key, buffer in list(blocks[name].named_buffers()):
            if buffer.is_meta:
                owner, _, leaf = key.rpartition(".")
                setattr(blocks[name].get_submodule(owner), leaf, block.get_buffer(key))
    return blocks


@pytest.mark.parametrize("name", FIRST_CASES)
def test_every_change_of_a_config_is_followed_or_refused(name: str, tmp_path: Path) -> None:
    """A key that changes what transformers' block computes changes ours equally, or we do not take the model."""
    fm = build_family(name, tmp_path / "model")
    document = json.loads((fm.path / "config.json").read_text())
    section = text_section(document)
    section = section.get(ROWS["dbrx"].section, section) if name.startswith("dbrx") else section
    (tmp_path / "changed").mkdir()
    followed = 0
    for key in [key for key, value in section.items() if _RELEVANT.search(key) and _changed(value) is not None]:
        original = section[key]
        section[key] = _changed(original)
        blocks = _with_weights_of(fm, document, tmp_path / "changed")
        write_config(fm.path, document)
        section[key] = original
        if blocks is None:
            continue
        try:
            spec = read_model(fm.path)
        except (UnsupportedModel, CorruptWeights):
            continue
        changed = FamilyModel(name=name, path=fm.path, model=fm.model, layers=blocks)
        layer, their_layer = next(iter(theirs(fm).items()))
        x_TD, ids_T = tokens(17, spec.dim, torch.float32)
        y_TD, _ = LocalLayer(spec, layer)(x_TD, token_ids_T=ids_T.numpy())
        assert error(y_TD, block_output(changed, their_layer, x_TD, ids_T)) <= 1e-5, f"{key}: {_changed(original)!r}"
        followed += 1
    assert followed


# ---------------------------------------------------------------- tensors

LAYOUTS = (
    ("mixtral", False),
    ("mixtral", True),
    ("deepseek_v3", False),
    ("qwen3_vl_moe", False),
    ("gpt_oss", False),
    ("granitemoe", False),
    ("dbrx", False),
    ("step3p7", False),
    ("nllb_moe", False),
    ("nemotron_h:latent", False),
    ("deepseek_v4:hash", False),
    ("gemma4", False),
)
_EXPERT_NUMBER = re.compile(r"experts\.(?:expert_)?(\d+)\.")
_BLOCK = re.compile(r"experts|share|gate\.|router|latent_proj|moe\.|input_linear|output_linear")


def block_tensors(tensors: dict[str, Tensor]) -> list[str]:
    """The tensors of the last MoE layer, of one of its experts only where each has its own."""
    last = max(
        (int(m[1]), m[0])
        for n in tensors
        if re.search("expert|input_linear", n) and (m := re.search(r"\.?(?:layers|blocks)\.(\d+)\.", n))
    )
    experts = {number for n in tensors if (m := _EXPERT_NUMBER.search(n)) for number in [m[1]]}
    names = [name for name in tensors if last[1] in name and _BLOCK.search(name.split(last[1])[1])]
    return [n for n in names if not (m := _EXPERT_NUMBER.search(n)) or m[1] == max(experts)]


@pytest.mark.parametrize(("name", "memory_layout"), LAYOUTS)
def test_a_block_with_one_tensor_out_of_place_is_refused(name: str, memory_layout: bool, tmp_path: Path) -> None:
    fm = build_family(name, tmp_path, memory_layout=memory_layout)
    file = fm.path / "model.safetensors"
    tensors = load_file(file)
    read_model(fm.path)
    names = [n for n in block_tensors(tensors) if "vision" not in n and "attn" not in n]
    assert len(names) >= 3

    def refused(edited: dict[str, Tensor], *words: str) -> None:
        save_file(edited, file)
        assert_refused(fm.path, *words)

    for part in names:
        rest = {key: tensor for key, tensor in tensors.items() if key != part}
        tensor = tensors[part]
        refused(rest)
        refused(rest | {f"{part}_of_tomorrow": tensor})
        if tensor.dim() >= 2 and tensor.shape[-1] != tensor.shape[-2]:
            refused(rest | {part: tensor.transpose(-1, -2).contiguous()}, "has shape", "expected")
        if tensor.dim() >= 2 and tensor.is_floating_point():
            refused(rest | {part: tensor.to(torch.int8)}, part, "has dtype I8")
