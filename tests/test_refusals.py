"""What we do not understand is refused with a sentence, and never guessed.

Config keys: every variant of every row, every watched key, and each key of each family's config.json changed in turn
and compared with what transformers makes of it. Tensors: each part of a block removed, renamed, transposed, doubled or
of a dtype that only a quantised checkpoint has.
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
from protos.configfile import _WATCHED, read_config
from protos.errors import CorruptWeights, UnsupportedModel
from protos.families import FAMILIES as ROWS
from protos.settings import settings_of
from tests.family_blocks import find_blocks
from tests.family_cases import CASES
from tests.family_models import FamilyModel, block_output, build_family, model_class
from tests.test_family_parity import SUPPORTED, error, theirs, tokens

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


@pytest.mark.parametrize("family", ROWS)
def test_an_option_that_the_family_does_not_have_is_refused(family: str, tmp_path: Path) -> None:
    row = ROWS[family]
    read = {key for setting in settings_of(row) for key in setting.keys} | row.ignored
    if row.capacity == "batch":
        read.add("moe_token_dropout")
    for key in _WATCHED.keys() - read:
        values: dict[str, Any] = {key: 7, "num_hidden_layers": 1, "num_layers": 1, "num_decoder_layers": 1}
        if row.section:
            values[row.section] = {}
        known = {s.keys[0]: next(iter(v)) for s, v in ((x.setting, x.values) for x in row.variants) if ... not in v}
        write_config(tmp_path, {"model_type": family} | known | values)
        assert_refused(tmp_path, f"{key} is 7, an option that {family} does not have", "supported: ", read=read_config)


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
