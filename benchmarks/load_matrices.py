"""Synthetic load matrices: how the routed pairs of a model spread over its experts, layer by layer.

Every matrix gives all layers the same total, as a model does: each token visits `top_k` experts of every layer. All
are drawn from a seed, and which experts are hot is independent between layers.

Shapes: L layers, E experts. The unit is routed pairs per second.
"""

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Load = npt.NDArray[np.float64]

# DeepSeek-V3's skew: the hottest expert of a layer has a median 5-8 times the mean, in the worst layer 14 times. With
# the layers' peaks lognormal around 6.3 and the worst of 58 at 14, half of the layers lie between 5 and 8.
DEEPSEEK_V3_MEDIAN, DEEPSEEK_V3_WORST = 6.3, 14.0

PAIRS_PER_S = 8 * 20_000.0  # 20,000 tokens/s of a top-8 model


def deepseek_v3_like(*, seed: int, num_layers: int = 58, num_experts: int = 256) -> Load:
    """Lognormal load in every layer, as skewed as DeepSeek-V3's.

    The peaks (hottest over mean expert) of the layers are the quantiles of a lognormal distribution, in random order;
    within a layer the spread is what makes its draw of experts have exactly that peak.

    Raises:
        ValueError: a layer has too few experts for its peak.
    """
    rng = np.random.default_rng(seed)
    worst = NormalDist().inv_cdf(1 - 0.5 / 58)
    spread = np.log(DEEPSEEK_V3_WORST / DEEPSEEK_V3_MEDIAN) / worst
    quantile_L = [NormalDist().inv_cdf((layer + 0.5) / num_layers) for layer in range(num_layers)]
    peak_L = DEEPSEEK_V3_MEDIAN * np.exp(spread * rng.permutation(quantile_L))
    if num_experts <= peak_L.max():
        raise ValueError(f"with {num_experts} experts none can have {peak_L.max():.1f} times the mean load")
    return _scaled(np.stack([_lognormal_with_peak(rng.normal(size=num_experts), peak) for peak in peak_L]))


def uniform(*, num_layers: int = 58, num_experts: int = 256) -> Load:
    """The same load for every expert."""
    return _scaled(np.ones((num_layers, num_experts)))


def zipf(exponent: float, *, seed: int, num_layers: int = 58, num_experts: int = 256) -> Load:
    """The r-th hottest expert of a layer has a load proportional to r to the power of -exponent."""
    falling_E = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    return _scaled(_shuffled(np.tile(falling_E, (num_layers, 1)), np.random.default_rng(seed)))


def hot_sets(num_hot: int, share: float, *, seed: int, num_layers: int = 58, num_experts: int = 256) -> Load:
    """In every layer `num_hot` experts have `share` of the load, evenly; the others have the rest, evenly.

    Raises:
        ValueError: the hot experts are none or all of them, or the share is not within 0..1.
    """
    if not 0 < num_hot < num_experts or not 0 <= share <= 1:
        raise ValueError(f"{num_hot} of {num_experts} experts cannot be a hot set with {share} of the load")
    load_E = np.full(num_experts, (1 - share) / (num_experts - num_hot))
    load_E[:num_hot] = share / num_hot
    return _scaled(_shuffled(np.tile(load_E, (num_layers, 1)), np.random.default_rng(seed)))


def another_workload(load_LE: Load, *, seed: int, changed: float = 0.5) -> Load:
    """The load after the requests have changed: part of the layers are as skewed as before, but on other experts.

    Args:
        load_LE: the load before.
        seed: of the choice of layers and of the new hot experts, which are independent of the old ones.
        changed: share of the layers that change; the others keep their load exactly.
    """
    rng = np.random.default_rng(seed)
    num_layers = len(load_LE)
    rows = rng.choice(num_layers, size=round(changed * num_layers), replace=False)
    changed_LE = load_LE.copy()
    changed_LE[rows] = _shuffled(load_LE[rows], rng)
    return changed_LE


def noisy(load_LE: Load, *, seed: int, tokens: int, top_k: int = 8) -> Load:
    """What is measured of a load over so many tokens: Poisson counts, in the same unit."""
    share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
    count_LE = np.random.default_rng(seed).poisson(share_LE * tokens * top_k)
    measured_LE: Load = count_LE * (load_LE.sum(axis=1, keepdims=True) / (tokens * top_k))
    return measured_LE


def _lognormal_with_peak(normal_E: npt.NDArray[np.float64], peak: float) -> npt.NDArray[np.float64]:
    """exp(sigma * normal_E) with the sigma that makes its maximum `peak` times its mean (it grows with sigma)."""
    below_max_E = normal_E - normal_E.max()
    low, high = 0.0, 1.0
    while 1 / np.exp(high * below_max_E).mean() < peak:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if 1 / np.exp(middle * below_max_E).mean() < peak:
            low = middle
        else:
            high = middle
    load_E: npt.NDArray[np.float64] = np.exp(high * below_max_E)
    return load_E


def _shuffled(load_LE: Load, rng: np.random.Generator) -> Load:
    return rng.permuted(load_LE, axis=1)


def _scaled(load_LE: Load) -> Load:
    scaled_LE: Load = load_LE * (PAIRS_PER_S / load_LE.sum(axis=1, keepdims=True))
    return scaled_LE
