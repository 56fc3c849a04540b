"""Slow, readable twins in float64: loops over examples, no trick of the fast code."""

import math

import torch


def softmax(z):
    top = max(float(v) for v in z)
    e = [math.exp(float(v) - top) for v in z]
    return [v / sum(e) for v in e]


def entropy(logits):
    return [-sum(p * math.log(p) for p in softmax(z) if p > 0) for z in logits]


def margin(logits):
    ranked = [sorted(softmax(z), reverse=True) for z in logits]
    return [-(p[0] - p[1]) for p in ranked]


def least_confidence(logits):
    return [1 - max(softmax(z)) for z in logits]


def el2n(early_logits, labels):
    scores = []
    for n, y in enumerate(labels):
        lengths = []
        for f in early_logits:
            p = softmax(f[n])
            p[int(y)] -= 1
            lengths.append(math.sqrt(sum(v * v for v in p)))
        scores.append(sum(lengths) / len(lengths))
    return scores


def grand(early_logits, embeddings, labels, regression=False):
    """Autograd through a last layer whose output is shifted to the given logits."""
    scores = []
    for n, y in enumerate(labels):
        h = embeddings[n].double()
        lengths = []
        for f in early_logits:
            W = torch.zeros(f.shape[1], len(h), dtype=torch.float64, requires_grad=True)
            b = f[n].double().clone().requires_grad_()
            z = W @ h + b
            loss = (z[0] - y) ** 2 / 2 if regression else -z.log_softmax(0)[y]
            gradients = torch.autograd.grad(loss, [W, b])
            lengths.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        scores.append(sum(lengths) / len(lengths))
    return scores


def forgetting(history, labels):
    scores = []
    for n, y in enumerate(labels):
        right = [int(f[n].argmax()) == int(y) for f in history]
        events = sum(a and not b for a, b in zip(right, right[1:], strict=False))
        scores.append(float(events) if any(right) else float(len(history)))
    return scores


def optimisation_complexity(history, labels):
    return [
        sum(-math.log(softmax(f[n])[int(y)]) for f in history) / len(history) for n, y in enumerate(labels)
    ]


def distance(a, b):
    return math.sqrt(sum((float(u) - float(v)) ** 2 for u, v in zip(a, b, strict=True)))


def symmetric_kl(z, w, epsilon):
    p, q = ([(v + epsilon) / (1 + len(z) * epsilon) for v in softmax(x)] for x in (z, w))
    kl = sum(u * math.log(u / v) for u, v in zip(p, q, strict=True))
    return kl + sum(v * math.log(v / u) for u, v in zip(p, q, strict=True))


def k_center(points, first, d, picks=None):
    """Positions in the order of picking; those that were not picked follow, far ones first."""
    chosen, rest = [first], [i for i in range(len(points)) if i != first]
    while rest and len(chosen) < (picks or len(points)):
        radius = [min(d(points[i], points[s]) for s in chosen) for i in rest]
        chosen.append(rest.pop(radius.index(max(radius))))
    return chosen + sorted(rest, key=lambda i: -min(d(points[i], points[s]) for s in chosen))


def herding(points, best=min):
    """Positions in the order of picking."""
    points = [[float(v) for v in p] for p in points]
    mu = [sum(column) / len(points) for column in zip(*points, strict=True)]
    chosen, rest = [], list(range(len(points)))
    while rest:
        t = len(chosen)
        target = [(t + 1) * m - sum(points[s][j] for s in chosen) for j, m in enumerate(mu)]
        i = best(rest, key=lambda i: distance(target, points[i]))
        chosen.append(i)
        rest.remove(i)
    return chosen


def turns(order):
    """Minus the turn of each position."""
    scores = [0.0] * len(order)
    for turn, i in enumerate(order):
        scores[i] = -float(turn)
    return scores


def moderate(embeddings, groups):
    scores = [0.0] * len(groups)
    for c in set(groups):
        rows = [i for i, g in enumerate(groups) if g == c]
        mean = embeddings[rows].double().mean(0)
        d = [distance(embeddings[i].double(), mean) for i in rows]
        s = sorted(d)
        median = (s[(len(s) - 1) // 2] + s[len(s) // 2]) / 2
        for i, v in zip(rows, d, strict=True):
            scores[i] = -abs(v - median)
    return scores


def flex_rand(n, k, percent):
    """Easy pool and the easy quotas that are possible, in whole numbers; gamma = percent / 100."""
    pool = n * percent // 100 + (1 if 2 * (n * percent % 100) >= 100 else 0)
    quotas = set()
    for half in {k // 2, k - k // 2}:
        if percent <= 50:
            easy = pool if pool < half else half
        else:
            easy = k - (n - pool if n - pool < half else half)
        while k - easy > n - pool:  # too many for the hard pool
            easy += 1
        while easy > pool:  # too many for the easy pool
            easy -= 1
        quotas.add(easy)
    return pool, quotas


def dq_bins(points, bins):
    """The bins as lists of positions in the order of picking; the last one is what is left."""
    n = len(points)
    left, found = list(range(n)), []

    def cut(i, members):
        return sum(distance(points[p], points[i]) ** 2 for p in members)

    for b in range(bins - 1):
        S = []
        for _ in range(n // bins + (b < n % bins)):
            R = [i for i in left if i not in S]
            S.append(max(R, key=lambda i: cut(i, S) - cut(i, R)))  # noqa: B023 (used at once)
        found.append(S)
        left = [i for i in left if i not in S]
    return [*found, left]


def mmd(x, y, sigma):
    def k(a, b):
        return math.exp(-(distance(a, b) ** 2) / (2 * sigma**2))

    def mean(u, v):
        return sum(k(a, b) for a in u for b in v) / (len(u) * len(v))

    return math.sqrt(max(0.0, mean(x, x) + mean(y, y) - 2 * mean(x, y)))
