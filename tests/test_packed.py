"""Packed expert weights: what quantisation may change, and that products with packed weights change nothing more."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import experts.packed as packed
from experts.packed import PackedMatrix, WeightDtype, dequantise, linear, pack, packed_bytes
from protos.errors import CorruptWeights, UnsupportedModel

WEIGHT_DTYPES: tuple[WeightDtype, ...] = get_args(WeightDtype)
ROUNDED_SCALE = 1 + 2**-7  # a bf16 scale is up to this much above the exact one


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Weights of odd and even shapes, with zero rows, outliers, offsets and very different magnitudes."""
    rows = draw(st.integers(1, 140))
    columns = draw(st.one_of(st.integers(1, 200), st.sampled_from([16, 64, 128, 256])))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight_ON = torch.randn(rows, columns, generator=rng) * 10.0 ** draw(st.integers(-6, 4))
    for spoil in draw(st.sets(st.sampled_from(["zero row", "outlier", "offset", "scaled rows", "zero"]))):
        if spoil == "zero row":
            weight_ON[draw(st.integers(0, rows - 1))] = 0
        elif spoil == "outlier":
            weight_ON[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] *= 1000
        elif spoil == "offset":
            weight_ON += weight_ON.abs().amax() * 3
        elif spoil == "scaled rows":
            weight_ON *= torch.logspace(-4, 4, rows)[:, None]
        else:
            weight_ON.zero_()
    return weight_ON.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


def half_step(weight_ON: Tensor, weight_dtype: WeightDtype, group_size: int) -> Tensor:
    """The largest error each element may have, from the definition of the formats."""
    exact_ON = weight_ON.double()
    if weight_dtype == "int4":
        rows, columns = exact_ON.shape
        groups_OGg = F.pad(exact_ON, (0, -columns % group_size)).view(rows, -1, group_size)
        range_OG1 = groups_OGg.amax(2, keepdim=True).clamp(min=0) - groups_OGg.amin(2, keepdim=True).clamp(max=0)
        # Half a step, and 1/64 of one at the ends of the range for the zero point's rounding.
        half_OG1: Tensor = range_OG1 / 15 * (1 / 2 + 1 / 32) * ROUNDED_SCALE
        return half_OG1.expand_as(groups_OGg).flatten(1)[:, :columns]
    largest_O1 = exact_ON.abs().amax(1, keepdim=True)
    if weight_dtype == "int8":
        return (largest_O1 / 127 / 2 * ROUNDED_SCALE).expand_as(exact_ON)
    # e4m3 has 3 bits of mantissa; below 2**-6 its steps are 2**-9 all the way to zero.
    return torch.maximum(exact_ON.abs() * 2**-4, largest_O1 / 448 * ROUNDED_SCALE * 2**-10)


@settings(deadline=None)
@given(weight_ON=matrices(), weight_dtype=st.sampled_from(WEIGHT_DTYPES), group_size=st.sampled_from([32, 64, 128]))
def test_every_element_stays_within_half_a_step(weight_ON: Tensor, weight_dtype: WeightDtype, group_size: int) -> None:
    before_ON = weight_ON.clone()
    matrix = pack(weight_ON, weight_dtype, dtype=torch.float32, group_size=group_size)
    error_ON = (dequantise(matrix).double() - weight_ON.double()).abs()
    rounding_ON = weight_ON.double().abs() * 1e-6 + torch.finfo(torch.bfloat16).tiny
    assert bool((error_ON <= half_step(weight_ON, weight_dtype, group_size) * (1 + 1e-5) + rounding_ON).all())
    assert torch.equal(weight_ON, before_ON), "packing changed its source"


@settings(deadline=None)
@given(weight_ON=matrices(), weight_dtype=st.sampled_from(WEIGHT_DTYPES), group_size=st.sampled_from([32, 64, 128]))
def test_packed_bytes_is_exactly_what_stays_in_memory(
    weight_ON: Tensor, weight_dtype: WeightDtype, group_size: int
) -> None:
    matrix = pack(weight_ON, weight_dtype, dtype=torch.bfloat16, group_size=group_size)
    rows, columns = weight_ON.shape
    kept = matrix.codes.untyped_storage().nbytes() + matrix.scales.untyped_storage().nbytes()
    assert packed_bytes(rows, columns, weight_dtype, group_size=group_size) == matrix.nbytes == kept
    assert matrix.shape == (rows, columns)


@settings(deadline=None)
@given(
    weight_ON=matrices(),
    weight_dtype=st.sampled_from(WEIGHT_DTYPES),
    num_rows=st.sampled_from([0, 1, 2, 5, 17, 24, 25, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    amx=st.booleans(),
    with_bias=st.booleans(),
)
def test_linear_is_that_of_the_dequantised_weight(
    weight_ON: Tensor, weight_dtype: WeightDtype, num_rows: int, dtype: torch.dtype, amx: bool, with_bias: bool
) -> None:
    rows, columns = weight_ON.shape
    x_RN = torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias_O = weight_ON[:, 0].to(dtype) if with_bias else None
    matrix = pack(weight_ON, weight_dtype, dtype=dtype)
    exact_ON = dequantise(pack(weight_ON, weight_dtype, dtype=torch.float32)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_has_amx", lambda: amx)  # both ways of a bf16 GEMM, whatever this CPU has
        y_RO = linear(x_RN, matrix, bias_O)
    assert y_RO.dtype is dtype
    expected_RO = F.linear(x_RN.double(), exact_ON, None if bias_O is None else bias_O.double())
    # Rounding is relative to the sum of magnitudes of a dot product, not to its result.
    magnitude_RO = F.linear(x_RN.double().abs(), exact_ON.abs(), None if bias_O is None else bias_O.double().abs())
    tolerance = 1e-5 if dtype is torch.float32 else 2**-6
    assert y_RO.shape == expected_RO.shape
    assert bool(((y_RO.double() - expected_RO).abs() <= tolerance * magnitude_RO + 1e-30).all())


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_many_blocks_give_what_one_does(weight_dtype: WeightDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_ON, x_RN = torch.randn(500, 130), torch.randn(7, 130)
    whole = pack(weight_ON, weight_dtype, dtype=torch.float32)
    at_once_RO = linear(x_RN, whole)
    monkeypatch.setattr(packed, "_PACK_ELEMENTS", 1)
    monkeypatch.setattr(packed, "_block_elements", lambda weight, rows: 1)
    pieces = pack(weight_ON, weight_dtype, dtype=torch.float32)
    assert torch.equal(pieces.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert torch.equal(pieces.scales, whole.scales)
    assert torch.equal(dequantise(pieces), dequantise(whole))
    torch.testing.assert_close(linear(x_RN, pieces), at_once_RO)


def test_all_e4m3_codes_unpack_to_their_values() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    finite = codes.float().isfinite()
    scales = torch.full((2,), 0.5, dtype=torch.bfloat16)
    matrix = PackedMatrix(weight_dtype="fp8", shape=(2, 128), dtype=torch.float32, codes=codes, scales=scales)
    assert torch.equal(dequantise(matrix)[finite], codes.float()[finite] / 2)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 24])
@pytest.mark.parametrize("columns", [64, 200, 208, 1000])
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_few_bf16_rows_agree_with_many(weight_dtype: WeightDtype, columns: int, num_rows: int) -> None:
    """Few rows may be computed by torch's packed kernels, many never are."""
    rng = torch.Generator().manual_seed(columns)
    weight_ON = torch.randn(192, columns, generator=rng)
    x_RN = torch.randn(200, columns, generator=rng).bfloat16()
    matrix = pack(weight_ON, weight_dtype, dtype=torch.bfloat16)
    many_RO = linear(x_RN, matrix)[:num_rows].double()
    few_RO = linear(x_RN[:num_rows], matrix).double()
    assert float((few_RO - many_RO).norm() / many_RO.norm()) < 6e-3


def test_tensors_are_multiplied_as_they_are() -> None:
    weight_ON, x_RN, bias_O = torch.randn(5, 7), torch.randn(3, 7), torch.randn(5)
    assert torch.equal(linear(x_RN, weight_ON, bias_O), F.linear(x_RN, weight_ON, bias_O))
    assert dequantise(weight_ON) is weight_ON


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_a_zero_matrix_stays_exactly_zero_in_products(weight_dtype: WeightDtype) -> None:
    matrix = pack(torch.zeros(64, 64), weight_dtype, dtype=torch.float32)
    assert torch.equal(linear(torch.ones(2, 64), matrix), torch.zeros(2, 64))


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(weight_dtype: WeightDtype, bad: float) -> None:
    weight_ON = torch.randn(70, 90)
    weight_ON[69, 89] = bad
    with pytest.raises(CorruptWeights, match=r"\[70, 90\] weight has elements that are not finite"):
        pack(weight_ON, weight_dtype, dtype=torch.float32)


def test_an_activation_dtype_without_the_range_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="int8 computes in float32 or bfloat16, not in float16"):
        pack(torch.randn(4, 4), "int8", dtype=torch.float16)


def test_packing_allocates_little_beside_the_result() -> None:
    weight_ON = torch.randn(4096, 2048, dtype=torch.bfloat16)
    for weight_dtype in WEIGHT_DTYPES:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            matrix = pack(weight_ON, weight_dtype, dtype=torch.bfloat16)
        held, most = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        assert matrix.nbytes > 4e6
        assert 0 < most <= 8e6  # the result lies in pages that torch does not count
