"""Every quantised format decodes to exactly what it defines, and what transformers makes of it where that is right."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from protos import quantised
from protos.errors import CorruptWeights
from protos.quant_floats import Fp4Blocks, Fp8Blocks, Mxfp4
from protos.quant_integers import Awq, Gptq, PackedIntegers
from protos.quantised import PIECE_DTYPES, Quantisation, Rule, WeightFormat
from tests.packers import (
    E2M1,
    E4M3,
    Codes,
    Pieces,
    described,
    grouped_value,
    pack_awq,
    pack_e2m1,
    pack_gptq,
    pack_integers,
    pack_words,
    random_codes,
    random_scales,
    times_blocks,
)

torch.set_num_threads(1)

SEEDS = st.integers(0, 2**32 - 1)
FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
ALL_SCALES = (*FLOAT_SCALES, torch.float8_e8m0fnu, torch.uint8)
FEW = settings(max_examples=40, deadline=None)


def decode(format: WeightFormat, pieces: Pieces, rows: int, columns: int) -> Tensor:
    """Check, decode, and hold `decode` to what it promises of its result."""
    assert format.check(described(pieces), rows, columns) is None
    weight = format.decode(pieces, rows, columns, name="file: layer")
    assert weight.dtype == torch.float32
    assert weight.shape == (rows, columns)
    assert weight.is_contiguous()
    return weight


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, and zeros have the same sign."""
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


def fp8_codes(generator: np.random.Generator, rows: int, columns: int) -> Codes:
    """Any code but the two NaNs."""
    codes = random_codes(generator, rows, columns, 0, 256)
    return np.where(codes % 128 == 127, 0, codes)


def as_fp8(code_RC: Codes) -> Tensor:
    return torch.from_numpy(code_RC.astype(np.uint8)).view(torch.float8_e4m3fn)


def transformers_fp8(pieces: Pieces, dtype: torch.dtype) -> Tensor:
    dequantise: Any = Fp8Dequantize
    weight: Tensor = dequantise(None)._dequantize_one(pieces["weight"], pieces["scale"], output_dtype=dtype)
    return weight


@pytest.mark.parametrize("scale_dtype", ALL_SCALES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(256, 384, (128, 128)), (128, 256, (64, 32)), (48, 96, (1, 32)), (512, 1024, (128, 128))],
)
def test_fp8_blocks_equal_transformers_bit_for_bit(
    rows: int, columns: int, block: tuple[int, int], scale_dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(rows)
    pieces = {
        "weight": as_fp8(fp8_codes(generator, rows, columns)),
        "scale": random_scales(generator, rows // block[0], columns // block[1], scale_dtype),
    }
    weight = decode(Fp8Blocks(block=block), pieces, rows, columns)
    assert same_bits(weight, transformers_fp8(pieces, torch.float32))
    assert same_bits(weight.bfloat16(), transformers_fp8(pieces, torch.bfloat16))


@pytest.mark.parametrize(("rows", "columns"), [(576, 256), (130, 128), (70, 200), (1, 1), (129, 129)])
def test_fp8_rows_that_the_block_does_not_divide_end_in_a_shorter_block(rows: int, columns: int) -> None:
    generator = np.random.default_rng(rows)
    code_RC = fp8_codes(generator, rows, columns)
    scale = random_scales(generator, math.ceil(rows / 128), math.ceil(columns / 128), torch.float32)
    weight = decode(Fp8Blocks(block=(128, 128)), {"weight": as_fp8(code_RC), "scale": scale}, rows, columns)
    assert same_bits(weight, times_blocks(E4M3[code_RC], scale, (128, 128)))


def test_transformers_takes_the_wrong_block_where_ours_is_shorter_at_the_end() -> None:
    """Why the definition is the oracle there: 130 rows in blocks of 128 are two rows of scales, not blocks of 65."""
    generator = np.random.default_rng(0)
    code_RC = fp8_codes(generator, 130, 128)
    pieces = {"weight": as_fp8(code_RC), "scale": torch.tensor([[1.0], [3.0]])}
    weight = decode(Fp8Blocks(block=(128, 128)), pieces, 130, 128)
    assert same_bits(weight[:128], torch.from_numpy(E4M3[code_RC[:128]]).float())
    assert not torch.equal(weight, transformers_fp8(pieces, torch.float32))


@FEW
@given(
    seed=SEEDS,
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    scale_dtype=st.sampled_from(ALL_SCALES),
    chunk=st.sampled_from([1, 64, 2**18]),
)
def test_fp8_blocks_of_any_size_decode_to_the_definition(
    seed: int, rows: int, columns: int, block: tuple[int, int], scale_dtype: torch.dtype, chunk: int
) -> None:
    generator = np.random.default_rng(seed)
    code_RC = fp8_codes(generator, rows, columns)
    scale = random_scales(generator, math.ceil(rows / block[0]), math.ceil(columns / block[1]), scale_dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "CHUNK_ELEMENTS", chunk)
        weight = decode(Fp8Blocks(block=block), {"weight": as_fp8(code_RC), "scale": scale}, rows, columns)
    assert same_bits(weight, times_blocks(E4M3[code_RC], scale, block))


@pytest.mark.parametrize(
    ("block", "shapes"), [((0, 0), [(), (1,), (1, 1)]), ((1, 0), [(6,), (6, 1)]), ((0, 1), [(1, 5)])]
)
def test_fp8_scales_may_cover_whole_rows_and_columns(block: tuple[int, int], shapes: list[tuple[int, ...]]) -> None:
    generator = np.random.default_rng(0)
    code_RC = fp8_codes(generator, 6, 5)
    for shape in shapes:
        scale = random_scales(generator, math.prod(shape), 1, torch.float32).reshape(shape)
        weight = decode(Fp8Blocks(block=block), {"weight": as_fp8(code_RC), "scale": scale}, 6, 5)
        grid = scale.reshape(6 if block[0] == 1 else 1, 5 if block[1] == 1 else 1)
        assert same_bits(weight, times_blocks(E4M3[code_RC], grid, (block[0] or 6, block[1] or 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_experts_equal_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 48, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (3, 48, 5), dtype=torch.uint8, generator=generator)
    theirs_ECR = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    for expert in range(3):
        weight = decode(Mxfp4(), {"blocks": blocks[expert], "scales": scales[expert]}, 48, 160)
        assert same_bits(weight.to(dtype), theirs_ECR[expert].T)


def test_mxfp4_equals_transformers_for_every_scale_that_float32_can_hold() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 252, 16, 16).contiguous()
    scales = torch.arange(252, dtype=torch.uint8)[None, :, None].expand(1, 252, 16).contiguous()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    assert same_bits(decode(Mxfp4(), {"blocks": blocks[0], "scales": scales[0]}, 252, 512), theirs)


@FEW
@given(seed=SEEDS, rows=st.integers(1, 20), num_groups=st.integers(1, 5), scale_dtype=st.sampled_from(ALL_SCALES))
def test_fp4_blocks_decode_to_the_definition_and_to_what_transformers_makes_of_them(
    seed: int, rows: int, num_groups: int, scale_dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(seed)
    code_RC = random_codes(generator, rows, num_groups * 32, 0, 16)
    scale = random_scales(generator, rows, num_groups, scale_dtype)
    pieces = {"weight": pack_e2m1(code_RC).view(torch.int8), "scale": scale}
    weight = decode(Fp4Blocks(), pieces, rows, num_groups * 32)
    assert same_bits(weight, times_blocks(E2M1[code_RC], scale, (1, 32)))
    assert same_bits(weight, transformers_fp8(pieces, torch.float32))


@FEW
@given(seed=SEEDS, rows=st.integers(1, 12), num_groups=st.integers(1, 4))
def test_mxfp4_decodes_to_the_definition(seed: int, rows: int, num_groups: int) -> None:
    generator = np.random.default_rng(seed)
    code_RC = random_codes(generator, rows, num_groups * 32, 0, 16)
    scale = random_scales(generator, rows, num_groups, torch.uint8)
    pieces = {"blocks": pack_e2m1(code_RC).reshape(rows, num_groups, 16), "scales": scale}
    assert same_bits(decode(Mxfp4(), pieces, rows, num_groups * 32), times_blocks(E2M1[code_RC], scale, (1, 32)))


def consecutive(columns: int, group_size: int) -> list[int]:
    return [column // (group_size or columns) for column in range(columns)]


@FEW
@given(
    seed=SEEDS,
    rows=st.integers(1, 40),
    columns=st.integers(1, 150),
    group_size=st.sampled_from([0, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    zeros=st.sampled_from(["plain", "less one", "borrowed"]),
    order=st.sampled_from(["none", "stated", "act"]),
    chunk=st.sampled_from([1, 2**18]),
)
def test_gptq_decodes_to_the_definition(
    seed: int, rows: int, columns: int, group_size: int, bits: int, symmetric: bool, zeros: str, order: str, chunk: int
) -> None:
    generator = np.random.default_rng(seed)
    group = consecutive(columns, group_size)
    num_groups = group[-1] + 1
    code_RC = random_codes(generator, rows, columns, 0, 1 << bits)
    zero_RG = random_codes(generator, rows, num_groups, 1 if zeros == "less one" else 0, 1 << bits)
    if symmetric:
        zero_RG[:] = 1 << bits - 1
    scale = random_scales(generator, rows, num_groups, torch.float16)
    if order == "act":
        generator.shuffle(group)
    pieces = pack_gptq(code_RC, zero_RG, scale, None if order == "none" else group, bits=bits, zeros=zeros)
    format = Gptq(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        zeros="plain" if zeros == "plain" else "borrowed" if zeros == "borrowed" else "less one",
        act_order=order == "act",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "CHUNK_ELEMENTS", chunk)
        weight = decode(format, pieces, rows, columns)
    assert torch.equal(weight, grouped_value(code_RC, zero_RG, scale, group))


@pytest.mark.parametrize("stored", [7, 8])
@pytest.mark.parametrize("stated", ["plain", "less one"])
def test_symmetric_gptq_has_its_zero_point_in_the_middle_whatever_the_file_calls_its_convention(
    stored: int, stated: str
) -> None:
    """Files exist that say checkpoint_format gptq and store zero points as gptq_v2 does."""
    format = Gptq(
        bits=4, group_size=0, symmetric=True, zeros="plain" if stated == "plain" else "less one", act_order=False
    )
    codes = random_codes(np.random.default_rng(0), 8, 32, 0, 16)
    scale = torch.ones(8, 1)
    pieces = pack_gptq(codes, np.full((8, 1), stored), scale, None, bits=4, zeros="plain")
    assert torch.equal(decode(format, pieces, 8, 32), torch.from_numpy(codes - 8).float())


@FEW
@given(seed=SEEDS, words=st.integers(1, 5), columns=st.integers(1, 150), group_size=st.sampled_from([0, 32, 64, 128]))
def test_awq_decodes_to_the_definition(seed: int, words: int, columns: int, group_size: int) -> None:
    generator = np.random.default_rng(seed)
    group = consecutive(columns, group_size)
    code_RC = random_codes(generator, 8 * words, columns, 0, 16)
    zero_RG = random_codes(generator, 8 * words, group[-1] + 1, 0, 16)
    scale = random_scales(generator, 8 * words, group[-1] + 1, torch.float16)
    weight = decode(Awq(bits=4, group_size=group_size), pack_awq(code_RC, zero_RG, scale), 8 * words, columns)
    assert torch.equal(weight, grouped_value(code_RC, zero_RG, scale, group))


@FEW
@given(
    seed=SEEDS,
    rows=st.integers(1, 20),
    columns=st.integers(1, 150),
    group_size=st.sampled_from([0, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(FLOAT_SCALES),
    with_shape=st.booleans(),
)
def test_packed_integers_decode_to_the_definition(
    seed: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    with_shape: bool,
) -> None:
    generator = np.random.default_rng(seed)
    half = 1 << bits - 1
    group = consecutive(columns, group_size)
    signed_RC = random_codes(generator, rows, columns, -half, half)
    zero_RG = random_codes(generator, rows, group[-1] + 1, -half, half)
    if symmetric:
        zero_RG[:] = 0
    scale = random_scales(generator, rows, group[-1] + 1, scale_dtype)
    pieces = pack_integers(signed_RC, None if symmetric else zero_RG, scale, bits=bits)
    if not with_shape:
        del pieces["shape"]
    format = PackedIntegers(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = decode(format, pieces, rows, columns)
    assert torch.equal(weight, grouped_value(signed_RC, zero_RG, scale, group))


# ---- what a file must not hold

ONE_GROUP = Gptq(bits=4, group_size=0, symmetric=False, zeros="plain", act_order=False)
GPTQ = pack_gptq(
    np.ones((8, 64), np.int64), np.ones((8, 1), np.int64), torch.ones(8, 1), [0] * 64, bits=4, zeros="plain"
)
V1 = Gptq(bits=4, group_size=0, symmetric=False, zeros="less one", act_order=False)
SYMMETRIC = Gptq(bits=4, group_size=0, symmetric=True, zeros="plain", act_order=False)
AWQ = pack_awq(np.ones((8, 64), np.int64), np.ones((8, 1), np.int64), torch.ones(8, 1))
PACKED = pack_integers(np.ones((8, 64), np.int64), None, torch.ones(8, 1), bits=4)
FP8 = {"weight": as_fp8(np.full((8, 64), 0x7E)), "scale": torch.ones(1, 1)}
FP4 = {"weight": torch.zeros(8, 32, dtype=torch.int8), "scale": torch.full((8, 2), 127, dtype=torch.uint8)}
MXFP4 = {"blocks": torch.zeros(8, 2, 16, dtype=torch.uint8), "scales": torch.full((8, 2), 127, dtype=torch.uint8)}
BLOCKS = Fp8Blocks(block=(128, 128))


def spoilt(value: Tensor, item: float) -> Tensor:
    copy = value.clone()
    copy.view(-1)[-1] = item
    return copy


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_an_fp8_weight_that_is_nan_is_refused(code: int) -> None:
    codes = np.zeros((8, 64), np.int64)
    codes[3, 5] = code
    with pytest.raises(CorruptWeights, match=r"^file: layer: the FP8 weights hold NaN$"):
        BLOCKS.decode({**FP8, "weight": as_fp8(codes)}, 8, 64, name="file: layer")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("format", "pieces", "piece"),
    [
        (BLOCKS, FP8, "scale"),
        (ONE_GROUP, GPTQ, "scales"),
        (Awq(bits=4, group_size=0), AWQ, "scales"),
        (PackedIntegers(bits=4, group_size=0, symmetric=True), PACKED, "scale"),
    ],
    ids=["fp8", "gptq", "awq", "packed"],
)
def test_a_scale_that_is_not_finite_is_refused(format: WeightFormat, pieces: Pieces, piece: str, bad: float) -> None:
    with pytest.raises(CorruptWeights, match=r"^file: layer: the scales hold NaN or infinity$"):
        format.decode({**pieces, piece: spoilt(pieces[piece], bad)}, 8, 64, name="file: layer")


@pytest.mark.parametrize(
    ("format", "pieces", "piece"),
    [
        (BLOCKS, {**FP8, "scale": torch.full((1, 1), 127, dtype=torch.uint8)}, "scale"),
        (Fp4Blocks(), FP4, "scale"),
        (Mxfp4(), MXFP4, "scales"),
    ],
    ids=["fp8", "fp4", "mxfp4"],
)
def test_the_exponent_that_stands_for_nan_is_refused(format: WeightFormat, pieces: Pieces, piece: str) -> None:
    with pytest.raises(CorruptWeights, match="the scales hold NaN"):
        format.decode({**pieces, piece: spoilt(pieces[piece], 255)}, 8, 64, name="file: layer")


@pytest.mark.parametrize(
    ("format", "pieces"),
    [
        (BLOCKS, {**FP8, "scale": torch.full((1, 1), 1e36)}),
        (Mxfp4(), {"blocks": MXFP4["blocks"] + 0x77, "scales": spoilt(MXFP4["scales"], 254)}),
        (PackedIntegers(bits=4, group_size=0, symmetric=True), {**PACKED, "scale": torch.full((8, 1), 3e38)}),
    ],
    ids=["fp8", "mxfp4", "packed"],
)
def test_a_weight_beyond_float32_is_refused(format: WeightFormat, pieces: Pieces) -> None:
    with pytest.raises(CorruptWeights, match="weights times scales exceed float32"):
        format.decode(pieces, 8, 64, name="file: layer")


def test_the_largest_scale_is_fine_where_the_weights_are_small() -> None:
    scales = torch.full((8, 2), 254, dtype=torch.uint8)
    weight = decode(Mxfp4(), {"blocks": MXFP4["blocks"] + 0x11, "scales": scales}, 8, 64)
    assert torch.equal(weight, torch.full((8, 64), 2.0**126))


@pytest.mark.parametrize("group", [-1, 1])
def test_a_group_index_that_points_nowhere_is_refused(group: int) -> None:
    g_idx = torch.zeros(64, dtype=torch.int32)
    g_idx[9] = group
    with pytest.raises(CorruptWeights, match=r"g_idx names a group outside 0\.\.0"):
        ONE_GROUP.decode({**GPTQ, "g_idx": g_idx}, 8, 64, name="file: layer")


def test_a_zero_point_that_tools_read_differently_is_refused() -> None:
    qzeros = pack_words(np.array([[1, 2, 15, 3, 4, 5, 6, 7]]), 4)
    with pytest.raises(CorruptWeights, match=r"qzeros holds 15.*checkpoint_format gptq.*supported.*gptq_v2"):
        V1.decode({**GPTQ, "qzeros": qzeros}, 8, 64, name="file: layer")


def test_symmetric_gptq_with_other_zero_points_is_refused() -> None:
    qzeros = pack_words(np.array([[8, 8, 8, 8, 8, 8, 8, 7]]), 4)
    with pytest.raises(
        CorruptWeights, match=r"sym is true, but not every zero point in qzeros is 8 \(stored as 7 or 8"
    ):
        SYMMETRIC.decode({**GPTQ, "qzeros": qzeros}, 8, 64, name="file: layer")


def test_a_weight_shape_that_is_not_the_matrix_is_refused() -> None:
    pieces = {**PACKED, "shape": torch.tensor([64, 8])}
    with pytest.raises(CorruptWeights, match=r"weight_shape is \[64, 8\], expected \[8, 64\]"):
        PackedIntegers(bits=4, group_size=0, symmetric=True).decode(pieces, 8, 64, name="file: layer")


# ---- what check says

EXAMPLES: list[tuple[WeightFormat, Pieces]] = [
    (BLOCKS, FP8),
    (Fp4Blocks(), FP4),
    (Mxfp4(), MXFP4),
    (ONE_GROUP, GPTQ),
    (Awq(bits=4, group_size=0), AWQ),
    (PackedIntegers(bits=4, group_size=0, symmetric=True), PACKED),
]
NAMES = [type(format).__name__ for format, _ in EXAMPLES]


@pytest.mark.parametrize(("format", "pieces"), EXAMPLES, ids=NAMES)
def test_check_tells_every_piece_that_is_missing_of_another_shape_or_of_another_dtype(
    format: WeightFormat, pieces: Pieces
) -> None:
    good = described(pieces)
    assert format.check(good, 8, 64) is None
    assert {piece.name for piece in format.pieces if piece.use == "required"} <= set(good)
    for piece in format.pieces:
        if piece.use == "unused":
            continue
        without = {name: value for name, value in good.items() if name != piece.name}
        problem = format.check(without, 8, 64)
        if piece.use == "optional":
            assert problem is None
        else:
            assert problem is not None
            assert f"has no {piece.name} (" in problem
            assert (piece.linear + piece.stacked)[0] in problem
    for name, (dtype, shape) in good.items():
        problem = format.check({**good, name: (dtype, (*shape, 3))}, 8, 64)
        assert problem is not None
        assert f"its {name} has shape {[*shape, 3]}, expected {list(shape)}" in problem
        problem = format.check({**good, name: ("F64", shape)}, 8, 64)
        assert problem is not None
        assert f"its {name} has dtype F64 (supported: " in problem
        assert format.words in problem
    problem = format.check({**good, "other": ("F32", (8,))}, 8, 64)
    assert problem is not None
    assert "no piece called other" in problem


def test_check_refuses_a_grid_of_scales_that_floor_division_would_give() -> None:
    problem = BLOCKS.check({"weight": ("F8_E4M3", (576, 256)), "scale": ("F32", (4, 2))}, 576, 256)
    assert problem == (
        "a 576 x 256 matrix in FP8, one scale for 128 x 128 weights: its scale has shape [4, 2], expected [5, 2]"
    )


@pytest.mark.parametrize(
    ("format", "piece", "rows", "columns"),
    [(Fp4Blocks(), "weight", 8, 48), (Mxfp4(), "blocks", 8, 48), (Awq(bits=4, group_size=0), "qweight", 12, 64)],
    ids=["fp4", "mxfp4", "awq"],
)
def test_check_refuses_a_matrix_that_the_format_cannot_store(
    format: WeightFormat, piece: str, rows: int, columns: int
) -> None:
    example = dict(zip(NAMES, EXAMPLES, strict=True))[type(format).__name__]
    problem = format.check(described(example[1]), rows, columns)
    assert problem is not None
    assert f"its {piece} has shape" in problem
    assert "no matrix of this size" in problem


def test_act_order_needs_g_idx() -> None:
    ordered = Gptq(bits=4, group_size=0, symmetric=False, zeros="plain", act_order=True)
    pieces = {name: piece for name, piece in GPTQ.items() if name != "g_idx"}
    problem = ordered.check(described(pieces), 8, 64)
    assert problem is not None
    assert "has no g_idx (.g_idx)" in problem


def test_zero_points_are_a_piece_only_where_they_are_needed() -> None:
    assert "zero_point" in {piece.name for piece in PackedIntegers(bits=4, group_size=0, symmetric=False).pieces}
    assert "zero_point" not in {piece.name for piece in PackedIntegers(bits=4, group_size=0, symmetric=True).pieces}


def test_every_dtype_that_a_format_expects_can_be_read() -> None:
    for format, _ in EXAMPLES:
        for expected in format.expected(64, 64).values():
            assert set(expected.dtypes) <= {*PIECE_DTYPES, *quantised.PLAIN_FLOATS}


# ---- which module is stored how

RULES = Quantisation(
    method="fp8", rules=(Rule(None, pattern=r".*gate$"), Rule(Fp4Blocks(), pattern=r".*experts\.")), default=BLOCKS
)


def test_the_first_rule_that_matches_decides_and_the_default_is_for_the_rest() -> None:
    assert RULES.format_of("model.layers.0.mlp.gate") is None
    assert RULES.format_of("model.layers.0.mlp.experts.0.up_proj") == Fp4Blocks()
    assert RULES.format_of("model.layers.0.mlp.up_proj") == BLOCKS
    assert not RULES.is_converted("model.layers.0.mlp.experts.0.gate")
    assert RULES.is_converted("model.layers.0.mlp.up_proj")
    assert RULES.formats == (Fp4Blocks(), BLOCKS)


def test_a_rule_goes_by_expressions_names_beginnings_and_endings() -> None:
    beginnings = frozenset({"model.layers.1"})
    rule = Rule(None, pattern=r"mlp\.\d", names=frozenset({"a.b"}), beginnings=beginnings, endings=("gate", "head"))
    for name in ("a.b", "mlp.3.x", "model.layers.1", "model.layers.1.mlp", "mlp.gate", "lm_head"):
        assert rule.matches(name), name
    for name in ("a", "a.b.c", "x.mlp.3", "model.layers.11", "model.layers", "mlp.gate_proj"):
        assert not rule.matches(name), name
    assert not Rule(None).matches("mlp")


def test_a_quantisation_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(RULES)) == RULES
