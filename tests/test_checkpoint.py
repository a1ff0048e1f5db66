"""Model reading against transformers: what `read_model` says, what `Checkpoint` reads, and what both refuse."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from protos.checkpoint import Checkpoint, ExpertWeights, read_model
from protos.errors import CorruptWeights, InvalidRequest, UnsupportedModel
from protos.families import FAMILIES as FAMILY_ROWS
from protos.model import BlockSpec, GateSpec, GroupLimit, ModelSpec, SharedSpec
from protos.settings import settings_of
from tests.tiny_models import DIM, FAMILIES, HIDDEN_DIM, NUM_EXPERTS, TOP_K, load_reference, reference_block, tiny_model

_EXPERT_PARAMS = 3 * DIM * HIDDEN_DIM
_WITHOUT_A_CLASS = {"grok-1", "deepseek", "kimi_k2"}  # rows for families that transformers has no class of
_LAYERS = dict.fromkeys(FAMILIES, ("0", "1", "2")) | {"deepseek_v3": ("1", "2")}
_SHARED = {"qwen2_moe": SharedSpec(hidden_dim=48, gated=True), "deepseek_v3": SharedSpec(hidden_dim=2 * HIDDEN_DIM)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _gate(**options: Any) -> GateSpec:
    return GateSpec(num_experts=NUM_EXPERTS, top_k=TOP_K, **options)


_GATES = {
    "mixtral": _gate(score="softmax", renorm="sum", weight_dtype="float32"),
    "qwen2_moe": _gate(score="softmax", renorm="none", weight_dtype="model"),
    "qwen3_moe": _gate(score="softmax", renorm="sum", weight_dtype="model"),
    "olmoe": _gate(score="softmax", renorm="none", weight_dtype="model"),
    "deepseek_v3": _gate(
        score="sigmoid",
        logits_dtype="float32",
        selection_bias=True,
        groups=GroupLimit(num_groups=4, top_groups=2),
        renorm="sum",
        renorm_eps=1e-20,
        scale=2.5,
        weight_dtype="float32",
    ),
}


def _edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def _edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def _write_raw(file: Path, header: bytes, data: bytes = b"", *, header_bytes: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if header_bytes is None else header_bytes) + header + data)


def _swiglu(x_TD: Tensor, weights: ExpertWeights) -> Tensor:
    gate_FD, up_FD = weights.up_IL.chunk(2)
    return (F.silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)) @ weights.down_LF.T


def _block_by_spec(spec: ModelSpec, checkpoint: Checkpoint, layer: str, x_TD: Tensor) -> Tensor:
    """The MoE block written down from `ModelSpec`'s documentation alone, token by token."""
    gate, weights = spec.blocks[layer].gate, checkpoint.gate(layer)
    compute_dtype = torch.float32 if gate.logits_dtype == "float32" else x_TD.dtype
    logits_TE = (x_TD.to(compute_dtype) @ weights.weight_ED.to(compute_dtype).T).float()
    score_TE = logits_TE.softmax(-1) if gate.score == "softmax" else logits_TE.sigmoid()
    choice_TE = score_TE if weights.bias_E is None else score_TE + weights.bias_E
    experts = [checkpoint.expert(layer, expert) for expert in range(spec.num_experts)]
    y_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        choice_E = choice_TE[t]
        if gate.groups:
            choice_GE = choice_E.view(gate.groups.num_groups, -1)
            best = choice_GE.topk(2).values.sum(-1).topk(gate.groups.top_groups).indices
            mask_GE = torch.full_like(choice_GE, -torch.inf)
            mask_GE[best] = 0
            choice_E = (choice_GE + mask_GE).flatten()
        chosen_K = choice_E.topk(gate.top_k).indices
        weight_K = score_TE[t][chosen_K]
        if gate.renorm == "sum":
            weight_K = weight_K / (weight_K.sum() + gate.renorm_eps)
        weight_K = weight_K * gate.scale
        if gate.weight_dtype == "model":
            weight_K = weight_K.to(x_TD.dtype)
        for weight, chosen in zip(weight_K, chosen_K.tolist(), strict=True):
            expert = experts[chosen]
            y_TD[t] += (weight * _swiglu(x_D[None], expert)[0]).to(x_TD.dtype)
    shared = checkpoint.shared(layer)
    if shared is not None:
        shared_TD = _swiglu(x_TD, shared.mlp)
        if shared.output_gate_1D is not None:
            shared_TD = shared_TD * (x_TD @ shared.output_gate_1D.T).sigmoid()
        y_TD = y_TD + shared_TD
    return y_TD


_LAYOUTS = pytest.mark.parametrize(("sharded", "stacked"), [(False, False), (True, False), (False, True), (True, True)])
_FAMILIES = pytest.mark.parametrize("family", FAMILIES)


@_FAMILIES
@_LAYOUTS
def test_the_spec_states_the_family_exactly(family: str, sharded: bool, stacked: bool, tmp_path: Path) -> None:
    tiny_model(family, tmp_path, dtype="bfloat16", sharded=sharded, stacked=stacked)
    assert read_model(tmp_path) == ModelSpec(
        path=tmp_path,
        family=family,
        dtype="bfloat16",
        dim=DIM,
        hidden_dim=HIDDEN_DIM,
        blocks=dict.fromkeys(_LAYERS[family], BlockSpec(gate=_GATES[family], shared=_SHARED.get(family))),
    )


@_FAMILIES
@_LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_those_that_transformers_loads(
    family: str, sharded: bool, stacked: bool, dtype: str, tmp_path: Path
) -> None:
    tiny_model(family, tmp_path, dtype=dtype, sharded=sharded, stacked=stacked)
    checkpoint, model = Checkpoint(read_model(tmp_path)), load_reference(tmp_path)
    for layer in _LAYERS[family]:
        block: Any = reference_block(model, layer)
        for index in range(NUM_EXPERTS):
            expert = checkpoint.expert(layer, index)
            assert expert.up_IL.dtype is getattr(torch, dtype)
            assert torch.equal(expert.up_IL, block.experts.gate_up_proj[index])
            assert torch.equal(expert.down_LF, block.experts.down_proj[index])
        gate, shared = checkpoint.gate(layer), checkpoint.shared(layer)
        assert torch.equal(gate.weight_ED, block.gate.weight)
        if family == "deepseek_v3":
            assert gate.bias_E is not None
            assert gate.bias_E.dtype is torch.float32
            assert torch.equal(gate.bias_E, block.gate.e_score_correction_bias)
        else:
            assert gate.bias_E is None
        if family not in _SHARED:
            assert shared is None
            continue
        assert shared is not None
        mlp = block.shared_expert if family == "qwen2_moe" else block.shared_experts
        assert torch.equal(shared.mlp.up_IL, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
        assert torch.equal(shared.mlp.down_LF, mlp.down_proj.weight)
        if family == "qwen2_moe":
            assert shared.output_gate_1D is not None
            assert torch.equal(shared.output_gate_1D, block.shared_expert_gate.weight)
        else:
            assert shared.output_gate_1D is None


@_FAMILIES
@pytest.mark.parametrize("stacked", [False, True])
def test_the_block_computed_from_the_spec_equals_transformers(family: str, stacked: bool, tmp_path: Path) -> None:
    tiny_model(family, tmp_path, seed=1, stacked=stacked)
    _assert_blocks_equal(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("olmoe", {"norm_topk_prob": True}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"norm_topk_prob": None}),
        ("deepseek_v3", {"routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}),
        ("mixtral", {"num_experts_per_tok": NUM_EXPERTS}),
    ],
)
def test_config_values_reach_the_gate_as_in_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tiny_model(family, tmp_path, seed=2)
    _edit_config(tmp_path, **changes)
    _assert_blocks_equal(tmp_path)


@pytest.mark.parametrize("family", sorted(set(FAMILY_ROWS) - _WITHOUT_A_CLASS))
def test_absent_keys_take_the_defaults_of_transformers(family: str) -> None:
    reference: Any = transformers.CONFIG_MAPPING[family]()
    row = FAMILY_ROWS[family]
    if family not in ("switch_transformers", "nllb-moe"):
        reference = reference.get_text_config()
    for setting in settings_of(row):
        for key in setting.keys:
            holder = getattr(reference, row.section, reference) if row.section else reference
            assert setting.required or getattr(holder, key, setting.default) == setting.default, key


def test_the_config_s_dtype_goes_before_the_stored_one_as_in_transformers(tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path, dtype="float32")
    _edit_config(tmp_path, dtype="bfloat16")
    spec, reference = read_model(tmp_path), load_reference(tmp_path)
    assert spec.dtype == "bfloat16"
    block: Any = reference_block(reference, "1")
    checkpoint = Checkpoint(spec)
    assert torch.equal(checkpoint.expert("1", 3).up_IL, block.experts.gate_up_proj[3])
    assert torch.equal(checkpoint.gate("1").weight_ED, block.gate.weight)
    _edit_config(tmp_path, dtype=...)
    assert read_model(tmp_path).dtype == "float32"


@pytest.mark.parametrize("keys", [("hidden_act",), ("routed_scaling_factor", "norm_topk_prob")])
def test_a_config_may_leave_out_what_is_default(keys: tuple[str, ...], tmp_path: Path) -> None:
    tiny_model("deepseek_v3", tmp_path)
    spec = read_model(tmp_path)
    _edit_config(tmp_path, **dict.fromkeys(keys, ...))
    assert read_model(tmp_path) == spec


def _assert_blocks_equal(path: Path) -> None:
    spec, model = read_model(path), load_reference(path)
    checkpoint = Checkpoint(spec)
    x_TD = torch.randn(16, DIM, generator=torch.Generator().manual_seed(7))
    for layer in spec.layers:
        with torch.no_grad():
            expected_TD = reference_block(model, layer)(x_TD[None])[0]
        error = (_block_by_spec(spec, checkpoint, layer, x_TD) - expected_TD).abs().max() / expected_TD.abs().max()
        assert error <= 1e-5


@_FAMILIES
@pytest.mark.parametrize("stacked", [False, True])
def test_bytes_read_are_exactly_the_bytes_asked_for(family: str, stacked: bool, tmp_path: Path) -> None:
    tiny_model(family, tmp_path, dtype="bfloat16", stacked=stacked)
    checkpoint = Checkpoint(read_model(tmp_path))
    layer, expected = _LAYERS[family][-1], 0
    assert checkpoint.bytes_read == expected
    for expert in (3, 0):
        checkpoint.expert(layer, expert)
        expected += 2 * _EXPERT_PARAMS
        assert checkpoint.bytes_read == expected
    checkpoint.gate(layer)
    expected += 2 * NUM_EXPERTS * DIM + (4 * NUM_EXPERTS if family == "deepseek_v3" else 0)
    assert checkpoint.bytes_read == expected
    checkpoint.shared(layer)
    if family in _SHARED:
        expected += 2 * (3 * DIM * _SHARED[family].hidden_dim + (DIM if family == "qwen2_moe" else 0))
    assert checkpoint.bytes_read == expected


def test_opening_a_model_reads_headers_and_no_weights(tmp_path: Path) -> None:
    header = json.dumps(_sparse_file_header()).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * (8 * 3 * 8192 * 16384 + 8 * 8192))  # 12 GiB of holes
    config = {"model_type": "mixtral", "hidden_size": 8192, "intermediate_size": 16384, "num_hidden_layers": 1}
    config |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(read_model(tmp_path))
    assert checkpoint.gate("0").weight_ED.abs().sum() == 0
    assert checkpoint.bytes_read == 4 * 8 * 8192


def _sparse_file_header() -> dict[str, Any]:
    header: dict[str, Any] = {}
    end = 0
    shapes = {f"experts.{e}.{w}.weight": s for e in range(8) for w, s in _MIXTRAL_SHAPES.items()}
    for name, shape in (shapes | {"gate.weight": [8, 8192]}).items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        header[f"model.layers.0.block_sparse_moe.{name}"] = entry
    return header


_MIXTRAL_SHAPES = {"w1": [16384, 8192], "w3": [16384, 8192], "w2": [8192, 16384]}


def test_tensors_outlive_the_files_they_came_from(tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path)
    checkpoint = Checkpoint(read_model(tmp_path))
    expert = checkpoint.expert("1", 2)
    copy_LF = expert.down_LF.clone()
    expert.up_IL.zero_()  # ours alone: the file keeps its values
    assert checkpoint.expert("1", 2).up_IL.any()
    os.truncate(tmp_path / "model.safetensors", 0)
    assert torch.equal(expert.down_LF, copy_LF)


def test_many_threads_read_the_same_bytes_as_one(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", tmp_path, sharded=True)
    spec = read_model(tmp_path)
    one, shared = Checkpoint(spec), Checkpoint(spec)
    pairs = [(layer, expert) for layer in spec.layers for expert in range(NUM_EXPERTS)] * 4
    with ThreadPoolExecutor(8) as pool:
        for (layer, expert), weights in zip(pairs, pool.map(lambda pair: shared.expert(*pair), pairs), strict=True):
            assert torch.equal(weights.down_LF, one.expert(layer, expert).down_LF)
    assert shared.bytes_read == one.bytes_read == len(pairs) * 4 * _EXPERT_PARAMS


def test_shards_without_an_index_are_read(tmp_path: Path) -> None:
    tiny_model("olmoe", tmp_path, sharded=True)
    spec = read_model(tmp_path)
    expected_DF = Checkpoint(spec).expert("2", 7).down_LF
    (tmp_path / "model.safetensors.index.json").unlink()
    assert read_model(tmp_path) == spec
    assert torch.equal(Checkpoint(spec).expert("2", 7).down_LF, expected_DF)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_a_composite_model_is_read_through_its_text_config(prefix: str, tmp_path: Path) -> None:
    tiny_model("deepseek_v3", tmp_path)
    spec = read_model(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}))
    _edit_tensors(tmp_path, lambda tensors: _rename(tensors, "model.", prefix))
    assert read_model(tmp_path) == spec


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    renamed = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


def test_the_multi_token_prediction_layer_is_not_a_layer(tmp_path: Path) -> None:
    tiny_model("deepseek_v3", tmp_path)
    _edit_config(tmp_path, num_hidden_layers=2)  # layer 2 is now stored beyond the model, as DeepSeek-V3 does
    spec = read_model(tmp_path)
    assert spec.layers == ("1",)
    assert Checkpoint(spec).expert("1", 0).up_IL.shape == (2 * HIDDEN_DIM, DIM)


def test_num_experts_may_go_by_any_of_its_names(tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path)
    spec = read_model(tmp_path)
    _edit_config(tmp_path, num_local_experts=..., num_experts=NUM_EXPERTS)
    assert read_model(tmp_path) == spec


def test_a_model_without_shared_experts_says_so(tmp_path: Path) -> None:
    tiny_model("deepseek_v3", tmp_path)
    _edit_config(tmp_path, n_shared_experts=0)
    _edit_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "shared" in name])
    spec = read_model(tmp_path)
    assert spec.blocks["1"].shared is None
    assert Checkpoint(spec).shared("1") is None


def test_a_router_in_another_dtype_is_cast_as_transformers_does(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", tmp_path, dtype="bfloat16")
    name = "model.layers.1.mlp.gate.weight"
    _edit_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].float() * 1.001}))
    block: Any = reference_block(load_reference(tmp_path), 1)
    assert torch.equal(Checkpoint(read_model(tmp_path)).gate("1").weight_ED, block.gate.weight)


# Refusals of read_model: config.json


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"model_type": "gpt2"}, "model_type is 'gpt2' .supported: afmoe, aria"),
        ("mixtral", {"model_type": ...}, "model_type is None"),
        ("mixtral", {"model_type": ["mixtral"]}, "model_type is"),
        ("mixtral", {"hidden_act": "xielu"}, "hidden_act is 'xielu' .*'silu'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax' .*'sigmoid'"),
        ("olmoe", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', an option that olmoe does not have"),
        ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "topk_method is .*'noaux_tc'"),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config.weight_block_size is missing",
        ),
        ("mixtral", {"num_experts": 9}, "num_experts is 9, but num_local_experts is 8"),
        ("mixtral", {"num_local_experts": 4}, "says 4 experts, but layer 0 has experts 0 to 7"),
        ("mixtral", {"num_local_experts": 16}, "says 16 experts, but layer 0 has experts 0 to 7"),
        ("mixtral", {"num_local_experts": ...}, "mixtral needs the key num_local_experts or num_experts"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9 .*at most the 8 experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0 .*at least 1"),
        ("mixtral", {"hidden_size": "64"}, "hidden_size is '64' .*an integer"),
        ("mixtral", {"hidden_size": True}, "hidden_size is True .*an integer"),
        ("olmoe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes' .*true or false"),
        ("deepseek_v3", {"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan .*finite"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3 .*divisor of the 8 experts"),
        ("deepseek_v3", {"n_group": 8}, "n_group is 8 .*two per group"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group is 5 .*at most the 4 groups"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5 .*experts of 2 of 4 groups"),
        ("deepseek_v3", {"n_shared_experts": 0}, "shared_experts.*describes a model without shared"),
        ("qwen3_moe", {"moe_intermediate_size": ...}, "qwen3_moe needs the key moe_intermediate_size"),
    ],
)
def test_a_config_that_we_do_not_understand_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_model(family, tmp_path)
    _edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        read_model(tmp_path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"x"', "\x00"])
def test_a_config_that_is_not_a_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json: (cannot be read|not a JSON object)"):
        read_model(tmp_path)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="nowhere: not a directory"):
        read_model(tmp_path / "nowhere")
    with pytest.raises(UnsupportedModel, match=r"no config\.json: not a model directory"):
        read_model(tmp_path)
    tiny_model("mixtral", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"no \.safetensors file"):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "model.pth"])
def test_pickled_weights_are_refused_unread(name: str, tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(UnsupportedModel, match=rf"only pickled weights \({name}\).*never read"):
        read_model(tmp_path)


# Refusals of read_model: tensors


def _pop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def _drop(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


_MOE = "model.layers.1.block_sparse_moe."
_MLP = "model.layers.1.mlp."


@pytest.mark.parametrize(
    ("family", "edit", "error", "message"),
    [
        (
            "mixtral",
            _pop(f"{_MOE}experts.3.w2.weight"),
            CorruptWeights,
            "layer 1: .*expert down of expert 3 is missing",
        ),
        ("mixtral", _pop(f"{_MOE}gate.weight"), CorruptWeights, "layer 1: .*router is missing"),
        ("mixtral", _drop("layers.1."), CorruptWeights, "layer 1 of 3 has neither"),
        ("mixtral", _drop("layers.1.block_sparse_moe.experts"), CorruptWeights, "router, but its experts"),
        ("mixtral", _drop("experts"), UnsupportedModel, "no MoE layer"),
        (
            "mixtral",
            _put(f"{_MOE}experts.3.w2.weight", torch.zeros(32, 64)),
            CorruptWeights,
            r"experts\.3\.w2\.weight has shape \(32, 64\), expected \(64, 32\)",
        ),
        (
            "mixtral",
            _put(f"{_MOE}gate.weight", torch.zeros(9, 64)),
            UnsupportedModel,
            r"gate\.weight has shape \(9, 64\), expected \(8, 64\)",
        ),
        (
            "mixtral",
            _put(f"{_MOE}gate.weight", torch.zeros(8, 63)),
            CorruptWeights,
            r"gate\.weight has shape \(8, 63\), expected \(8, 64\)",
        ),
        (
            "mixtral",
            _put(f"{_MOE}experts.3.w2.bias", torch.zeros(64)),
            UnsupportedModel,
            r"experts\.3\.w2\.bias: .* without biases",
        ),
        ("mixtral", _put(f"{_MOE}gate.e_score_correction_bias", torch.zeros(8)), UnsupportedModel, "without selection"),
        ("mixtral", _put(f"{_MLP}experts.3.down_proj.weight", torch.zeros(64, 32)), UnsupportedModel, "the same part"),
        ("mixtral", _put(f"{_MOE}experts.down_proj", torch.zeros(8, 64, 32)), UnsupportedModel, "stacked and per-exp"),
        ("mixtral", _put(f"{_MLP}gate_proj.weight", torch.zeros(32, 64)), CorruptWeights, "layer 1 of 3 has both"),
        ("mixtral", _put("layers.1.mlp.gate.weight", torch.zeros(8, 64)), UnsupportedModel, "more than one stack"),
        (
            "mixtral",
            _put(f"{_MOE}experts.3.w2.weight", torch.zeros(64, 32, dtype=torch.float64)),
            UnsupportedModel,
            r"experts\.3\.w2\.weight has dtype F64",
        ),
        (
            "mixtral",
            _put(f"{_MOE}experts.3.w2.weight", torch.zeros(64, 32, dtype=torch.bfloat16)),
            UnsupportedModel,
            r"experts\.3\.w2\.weight has dtype BF16 .*has F32",
        ),
        ("qwen2_moe", _pop(f"{_MLP}shared_expert_gate.weight"), CorruptWeights, "shared output gate is missing"),
        ("qwen2_moe", _drop("1.mlp.shared_expert.up"), CorruptWeights, "shared up is missing"),
        ("qwen3_moe", _put(f"{_MLP}shared_expert.up_proj.weight", torch.zeros(1)), UnsupportedModel, "without shared"),
        ("deepseek_v3", _pop(f"{_MLP}gate.e_score_correction_bias"), CorruptWeights, "selection bias is missing"),
        (
            "deepseek_v3",
            _put(f"{_MLP}shared_experts.up_proj.weight", torch.zeros(32, 64)),
            CorruptWeights,
            r"has shape \(32, 64\), expected \(64, 64\)",
        ),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(
    family: str,
    edit: Callable[[dict[str, Tensor]], object],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    tiny_model(family, tmp_path)
    _edit_tensors(tmp_path, edit)
    with pytest.raises(error, match=message) as caught:
        read_model(tmp_path)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("shape", "error"), [((8, 33, 64), CorruptWeights), ((9, 64, 32), UnsupportedModel), ((8, 64), CorruptWeights)]
)
def test_stacked_tensors_of_another_shape_are_refused(
    shape: tuple[int, ...], error: type[Exception], tmp_path: Path
) -> None:
    tiny_model("mixtral", tmp_path, stacked=True)
    _edit_tensors(tmp_path, _put(f"{_MLP}experts.down_proj", torch.zeros(shape)))
    with pytest.raises(error, match=r"experts\.down_proj has shape .* expected \(8, 64, 32\)"):
        read_model(tmp_path)


# Refusals of read_model: files


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}).encode()


@pytest.mark.parametrize(
    ("header", "data", "header_bytes", "message"),
    [
        (b"", b"", 200_000_000, "header of 200000000 bytes exceeds the limit of 100000000"),
        (b"{}", b"", 2**64 - 1, "exceeds the limit"),
        (b"{}", b"", 50, "truncated: 10 bytes cannot hold a header of 50 bytes"),
        (b"{", b"", None, "the header is not JSON"),
        (b"\xff\xfe\xfd", b"", None, "the header is not JSON"),
        (b"[" * 100_000, b"", None, "the header is not JSON"),
        (b"[]", b"", None, "the header is not a JSON object"),
        (b'{"a": 1}', b"", None, "bad header: tensor a is described as 1"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', b"", None, "bad header: tensor a is described as"),
        (b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}', b"1234", None, "bad header: tensor a is"),
        (_entry([1], 4, 0), b"1234", None, "bad header: tensor a is described as"),
        (_entry([-1], 0, 4), b"1234", None, "bad header: tensor a is described as"),
        (_entry([2], 0, 4), b"1234", None, "tensor a of shape .2,. and dtype F32 spans 4 bytes, expected 8"),
        (_entry([1], 0, 4), b"123", None, "truncated: "),
        (_entry([1], 0, 4), b"12345", None, "bad header: "),
        (_entry([1], 1, 5), b"12345", None, "bad header: tensor a starts at byte"),
        (_entry([2**62], 0, 2**64), b"1234", None, "truncated: "),
    ],
)
def test_a_bad_safetensors_file_is_refused(
    header: bytes, data: bytes, header_bytes: int | None, message: str, tmp_path: Path
) -> None:
    tiny_model("mixtral", tmp_path)
    _write_raw(tmp_path / "model.safetensors", header, data, header_bytes=header_bytes)
    with pytest.raises(CorruptWeights, match=message) as caught:
        read_model(tmp_path)
    assert "model.safetensors" in caught.value.message


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(size: int, tmp_path: Path) -> None:
    file = tiny_model("mixtral", tmp_path) / "model.safetensors"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(CorruptWeights, match=r"model\.safetensors: (truncated|the header|layer)"):
        read_model(tmp_path)


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path, sharded=True)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(weight_map.items()))
    for text, message in (
        ("{", "not a safetensors index"),
        ("{}", "not a safetensors index"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": []}', "weight_map is not a non-empty object"),
        (json.dumps({"weight_map": weight_map | {name: "../model.safetensors"}}), "not the name of a .safetensors"),
        (json.dumps({"weight_map": weight_map | {name: "pytorch_model.bin"}}), "not the name of a .safetensors"),
        (json.dumps({"weight_map": weight_map | {name: 3}}), "not the name of a .safetensors"),
        (json.dumps({"weight_map": weight_map | {"extra": shard}}), f"{shard}: tensor extra is missing"),
        (json.dumps({"weight_map": weight_map | {name: "gone.safetensors"}}), "gone.safetensors: missing"),
    ):
        index.write_text(text)
        with pytest.raises(CorruptWeights, match=message):
            read_model(tmp_path)


def test_a_missing_shard_is_refused_with_and_without_an_index(tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path, sharded=True)
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(CorruptWeights, match=rf"{shard.name}: missing"):
        read_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CorruptWeights, match=rf"{shard.name}: missing"):
        read_model(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(CorruptWeights, match=r"b\.safetensors: tensor .* is also in a\.safetensors"):
        read_model(tmp_path)


# Refusals of Checkpoint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_refused_by_name(value: float, dtype: str, tmp_path: Path) -> None:
    tiny_model("mixtral", tmp_path, dtype=dtype)

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[f"{_MOE}experts.3.w3.weight"][17, 41] = value
        tensors[f"{_MOE}gate.weight"][7, 63] = value

    _edit_tensors(tmp_path, poison)
    checkpoint = Checkpoint(read_model(tmp_path))
    checkpoint.expert("1", 2)
    checkpoint.gate("0")
    with pytest.raises(CorruptWeights, match=r"model\.safetensors: tensor .*1\..*experts\.3\.w3\.weight holds NaN or"):
        checkpoint.expert("1", 3)
    with pytest.raises(CorruptWeights, match=r"model\.safetensors: tensor .*gate\.weight holds NaN or infinity"):
        checkpoint.gate("1")


def test_a_layer_or_expert_that_is_not_there_is_an_invalid_request(tmp_path: Path) -> None:
    checkpoint = Checkpoint(read_model(tiny_model("deepseek_v3", tmp_path)))
    for read in (checkpoint.gate, checkpoint.shared, lambda layer: checkpoint.expert(layer, 0)):
        with pytest.raises(InvalidRequest, match=r"layer '0' is not an MoE layer .*: 1, 2"):
            read("0")
    for expert in (-1, NUM_EXPERTS):
        with pytest.raises(InvalidRequest, match=f"expert {expert} of layer 1: the model has experts 0 to 7"):
            checkpoint.expert("1", expert)
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "cannot read tensor"),
        (lambda file: os.truncate(file, 100), "changed on disk"),
        (lambda file: os.utime(file, (0, 0)), "changed on disk"),
    ],
)
def test_a_file_replaced_under_us_is_an_error_and_not_a_crash(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(read_model(tiny_model("mixtral", tmp_path)))
    change(tmp_path / "model.safetensors")
    with pytest.raises(CorruptWeights, match=rf"model\.safetensors: {message}"):
        checkpoint.expert("1", 0)
    assert checkpoint.bytes_read == 0


def test_opening_in_one_step_gives_the_same_checkpoint(tiny_mixtral: Path) -> None:
    spec, opened = read_model(tiny_mixtral), Checkpoint.open(tiny_mixtral)
    assert opened.spec == spec
    assert opened.expert_extents("1", 3) == Checkpoint(spec).expert_extents("1", 3)
    assert opened.fingerprint == Checkpoint(spec).fingerprint


def test_a_directory_that_changed_since_the_spec_was_read_is_refused(tmp_path: Path) -> None:
    spec = read_model(tiny_model("deepseek_v3", tmp_path, dtype="bfloat16"))
    tiny_model("deepseek_v3", tmp_path, dtype="float32")
    with pytest.raises(CorruptWeights, match="changed since the model was described"):
        Checkpoint(spec)


def test_reading_a_model_imports_no_transformers() -> None:
    code = "import sys, protos.checkpoint; sys.exit('transformers' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# Refusals in general


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("mixtral", tmp_path_factory.mktemp("mixtral"))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["silu", "F32", "I4", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_config_of_any_values_is_read_or_refused(tiny_mixtral: Path, data: st.DataObject) -> None:
    file = tiny_mixtral / "config.json"
    original = file.read_text()
    keys = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts", "num_experts_per_tok"]
    keys += ["model_type", "hidden_act", "scoring_func", "text_config", "quantization_config", "norm_topk_prob"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), _JSON, min_size=1, max_size=2))
    try:
        _edit_config(tiny_mixtral, **changes)
        with suppress(UnsupportedModel, CorruptWeights):
            Checkpoint(read_model(tiny_mixtral)).expert("0", 0)
    finally:
        file.write_text(original)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_header_of_any_values_is_read_or_refused(tiny_mixtral: Path, data: st.DataObject) -> None:
    file = tiny_mixtral / "model.safetensors"
    original = file.read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    header = json.loads(original[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["", "dtype", "shape", "data_offsets"]))
    if field and isinstance(header[name], dict):
        header[name][field] = data.draw(_JSON)
    else:
        header[name] = data.draw(_JSON)
    try:
        _write_raw(file, json.dumps(header).encode(), original[8 + length :])
        with suppress(UnsupportedModel, CorruptWeights):
            Checkpoint(read_model(tiny_mixtral)).expert("0", 0)
    finally:
        file.write_bytes(original)
