"""config.json's quantization_config, read into a `Quantisation`.

Every option that changes a weight is checked, and a key that nobody here knows is refused: a matrix decoded with a
wrong option is a matrix of plausible numbers. Options that only steer the quantiser, kernels, activations or the KV
cache are listed as such; keys whose value is null say nothing.

The methods' own definitions: transformers' utils/quantization_config.py, GPTQModel's QuantizeConfig, AutoAWQ's
AwqConfig; for compressed-tensors see `protos/quant_groups.py`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from protos.errors import UnsupportedModel
from protos.quant_floats import Fp4Blocks, Fp8Blocks, Mxfp4
from protos.quant_groups import read_groups
from protos.quant_integers import Awq, Gptq
from protos.quant_options import Options
from protos.quantised import Quantisation, Rule, WeightFormat
from protos.settings import COMPOSITES

_KEYS = ("quantization_config", "compression_config")
# routed experts, one by one or stacked, but not "shared_experts"
_EXPERTS = r"(?:.*\.)?experts(?:\.|$)"
_E4M3 = ("e4m3", "float8_e4m3fn")
_GPTQ_LAYOUTS = ("gptq", "gptq_v2")
# kernels, not layouts: transformers also accepts "llm-awq" and "gemv" here, which are both
_AWQ_KERNELS = (
    *("auto", "autoawq", "auto_trainable", "exllama_v1", "exllama_v2", "gemm", "gemm_triton", "machete", "marlin"),
    *("torch_awq", "torch_fused_awq"),
)
_NO_WEIGHT_DEPENDS_ON = {
    # of the quantiser's work
    *("act_group_aware", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_auto_increment"),
    *("damp_percent", "dataset", "max_input_length", "meta", "model_file_base_name", "model_name_or_path"),
    *("model_seqlen", "module_name_preceding_first_block", "mse", "nsamples", "pad_token_id", "static_groups"),
    *("tokenizer", "true_sequential"),
    *("failsafe", "gptaq", "offload_to_disk", "offload_to_disk_path", "pack_impl", "vram_strategy"),
    "v2",  # GPTQModel's second algorithm; the layout gptq_v2 is checkpoint_format's
    # of kernels, the KV cache and the output embedding
    *("backend", "dequantize", "disable_exllama", "do_fuse", "exllama_config", "fuse_max_seq_len"),
    *("kv_cache_quant_algo", "kv_cache_scheme", "lm_head", "modules_to_fuse", "use_cuda_fp16", "use_exllama"),
}

_Read = tuple[WeightFormat | None, list[Rule]]


# Inkling 2 is published in MXFP8 and says so nowhere (transformers' configuration_inkling2.py adds the same). What
# transformers has written since says what it is; and tensors that are not quantised are read as they are.
_IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "inkling2": {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
}


def read_quantisation(document: Mapping[str, Any], *, file: Path) -> Quantisation | None:
    """What a model directory says of quantised weights; None: the model is not quantised.

    config.json says it, or AutoGPTQ's quantize_config.json beside it.

    Args:
        document: config.json.
        file: its path.

    Raises:
        UnsupportedModel: a method, an option or a value that is not understood, named by its key; or
            quantize_config.json cannot be read.
    """
    found = _read_section(document, file=file)
    if found is not None:
        return found
    beside = file.with_name("quantize_config.json")
    if beside.is_file():
        try:
            options = json.loads(beside.read_bytes())
        except (OSError, ValueError, RecursionError) as err:
            raise UnsupportedModel(f"{beside}: cannot be read ({type(err).__name__}: {err})") from err
        if isinstance(options, Mapping):
            options = {"quant_method": "gptq", **options}  # which its first versions leave out
        return _read_section({"quantization_config": options}, file=beside)
    implied = _IMPLIED.get(str(document.get("model_type")))
    if implied is None or "transformers_version" in document:
        return None
    return _read_section({"quantization_config": implied}, file=file)


def _read_section(values: Mapping[str, Any], *, file: Path) -> Quantisation | None:
    """quantization_config of config.json or of a text section in it; None where none has one."""
    sections = _sections(values)
    found = [(key, section[key]) for section in sections for key in _KEYS if section.get(key) is not None]
    if not found:
        return None
    path, options = found[0]
    if any(other != options for _, other in found):
        raise UnsupportedModel(f"{file}: {path} occurs twice and differs (supported: one, or equal ones)")
    inherited = [section["expert_dtype"] for section in sections if section.get("expert_dtype") is not None]
    if inherited and isinstance(options, Mapping) and options.get("quant_method") == "fp8":
        options = {"expert_dtype": inherited[0], **options}  # DeepSeek-V4 has it outside, V4.1 inside
    reader = Options(options, path=path, file=file)
    method = reader.one_of("quant_method", tuple(_METHODS))
    default, rules = _METHODS[method](reader)
    reader.refuse_unknown()
    return Quantisation(method=method, rules=tuple(rules), default=default)


def _sections(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and the text models' sections within it, the outermost first."""
    nested = [values[key] for key in COMPOSITES if isinstance(values.get(key), Mapping)]
    return [values, *(section for inner in nested for section in _sections(inner))]


def _read_fp8(options: Options) -> _Read:
    options.one_of("activation_scheme", ("dynamic", "static"), default="dynamic")
    options.one_of("fmt", _E4M3, default="e4m3")
    options.one_of("scale_fmt", ("float", "ue8m0"), default="float")  # the file says which, in the scales' dtype
    expert_dtype = options.one_of("expert_dtype", ("fp8", "fp4"), default="fp8")
    options.ignore(_NO_WEIGHT_DEPENDS_ON | {"modules_to_convert"})  # these are embeddings
    experts = [Rule(Fp4Blocks(), pattern=_EXPERTS)] if expert_dtype == "fp4" else []
    if options.is_null("weight_block_size"):
        default = Fp8Blocks(block=(0, 0))
    else:
        default = Fp8Blocks(block=options.block("weight_block_size"))
    return default, _unconverted(options, "modules_to_not_convert", "ignored_layers") + experts


def _read_mxfp8(options: Options) -> _Read:
    options.one_of("activation_scheme", ("dynamic",), default="dynamic")
    options.one_of("fmt", _E4M3, default="e4m3")
    options.one_of("scale_fmt", ("ue8m0",), default="ue8m0")
    options.one_of("weight_block_size", ([1, 32],), default=[1, 32])
    options.ignore(_NO_WEIGHT_DEPENDS_ON)
    return Fp8Blocks(block=(1, 32)), _unconverted(options, "modules_to_not_convert", "ignored_layers")


def _read_mxfp4(options: Options) -> _Read:
    options.ignore(_NO_WEIGHT_DEPENDS_ON)
    return None, [*_unconverted(options, "modules_to_not_convert"), Rule(Mxfp4(), pattern=_EXPERTS)]


def _read_gptq(options: Options) -> _Read:
    layout = options.one_of("format", _GPTQ_LAYOUTS, default="gptq")
    if options.value("checkpoint_format") is not None:  # the older name of the same, and the one transformers prefers
        older = options.one_of("checkpoint_format", _GPTQ_LAYOUTS)
        if options.value("format") is not None and older != layout:
            raise options.refusal("format", f"{older}, as checkpoint_format says")
        layout = older
    options.one_of("method", ("gptq",), default="gptq")
    options.one_of("pack_dtype", ("int32",), default="int32")
    options.one_of("is_marlin_format", (False,), default=False)
    options.one_of("hyb_act", (False,), default=False)  # true: an order of columns between those of desc_act
    by_gptqmodel = "gptqmodel:" in str(options.section("meta").value("quantizer"))
    zeros: Literal["plain", "less one", "borrowed"]
    zeros = "plain" if layout == "gptq_v2" else "borrowed" if by_gptqmodel else "less one"

    def read(section: Options, defaults: Gptq | None = None) -> Gptq:
        return Gptq(
            bits=section.one_of("bits", (4, 8), default=None if defaults is None else defaults.bits),
            group_size=section.group_size("group_size", default=None if defaults is None else defaults.group_size),
            symmetric=section.one_of("sym", (True, False), default=defaults.symmetric if defaults else True),
            act_order=section.one_of("desc_act", (True, False), default=defaults.act_order if defaults else False),
            zeros=zeros,
        )

    default = read(options)
    rules = _unconverted(options, "modules_to_not_convert") + _dynamic(options, lambda section: read(section, default))
    options.ignore(_NO_WEIGHT_DEPENDS_ON)
    if listed := options.names("modules_in_block_to_quantize"):
        return None, [*rules, Rule(default, pattern=rf"(?:.*\.)?(?:{'|'.join(map(re.escape, listed))})$")]
    return default, rules


def _read_awq(options: Options) -> _Read:
    for key in ("version", "format", "checkpoint_format"):
        options.one_of(key, ("gemm",), default="gemm")
    options.one_of("method", ("awq",), default="awq")
    options.one_of("backend", _AWQ_KERNELS, default="auto")
    options.one_of("pack_dtype", ("int32",), default="int32")
    options.one_of("desc_act", (False,), default=False)
    options.one_of("zero_point", (True, False), default=True)  # the layout has them in any case

    def read(section: Options, defaults: Awq | None = None) -> Awq:
        section.one_of("sym", (True, False), default=False)
        return Awq(
            bits=section.one_of("bits", (4,), default=None if defaults is None else defaults.bits),
            group_size=section.group_size("group_size", default=None if defaults is None else defaults.group_size),
        )

    default = read(options)
    rules = _unconverted(options, "modules_to_not_convert") + _dynamic(options, lambda section: read(section, default))
    options.ignore(_NO_WEIGHT_DEPENDS_ON)
    return default, rules


def _dynamic(options: Options, read: Callable[[Options], WeightFormat]) -> list[Rule]:
    """GPTQModel's exceptions for modules that match an expression: "-:" is not quantised, "+:" or nothing differs."""
    rules = []
    for key, section in options.section("dynamic").sections():
        format = None if key.startswith("-:") else read(section)
        section.ignore(_NO_WEIGHT_DEPENDS_ON)
        section.refuse_unknown()
        rules.append(Rule(format, pattern=options.expression("dynamic", re.sub(r"^[-+]:", "", key))))
    return rules


def _unconverted(options: Options, *keys: str) -> list[Rule]:
    """Modules that transformers leaves alone: an entry is a name's beginning up to a dot, which may be a regular
    expression, or a name's end."""
    names = [(key, options.names(key)) for key in keys if options.value(key) is not None]
    if not names:
        return []
    for key, other in names[1:]:
        if set(other) != set(names[0][1]):
            raise options.refusal(key, f"the names in {names[0][0]}")
    key, first = names[0]
    plain = frozenset(name for name in first if re.fullmatch(r"(?:[\w-]+\.)*[\w-]+", name))
    expressions = [options.expression(key, rf"(?:{name})(?:(?<=\.)|(?=\.|$))") for name in first if name not in plain]
    return [Rule(None, beginnings=plain, endings=first), *(Rule(None, pattern=one) for one in expressions)]


_METHODS: dict[str, Callable[[Options], _Read]] = {
    "fp8": _read_fp8,
    "mxfp8": _read_mxfp8,
    "mxfp4": _read_mxfp4,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": read_groups,
}
