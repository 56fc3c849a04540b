"""Lazy greedy maximisation of a submodular function, for the scorers that rank by it; imports only torch.

A gain can only fall as the set grows, so an old gain is an upper bound: a candidate is looked at again
only while its bound is the highest. Minoux 1978, "Accelerated greedy algorithms for maximizing
submodular set functions". The picks are those of the plain greedy algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ELEMENTS = 2**21  # of one block of a matrix that is never held as a whole: 16 MiB in float64


def blocks(total: int, width: int) -> Iterator[Tensor]:
    """0 .. total-1 in pieces (n,) of so many that n x `width` stays below `ELEMENTS`."""
    yield from torch.arange(total).split(max(1, ELEMENTS // max(1, width)))


def on_grid(values: Tensor, steps: float = 2.0**30) -> Tensor:
    """Rounded to whole multiples of 1 / `steps`.

    Sums of such numbers are exact, in any order: equal examples have equal gains, to the last bit.
    """
    return (values * steps).round_() / steps


def lazy_greedy(
    gain_N: Tensor,
    gains_of: Callable[[Tensor], Tensor],
    take: Callable[[int], None],
    picks: int,
) -> Tensor:
    """Positions (N,) in the order of picking; of equal gains the earlier position.

    Args:
        gain_N: (N,) float64, gain of each candidate given the empty set.
        gains_of: gains (n,) of the candidates at positions (n,), given what has been taken.
        take: adds the candidate at a position to the set.
        picks: after so many the others follow by the last gain that is known of them.

    Example:
        >>> covered = torch.zeros(3, dtype=torch.bool)
        >>> cover = torch.tensor([[True, True, False], [True, False, False], [False, False, True]])
        >>> gains = lambda rows: (cover[rows] & ~covered).sum(1).double()
        >>> lazy_greedy(gains(torch.arange(3)), gains, lambda i: covered.logical_or_(cover[i]), 3).tolist()
        [0, 2, 1]
    """
    n = len(gain_N)
    bound_N, order = gain_N.clone(), []
    fresh_N = torch.ones(n, dtype=torch.bool)  # is the bound the gain itself?
    for _ in range(min(picks, n)):
        width = 8
        while not fresh_N[i := int(bound_N.argmax())]:
            rows = bound_N.masked_fill(fresh_N, -torch.inf).topk(min(width, n)).indices
            rows = rows[~fresh_N[rows] & (bound_N[rows] > -torch.inf)]
            bound_N[rows] = torch.minimum(bound_N[rows], gains_of(rows))
            fresh_N[rows] = True
            width = min(2 * width, max(8, ELEMENTS // n))
        order.append(i)
        take(i)
        bound_N[i] = -torch.inf
        fresh_N.zero_()
    rest = bound_N.argsort(descending=True, stable=True)[: n - len(order)]
    return torch.cat([torch.tensor(order, dtype=torch.long), rest])
