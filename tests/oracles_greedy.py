"""Slow, readable twins in float64 of the greedy and gradient methods: whole matrices, plain greedy loops."""

import math

import torch
from oracles import distance, softmax
from scipy.stats import beta


def aum(history, labels):
    scores = []
    for n, y in enumerate(labels.tolist()):
        margins = [float(f[n][y]) - max(float(z) for c, z in enumerate(f[n]) if c != y) for f in history]
        scores.append(-sum(margins) / len(margins))
    return scores


def dual(history, labels, J):
    scores = []
    for n, y in enumerate(labels.tolist()):
        p = [softmax(f[n])[y] for f in history]
        J = min(J, len(p))
        windows = [p[t : t + J] for t in range(len(p) - J + 1)]
        total = 0.0
        for w in windows:
            mean = sum(w) / J
            std = math.sqrt(sum((v - mean) ** 2 for v in w) / (J - 1))
            total += std * (1 - mean)
        scores.append(total / len(windows))
    return scores


def dual_weights(history, labels, J, keep, c):
    scores = dual(history, labels, J)
    mean = [sum(softmax(f[n])[y] for f in history) / len(history) for n, y in enumerate(labels.tolist())]
    top = sorted(range(len(scores)), key=lambda n: -scores[n])[:10]
    mu = sum(mean[n] for n in top) / len(top)
    b = 15 * (1 - mu) * (1 - (1 - keep) ** c)
    return [s * beta.pdf(m, 16 - b, b) for s, m in zip(scores, mean, strict=True)]


def beta_weights(scores, k, c):
    """Examples from the hardest: x is the middle of the places that the score's ties take."""
    n = len(scores)
    x = []
    for s in scores:
        harder, ties = sum(t > s for t in scores), sum(t == s for t in scores)
        x.append((harder + ties / 2) / n)
    mu = sum(sorted(x)[:10]) / min(10, n)
    b = 15 * (1 - mu) * (1 - (1 - k / n) ** c)
    return [(1 - v) * beta.pdf(v, 16 - b, b) for v in x]


def last_layer_gradients(logits, embeddings, labels, regression=False):
    """(N, C * (D + 1)) by autograd through a last layer whose output is shifted to the given logits."""
    rows = []
    for f, h, y in zip(logits.double(), embeddings.double(), labels, strict=True):
        W = torch.zeros(len(f), len(h), dtype=torch.float64, requires_grad=True)
        b = f.clone().requires_grad_()
        z = W @ h + b
        loss = (z[0] - y) ** 2 / 2 if regression else -z.log_softmax(0)[y]
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [W, b])]))
    return torch.stack(rows)


def moso(history, embeddings, labels, regression=False):
    scores = torch.zeros(len(labels), dtype=torch.float64)
    for f in history:
        g = last_layer_gradients(f, embeddings, labels, regression)
        for n in range(len(labels)):
            others = torch.cat([g[:n], g[n + 1 :]]).mean(0)
            scores[n] += others @ g[n] / len(history)
    return scores


def greedy(n, value, picks=None):
    """Order of picking of the plain greedy algorithm; `value` of a list of positions."""
    chosen, rest = [], list(range(n))
    while rest and len(chosen) < (picks or n):
        gains = [round(value([*chosen, i]) - value(chosen), 6) for i in rest]
        chosen.append(rest.pop(gains.index(max(gains))))
    return chosen


def cosine_similarity(embeddings):
    x = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    return (1 + x @ x.T) / 2


def facility_location(similarity):
    return lambda S: float(similarity[:, S].amax(1).sum()) if S else 0.0


def graph_cut(similarity, redundancy):
    return lambda S: float(similarity[:, S].sum() - redundancy * similarity[S][:, S].sum())


def craig(gradients):
    d = torch.tensor([[distance(a, b) for b in gradients] for a in gradients])
    return facility_location(d.max() + 1 - d)


def grad_match(g, penalty, support):
    """Order of picking among the gradients (n, P)."""
    target, penalty = g.mean(0), penalty * g.square().sum(1).mean()
    order, rest, S = [], list(range(len(g))), []
    while rest:
        if len(S) == support:
            S = []
        residual = target
        if S:  # ridge regression of the target on the support
            A = g[S].T
            w = torch.linalg.solve(A.T @ A + penalty * torch.eye(len(S), dtype=g.dtype), A.T @ target)
            residual = target - A @ w
        i = max(rest, key=lambda i: float(g[i] @ residual))  # noqa: B023 (used at once)
        S.append(i)
        order.append(i)
        rest.remove(i)
    return order


def glister(logits, embeddings, labels, validation, step, every, regression=False):
    """Order of picking: autograd of the validation loss in the weights of a last layer that really moves."""
    h, n = embeddings.double(), len(labels)
    g = last_layer_gradients(logits, embeddings, labels, regression)
    eta = step / float((1 + h.square().sum(1)).mean())
    C, D = logits.shape[1], h.shape[1]
    moved = torch.zeros(C * (D + 1), dtype=torch.float64)

    def validation_gradient(v):
        theta = moved.clone().requires_grad_()
        z = theta[: C * D].view(C, D) @ h[v] + theta[C * D :] + logits[v].double()
        loss = (z[0] - labels[v]) ** 2 / 2 if regression else -z.log_softmax(0)[labels[v]]
        return torch.autograd.grad(loss, theta)[0]

    order, rest = [], list(range(n))
    while rest:
        by_v = {v: validation_gradient(v) for v in validation}

        def gain(i):
            others = [by_v[v] for v in validation if v != i]  # noqa: B023 (used at once)
            return float(g[i] @ torch.stack(others).mean(0)) if others else 0.0

        took = sorted(rest, key=gain, reverse=True)[:every]
        moved -= eta * g[took].mean(0)
        order += took
        rest = [i for i in rest if i not in took]
    return order


def d2(scores, embeddings, k, neighbours, gamma, gamma_back):
    n = len(scores)
    low, high = min(scores), max(scores)
    s = [(v - low) / (high - low) for v in scores]
    d = [[distance(a, b) for b in embeddings] for a in embeddings]
    near = [sorted((j for j in range(n) if j != i), key=lambda j: d[i][j])[:neighbours] for i in range(n)]
    lengths = sorted(d[i][j] for i in range(n) for j in near[i])
    unit = lengths[(len(lengths) - 1) // 2]
    s = [s[i] + sum(math.exp(-gamma * d[i][j] / unit) * s[j] for j in near[i]) for i in range(n)]
    picks = []
    for _ in range(k):
        i = max((i for i in range(n) if i not in picks), key=lambda i: s[i])
        picks.append(i)
        for j in near[i]:
            s[j] -= math.exp(-gamma_back * d[i][j] / unit) * s[i]
    return sorted(picks)
