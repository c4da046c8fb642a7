"""Training loss and sampling around a decoder, in the reference's form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memformer.sharding import Gathered, Step
from memformer.transformer import Decoder, TransformerWrapper
from shared_core import eval_mode, filter_logits, generate, next_token_pairs, stream, top_k
from shared_core.checks import check_mask, check_tokens, check_vectors

__all__ = ["AutoregressiveWrapper", "top_k", "top_p"]


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """Keeps the most likely of (b, V) logits that together have probability `thres`.

    A filter for `generate`. The reference's keeps a probability of 1 - `thres`.
    """
    return filter_logits(logits, top_p=thres)


class AutoregressiveWrapper(nn.Module):
    """Next-token loss and generation for a causal model of tokens.

    Args:
        net: maps (b, n) tokens to (b, n, num_tokens) logits, with `context` and masks by name
            where they are given; has `max_seq_len`.
        ignore_index: target that does not count in the loss.
        pad_value: fills short rows and what follows the end of a row.

    Raises:
        TypeError: `net` has no integer `max_seq_len`.
    """

    def __init__(self, net: nn.Module, ignore_index: int = -100, pad_value: int = 0) -> None:
        if not isinstance(getattr(net, "max_seq_len", None), int):
            raise TypeError(f"net must have an integer max_seq_len, {type(net).__name__} has none")
        super().__init__()
        self.pad_value: int = pad_value
        self.ignore_index: int = ignore_index
        self.net: nn.Module = net
        self.max_seq_len: int = int(net.max_seq_len)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        return_loss: bool = False,
        *,
        context: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """The mean cross-entropy of each token given those before it, in nats; or the logits.

        Args:
            x: (b, n) tokens, or a list of 1-D tensors of any lengths >= 2.
            return_loss: the loss; else the logits (b, n, num_tokens) of all tokens.
            context: (b, m, d) that the decoder attends to.
            src_mask: (b, n) or, for the loss, (b, n - 1) boolean, True = take part. Masked targets
                do not count, unless `net` is legacy. Without any target the loss is 0.
            tgt_mask: (b, m) boolean, of the context.
        """
        given = {"context": context, "tgt_mask": tgt_mask}
        if not return_loss:
            if not isinstance(x, Tensor):
                x = pad_sequence(list(x), batch_first=True, padding_value=self.pad_value)
            return self._logits(x, src_mask=src_mask, **given)
        inputs, targets, mask = self.pairs(x, src_mask)
        logits = self._logits(inputs, src_mask=mask, **given)
        total = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=self.ignore_index,
            reduction="sum",
        )
        return total / (targets != self.ignore_index).sum().clamp(min=1)

    def pairs(
        self, x: Tensor | Sequence[Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and mask; raises what `forward` raises for them."""
        if getattr(self.net, "legacy", False) and not isinstance(x, Tensor):
            # The reference pads lists with tokens that count like any other.
            rows = [[t[:-1] for t in x], [t[1:] for t in x]]
            padded, targets = (pad_sequence(part, True, self.pad_value) for part in rows)
            return padded, targets.long(), mask
        inputs, targets, fitted = next_token_pairs(
            x, mask, pad_value=self.pad_value, ignore_index=self.ignore_index
        )
        if getattr(self.net, "legacy", False) and isinstance(x, Tensor):
            # It counts masked targets, and drops a mask that is about the inputs alone.
            whole = mask is not None and mask.shape == x.shape
            return inputs, x[:, 1:].long(), fitted if whole else None
        return inputs, targets, fitted

    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Callable[..., Tensor] = top_k,
        filter_thres: float = 0.9,
        *,
        context: Tensor | None = None,
        input_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples a continuation; keys and values of earlier tokens are kept.

        Args:
            start_tokens: (b, t) or (t,) tokens, t >= 1.
            seq_len: number of tokens to sample.
            eos_token: ends its row; the rest of the row is `pad_value`.
            temperature: of the softmax; 0 takes the most probable token.
            filter_logits_fn: called as fn(logits (b, num_tokens), thres=filter_thres).
            filter_thres: part of the vocabulary that the filter leaves out.
            context: (b, m, d) that the decoder attends to.
            input_mask: (b, t) boolean, of the start tokens: rows may be padded in front.
            tgt_mask: (b, m) boolean, of the context.
            generator: source of randomness.

        Returns:
            The new tokens, (b, seq_len) or (seq_len,).

        Raises:
            TypeError, ValueError: as `shared_core.generate`; a shape does not fit; start and new
                tokens are together more than `max_seq_len`.
        """
        prompt = start_tokens[None] if start_tokens.ndim == 1 else start_tokens
        step = self.stepper(prompt, seq_len, context, input_mask, tgt_mask)
        with Gathered(self.modules()) as weights:
            out = generate(
                weights.step(step),
                prompt,
                seq_len,
                temperature=temperature,
                eos_token=eos_token,
                pad_value=self.pad_value,
                filter_fn=partial(filter_logits_fn, thres=filter_thres),
                generator=generator,
            )
        return out[0] if start_tokens.ndim == 1 else out

    def stream(
        self,
        prompt: Tensor,
        length: int,
        *,
        context: Tensor | None = None,
        input_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        temperature: float = 1.0,
        eos_token: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields up to `length` tokens (b,) as they come; see `generate`."""
        weights = Gathered(self.modules())
        tokens = stream(
            weights.step(self.stepper(prompt, length, context, input_mask, tgt_mask)),
            prompt,
            length,
            temperature=temperature,
            eos_token=eos_token,
            pad_value=self.pad_value,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            generator=generator,
        )
        return weights.stream(tokens)

    def stepper(
        self,
        prompt: Tensor,
        length: int,
        context: Tensor | None = None,
        input_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Step:
        """What `shared_core.stream` takes: (tokens, state) to (logits, state), without dropout.

        Raises what `generate` raises for the lengths and shapes.
        """
        check_tokens("start_tokens", prompt)
        b, t = prompt.shape
        if t + length > self.max_seq_len:
            raise ValueError(
                f"{t} start tokens and {length} new ones are more than max_seq_len="
                f"{self.max_seq_len}"
            )
        check_mask("input_mask", input_mask, (b, t))
        if context is not None:
            check_vectors("context", context, context.shape[-1], b)
            check_mask("tgt_mask", tgt_mask, (b, context.shape[1]))
        # What torch.compile returns holds the model as `_orig_mod`.
        net: Any = getattr(self.net, "_orig_mod", self.net)
        room = t + length

        def cached(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            blocks, mask = net.layer_blocks, None
            if state is None:
                state, mask = blocks.init_state(b, room, context, tgt_mask), input_mask
            hidden, state = blocks.step(net.embed(tokens), state, mask)
            return net.read(hidden[:, -1:]), state

        def anew(tokens: Tensor, seen: Any) -> tuple[Tensor, Any]:
            """Any other model reads everything again for each token."""
            seen = tokens if seen is None else torch.cat((seen, tokens), 1)
            mask = None
            if input_mask is not None:
                mask = F.pad(input_mask, (0, seen.shape[1] - t), value=True)
            given = {"context": context, "src_mask": mask, "tgt_mask": tgt_mask}
            return self._logits(seen, **given), seen

        fast = isinstance(net, TransformerWrapper) and isinstance(net.layer_blocks, Decoder)
        # There the reference's tokens see those that are still to come.
        fast = fast and not (net.legacy and context is None)
        step = cached if fast else anew

        def evaluated(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            with eval_mode(self):
                return step(tokens, state)

        return evaluated

    def _logits(self, x: Tensor, **given: Tensor | None) -> Tensor:
        """By the net, which needs to know only what is given."""
        out: Tensor = self.net(x, **{name: y for name, y in given.items() if y is not None})
        return out
