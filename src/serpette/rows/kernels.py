"""A frozen linear layer with trained rows and columns, saving only what the backward pass needs.

Letters: x (..., I) inputs, W (O, I) frozen, A (r, I) change of the rows `rows`, B (O, c) change of the
columns `columns`, g (..., O) gradient of the output.

    y = x W^T + b;   y[..., rows] += x A^T + a;   y += x[..., columns] B^T

Saved: x where A trains, x[..., columns] where B does, and no output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class AddAt(torch.autograd.Function):
    """`y` plus `delta` at `index` of `dim`. Saves neither; torch's own index_add keeps `delta`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.dtype = dim, delta.dtype
        return y.index_copy(dim, index, _sum_at(y, delta, index, dim))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return g, g.index_select(ctx.dim, index).to(ctx.dtype), None, None


class MaskRows(torch.autograd.Function):
    """The columns' B as it is, without gradient where a trained row crosses: A has those elements."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return B.view_as(B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.index_fill(0, ctx.saved_tensors[0], 0), None


class FrozenWithRows(torch.autograd.Function):
    """The whole layer in one: one output, one gradient of the input.

    `live`: W has A and B written into it already, so the forward pass is that of the frozen layer, and so is
    the gradient of the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Any,
        a: Any,
        rows: Any,
        B: Any,
        columns: Any,
        live: bool,
    ) -> Tensor:
        W_cast, b = W.to(x.dtype), _cast(b, x)
        y = linear(x, W_cast, b)
        if A is not None and not live:
            y.index_copy_(-1, rows, _sum_at(y, linear(x, A.to(x.dtype), _cast(a, x)), rows, -1))
        x_columns = None
        if B is not None:
            x_columns = x.index_select(-1, columns)
            if not live:
                flat = x_columns.view(-1, B.shape[1])
                y.view(-1, len(W)).addmm_(flat, B.to(x.dtype).t())
        ctx.live, ctx.has_bias, ctx.shape = live, a is not None, x.shape
        needs_x, needs_x_columns = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
        # W, A, B as they are: under autocast a cast copy of each frozen weight would be saved
        ctx.save_for_backward(
            x if needs_x else None, W, A, rows, x_columns if needs_x_columns else None, B, columns
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, rows, x_columns, B, columns = ctx.saved_tensors
        g = g.reshape(-1, len(W))
        g_rows: Any = None if A is None else g.index_select(-1, rows)
        gx = gA = ga = gB = None
        if ctx.needs_input_grad[0]:
            gx = g @ W.to(g.dtype)
            if A is not None and not ctx.live:
                gx.addmm_(g_rows, A.to(g.dtype))
            if B is not None and not ctx.live:
                gx.index_copy_(-1, columns, _sum_at(gx, g @ B.to(g.dtype), columns, -1))
            gx = gx.view(ctx.shape)
        if x is not None:
            assert A is not None
            gA = (g_rows.t() @ x.reshape(-1, x.shape[-1])).to(A.dtype)
            ga = g_rows.sum(0, dtype=A.dtype) if ctx.has_bias else None
        if x_columns is not None:
            assert B is not None
            gB = (g.t() @ x_columns.reshape(-1, x_columns.shape[-1])).to(B.dtype)
        return gx, None, None, gA, ga, None, gB, None, None


def _cast(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.to(x.dtype)


def _sum_at(y: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
    """What `y` becomes at `index`: gathered, summed, to be copied. index_add_ on CUDA adds in any order."""
    return (y.index_select(dim, index) + delta).to(y.dtype)
