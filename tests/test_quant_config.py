"""quantization_config as the hub has it becomes formats and rules; whatever is not understood is refused by name."""

import copy
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from protos.errors import UnsupportedModel
from protos.quant_config import read_quantisation
from protos.quant_floats import Fp4Blocks, Fp8Blocks, Mxfp4
from protos.quant_integers import Awq, Gptq, PackedIntegers
from protos.quantised import Quantisation, WeightFormat

FILE = Path("model/config.json")
EXPERT = "model.layers.3.mlp.experts.7.gate_proj"
SHARED = "model.layers.3.mlp.shared_experts.gate_proj"
GATE = "model.layers.3.mlp.gate"
ATTENTION = "model.layers.3.self_attn.q_proj"
BLOCKS = Fp8Blocks(block=(128, 128))

# As published with Qwen3-30B-A3B-FP8, gpt-oss, Qwen1.5-MoE GPTQ, GPTQModel's output, Mixtral AWQ, Kimi-K2-Thinking and
# GLM-4.5-FP8; lists shortened.
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.3.mlp.gate", "model.layers.3.input_layernorm"],
}
MXFP4: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
    ],
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "modules_in_block_to_quantize": None,
}
GPTQ_V2: dict[str, Any] = {
    **GPTQ,
    "checkpoint_format": "gptq_v2",
    "format": "gptq_v2",
    "pack_dtype": "int32",
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:4.0.0"], "mse": 0.0},
}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "version": "GEMM",
    "zero_point": True,
    "modules_to_not_convert": ["gate"],
}
PACKED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}
CHANNELS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.11.0",
    "ignore": ["lm_head", "model.layers.3.mlp.gate"],
    "config_groups": {
        "group_0": {
            "format": None,
            "targets": ["Linear"],
            "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"},
            "output_activations": None,
            "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"},
        }
    },
}
V1 = Gptq(bits=4, group_size=128, symmetric=True, zeros="less one", act_order=False)


def read(options: Any, **values: Any) -> Quantisation:
    quantisation = read_quantisation({"quantization_config": options, **values}, file=FILE)
    assert quantisation is not None
    assert pickle.loads(pickle.dumps(quantisation)) == quantisation
    return quantisation


def changed(options: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `options` with another value at the dotted `path`; `...` removes it."""
    copied = copy.deepcopy(dict(options))
    *parents, key = path.split(".")
    section = copied
    for parent in parents:
        section = section[parent]
    if value is ...:
        del section[key]
    else:
        section[key] = value
    return copied


def weights(value: Mapping[str, Any], base: Mapping[str, Any] = PACKED) -> dict[str, Any]:
    """`base` with other options of its only group's weights."""
    old = base["config_groups"]["group_0"]["weights"]
    return changed(base, "config_groups.group_0.weights", {**old, **value})


@pytest.mark.parametrize("values", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}])
def test_a_model_without_the_section_is_not_quantised(values: dict[str, Any]) -> None:
    assert read_quantisation(values, file=FILE) is None


GPTQMODELS_OWN: dict[str, Any] = {  # which says how it has worked
    "adapter": None,
    "failsafe": {"strategy": "rtn", "threshold": "0.5%"},
    "gptaq": None,
    "hyb_act": False,
    "offload_to_disk": True,
    "offload_to_disk_path": "./gptqmodel_offload/tmp",
    "pack_impl": "cpu",
    "v2": False,
    "vram_strategy": "exclusive",
}


def gptq(**options: Any) -> Gptq:
    return replace(V1, **options)


@pytest.mark.parametrize(
    ("options", "expert"),
    [
        (FP8, BLOCKS),
        (changed(FP8, "weight_block_size", [64, 32]), Fp8Blocks(block=(64, 32))),
        (changed(FP8, "fmt", "float8_e4m3fn"), BLOCKS),
        (changed(FP8, "activation_scheme", "static"), BLOCKS),
        (changed(FP8, "weight_block_size", None), Fp8Blocks(block=(0, 0))),
        ({"quant_method": "mxfp8"}, Fp8Blocks(block=(1, 32))),
        (MXFP4, Mxfp4()),
        (GPTQ, V1),
        (GPTQ_V2, gptq(zeros="plain")),
        (changed(GPTQ, "meta", {"quantizer": "gptqmodel:2.2.0"}), gptq(zeros="borrowed")),
        (changed(GPTQ, "meta", {"quantizer": ["optimum:1.24.0", "gptqmodel:2.2.0"]}), gptq(zeros="borrowed")),
        (changed(GPTQ, "bits", 8), gptq(bits=8)),
        (GPTQ | GPTQMODELS_OWN, gptq()),
        (changed(GPTQ, "group_size", -1), gptq(group_size=0)),
        (changed(GPTQ, "desc_act", True), gptq(act_order=True)),
        (changed(GPTQ, "sym", False), gptq(symmetric=False)),
        (AWQ, Awq(bits=4, group_size=128)),
        (changed(AWQ, "group_size", -1), Awq(bits=4, group_size=0)),
        (PACKED | {"ignore": []}, PackedIntegers(bits=4, group_size=32, symmetric=True)),
        (
            weights({"num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": False}) | {"ignore": []},
            PackedIntegers(bits=8, group_size=0, symmetric=False),
        ),
        (weights({"actorder": "static"}) | {"ignore": []}, PackedIntegers(bits=4, group_size=32, symmetric=True)),
        (weights({"strategy": None}) | {"ignore": []}, PackedIntegers(bits=4, group_size=32, symmetric=True)),
        (CHANNELS, Fp8Blocks(block=(1, 0))),
        (weights({"strategy": "tensor"}, CHANNELS), Fp8Blocks(block=(0, 0))),
        (weights({"strategy": "group", "group_size": 64}, CHANNELS), Fp8Blocks(block=(1, 64))),
        (weights({"strategy": "block", "block_structure": [128, 64]}, CHANNELS), Fp8Blocks(block=(128, 64))),
        (changed(CHANNELS, "format", "naive-quantized"), Fp8Blocks(block=(1, 0))),
        (changed(CHANNELS, "sparsity_config", {"format": "dense", "ignore": []}), Fp8Blocks(block=(1, 0))),
    ],
)
def test_an_expert_is_stored_as_its_config_says(options: dict[str, Any], expert: WeightFormat) -> None:
    quantisation = read(options)
    assert quantisation.method == options["quant_method"]
    assert quantisation.format_of(EXPERT) == expert
    assert expert in quantisation.formats


@pytest.mark.parametrize(
    "values",
    [
        {"compression_config": CHANNELS},
        {"text_config": {"quantization_config": CHANNELS}},
        {"language_config": {"quantization_config": CHANNELS}},
        {"thinker_config": {"text_config": {"quantization_config": CHANNELS}}},
        {"quantization_config": CHANNELS, "text_config": {"quantization_config": CHANNELS}},
    ],
    ids=["its older name", "in the text section", "inner language_config", "two levels down", "twice the same"],
)
def test_the_section_is_found_where_files_have_it(values: dict[str, Any]) -> None:
    assert read_quantisation(values, file=FILE) == read(CHANNELS)


# ---- which modules


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (FP8, {"expert_dtype": "fp4"}),
        (FP8, {"text_config": {"expert_dtype": "fp4"}}),
        ({**FP8, "expert_dtype": "fp4"}, {}),
        ({**FP8, "expert_dtype": "fp4"}, {"expert_dtype": "fp8"}),
    ],
    ids=["beside", "in the text section", "inside", "inside goes first"],
)
def test_deepseek_v4_has_fp4_experts_and_the_rest_in_fp8(options: dict[str, Any], values: dict[str, Any]) -> None:
    quantisation = read(options, **values)
    for name in ("layers.3.ffn.experts.7.w1", "model.layers.3.mlp.experts"):
        assert quantisation.format_of(name) == Fp4Blocks()
    for name in ("layers.3.ffn.shared_experts.w1", ATTENTION):
        assert quantisation.format_of(name) == BLOCKS
    assert quantisation.format_of(GATE) is None


def test_expert_dtype_is_of_no_concern_to_other_methods() -> None:
    assert read(GPTQ, expert_dtype="fp4") == read(GPTQ)


def test_only_the_experts_of_gpt_oss_are_converted() -> None:
    quantisation = read(MXFP4)
    assert quantisation.format_of("model.layers.0.mlp.experts") == Mxfp4()
    for name in ("model.layers.0.mlp.router", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        assert not quantisation.is_converted(name)


NAMES = (
    *(EXPERT, SHARED, GATE, ATTENTION, "lm_head", "model.layers.31.mlp.gate", "model.layers.3.mlp.gate_proj"),
    *("model.layers.3.mlp.experts", "model.layers.3.mlp.shared_expert_gate", "block_sparse_moe.gate"),
)


@pytest.mark.parametrize(
    "skipped",
    [
        ["lm_head"],
        ["gate"],
        ["model.layers."],
        ["model.layers.3"],
        ["model.layers.3.mlp.gate", "lm_head"],
        ["model.layers.*.self_attn", "mlp.experts"],
        ["q_proj", "experts.7.gate_proj"],
        [r"model.layers.\d+.mlp.gate"],
        ["model.layers.(3|31).mlp"],
        ["a|model.layers.3.self_attn"],
        [],
    ],
)
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_modules_to_not_convert_mean_what_transformers_takes_them_for(skipped: list[str], key: str) -> None:
    quantisation = read({"quant_method": "fp8", "weight_block_size": [128, 128], key: skipped})
    for name in NAMES:
        assert quantisation.is_converted(name) == should_convert_module(name, skipped), name


def test_a_long_list_of_modules_costs_no_expressions() -> None:
    skipped = [f"model.layers.{layer}.mlp.gate" for layer in range(61)]
    for rules in (read({**FP8, "modules_to_not_convert": skipped}).rules, read({**CHANNELS, "ignore": skipped}).rules):
        (rule,) = rules
        assert rule.pattern is None


def test_compressed_tensors_ignores_names_and_expressions() -> None:
    quantisation = read(PACKED)
    for name in (ATTENTION, SHARED, "lm_head", "model.layers.0.mlp.gate_proj"):
        assert not quantisation.is_converted(name), name
    for name in (EXPERT, "lm_head.other", "model.lm_head"):
        assert quantisation.is_converted(name), name


def test_groups_of_compressed_tensors_have_formats_of_their_own() -> None:
    scheme = PACKED["config_groups"]["group_0"]
    options = changed(CHANNELS, "format", "mixed-precision")
    options["config_groups"] = {
        "attention": {**CHANNELS["config_groups"]["group_0"], "format": "float-quantized"},
        "experts": {**scheme, "format": "pack-quantized", "targets": [r"re:.*mlp\.experts\..*"]},
        "one": {**scheme, "format": "pack-quantized", "targets": [EXPERT], "weights": {**scheme["weights"]}},
    }
    options["config_groups"]["one"]["weights"]["num_bits"] = 8
    quantisation = read(options)
    assert quantisation.format_of(ATTENTION) == Fp8Blocks(block=(1, 0))
    assert quantisation.format_of(GATE) is None
    assert quantisation.format_of(EXPERT.replace("7", "8")) == PackedIntegers(bits=4, group_size=32, symmetric=True)
    assert quantisation.format_of(EXPERT) == PackedIntegers(bits=8, group_size=32, symmetric=True)


def test_a_group_may_target_linear_layers_beside_names_and_ignore_all_of_them() -> None:
    options = changed(CHANNELS, "config_groups.group_0.targets", ["Linear", EXPERT])
    assert read(options).format_of(ATTENTION) == Fp8Blocks(block=(1, 0))
    assert not read({**options, "ignore": ["Linear"]}).is_converted(EXPERT)


def test_modules_that_no_group_targets_are_not_converted() -> None:
    options = changed(PACKED, "config_groups.group_0.targets", ["re:.*experts.*"])
    assert read({**options, "ignore": []}).is_converted(EXPERT)
    assert not read({**options, "ignore": []}).is_converted(ATTENTION)


def test_a_group_that_quantises_activations_alone_leaves_weights_as_they_are() -> None:
    options = {**PACKED, "ignore": []}
    options["config_groups"] = {**PACKED["config_groups"], "group_1": {"targets": [ATTENTION], "weights": None}}
    assert read(options).is_converted(EXPERT)
    assert not read(options).is_converted(ATTENTION)


def test_dynamic_rules_of_gptqmodel_skip_modules_or_change_their_options() -> None:
    dynamic = {
        r"-:.*\.gate$": {},
        r"+:.*experts\.7\.": {"bits": 8, "group_size": 64, "mse": 2.0},
        r".*experts\.[78]\.": {"desc_act": True, "sym": False},
    }
    quantisation = read({**GPTQ, "dynamic": dynamic})
    assert quantisation.format_of(GATE) is None
    assert quantisation.format_of(EXPERT) == gptq(bits=8, group_size=64)
    assert quantisation.format_of(EXPERT.replace("7", "8")) == gptq(act_order=True, symmetric=False)
    assert quantisation.format_of(EXPERT.replace("7", "9")) == V1
    awq = read({**AWQ, "dynamic": {r"+:.*experts\.7\.": {"group_size": 32}}})
    assert awq.format_of(EXPERT) == Awq(bits=4, group_size=32)


def test_gptq_may_list_the_modules_that_it_converted() -> None:
    listed = [["self_attn.q_proj", "self_attn.k_proj"], ["experts.7.gate_proj"]]
    quantisation = read({**GPTQ, "modules_in_block_to_quantize": listed})
    assert quantisation.is_converted(EXPERT)
    assert quantisation.is_converted(ATTENTION)
    assert not quantisation.is_converted(GATE)
    assert not quantisation.is_converted("model.layers.3.cross_self_attn.q_proj")


# ---- what is refused

REFUSED: list[tuple[Mapping[str, Any], str, Any, str, str]] = [
    # options, dotted key, value, how the sentence shows it, what it must say is supported
    (FP8, "quant_method", "bitsandbytes", "'bitsandbytes'", "'fp8', 'mxfp8', 'mxfp4', 'gptq', 'awq', 'compressed-"),
    (FP8, "quant_method", ..., "missing", "'fp8'"),
    (FP8, "weight_block_size", ..., "missing", "[rows, columns]"),
    (FP8, "weight_block_size", [128], "[128]", "[rows, columns]"),
    (FP8, "weight_block_size", [128, 0], "[128, 0]", "[rows, columns]"),
    (FP8, "weight_block_size", "128x128", "'128x128'", "[rows, columns]"),
    (FP8, "weight_block_size", [True, 128], "[True, 128]", "[rows, columns]"),
    (FP8, "fmt", "e5m2", "'e5m2'", "'e4m3', 'float8_e4m3fn'"),
    (FP8, "scale_fmt", "e4m3", "'e4m3'", "'float', 'ue8m0'"),
    (FP8, "activation_scheme", "token", "'token'", "'dynamic', 'static'"),
    (FP8, "expert_dtype", "int4", "'int4'", "'fp8', 'fp4'"),
    (FP8, "modules_to_not_convert", "lm_head", "'lm_head'", "a list of names"),
    (FP8, "modules_to_not_convert", ["a("], "['a(']", "regular expressions"),
    (FP8, "ignored_layers", ["lm_head"], "['lm_head']", "the names in modules_to_not_convert"),
    (FP8, "weight_scale_semantics", "inverse", "'inverse'", "weight_block_size"),
    ({"quant_method": "mxfp8"}, "weight_block_size", [128, 128], "[128, 128]", "[1, 32]"),
    ({"quant_method": "mxfp8"}, "scale_fmt", "float", "'float'", "'ue8m0'"),
    ({"quant_method": "mxfp8"}, "fmt", "e5m2", "'e5m2'", "'e4m3'"),
    ({"quant_method": "mxfp8"}, "activation_scheme", "static", "'static'", "'dynamic'"),
    (MXFP4, "block_size", 16, "16", "modules_to_not_convert"),
    (GPTQ, "bits", 2, "2", "4, 8"),
    (GPTQ, "bits", 3, "3", "4, 8"),
    (GPTQ, "bits", True, "true", "4, 8"),
    (GPTQ, "bits", ..., "missing", "4, 8"),
    (GPTQ, "group_size", 0, "0", "a positive number, or -1"),
    (GPTQ, "group_size", -2, "-2", "a positive number, or -1"),
    (GPTQ, "group_size", ..., "missing", "a positive number, or -1"),
    (GPTQ, "sym", 1, "1", "true, false"),
    (GPTQ, "desc_act", "yes", "'yes'", "true, false"),
    (GPTQ, "checkpoint_format", "marlin", "'marlin'", "'gptq', 'gptq_v2'"),
    (GPTQ, "format", "gptq_p", "'gptq_p'", "'gptq', 'gptq_v2'"),
    (GPTQ_V2, "format", "gptq", "'gptq'", "gptq_v2, as checkpoint_format says"),
    (GPTQ, "is_marlin_format", True, "true", "false"),
    (GPTQ, "hyb_act", True, "true", "false"),
    (GPTQ, "adapter", {"rank": 8}, "{'rank': 8}", "an option that is not understood (supported: "),
    (GPTQ, "method", "qqq", "'qqq'", "'gptq'"),
    (GPTQ, "pack_dtype", "int64", "'int64'", "'int32'"),
    (GPTQ, "meta", "gptqmodel", "'gptqmodel'", "an object"),
    (GPTQ, "rotation", "hadamard", "'hadamard'", "an option that is not understood"),
    (GPTQ, "activation", "w4afp8", "'w4afp8'", "an option that is not understood"),
    (GPTQ, "dynamic", {"+:[": {}}, "{'+:[': {}}", "regular expressions"),
    (GPTQ, "dynamic", {"+:a": {"bits": 3}}, "3", "4, 8"),
    (GPTQ, "dynamic", {"+:a": {"adapter": "x"}}, "'x'", "bits"),
    (GPTQ, "modules_in_block_to_quantize", [[1]], "[[1]]", "a list of names"),
    (AWQ, "bits", 8, "8", "4"),
    (AWQ, "bits", ..., "missing", "4"),
    (AWQ, "group_size", "128", "'128'", "a positive number, or -1"),
    (AWQ, "version", "gemv", "'gemv'", "'gemm'"),
    (AWQ, "format", "llm-awq", "'llm-awq'", "'gemm'"),
    (AWQ, "backend", "llm-awq", "'llm-awq'", "'autoawq'"),
    (AWQ, "zero_point", "yes", "'yes'", "true, false"),
    (AWQ, "desc_act", True, "true", "false"),
    (AWQ, "pack_dtype", "int16", "'int16'", "'int32'"),
    (AWQ, "method", "gptq", "'gptq'", "'awq'"),
    (AWQ, "krot", 8, "8", "zero_point"),
    (PACKED, "format", "nvfp4-pack-quantized", "'nvfp4-pack-quantized'", "'pack-quantized', 'float-quantized'"),
    (PACKED, "format", "int-quantized", "'int-quantized'", "'pack-quantized', 'float-quantized'"),
    (PACKED, "format", "mixed-precision", "'mixed-precision'", "'pack-quantized', 'float-quantized'"),
    (PACKED, "config_groups.group_0.format", "mxfp4-pack-quantized", "'mxfp4-pack-quantized'", "'pack-quantized'"),
    (PACKED, "quantization_status", "calibration", "'calibration'", "'compressed', 'frozen'"),
    (PACKED, "quantization_status", ..., "missing", "'compressed'"),
    (PACKED, "sparsity_config", {"format": "sparse-24-bitmask"}, "'sparse-24-bitmask'", "'dense'"),
    (PACKED, "transform_config", {"config_groups": {"u": {}}}, "{'config_groups': {'u': {}}}", "{}"),
    (PACKED, "moe_sparsity_config", {"method": "prune"}, "{'method': 'prune'}", "{}"),
    (PACKED, "ignore", ["Conv1d"], "['Conv1d']", "re: and a regular expression"),
    (PACKED, "ignore", ["re:("], "['re:(']", "regular expressions"),
    (PACKED, "config_groups", {}, "{}", "at least one group"),
    (PACKED, "config_groups", {"W4A16": ["Linear"]}, "['Linear']", "an object"),
    (PACKED, "config_groups.group_0.targets", ["MoEGate"], "['MoEGate']", "Linear, names"),
    (PACKED, "config_groups.group_0.output_activations", {"num_bits": 8}, "{'num_bits': 8}", "null"),
    (PACKED, "config_groups.group_0.bias", True, "true", "targets"),
    (PACKED, "config_groups.group_0.weights", {}, "missing", "'channel', 'group'"),
    (PACKED, "config_groups.group_0.weights.num_bits", ..., "missing", "4, 8"),
    (PACKED, "config_groups.group_0.weights.num_bits", 3, "3", "4, 8"),
    (PACKED, "config_groups.group_0.weights.type", "float", "'float'", "'int'"),
    (PACKED, "config_groups.group_0.weights.strategy", "tensor", "'tensor'", "'channel', 'group'"),
    (PACKED, "config_groups.group_0.weights.strategy", "block", "'block'", "'channel', 'group'"),
    (PACKED, "config_groups.group_0.weights.group_size", None, "missing", "a positive number"),
    (PACKED, "config_groups.group_0.weights.block_structure", [8, 8], "[8, 8]", "null"),
    (PACKED, "config_groups.group_0.weights.symmetric", "no", "'no'", "true, false"),
    (PACKED, "config_groups.group_0.weights.dynamic", True, "true", "false"),
    (PACKED, "config_groups.group_0.weights.actorder", "group", "'group'", "'weight', 'static'"),
    (PACKED, "config_groups.group_0.weights.scale_dtype", "torch.uint8", "'torch.uint8'", "'torch.bfloat16'"),
    (PACKED, "config_groups.group_0.weights.zp_dtype", "torch.int16", "'torch.int16'", "'torch.int8'"),
    (PACKED, "config_groups.group_0.weights.codebook", "nf4", "'nf4'", "num_bits"),
    (CHANNELS, "config_groups.group_0.weights.type", "int", "'int'", "'float'"),
    (CHANNELS, "config_groups.group_0.weights.num_bits", 4, "4", "8"),
    (CHANNELS, "config_groups.group_0.weights.symmetric", False, "false", "true"),
    (CHANNELS, "config_groups.group_0.weights.strategy", "token", "'token'", "'tensor', 'channel', 'group', 'block'"),
    (CHANNELS, "config_groups.group_0.weights.strategy", "block", "missing", "[rows, columns]"),
]


@pytest.mark.parametrize(("options", "path", "value", "shown", "supported"), REFUSED)
def test_an_option_that_is_not_understood_is_refused_by_name_with_its_value(
    options: Mapping[str, Any], path: str, value: Any, shown: str, supported: str
) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        read(changed(options, path, value))
    sentence = str(refusal.value)
    assert sentence.startswith(f"{FILE}: quantization_config.")
    assert path.rpartition(".")[2] in sentence or shown == "missing"
    assert shown in sentence
    assert "supported: " in sentence
    assert supported in sentence


def test_a_refusal_reads_as_a_sentence() -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        read(changed(GPTQ, "bits", 3))
    assert str(refusal.value) == "model/config.json: quantization_config.bits is 3 (supported: 4, 8)"
    with pytest.raises(UnsupportedModel) as refusal:
        read(changed(PACKED, "config_groups.group_0.weights.codebook", "nf4"))
    assert str(refusal.value).startswith(
        "model/config.json: quantization_config.config_groups.group_0.weights.codebook is 'nf4', an option that is not "
        "understood (supported: actorder, "
    )


def test_a_key_whose_value_is_null_says_nothing() -> None:
    assert read({**GPTQ, "rotation": None, "dynamic": None}) == read(GPTQ)


def test_a_section_that_is_no_object_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"quantization_config is 'fp8' \(supported: an object\)"):
        read("fp8")


def test_two_sections_that_differ_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="quantization_config occurs twice and differs"):
        read(FP8, compression_config=PACKED)


def test_two_groups_that_claim_the_same_modules_are_refused() -> None:
    other = weights({"num_bits": 8})["config_groups"]["group_0"]
    options = {**PACKED, "config_groups": {**PACKED["config_groups"], "group_1": other}}
    with pytest.raises(UnsupportedModel, match=r"group_1.targets is \['Linear'\] .*none of another group"):
        read(options)
