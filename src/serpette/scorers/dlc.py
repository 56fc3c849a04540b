r"""DLC: distorting-based learning complexity.   S(x, y) = mean over t of CE(f(x; theta_t), y)

theta_t are masked copies of the pre-trained weights (`serpette.masking`), f classifies by class
prototypes (`serpette.prototypes`). Jiang et al., "Exploring learning complexity for efficient
downstream dataset pruning", ICLR 2025, definition 2 and section 3.1.

Differs from the paper, which leaves it open: the path takes its points in a low-discrepancy order
and stops when the class-averaged Spearman correlation of S with the previous S is at least 0.99
twice running; the features are standardised; the logits are minus the Euclidean distance.
`variant="official"` is what the authors' scripts do: one global ranking of the weights, 50 models with
0.98^n of the weights kept (n = 0 .. 49), raw features, 1 / distance.
In a causal language model the loss is the mean over the response tokens, with the decoder's linears masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..masking import LOW_DISCREPANCY
from ..prototypes import moments, prototype_logits
from ..types import EVERY_TASK, PathSpec, Signals

CHAINED = tuple(1 - Fraction(98, 100) ** n for n in range(50))


class DLC:
    """Loss along a path of masked models: high = hard. No training; one forward pass a point.

    Regression: squared error of a ridge probe, fitted on the unmasked features, on the masked ones. Causal
    language model: mean loss of the response tokens in nats; `prototype`, `logits` and `temperature` have no
    meaning there.

    Args:
        variant: `"paper"` or `"official"`, see above.
        points: shares of the weights masked, 0 first; default: the variant's own. Given points are all
            used; a path of the single point 0 is the plain unmasked loss, the control of this method.
        prototype: class means of the `"unmasked"` features (what the authors do) or of each
            `"masked"` model's own.
        logits: `"neg_distance"` or `"inverse_distance"` (nearly flat: distances 10, 12, 14 give a loss
            of 1.084 against ln 3 = 1.099); default: the variant's own.
        temperature: of `"neg_distance"`, in units of standardised features.
        principle: `"l1"` masks the smallest weights first; `"random"` is the paper's figure 6b.
        tolerance, max_points: when the default path stops growing; the paper saturates at 5 points.

    Raises:
        ValueError: an unknown word, points outside [0, 1) or not starting at 0, a number out of range.
    """

    name = "dlc"
    needs = frozenset({"labels"})
    tasks = EVERY_TASK

    def __init__(
        self,
        variant: Literal["paper", "official"] = "paper",
        points: Sequence[float] | None = None,
        prototype: Literal["unmasked", "masked"] = "unmasked",
        logits: Literal["neg_distance", "inverse_distance"] | None = None,
        temperature: float = 1.0,
        principle: Literal["l1", "random"] = "l1",
        tolerance: float = 0.99,
        max_points: int = 10,
        seed: int = 0,
    ):
        for option, value, words in (
            ("variant", variant, ("paper", "official")),
            ("prototype", prototype, ("unmasked", "masked")),
            ("logits", logits, (None, "neg_distance", "inverse_distance")),
            ("principle", principle, ("l1", "random")),
        ):
            if value not in words:
                raise ValueError(f"{option}={value!r} must be one of {', '.join(map(repr, words))}")
        for option, value, fine, limit in (
            ("temperature", temperature, temperature > 0, "above 0; 1 is usual"),
            ("max_points", max_points, 1 <= max_points <= len(LOW_DISCREPANCY), "in 1..10"),
        ):
            if not fine:
                raise ValueError(f"{option}={value!r} must be {limit}")
        official = variant == "official"
        own = CHAINED if official else LOW_DISCREPANCY[:max_points]
        shares = own if points is None else tuple(Fraction(str(p)) for p in points)
        if (
            not shares
            or shares[0] != 0
            or not all(0 <= p < 1 for p in shares)
            or len(set(shares)) < len(shares)
        ):
            raise ValueError(
                f"points={points} must be different shares in [0, 1), the unmasked model (0) first"
            )
        self.variant, self.temperature, self.points = variant, temperature, points
        self.principle, self.tolerance, self.max_points, self.seed = principle, tolerance, max_points, seed
        self.prototype: Literal["unmasked", "masked"] = prototype
        self.logits: Literal["neg_distance", "inverse_distance"] = logits or (
            "inverse_distance" if official else "neg_distance"
        )
        self.path = PathSpec(
            points=shares,
            scope="global" if official else "layer",
            principle=principle,
            adaptive=points is None and not official,
            tolerance=tolerance,
            min_points=min(4, len(shares)),
            seed=seed,
        )

    def along_path(self, signals: Signals) -> Tensor:
        """Loss of each example under each model, (P, N) float64."""
        path = signals.path(self.path, self.name)
        if signals.task == "causal-lm":  # its "features" are the losses
            losses_PN = torch.empty(len(path.points), len(signals), dtype=torch.float64)
            for rows, losses_Pn1 in path.chunks():
                losses_PN[:, rows] = losses_Pn1[..., 0].double()
            return losses_PN
        labels = signals.require("labels", self.name)
        if signals.task == "regression":
            return _ridge_errors(path, labels)
        losses_PN = torch.empty(len(path.points), len(labels), dtype=torch.float64)
        classified = prototype_logits(
            path,
            labels,
            signals.num_classes,
            prototype=self.prototype,
            logits=self.logits,
            standardize=self.variant == "paper",
            temperature=self.temperature,
        )
        for rows, logits_PnC in classified:
            targets = labels[rows].expand(len(logits_PnC), -1)
            losses_PN[:, rows] = cross_entropy(logits_PnC.transpose(1, 2), targets, reduction="none")
        return losses_PN

    def __call__(self, signals: Signals) -> Tensor:
        """(N,) float64, the mean of `along_path` over the points."""
        return self.along_path(signals).mean(0)


def _ridge_errors(path, targets: Tensor) -> Tensor:
    """(y - w' h_t(x))^2, (P, N); the ridge penalty minimises generalised cross-validation."""
    mean_D, scale_D = moments(path)
    y_N = targets.double() - targets.double().mean()
    gram_DD, cross_D, n = 0.0, 0.0, len(y_N)
    for rows, features in path.chunks():
        z_nD = (features[0].double() - mean_D) / scale_D
        gram_DD, cross_D = gram_DD + z_nD.T @ z_nD, cross_D + z_nD.T @ y_N[rows]
    s_D, U_DD = torch.linalg.eigh(torch.as_tensor(gram_DD))
    c_D, s_D = U_DD.T @ cross_D, s_D.clamp(min=0)

    def gcv(penalty: float) -> float:
        shrink_D = 1 / (s_D + penalty)
        residual = (y_N @ y_N) - (c_D**2 * shrink_D * (2 - s_D * shrink_D)).sum()
        return float(residual / (n - (s_D * shrink_D).sum()) ** 2)

    penalty = min((n * 10.0**e for e in range(-4, 4)), key=gcv)
    w_D = U_DD @ (c_D / (s_D + penalty))
    errors_PN = torch.empty(len(path.points), n, dtype=torch.float64)
    for rows, features in path.chunks():
        z_PnD = (features.double() - mean_D) / scale_D
        errors_PN[:, rows] = (z_PnD @ w_D - y_N[rows]) ** 2
    return errors_PN
