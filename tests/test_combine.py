"""Combine: partial sums add up in fp32 at their rows, and the output is rounded once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.combine import combine, finish


@given(rows=st.sets(st.integers(0, 11)), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_partial_is_added_at_its_rows_and_nowhere_else(rows: set[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(rows))
    row_R = np.array(sorted(rows), dtype=np.int32)
    y_TD = torch.randn(12, 5, generator=generator)
    partial_RD = torch.randn(len(rows), 5, generator=generator).to(dtype)
    wanted_TD = y_TD.clone()
    for row, partial_D in zip(sorted(rows), partial_RD, strict=True):
        wanted_TD[row] += partial_D.float()
    combine(y_TD, partial_RD, row_R)
    assert torch.equal(y_TD, wanted_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_shared_output_is_added_in_fp32_and_the_sum_rounded_once(dtype: torch.dtype) -> None:
    y_TD = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    shared_TD = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted_TD = (y_TD + shared_TD.float()).to(dtype)
    assert torch.equal(finish(y_TD.clone(), shared_TD, dtype=dtype), wanted_TD)
    assert torch.equal(finish(y_TD.clone(), None, dtype=dtype), y_TD.to(dtype))
