"""From logits to a token: filters, and the draw itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_at_least, check_probability


def filter_logits(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Keeps the likely tokens of (..., V) logits; the others get -inf.

    The filters act in the order of the arguments, each on what the one before it has kept; the most
    likely token always stays. Probabilities are compared in float32 or wider.

    `top_k` keeps that many; of equal logits at the border, any. `top_p` keeps the fewest most
    likely tokens that together have at least this probability (Holtzman et al., arXiv 1904.09751).
    `min_p` keeps those at least this many times as likely as the most likely one (Nguyen et al.,
    arXiv 2407.01082).

    Raises TypeError for logits that are not floating point, a `top_k` that is no integer, a `top_p`
    or `min_p` that is no number, ValueError for V = 0, a `top_k` below 1, a share outside [0, 1].
    """
    _check_logits(logits)
    check_filters(top_k, top_p, min_p)
    if top_k is not None and top_k < logits.shape[-1]:
        chosen = logits.topk(top_k, dim=-1).indices
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        logits = logits.masked_fill(~keep, -math.inf)
    # At 1 all stay: by rounding the first probabilities can sum to 1 before the last has come.
    if top_p is not None and top_p < 1.0:
        ordered, order = _widen(logits).sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1)[..., :-1]
        first = torch.ones_like(order[..., :1], dtype=torch.bool)
        keep = torch.cat((first, before < top_p), dim=-1)
        keep = torch.zeros_like(keep).scatter(-1, order, keep)
        logits = logits.masked_fill(~keep, -math.inf)
    if min_p is not None and min_p > 0.0:
        wide = _widen(logits)
        keep = wide >= wide.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(~keep, -math.inf)
    return logits


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the largest 1 - `thres` of (..., V) logits, at least one; the others get -inf.

    The filter of the reference packages, `int((1 - thres) * V)` in their words. The product is not
    left to rounding here: 0.9 keeps 2 of 20, not 1.
    Raises what `filter_logits` raises; ValueError for `thres` outside [0, 1], TypeError where it is
    no number.
    """
    _check_logits(logits)
    check_probability(thres=thres)
    return filter_logits(logits, top_k=max(1, int((1.0 - thres) * logits.shape[-1] + 1e-6)))


def sample(
    logits: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws a token per row from softmax(logits / temperature): (b, V) -> (b,) int64.

    A temperature of 0 takes the most likely token. A token of -inf is never drawn.
    Raises TypeError for logits that are not floating point, ValueError for another shape, a
    `temperature` that is negative or not finite, a `generator` on another device.
    """
    _check_logits(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be (b, V), got shape {tuple(logits.shape)}")
    check_draw(temperature, generator, logits.device)
    if temperature == 0.0:
        # The first of the largest, as argmax, which takes several times as long in half precision.
        return logits.max(dim=-1).indices
    wide = _widen(logits)
    limits = torch.finfo(wide.dtype)
    # The largest becomes 0: no temperature overflows. The limits keep 0 / 0 and inf / inf out.
    scaled = wide - wide.amax(-1, keepdim=True)
    scaled = scaled / min(max(temperature, limits.tiny), limits.max)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]


def check_filters(top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    """Raises what `filter_logits` raises for its options."""
    if top_k is not None:
        check_at_least(1, top_k=top_k)
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None:
            check_probability(**{name: share})


def check_draw(temperature: float, generator: torch.Generator | None, device: torch.device) -> None:
    """Raises what `sample` raises for its options."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, but the tokens are on {device}")


def _check_logits(logits: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got shape {tuple(logits.shape)}")


def _widen(x: Tensor) -> Tensor:
    """Half precision to float32: neighbours of a bfloat16 probability are up to 1% apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
