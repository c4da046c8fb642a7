"""Training loss and sampling around a causal model, in the reference's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from h_transformer_1d.model import HTransformer1D
from shared_core import eval_mode, generate, next_token_pairs, top_k

__all__ = ["AutoregressiveWrapper", "top_k"]


class AutoregressiveWrapper(nn.Module):
    """Next-token loss and generation for a causal model of tokens.

    Args:
        net: maps (b, n) tokens to (b, n, num_tokens) logits; has `max_seq_len`.
        ignore_index: target that does not count in the loss.
        pad_value: fills short rows and what follows the end of a row.

    Raises:
        TypeError: `net` has no integer `max_seq_len`.
        ValueError: `net` has no tokens.
    """

    def __init__(self, net: nn.Module, ignore_index: int = -100, pad_value: int = 0) -> None:
        if not isinstance(getattr(net, "max_seq_len", None), int):
            raise TypeError(f"net must have an integer max_seq_len, {type(net).__name__} has none")
        if getattr(net, "num_tokens", 0) is None:
            raise ValueError("net must map tokens to logits, got a model with num_tokens=None")
        super().__init__()
        self.pad_value = pad_value
        self.ignore_index = ignore_index
        self.net = net
        self.max_seq_len: int = int(net.max_seq_len)  # type: ignore[arg-type]

    def forward(self, x: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of each token given those before it, in nats.

        Args:
            x: (b, n) tokens, or a list of 1-D tensors of any lengths >= 2.
            mask: (b, n) or (b, n - 1) boolean, True = take part; masked targets do not count,
                unless `net` is legacy. Without any target the loss is 0.
        """
        inputs, targets, mask = next_token_pairs(
            x, mask, pad_value=self.pad_value, ignore_index=self.ignore_index
        )
        if isinstance(x, Tensor) and getattr(self.net, "legacy", False):
            # The reference counts masked targets.
            targets = x[:, 1:].long()
        logits = self.net(inputs) if mask is None else self.net(inputs, mask=mask)
        total = F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=self.ignore_index, reduction="sum"
        )
        return total / (targets != self.ignore_index).sum().clamp(min=1)

    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] = top_k,
        filter_thres: float = 0.9,
    ) -> Tensor:
        """Samples a continuation.

        Args:
            start_tokens: (b, t) or (t,) tokens, t >= 1.
            seq_len: number of tokens to sample.
            eos_token: ends its row; the rest of the row is `pad_value`.
            temperature: of the softmax; 0 takes the most probable token.
            filter_logits_fn: called as fn(logits (b, num_tokens), thres=filter_thres).
            filter_thres: part of the vocabulary that the filter leaves out.

        Returns:
            The new tokens, (b, seq_len) or (seq_len,).
        """
        prompt = start_tokens[None] if start_tokens.dim() == 1 else start_tokens
        with eval_mode(self):
            out = generate(
                self._step,
                prompt,
                seq_len,
                temperature=temperature,
                eos_token=eos_token,
                pad_value=self.pad_value,
                filter_fn=partial(filter_logits_fn, thres=filter_thres),
            )
        return out[0] if start_tokens.dim() == 1 else out

    def _step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        # What torch.compile returns holds the model as `_orig_mod`.
        net = getattr(self.net, "_orig_mod", self.net)
        if isinstance(net, HTransformer1D) and not net.legacy:
            return net.advance(tokens, state)
        # Any other model sees its last `max_seq_len` tokens again.
        seen = tokens if state is None else torch.cat((state, tokens), 1)
        seen = seen[:, -self.max_seq_len :]
        return self.net(seen), seen
