"""The synthetic loads have the profiles their names promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.load_matrices import (
    PAIRS_PER_S,
    Load,
    another_workload,
    deepseek_v3_like,
    hot_sets,
    noisy,
    uniform,
    zipf,
)

SEEDS = st.integers(0, 2**32)


def peaks(load_LE: Load) -> Load:
    """Hottest over mean expert of every layer."""
    peak_L: Load = load_LE.max(axis=1) / load_LE.mean(axis=1)
    return peak_L


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_the_hottest_expert_is_as_hot_as_in_deepseek_v3(seed: int) -> None:
    load_LE = deepseek_v3_like(seed=seed)
    peak_L = peaks(load_LE)
    assert load_LE.shape == (58, 256)
    assert 5 <= np.median(peak_L) <= 8
    assert (np.quantile(peak_L, [0.25, 0.75]) >= 5).all()
    assert (np.quantile(peak_L, [0.25, 0.75]) <= 8).all()
    assert peak_L.max() == pytest.approx(14)
    assert peak_L.min() > 2.5
    assert (load_LE > 0).all()
    assert load_LE.sum(axis=1) == pytest.approx(PAIRS_PER_S)


def test_the_profile_holds_for_other_sizes_and_too_few_experts_are_refused() -> None:
    assert 5 <= np.median(peaks(deepseek_v3_like(seed=0, num_layers=61))) <= 8
    with pytest.raises(ValueError, match="with 8 experts none can have"):
        deepseek_v3_like(seed=0, num_experts=8)


def test_a_seed_gives_the_same_load_again_and_another_seed_another() -> None:
    assert (deepseek_v3_like(seed=3) == deepseek_v3_like(seed=3)).all()
    assert (deepseek_v3_like(seed=3) != deepseek_v3_like(seed=4)).any()


def test_uniform_is_uniform() -> None:
    assert (peaks(uniform()) == 1).all()


@pytest.mark.parametrize("exponent", [0.5, 1.2])
def test_zipf_falls_with_its_exponent_and_is_hot_somewhere_else_in_every_layer(exponent: float) -> None:
    load_LE = zipf(exponent, seed=0)
    falling_LE = -np.sort(-load_LE, axis=1)
    assert falling_LE[:, 0] / falling_LE[:, 9] == pytest.approx(10**exponent)
    assert len(set(load_LE.argmax(axis=1).tolist())) > 40


def test_a_hot_set_has_its_share() -> None:
    load_LE = hot_sets(8, 0.4, seed=0)
    falling_LE = -np.sort(-load_LE, axis=1)
    assert falling_LE[:, :8].sum(axis=1) == pytest.approx(0.4 * PAIRS_PER_S)
    assert falling_LE[:, 0] == pytest.approx(falling_LE[:, 7])
    for num_hot, share in ((0, 0.4), (256, 0.4), (8, 1.1)):
        with pytest.raises(ValueError, match="cannot be a hot set"):
            hot_sets(num_hot, share, seed=0)


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_another_workload_moves_the_heat_in_half_of_the_layers_and_keeps_the_skew(seed: int) -> None:
    before_LE = deepseek_v3_like(seed=1)
    after_LE = another_workload(before_LE, seed=seed)
    changed_L = (before_LE != after_LE).any(axis=1)
    assert changed_L.sum() == 29
    assert peaks(after_LE) == pytest.approx(peaks(before_LE))
    between = [float(np.corrcoef(before_LE[row], after_LE[row])[0, 1]) for row in np.flatnonzero(changed_L)]
    assert abs(np.mean(between)) < 0.1


def test_noise_shrinks_with_the_tokens_counted() -> None:
    load_LE = deepseek_v3_like(seed=0)
    errors = [
        float(np.abs(noisy(load_LE, seed=1, tokens=tokens) - load_LE).sum() / load_LE.sum())
        for tokens in (10_000, 1_000_000)
    ]
    assert 0.02 < errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)
