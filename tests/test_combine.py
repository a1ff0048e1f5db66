"""Combine: partial sums add up in fp32 at their rows, and the output is rounded once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.combine import RoutedSum, combine


@given(rows=st.sets(st.integers(0, 150)))
def test_a_partial_is_added_at_its_rows_and_nowhere_else(rows: set[int]) -> None:
    rng = np.random.default_rng(len(rows))
    row_R = np.array(sorted(rows), dtype=np.int32)
    y_TD = rng.random((151, 5), dtype=np.float32)
    partial_RD = rng.random((len(rows), 5), dtype=np.float32)
    wanted_TD = y_TD.copy()
    for row, partial_D in zip(sorted(rows), partial_RD, strict=True):
        wanted_TD[row] += partial_D
    combine(y_TD, partial_RD, row_R)
    np.testing.assert_array_equal(y_TD, wanted_TD)


@given(st.lists(st.sets(st.integers(0, 5)) | st.just(set(range(6))), max_size=6))
def test_a_routed_sum_equals_adding_its_partials_one_by_one(parts: list[set[int]]) -> None:
    rng = np.random.default_rng(len(parts))
    total, wanted_TD = RoutedSum(6, 3), np.zeros((6, 3), dtype=np.float32)
    for rows in parts:
        row_R = np.array(sorted(rows), dtype=np.int32)
        message = rng.random((len(rows), 3), dtype=np.float32).tobytes()
        partial_RD = np.frombuffer(message, dtype=np.float32).reshape(-1, 3)  # read-only, as from the wire
        wanted_TD[row_R] += partial_RD
        total.add(partial_RD, row_R)
        assert np.frombuffer(message, dtype=np.float32).tobytes() == message
    np.testing.assert_array_equal(total.rows(0, 6), wanted_TD)
    np.testing.assert_array_equal(total.rows(2, 4), wanted_TD[2:4])
