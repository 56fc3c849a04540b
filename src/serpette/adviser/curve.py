"""How the quality grows with the number of examples, and what that says of more than were observed.

    value(n) = ceiling - b n^(-c),    b >= 0

The power law of learning curves, Hestness et al. 2017, arXiv 1712.00409. For each exponent c of a grid the
rest is a linear least-squares problem. The band comes from fits to draws of the trials.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student

EXPONENTS = np.geomspace(0.1, 2.0, 30)
DRAWS = 200


@dataclass(frozen=True)
class Curve:
    """Fits to draws of the trials: `ceiling`, `b` and `c` are (draws,); the first is that of the means.

    The draws are `spread` times as far from the first; of what the curve moves beyond `seen` examples half
    counts as an error.
    """

    ceiling: np.ndarray
    b: np.ndarray
    c: np.ndarray
    spread: float = 1.0
    seen: float = np.inf

    def __call__(self, n: float) -> float:
        """The value at `n` examples."""
        return float(self.ceiling[0] - self.b[0] * n ** -self.c[0])

    def draws(self, n: float) -> np.ndarray:
        """(draws,) what the resampled fits say at `n` examples."""
        found = self.ceiling - self.b * n**-self.c
        return found[0] + self.spread * (found - found[0])

    def band(self, n: float) -> tuple[float, float, float]:
        """Value and 95 % interval at `n` examples."""
        return self._interval(self(n), self.draws(n), self._beyond(n))

    def loss(self, n: float, total: float) -> tuple[float, float, float]:
        """What `n` examples lose to `total`, with its 95 % interval."""
        lost = self.draws(total) - self.draws(n)
        return self._interval(float(lost[0]), lost, self._beyond(total) - self._beyond(n))

    def cautious(self, trials: int, seen: float) -> Curve:
        """With the intervals that so few `trials`, of up to `seen` examples, allow.

        Means of J trials drawn from J are closer together than means of J new ones, by sqrt((J - 1) / J), and
        their spread is itself an estimate: Student's t in place of the normal distribution.
        """
        far = float(student.ppf(0.975, trials - 1) / 1.96 * np.sqrt(trials / (trials - 1)))
        return replace(self, spread=far, seen=seen)

    def _beyond(self, n: float) -> float:
        return self(n) - self(self.seen) if n > self.seen else 0.0

    @staticmethod
    def _interval(value: float, draws: np.ndarray, beyond: float) -> tuple[float, float, float]:
        low, high = np.quantile(draws, [0.025, 0.975])
        move = 1.96 * beyond / 2
        below, above = (np.hypot(max(0.0, x), move) for x in (value - low, high - value))
        return value, float(value - below), float(value + above)


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
    return Curve(found[0], found[1], found[2])
