"""LoRA gradients and TSA scores the slow way: autograd one example at a time, dense matrices, float64."""

import torch
from torch.nn.functional import cross_entropy


def lora_layers(model):
    """[(name, peft's layer)]."""
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]


def factors(model):
    """[(A, B)], the parameters."""
    return [(m.lora_A["default"].weight, m.lora_B["default"].weight) for _, m in lora_layers(model)]


def gradients(model, losses):
    """[(g_B (n, O, r), g_A (n, r, I))] of the layers; `losses` yields one scalar an example."""
    weights = [w for A, B in factors(model) for w in (B, A)]
    each = [torch.autograd.grad(loss, weights, materialize_grads=True) for loss in losses]
    stacked = [torch.stack(g).flatten(2) for g in zip(*each, strict=True)]
    return list(zip(stacked[::2], stacked[1::2], strict=True))


def tsa(model, batches, labels, damping):
    """(tsa (N,), tsa_joint (N,)) with moments over every position of every example.

    Args:
        model: in evaluation mode, best in float64.
        batches: one an example, the inputs by name.
        damping: relative, added before the projection.
    """
    layers = lora_layers(model)
    x, delta, hooks = {}, {}, []
    for name, module in layers:

        def watch(module, args, output, name=name):
            x[name] = args[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: delta.__setitem__(name, gradient.flatten(0, -2)))

        hooks.append(module.register_forward_hook(watch))
    seen = {name: ([], [], [], []) for name, _ in layers}
    for batch, label in zip(batches, labels, strict=True):
        model.zero_grad()
        output = model(**batch)
        cross_entropy(getattr(output, "logits", output), label[None]).backward()
        for (name, _), (A, B) in zip(layers, factors(model), strict=True):
            for held, value in zip(seen[name], (x[name], delta[name], A.grad, B.grad), strict=True):
                held.append(value.double().clone())
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    single, joint = 0, 0
    for (name, module), (A, B) in zip(layers, factors(model), strict=True):
        A, B, s = A.detach().double(), B.detach().double(), module.scaling["default"]
        Sx, Sd = (damped(torch.cat(v), damping) for v in seen[name][:2])
        g_A, g_B = (torch.stack(g).flatten(1) for g in seen[name][2:])
        eye_O, eye_I = torch.eye(len(Sd)).double(), torch.eye(len(Sx)).double()
        J_B, J_A = s * torch.kron(eye_O, A.T.contiguous()), s * torch.kron(B, eye_I)  # of vec(W) = vec(s B A)
        H = torch.kron(Sd, Sx)
        single = single + (form(g_B, J_B.T @ H @ J_B) + form(g_A, J_A.T @ H @ J_A)) / 2
        J = torch.cat([J_B, J_A], 1)
        joint = joint + form(torch.cat([g_B, g_A], 1), J.T @ H @ J)
    return single / len(layers), joint / len(layers)


def damped(rows, damping):
    """E[v v'] of the rows (t, D), and a multiple of its mean eigenvalue on the diagonal."""
    S = rows.T @ rows / len(rows)
    return S + damping * S.diagonal().mean() * torch.eye(len(S)).double()


def form(g, H):
    """(N,) g' H^+ g; what is in the null space of H moves nothing (a fresh B, two ways to one change)."""
    return (g @ torch.linalg.pinv(H, rtol=1e-11, hermitian=True) * g).sum(1)
