"""How the quality grows with the number of examples, and what that says of more than were observed.

    value(n) = ceiling - b n^(-c),    b >= 0

The power law of learning curves, Hestness et al. 2017, arXiv 1712.00409. For each exponent c of a grid the
rest is a linear least-squares problem. The band comes from fits to draws of the trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXPONENTS = np.geomspace(0.1, 2.0, 30)
DRAWS = 200


@dataclass(frozen=True)
class Curve:
    """Fits to draws of the trials: `ceiling`, `b` and `c` are (draws,); the first is that of the means."""

    ceiling: np.ndarray
    b: np.ndarray
    c: np.ndarray

    def __call__(self, n: float) -> float:
        """The value at `n` examples."""
        return float(self.ceiling[0] - self.b[0] * n ** -self.c[0])

    def draws(self, n: float) -> np.ndarray:
        """(draws,) what the resampled fits say at `n` examples."""
        return self.ceiling - self.b * n**-self.c

    def band(self, n: float, level: float = 0.95) -> tuple[float, float, float]:
        """Value and interval at `n` examples."""
        low, high = np.quantile(self.draws(n), [(1 - level) / 2, (1 + level) / 2])
        return self(n), float(min(low, self(n))), float(max(high, self(n)))


def fit(sizes: np.ndarray, values: np.ndarray, ceiling: float = np.inf, seed: int = 0) -> Curve:
    """The curve through the means of (P, J) `values` of J trials at (P,) `sizes`; P at least 2.

    Args:
        sizes: examples, increasing.
        ceiling: no curve rises above it: 100 in points.

    Example:
        >>> sizes = np.array([10.0, 100.0, 1000.0])
        >>> curve = fit(sizes, (90 - 50 * sizes**-0.5)[:, None].repeat(3, 1))
        >>> abs(curve(4000) - 89.2) < 0.2
        True
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes={sizes.tolist()} must be two or more, for a curve")
    rng = np.random.default_rng(seed)
    J = values.shape[1]
    means = [values.mean(1), *(values[:, rng.integers(0, J, J)].mean(1) for _ in range(DRAWS - 1))]
    v_PS = np.stack(means, 1)
    best = np.full(v_PS.shape[1], np.inf)
    found = np.zeros((3, v_PS.shape[1]))
    for c in EXPONENTS:
        u_P = np.asarray(sizes, float) ** -c
        centred_P = u_P - u_P.mean()
        b_S = np.maximum(-(centred_P @ (v_PS - v_PS.mean(0))) / (centred_P @ centred_P), 0)
        ceiling_S = v_PS.mean(0) + b_S * u_P.mean()
        over = ceiling_S > ceiling  # then through (the largest mean, ceiling): as steep as may be
        if over.any():
            b_S = np.where(over, (u_P @ (ceiling - v_PS)) / (u_P @ u_P), b_S)
            ceiling_S = np.where(over, ceiling, ceiling_S)
        error_S = (v_PS - ceiling_S + np.outer(u_P, b_S)) ** 2
        error_S = error_S.sum(0)
        better = error_S < best
        best = np.where(better, error_S, best)
        found[:, better] = np.stack([ceiling_S, b_S, np.full_like(b_S, c)])[:, better]
    return Curve(*found)
