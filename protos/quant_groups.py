"""compressed-tensors' config: groups of modules, each with a scheme of its own.

Read are schemes of two formats: "pack-quantized" (int4, int8) and "float-quantized" (FP8). What a scheme says of
activations steers kernels that compute on quantised weights; decoded weights meet activations as they are, as in
transformers with dequantize=True.

Definition: compressed-tensors' QuantizationConfig, QuantizationScheme, QuantizationArgs and match_name.
"""

import re

from protos.quant_floats import Fp8Blocks
from protos.quant_integers import PackedIntegers
from protos.quant_options import Options
from protos.quantised import Rule, WeightFormat

# "naive-quantized" is what "float-quantized" was called at first
_FORMATS = ("pack-quantized", "float-quantized", "naive-quantized")
_FP8_STRATEGIES = ("tensor", "channel", "group", "block")
_INTEGER_STRATEGIES = ("channel", "group")
_ALL_LINEAR = "Linear"
_EXPRESSION = "re:"
_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32", "torch.int8", "torch.float8_e4m3fn")


def read_groups(options: Options) -> tuple[WeightFormat | None, list[Rule]]:
    """The format of modules that no rule names, and the rules: what is ignored, then names, then expressions.

    Raises:
        UnsupportedModel: an option is not understood.
    """
    options.one_of("quantization_status", ("compressed", "frozen"))  # frozen: calibrated, and stored the same
    options.section("sparsity_config").one_of("format", ("dense",), default="dense")
    for key in ("transform_config", "moe_sparsity_config"):
        options.one_of(key, ({},), default={})
    options.ignore({"global_compression_ratio", "kv_cache_scheme", "version", "run_compressed", "dequantize"})
    options.ignore({"use_optimized_inference"})
    formats: dict[str, WeightFormat | None] = {}
    for _, scheme in options.section("config_groups").sections():
        format = _read_scheme(scheme, outer=options)
        for target in _targets(scheme, "targets"):
            if formats.setdefault(target, format) != format:
                raise scheme.refusal("targets", f"none of another group; {target} is")
        scheme.refuse_unknown()
    if not formats:
        raise options.refusal("config_groups", "at least one group")
    default = formats.pop(_ALL_LINEAR, None)
    rules = _rules(options, "ignore", _targets(options, "ignore"), None)
    for target in sorted(formats, key=lambda target: (target.startswith(_EXPRESSION), target)):
        rules += _rules(options, "config_groups", (target,), formats[target])
    return default, rules


def _read_scheme(scheme: Options, *, outer: Options) -> WeightFormat | None:
    """The format of a group's weights; None: only its activations are quantised."""
    if scheme.value("format") is not None:
        stored = scheme.one_of("format", _FORMATS)
    else:
        stored = outer.one_of("format", _FORMATS)
    outer.one_of("format", (*_FORMATS, "mixed-precision"))
    scheme.ignore({"input_activations"})
    if scheme.value("output_activations") is not None:
        raise scheme.refusal("output_activations", "null")
    if scheme.value("weights") is None:
        return None
    weights = scheme.section("weights")
    weights.one_of("dynamic", (False,), default=False)
    if weights.value("actorder") not in (None, False):  # "group" needs a weight_g_idx; "static" is another "weight"
        weights.one_of("actorder", ("weight", "static"))
    for key in ("scale_dtype", "zp_dtype"):
        weights.one_of(key, _DTYPES, default=_DTYPES[0])
    weights.ignore({"observer", "observer_kwargs"})
    format = _read_packed(weights) if stored == "pack-quantized" else _read_fp8(weights)
    weights.refuse_unknown()
    return format


def _read_packed(weights: Options) -> WeightFormat:
    weights.one_of("type", ("int",), default="int")
    strategy = _strategy(weights, _INTEGER_STRATEGIES)
    if weights.value("block_structure") is not None:
        raise weights.refusal("block_structure", "null")
    return PackedIntegers(
        bits=weights.one_of("num_bits", (4, 8)),
        group_size=weights.group_size("group_size") if strategy == "group" else 0,
        symmetric=weights.one_of("symmetric", (True, False), default=True),
    )


def _read_fp8(weights: Options) -> WeightFormat:
    weights.one_of("type", ("float",))
    weights.one_of("num_bits", (8,))
    weights.one_of("symmetric", (True,), default=True)
    strategy = _strategy(weights, _FP8_STRATEGIES)
    if strategy == "block":
        return Fp8Blocks(block=weights.block("block_structure"))
    if strategy == "group":
        return Fp8Blocks(block=(1, weights.group_size("group_size")))
    return Fp8Blocks(block=(0, 0) if strategy == "tensor" else (1, 0))


def _strategy(weights: Options, supported: tuple[str, ...]) -> str:
    """What shares a scale; where it is not said, group_size tells."""
    group_size = weights.value("group_size")
    implied = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if weights.value("strategy") is None and implied not in supported:
        raise weights.refusal("strategy", ", ".join(map(repr, supported)))
    return weights.one_of("strategy", supported, default=implied)


def _targets(options: Options, key: str) -> tuple[str, ...]:
    """Names of modules, expressions, or the class of all linear layers; other classes are not."""
    targets = options.names(key)
    for target in targets:
        if target != _ALL_LINEAR and re.fullmatch(r"[A-Z]\w*", target):
            raise options.refusal(key, f"{_ALL_LINEAR}, names, or {_EXPRESSION} and a regular expression")
    return targets


def _rules(options: Options, key: str, targets: tuple[str, ...], format: WeightFormat | None) -> list[Rule]:
    expressions = [target.removeprefix(_EXPRESSION) for target in targets if target.startswith(_EXPRESSION)]
    patterns = [options.expression(key, expression) for expression in expressions]
    if _ALL_LINEAR in targets:
        patterns.append("")
    names = frozenset(target for target in targets if not target.startswith(_EXPRESSION))
    return [Rule(format, names=names), *(Rule(format, pattern=pattern) for pattern in patterns)]
