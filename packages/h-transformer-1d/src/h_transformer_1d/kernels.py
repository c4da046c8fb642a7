"""Attention within the rectangles of one patch.

Shapes: p rectangles, h heads, r rows, s keys, d head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from h_transformer_1d.pyramid import EMPTY, accumulator


def _operator(name: str, arguments: str) -> Any:
    """A private operator of PyTorch, or None where it is not there or takes other arguments."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "default" not in packet.overloads():
        return None
    names = " ".join(argument.name for argument in packet.default._schema.arguments)
    return packet if names == arguments else None


# PyTorch's fused CPU attention returns the log-sum-exp only through these two operators. They are
# private, so a release where they differ takes the matrix products below.
_FLASH = _operator(
    "_scaled_dot_product_flash_attention_for_cpu",
    "query key value dropout_p is_causal attn_mask scale",
)
_FLASH_BACKWARD = _operator(
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
)


class Rectangles(NamedTuple):
    """What a patch attends with.

    Attributes:
        q: (p, h, r, d). k, v: (p, h, s, d).
        bias: (p, s) added to every row's logits, or None.
        causal: a row sees the keys up to its own number.
        scale: factor of the products.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    causal: bool
    scale: float

    def kernel_bias(self) -> Tensor | None:
        """The bias as (p, 1, r, s), without a copy."""
        if self.bias is None:
            return None
        return self.bias[:, None, None, :].expand(-1, 1, self.q.shape[2], -1)


class Rows(NamedTuple):
    """What is known of whole rows, whose softmax reaches beyond the patch.

    Attributes:
        grad: (p, h, r, d) gradient of the row's output.
        lse: (p, h, r) log-sum-exp of the row.
        out: (p, h, r, d) the row's output; needed by the fused kernel.
        delta: (p, h, r) the sum of grad times out; needed by the matrix products.
    """

    grad: Tensor
    lse: Tensor
    out: Tensor | None
    delta: Tensor | None


def has_flash(q: Tensor) -> bool:
    """Whether PyTorch's fused CPU kernel serves the forward pass."""
    return q.device.type == "cpu" and _FLASH is not None


def has_flash_backward(q: Tensor) -> bool:
    """Whether it serves the backward pass: in bf16 and fp16 matrix products are much faster."""
    fast = q.dtype in (torch.float32, torch.float64)
    return q.device.type == "cpu" and _FLASH_BACKWARD is not None and fast


def attend_patch(x: Rectangles) -> tuple[Tensor, Tensor]:
    """The output (p, h, r, d) and the log-sum-exp (p, h, r), at least in float32."""
    if has_flash(x.q):
        out, lse = _FLASH(x.q, x.k, x.v, 0.0, x.causal, attn_mask=x.kernel_bias(), scale=x.scale)
        return out, lse
    logits = _logits(x)
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp().to(x.v.dtype) @ x.v, lse


def attend_patch_backward(x: Rectangles, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if rows.out is not None and has_flash_backward(x.q):
        grad_q, grad_k, grad_v = _FLASH_BACKWARD(
            rows.grad,
            x.q,
            x.k,
            x.v,
            rows.out,
            rows.lse,
            0.0,
            x.causal,
            attn_mask=x.kernel_bias(),
            scale=x.scale,
        )
        return grad_q, grad_k, grad_v
    if rows.delta is None:
        raise RuntimeError("the matrix products need delta")
    weight = (_logits(x) - rows.lse[..., None]).exp()
    grad_v = weight.to(x.q.dtype).mT @ rows.grad
    grad_logits = weight * (rows.grad @ x.v.mT - rows.delta[..., None])
    grad_logits = (grad_logits * x.scale).to(x.q.dtype)
    return grad_logits @ x.k, grad_logits.mT @ x.q, grad_v


def _logits(x: Rectangles) -> Tensor:
    bias = None if x.bias is None else x.bias[:, None]
    return patch_logits(x.q, x.k, bias, x.causal, x.scale)


def patch_logits(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Logits (..., r, s), at least in float32, of q (..., r, d), k (..., s, d), bias (..., s)."""
    # Rounded logits would not belong to the log-sum-exp that a fused kernel has found.
    wide = accumulator(q.dtype)
    logits = q.to(wide) @ k.to(wide).mT * scale
    if bias is not None:
        logits = logits + bias[..., None, :]
    if causal:
        above = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(above, EMPTY)
    return logits
