"""Quantised directories end to end: read, decoded expert by expert, and computed as transformers does decoded ones."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.local_layer import LocalLayer
from cluster.run_model import run_verify
from protos.checkpoint import Checkpoint, read_model
from protos.errors import CorruptWeights, UnsupportedModel
from tests.family_configs import DIM
from tests.family_models import block_output
from tests.quantised_models import Method, QuantisedModel, awq, build_quantised, fp4, fp8, gptq, packed_int4
from tests.test_quant_config import AWQ, CHANNELS, FP8, GPTQ, GPTQ_V2, MXFP4, PACKED

NUM_TOKENS = 21
E8M0 = torch.float8_e8m0fnu
WIDE = {"moe_intermediate_size": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One quantised directory: a family case, how it is quantised, and how its tensors lie."""

    family: str
    method: Method
    memory_layout: bool = False
    config: dict[str, Any] = field(default_factory=dict)


def _fp8(block: list[int], **options: Any) -> Method:
    make = fp8((block[0], block[1]), **options)
    config = FP8 | {"weight_block_size": block}
    return Method(config=config, make={"": make}, words=f"FP8, one scale for {block[0]} x {block[1]} weights")


def _gptq(base: dict[str, Any] = GPTQ, **options: Any) -> Method:
    config = base | {"group_size": 16, "sym": False, "bits": options.get("bits", 4)}
    config |= {"desc_act": options.get("act_order", False)}
    order = ", in activation order" if config["desc_act"] else ""
    return Method(
        config=config, make={"": gptq(**options)}, words=f"GPTQ int{config['bits']}, one scale for 16 columns{order}"
    )


def _kimi(config: dict[str, Any]) -> None:
    config["model_type"] = "kimi_k2"


def _as_on_the_hub(config: dict[str, Any]) -> None:
    del config["transformers_version"]  # save_pretrained's mark, which says that the config is complete


_AWQ = Method(config=AWQ | {"group_size": 16}, make={"": awq()}, words="AWQ int4, one scale for 16 columns")
_INT4 = json.loads(json.dumps(PACKED))
_INT4["config_groups"]["group_0"]["weights"]["group_size"] = 16

CASES: dict[str, Case] = {
    "deepseek_v3 fp8": Case(family="deepseek_v3", method=_fp8([128, 128])),
    "deepseek_v3 fp8, small blocks": Case(family="deepseek_v3", method=_fp8([16, 16], dtype=torch.bfloat16)),
    "deepseek_v3 fp8, cut blocks": Case(family="deepseek_v3", method=_fp8([20, 36])),
    "deepseek_v3 fp8, stacked": Case(family="deepseek_v3", method=_fp8([32, 32]), memory_layout=True),
    "qwen3_moe fp8": Case(family="qwen3_moe", method=_fp8([32, 32])),
    "qwen3_moe fp8, stacked": Case(family="qwen3_moe", method=_fp8([128, 128]), memory_layout=True),
    "qwen3_moe mxfp8": Case(
        family="qwen3_moe",
        method=Method(
            config={"quant_method": "mxfp8"},
            make={"": fp8((1, 32), dtype=torch.uint8)},
            words="FP8, one scale for 1 x 32 weights",
        ),
    ),
    "mistral_large4 fp8, one scale": Case(
        family="mistral_large4",
        method=Method(
            config={"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
            make={"": fp8((0, 0), scale="qscale_weight", dtype=torch.bfloat16, extra="qscale_act")},
            words="FP8, one scale",
            unused=".qscale_act",
        ),
    ),
    "glm4_moe compressed-tensors fp8": Case(
        family="glm4_moe",
        method=Method(
            config=CHANNELS,
            make={"": fp8((1, 0), scale="weight_scale", dtype=torch.bfloat16)},
            words="FP8, one scale for 1 x all weights",
        ),
    ),
    "gpt_oss mxfp4": Case(
        family="gpt_oss",
        method=Method(
            config=MXFP4,
            make={"": fp4(scale="scales", blocks="blocks", dtype=torch.uint8)},
            words="MXFP4, one scale for 1 x 32 weights",
        ),
        config={"intermediate_size": 32},
    ),
    "deepseek_v4 fp4": Case(
        family="deepseek_v4:hash",
        method=Method(
            config=FP8 | {"expert_dtype": "fp4"},
            make={
                r"\.experts\.": fp4(scale="scale", dtype=E8M0),
                "": fp8((128, 128), scale="scale", dtype=E8M0),
            },
            words="FP4, one scale for 1 x 32 weights",
        ),
        config=WIDE,
    ),
    "inkling2 mxfp8, unsaid": Case(
        family="inkling2",
        method=Method(
            config=None,
            make={"": fp8((1, 32), scale="weight_scale", dtype=torch.uint8)},
            words="FP8, one scale for 1 x 32 weights",
            edit=_as_on_the_hub,
        ),
    ),
    "step3p7 fp8": Case(family="step3p7", method=_fp8([32, 32])),
    "mixtral gptq": Case(family="mixtral", method=_gptq()),
    "mixtral gptq 8 bits": Case(family="mixtral", method=_gptq(bits=8)),
    "mixtral gptq, zero biases": Case(family="mixtral", method=_gptq(bias=True)),
    "qwen3_moe gptq v2": Case(family="qwen3_moe", method=_gptq(GPTQ_V2, zeros="plain")),
    "qwen3_moe gptq act-order": Case(family="qwen3_moe", method=_gptq(act_order=True)),
    "mixtral awq": Case(family="mixtral", method=_AWQ),
    "qwen3_moe awq": Case(family="qwen3_moe", method=_AWQ),
    "kimi_k2 int4": Case(
        family="deepseek_v3",
        method=Method(
            config=_INT4,
            make={r"\.experts\.": packed_int4()},
            words="packed int4, one scale for 16 columns",
            edit=_kimi,
        ),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, path: Path, **options: Any) -> QuantisedModel:
    case = CASES[name]
    return build_quantised(
        case.family, path, case.method, memory_layout=case.memory_layout, config=case.config, **options
    )


def edit_tensors(model: QuantisedModel, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = model.path / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_config(model: QuantisedModel, edit: Callable[[dict[str, Any]], object]) -> None:
    file = model.path / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def decoded(model: QuantisedModel, layer: str, expert: int) -> tuple[Tensor, Tensor]:
    """[gate; up] and down of an expert as transformers holds the twin's."""
    experts: Any = model.twin.layers[layer].get_submodule("experts")
    up_IL, down_LF = experts.gate_up_proj[expert], experts.down_proj[expert]
    if model.twin.name == "gpt_oss":
        up_IL, down_LF = torch.cat((up_IL.T[::2], up_IL.T[1::2])), down_LF.T
    return up_IL, down_LF


@pytest.mark.parametrize("sharded", [False, True], ids=["float32", "bfloat16 in shards"])
@pytest.mark.parametrize("name", CASES)
def test_every_expert_is_what_the_format_defines_and_every_block_computes_with_it(
    name: str, sharded: bool, tmp_path: Path
) -> None:
    dtype = "bfloat16" if sharded else "float32"
    model = build(name, tmp_path, dtype=dtype, sharded=sharded)
    assert (len(list(model.path.glob("*.safetensors"))) > 1) is sharded
    spec = read_model(model.path)
    assert spec.dtype == dtype
    assert spec.quantisation == CASES[name].method.words
    assert spec.layers == tuple(model.twin.layers)
    checkpoint = Checkpoint(spec)
    for layer in spec.layers:
        for expert in range(spec.num_experts):
            weights = checkpoint.expert(layer, expert)
            up_IL, down_LF = decoded(model, layer, expert)
            assert weights.up_IL.dtype is getattr(torch, dtype)
            assert torch.equal(weights.up_IL, up_IL)
            assert torch.equal(weights.down_LF, down_LF)
    assert checkpoint.bytes_read == model.expert_bytes
    x_TD = torch.randn(NUM_TOKENS, DIM, generator=torch.Generator().manual_seed(7)).to(getattr(torch, dtype))
    ids_T = torch.randint(128, (NUM_TOKENS,), generator=torch.Generator().manual_seed(8))
    for layer in spec.layers:
        expected_TD = block_output(model.twin, layer, x_TD, ids_T)
        y_TD, _ = LocalLayer(spec, layer, getattr(torch, dtype))(x_TD, token_ids_T=ids_T.numpy())
        error = (y_TD.float() - expected_TD.float()).norm() / expected_TD.float().norm()
        assert error <= (1e-2 if sharded else 1e-5)


EXPERT = "model.layers.2.mlp.experts.3.up_proj"
MIXTRAL = "model.layers.2.block_sparse_moe.experts.3.w3"


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


def removed(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def added(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


def plain_with_bias(tensors: dict[str, Tensor]) -> None:
    for piece in ("qzeros", "scales", "g_idx", "qweight"):
        del tensors[f"{MIXTRAL}.{piece}"]
    tensors[f"{MIXTRAL}.weight"] = torch.zeros(48, 64)


NAN = float("nan")
SCALE = f"{EXPERT}.weight_scale_inv"
BAD_TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str, str]] = {
    "no scale": ("deepseek_v3 fp8", removed(SCALE), f"{EXPERT}.weight", "has no scale"),
    "a scale of another shape": (
        "deepseek_v3 fp8, small blocks",
        replaced(SCALE, lambda scale: scale[:, :3].clone()),
        f"{EXPERT}.weight",
        r"its scale has shape \[3, 3\], expected \[3, 4\]",
    ),
    "a scale of another dtype": (
        "deepseek_v3 fp8",
        replaced(SCALE, lambda scale: scale.double()),
        f"{EXPERT}.weight",
        "its scale has dtype F64",
    ),
    "a weight of another dtype": (
        "deepseek_v3 fp8",
        replaced(f"{EXPERT}.weight", lambda weight: weight.view(torch.int8)),
        f"{EXPERT}.weight",
        "its weight has dtype I8",
    ),
    "no weight": ("deepseek_v3 fp8", removed(f"{EXPERT}.weight"), SCALE, "has no weight"),
    "no scale of a shared expert": (
        "deepseek_v3 fp8",
        removed("model.layers.1.mlp.shared_experts.down_proj.weight_scale_inv"),
        "model.layers.1.mlp.shared_experts.down_proj.weight",
        "has no scale",
    ),
    "no scales of a stack": (
        "qwen3_moe fp8, stacked",
        removed("model.layers.2.mlp.experts.down_proj_scale_inv"),
        "model.layers.2.mlp.experts.down_proj",
        "has no scale",
    ),
    "no scales of mxfp4": (
        "gpt_oss mxfp4",
        removed("model.layers.1.mlp.experts.gate_up_proj_scales"),
        "model.layers.1.mlp.experts.gate_up_proj_blocks",
        "has no scales",
    ),
    "blocks of another shape": (
        "gpt_oss mxfp4",
        replaced("model.layers.1.mlp.experts.gate_up_proj_blocks", lambda blocks: blocks[:, :, :1].clone()),
        "model.layers.1.mlp.experts.gate_up_proj_blocks",
        r"its blocks has shape \[64, 1, 16\], expected \[64, 2, 16\]",
    ),
    "no zero points": ("mixtral gptq", removed(f"{MIXTRAL}.qzeros"), MIXTRAL, "has no qzeros"),
    "no order of columns": (
        "qwen3_moe gptq act-order",
        removed(f"{EXPERT}.g_idx"),
        EXPERT,
        "has no g_idx",
    ),
    "no packed words": ("kimi_k2 int4", removed(f"{EXPERT}.weight_packed"), EXPERT, "has no packed"),
    "an expert that is not there": (
        "mixtral awq",
        lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(MIXTRAL)],
        "expert up of expert 3",
        "is missing",
    ),
}
BAD_VALUES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str, str]] = {
    "a scale that is NaN": (
        "deepseek_v3 fp8",
        replaced(SCALE, lambda scale: scale * NAN),
        f"tensor {EXPERT}.weight_scale_inv",
        "NaN or infinity",
    ),
    "an exponent that is NaN": (
        "inkling2 mxfp8, unsaid",
        replaced("model.llm.layers.2.mlp.experts.w13_weight_scale", lambda scale: scale.fill_(255)),
        r"model.llm.layers.2.mlp.experts.w13_weight\[3\]",
        "NaN or infinity",
    ),
    "a code that is NaN": (
        "deepseek_v3 fp8",
        replaced(f"{EXPERT}.weight", lambda weight: weight.view(torch.uint8).fill_(0x7F).view(torch.float8_e4m3fn)),
        f"{EXPERT}.weight",
        "NaN",
    ),
    "a bias that is not zero": (
        "mixtral gptq, zero biases",
        replaced(f"{MIXTRAL}.bias", lambda bias: bias + 0.5),
        MIXTRAL,
        "its bias is not zero",
    ),
    "another shape than the checkpoint says": (
        "kimi_k2 int4",
        replaced(f"{EXPERT}.weight_shape", lambda shape: shape.flip(0)),
        EXPERT,
        r"weight_shape is \[64, 48\], expected \[48, 64\]",
    ),
}
UNKNOWN: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str, str]] = {
    "a piece of another format": (
        "qwen3_moe fp8",
        added(f"{EXPERT}.weight_packed", torch.zeros(48, 8, dtype=torch.int32)),
        f"{EXPERT}.weight_packed",
        "has no place in the known layouts",
    ),
    "scales under two names": (
        "qwen3_moe fp8",
        added(f"{EXPERT}.weight_scale", torch.zeros(2, 2)),
        f"{EXPERT}.weight_scale",
        "play the same part",
    ),
    "a bias where nothing is packed": ("mixtral gptq", plain_with_bias, f"{MIXTRAL}.bias", "experts without biases"),
    "a bias that the format does not know": (
        "mixtral awq",
        added(f"{MIXTRAL}.bias", torch.zeros(48)),
        f"{MIXTRAL}.bias",
        "is no part of AWQ int4",
    ),
    "a quantised router": (
        "qwen3_moe fp8",
        replaced("model.layers.2.mlp.gate.weight", lambda weight: weight.to(torch.float8_e4m3fn)),
        "model.layers.2.mlp.gate.weight",
        "has dtype F8_E4M3",
    ),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_a_tensor_that_is_missing_or_of_another_kind_is_found_before_anything_is_read(
    what: str, tmp_path: Path
) -> None:
    name, edit, tensor, problem = BAD_TENSORS[what]
    model = build(name, tmp_path)
    edit_tensors(model, edit)
    with pytest.raises(CorruptWeights, match=problem) as refused:
        read_model(model.path)
    assert tensor in str(refused.value)
    assert what == "an expert that is not there" or str(model.path / "model.safetensors") in str(refused.value)


@pytest.mark.parametrize("what", BAD_VALUES)
def test_a_value_that_is_no_weight_fails_its_expert_alone(what: str, tmp_path: Path) -> None:
    name, edit, tensor, problem = BAD_VALUES[what]
    model = build(name, tmp_path)
    edit_tensors(model, edit)
    checkpoint = Checkpoint(read_model(model.path))
    checkpoint.expert("1", 3)
    with pytest.raises(CorruptWeights, match=rf"{model.path}/model.safetensors: {tensor}.*{problem}"):
        checkpoint.expert("2", 3)


@pytest.mark.parametrize("what", UNKNOWN)
def test_a_tensor_that_the_format_does_not_know_is_refused(what: str, tmp_path: Path) -> None:
    name, edit, tensor, problem = UNKNOWN[what]
    model = build(name, tmp_path)
    if what == "a bias where nothing is packed":
        edit_tensors(model, added(f"{MIXTRAL}.bias", torch.zeros(48)))
    edit_tensors(model, edit)
    with pytest.raises(UnsupportedModel, match=problem) as refused:
        read_model(model.path)
    assert tensor in str(refused.value)
    assert str(model.path / "model.safetensors") in str(refused.value)


def test_a_module_that_the_config_leaves_out_must_not_be_quantised(tmp_path: Path) -> None:
    model = build("qwen3_moe fp8", tmp_path)
    edit_config(model, lambda config: config["quantization_config"]["modules_to_not_convert"].append(EXPERT))
    with pytest.raises(UnsupportedModel, match=rf"{EXPERT}.weight has dtype F8_E4M3, but quantization_config leaves"):
        read_model(model.path)


def test_a_module_that_is_stored_plain_is_read_as_it_is(tmp_path: Path) -> None:
    model = build("qwen3_moe fp8", tmp_path)
    decoded_IL, _ = decoded(model, "2", 3)
    _, up_FL = decoded_IL.chunk(2)

    def store_plain(tensors: dict[str, Tensor]) -> None:
        del tensors[SCALE]
        tensors[f"{EXPERT}.weight"] = up_FL.clone()

    edit_tensors(model, store_plain)
    spec = read_model(model.path)
    assert spec.quantisation == "FP8, one scale for 32 x 32 weights"
    assert torch.equal(Checkpoint(spec).expert("2", 3).up_IL, decoded_IL)


def test_quantised_tensors_without_a_word_in_the_config_are_refused(tmp_path: Path) -> None:
    model = build("deepseek_v3 fp8", tmp_path)
    edit_config(model, lambda config: config.pop("quantization_config"))
    with pytest.raises(UnsupportedModel, match=r"has dtype F8_E4M3, but config.json has no quantization_config"):
        read_model(model.path)


def test_transposed_stacks_of_a_quantised_format_are_refused(tmp_path: Path) -> None:
    case = Case(family="qwen3_vl_moe", method=_fp8([32, 32]))
    model = build_quantised(case.family, tmp_path, case.method)
    with pytest.raises(CorruptWeights, match=r"its weight has shape \[64, 96\], expected \[96, 64\]"):
        read_model(model.path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_config_that_names_no_dtype_leaves_it_to_the_router(dtype: str, tmp_path: Path) -> None:
    model = build("qwen3_moe fp8", tmp_path, dtype=dtype)
    edit_config(model, lambda config: [config.pop(key, None) for key in ("dtype", "torch_dtype")])
    assert read_model(model.path).dtype == dtype


def test_quantize_config_beside_a_silent_config_is_enough(tmp_path: Path) -> None:
    model = build("mixtral gptq", tmp_path)
    options = json.loads((model.path / "config.json").read_text())["quantization_config"]
    edit_config(model, lambda config: config.pop("quantization_config"))
    del options["quant_method"]  # as AutoGPTQ 0.4 wrote it
    beside = model.path / "quantize_config.json"
    beside.write_text(json.dumps(options))
    spec = read_model(model.path)
    assert spec.quantisation == "GPTQ int4, one scale for 16 columns"
    assert torch.equal(Checkpoint(spec).expert("2", 3).up_IL, decoded(model, "2", 3)[0])
    beside.write_text(json.dumps(options | {"bits": 3}))
    with pytest.raises(UnsupportedModel, match=r"quantize_config.json: quantization_config.bits is 3"):
        read_model(model.path)
    beside.write_text("[")
    with pytest.raises(UnsupportedModel, match=r"quantize_config.json: cannot be read"):
        read_model(model.path)


def test_an_inkling_2_that_transformers_has_written_is_what_it_says(tmp_path: Path) -> None:
    model = build("inkling2 mxfp8, unsaid", tmp_path)
    edit_config(model, lambda config: config.update(transformers_version="5.23.0"))
    with pytest.raises(UnsupportedModel, match=r"config.json has no quantization_config"):
        read_model(model.path)


def test_headers_alone_describe_a_model_of_deepseek_v3_s_size_per_layer(tmp_path: Path) -> None:
    """Real shapes, sparse files: 1,573 tensors and 12 GB to a layer, of which nothing is on disk."""
    dim, hidden, num_experts, num_layers = 7168, 2048, 256, 2
    config = {
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "hidden_size": dim,
        "moe_intermediate_size": hidden,
        "n_routed_experts": num_experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "num_hidden_layers": num_layers,
        "quantization_config": FP8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for layer in range(num_layers):
        block, header, end = f"model.layers.{layer}.mlp", {}, 0
        entries: list[tuple[str, str, tuple[int, ...], int]] = [
            ("gate.weight", "BF16", (num_experts, dim), 2),
            ("gate.e_score_correction_bias", "F32", (256,), 4),
        ]
        for mlp in [*(f"experts.{expert}" for expert in range(num_experts)), "shared_experts"]:
            for part, shape in (("gate", (hidden, dim)), ("up", (hidden, dim)), ("down", (dim, hidden))):
                entries.append((f"{mlp}.{part}_proj.weight", "F8_E4M3", shape, 1))
                entries.append((f"{mlp}.{part}_proj.weight_scale_inv", "F32", (shape[0] // 128, shape[1] // 128), 4))
        for name, dtype, sizes, item_bytes in entries:
            begin, end = end, end + math.prod(sizes) * item_bytes
            header[f"{block}.{name}"] = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        with (tmp_path / f"model-{layer + 1:05d}-of-{num_layers:05d}.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    spec = read_model(tmp_path)
    assert (spec.layers, spec.num_experts, spec.dtype) == (("0", "1"), num_experts, "bfloat16")
    assert spec.quantisation == "FP8, one scale for 128 x 128 weights"
    assert Checkpoint(spec).expert_bytes("1", 255) == 3 * (hidden * dim + 4 * (hidden // 128) * (dim // 128))


@pytest.mark.parametrize("name", CASES)
async def test_verify_compares_quantised_models_with_what_they_stand_for(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    document = await run_verify(read_model(model.path), router=None, on_layer=lambda error, tolerance: None)
    assert document["ok"], document
    assert document["quantisation"] == CASES[name].method.words


async def test_a_model_whose_first_moe_layer_is_plain_is_a_quantised_one(tmp_path: Path) -> None:
    first = r"\.layers\.1\."
    config = FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.1."]}
    words = "FP8, one scale for 128 x 128 weights"
    method = Method(config=config, make={rf"^(?!.*{first})": fp8((128, 128))}, words=words)
    model = build_quantised("deepseek_v3", tmp_path, method)
    spec = read_model(model.path)
    assert spec.quantisation == method.words
    document = await run_verify(spec, router=None, on_layer=lambda error, tolerance: None)
    assert document["ok"], document
