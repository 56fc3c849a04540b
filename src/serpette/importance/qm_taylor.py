r"""QMTaylor: quantiles-mean Taylor importance, between the mean over classes and the greatest class.

    eta_i = (1/11) sum over k = 0..10 of Q_k( { eta_i^t } over t ),   eta_i^t = | w_i . dL(D^t)/dw_i |

SPSFT 2024, "Memory-efficient fine-tuning via structured neural network pruning", Eq. 7: Q_k is the 10 k %
quantile over the p classes, interpolated linearly. With 2, 10 or 11 classes it is exactly the mean over them,
since each class then has the same weight in the 11 quantiles.
Differs: nothing; holds p x n numbers of a layer, and no gradient of a weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..types import NeuronStats

AT_ONCE = 2**24  # numbers that torch.quantile takes


class QMTaylor:
    """Mean of the quantiles over classes of the Taylor importance; high = more important.

    Args:
        missing: of classes without examples, whose importance is unknown: `"error"`, or `"ignore"` for the
            quantiles over the other classes.

    Raises:
        ValueError: no class labels; classes without examples.
    """

    name = "qm_taylor"
    needs = frozenset({"contribution", "labels"})

    def __init__(self, missing: Literal["error", "ignore"] = "error"):
        if missing not in ("error", "ignore"):
            raise ValueError(f"missing={missing!r} must be 'error' or 'ignore'")
        self.missing = missing

    def __call__(self, stats: NeuronStats) -> Tensor:
        """(n,) float64, 0 or more."""
        stats.require("labels", self.name)
        c_Tn, counts_T = stats.require("contribution", self.name), stats.require("counts", self.name)
        seen_T = counts_T > 0
        if self.missing == "error" and not bool(seen_T.all()):
            absent = (~seen_T).nonzero()[:, 0].tolist()
            shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
            raise ValueError(
                f"importance 'qm_taylor' needs examples of each class, and {len(absent)} of {len(seen_T)} "
                f"have none: {shown}; give more data, or QMTaylor(missing='ignore') for the others alone"
            )
        eta_Tn = c_Tn[seen_T].abs()
        tenths = torch.linspace(0, 1, 11, dtype=eta_Tn.dtype, device=eta_Tn.device)
        parts = eta_Tn.split(max(1, AT_ONCE // len(eta_Tn)), dim=1)
        return torch.cat([part.quantile(tenths, dim=0).mean(0) for part in parts])
