"""Encoder and decoder: self-attention by distance, attention to a context, feed-forward.

Shapes: b batch, n tokens, m tokens of the context, d model width, h heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memformer.attention import attend
from memformer.checks import check_dtype, check_heads, check_only_one
from memformer.layers import Layer
from memformer.legacy import LAYER_KEYS
from memformer.products import multiply, project
from memformer.state import DecoderState
from shared_core import RelativePositionBias, register_key_map, transformed
from shared_core.checks import (
    check_at_least,
    check_dropout,
    check_legacy_options,
    check_length,
    check_mask,
    check_tokens,
    check_vectors,
)


class Blocks(nn.Module):
    """The layers that encoder and decoder have in common.

    Args:
        dim, depth, heads: width, layers, heads of all attention.
        causal: a token sees those before it; else all.
        max_distance: from which on all distances share a bias.
        dropout: of what each sublayer adds, and inside the feed-forward layers.
        context_scale: factor of the context, for one that is not of unit variance.
        checkpoint_layers: run each layer again for its gradient, and keep only what it was given.
        legacy: reproduce the numbers of memformer 0.3.1.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range, or a new option meets `legacy`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        causal: bool,
        max_distance: int,
        dropout: float,
        context_scale: float,
        checkpoint_layers: bool,
        legacy: bool,
    ) -> None:
        check_heads(dim, heads)
        check_at_least(1, depth=depth)
        check_dropout(dropout=dropout)
        if legacy:
            check_legacy_options(max_distance=max_distance == 128, dropout=dropout == 0.0)
        super().__init__()
        self.dim: int = dim
        self.causal: bool = causal
        self.context_scale: float = context_scale
        self.checkpoint_layers: bool = checkpoint_layers
        self.legacy: bool = legacy
        # The reference has the two rules the wrong way round.
        self.rel_pos_emb: RelativePositionBias = RelativePositionBias(
            heads, bidirectional=causal == legacy, max_distance=max_distance
        )
        self.layers: nn.ModuleList = nn.ModuleList(
            Layer(dim, heads, dropout, causal=causal, legacy=legacy) for _ in range(depth)
        )
        register_key_map(self, LAYER_KEYS)

    def _layers(self) -> Iterator[Layer]:
        for layer in self.layers:
            yield cast(Layer, layer)

    def by_distance(self, n: int, m: int) -> Tensor:
        """Biases (h, n + m - 1) for n queries, the last of which stands at the last of m keys."""
        device = self.rel_pos_emb.relative_attention_bias.weight.device
        distances = torch.arange(m - 1, -n, -1, device=device)
        biases: Tensor = self.rel_pos_emb(distances)
        return biases.t()

    def run(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None
    ) -> Tensor:
        """Runs all layers: (b, n, d) -> (b, n, d); masks are of the tokens and of the context."""
        self._check(x, context, mask, context_mask)
        if not self.legacy:
            # NaN in what is masked must not reach a sum with weight 0.
            x = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
            context = self._prepare(context, context_mask)
        by_distance = self.by_distance(x.shape[1], x.shape[1])
        again = self.checkpoint_layers and torch.is_grad_enabled()
        again = again and not transformed(x, context, by_distance)
        for layer in self.layers:
            given = x, context, by_distance, mask, context_mask
            x = checkpoint(layer, *given, use_reentrant=False) if again else layer(*given)
        return x

    def _prepare(self, context: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if context is None:
            return None
        if mask is not None:
            context = context.masked_fill(~mask[..., None], 0.0)
        return context if self.context_scale == 1.0 else context * self.context_scale

    def _check(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None
    ) -> None:
        check_vectors("x", x, self.dim)
        b = x.shape[0]
        check_mask("src_mask", mask, (b, x.shape[1]))
        if context is not None:
            check_vectors("context", context, self.dim, b)
            check_mask("tgt_mask", context_mask, (b, context.shape[1]))
        elif context_mask is not None and not self.legacy:
            raise ValueError("tgt_mask is about the context, and there is none")


class Encoder(Blocks):
    """Layers whose tokens see all others, and a context such as the memory; see `Blocks`."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        *,
        max_distance: int = 128,
        dropout: float = 0.0,
        context_scale: float = 1.0,
        checkpoint_layers: bool = False,
        legacy: bool = False,
    ) -> None:
        super().__init__(
            dim,
            depth,
            heads,
            causal=False,
            max_distance=max_distance,
            dropout=dropout,
            context_scale=context_scale,
            checkpoint_layers=checkpoint_layers,
            legacy=legacy,
        )

    def forward(
        self, x: Tensor, context: Tensor | None = None, src_mask: Tensor | None = None
    ) -> Tensor:
        """(b, n, d), context (b, m, d), mask (b, n) of the tokens -> (b, n, d).

        Without a context its attention adds nothing; the reference attends to `x` again.
        """
        return self.run(x, context, src_mask, None)


class Decoder(Blocks):
    """Layers whose tokens see those before them, and a context; see `Blocks`."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        *,
        max_distance: int = 128,
        dropout: float = 0.0,
        checkpoint_layers: bool = False,
        legacy: bool = False,
    ) -> None:
        super().__init__(
            dim,
            depth,
            heads,
            causal=True,
            max_distance=max_distance,
            dropout=dropout,
            context_scale=1.0,
            checkpoint_layers=checkpoint_layers,
            legacy=legacy,
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """(b, n, d), context (b, m, d) -> (b, n, d).

        `src_mask` (b, n) is about the tokens, `tgt_mask` (b, m) about the context: the reference's
        words. Without a context its attention adds nothing; the reference attends to all of `x`.
        """
        return self.run(x, context, src_mask, tgt_mask)

    @torch.no_grad()
    def init_state(
        self, batch: int, room: int, context: Tensor | None = None, tgt_mask: Tensor | None = None
    ) -> DecoderState:
        """The state before the first token of `batch` sequences of up to `room` tokens.

        Without gradients, as `step`, which writes in place.
        """
        check_at_least(1, batch=batch, room=room)
        if self.legacy and context is None:
            raise ValueError("a legacy decoder without a context attends to all tokens at once")
        weight = self.rel_pos_emb.relative_attention_bias.weight
        if context is not None:
            check_vectors("context", context, self.dim, batch)
            check_mask("tgt_mask", tgt_mask, (batch, context.shape[1]))
        elif tgt_mask is not None:
            raise ValueError("tgt_mask is about the context, and there is none")
        context = self._prepare(context, tgt_mask)
        crossed: list[tuple[Tensor, Tensor]] = []
        if context is not None:
            # Contiguous: they are read for every token.
            crossed = [
                (k.contiguous(), v.contiguous())
                for k, v in (layer.cross_attn.body.keys_values(context) for layer in self._layers())
            ]
        heads = weight.shape[1]
        # Of the dtype that comes out of a projection, under autocast too.
        body = next(self._layers()).self_attn.body
        like, _ = body.keys_values(weight.new_zeros(1, 1, self.dim))
        shape = (batch, heads, room, self.dim // heads)
        return DecoderState(
            tuple(like.new_empty(shape) for _ in self.layers),
            tuple(like.new_empty(shape) for _ in self.layers),
            tuple(k for k, _ in crossed),
            tuple(v for _, v in crossed),
            None,
            tgt_mask,
            self.by_distance(room, room).to(like.dtype),
            0,
        )

    @torch.no_grad()
    def step(
        self, x: Tensor, state: DecoderState, mask: Tensor | None = None
    ) -> tuple[Tensor, DecoderState]:
        """The next tokens (b, t, d), of which `mask` (b, t) takes part; the state is written to."""
        check_vectors("x", x, self.dim, state.keys[0].shape[0])
        check_mask("mask", mask, x.shape[:2])
        t = x.shape[1]
        room, m = state.keys[0].shape[2], state.length + t
        if m > room:
            raise ValueError(f"state has room for {room} tokens, got {m}")
        if mask is not None or state.mask is not None:
            state = state.hide(
                torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
            )
            x = x.masked_fill(~mask[..., None], 0.0) if mask is not None else x
        seen = None if state.mask is None else state.mask[:, :m]
        by_distance = state.by_distance[:, room - m : room + t - 1]
        for i, layer in enumerate(self._layers()):
            body, normed = layer.self_attn.body, layer.self_attn.norm(x)
            k, v = body.keys_values(normed)
            keys, values = state.keys[i], state.values[i]
            keys[:, :, state.length : m], values[:, :, state.length : m] = k, v
            keys, values = keys[:, :, :m], values[:, :, :m]
            found = attend(body.queries(normed), keys, values, by_distance, seen, causal=True)
            x = layer.self_attn.add(x, found)
            if state.cross_keys:
                k, v = state.cross_keys[i], state.cross_values[i]
                x = layer.cross(x, k, v, state.cross_mask)
            x = layer.feed_forward(x)
        return x, state._replace(length=m)


class TransformerWrapper(nn.Module):
    """Token embeddings in front of an `Encoder` or `Decoder`, and behind it a norm and logits.

    Args:
        num_tokens: of the vocabulary.
        max_seq_len: tokens that a sequence has at most.
        dim: width, that of `layer_blocks`.
        layer_blocks: (b, n, d) -> (b, n, d), called with `context` and masks by name.
        heads: unused; the reference takes it.
        return_logits: logits come out; else what the norm gives.
        tie_embeddings: logits are products with the token embeddings, times d^-0.5.
        dropout: of the embeddings.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range, `layer_blocks` has another width, or a new option
            meets legacy ones.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        dim: int,
        layer_blocks: nn.Module,
        heads: int = 8,
        return_logits: bool = True,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_at_least(1, num_tokens=num_tokens, max_seq_len=max_seq_len, dim=dim, heads=heads)
        check_dropout(dropout=dropout)
        if tie_embeddings and not return_logits:
            raise ValueError("tie_embeddings needs return_logits=True, got return_logits=False")
        width = getattr(layer_blocks, "dim", dim)
        if width != dim:
            raise ValueError(f"dim must be that of layer_blocks, got {dim} and {width}")
        if getattr(layer_blocks, "legacy", False):
            check_legacy_options(tie_embeddings=not tie_embeddings, dropout=dropout == 0.0)
        super().__init__()
        self.max_seq_len: int = max_seq_len
        self.token_emb: nn.Embedding = nn.Embedding(num_tokens, dim)
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        self.layer_blocks: nn.Module = layer_blocks
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.to_logits: nn.Linear | None = None
        self.logits_bias: nn.Parameter | None = None
        if tie_embeddings:
            self.logits_bias = nn.Parameter(torch.zeros(num_tokens))
        elif return_logits:
            self.to_logits = nn.Linear(dim, num_tokens)

    @property
    def legacy(self) -> bool:
        """Whether the layers reproduce the reference."""
        return bool(getattr(self.layer_blocks, "legacy", False))

    def forward(
        self,
        x: Tensor | None,
        *,
        context: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Tokens (b, n), or their embeddings (b, n, d), to logits (b, n, num_tokens) or (b, n, d).

        Args:
            x: tokens; None where `inputs_embeds` takes their place.
            context: (b, m, d) that the layers attend to.
            src_mask: (b, n) boolean, the tokens that take part.
            tgt_mask: (b, m) boolean, what takes part of the context; for a decoder.

        Raises:
            TypeError, ValueError: a dtype or shape does not fit, or a sequence is longer than
                `max_seq_len`.
        """
        self.check(x, inputs_embeds)
        masks = {} if tgt_mask is None else {"tgt_mask": tgt_mask}
        hidden = self.embed(x, inputs_embeds)
        hidden = self.layer_blocks(hidden, context=context, src_mask=src_mask, **masks)
        return self.read(hidden)

    def check(
        self,
        x: Tensor | None,
        inputs_embeds: Tensor | None,
        name: str = "x",
        batch: int | None = None,
    ) -> None:
        """Raises what `forward` raises for its tokens."""
        check_only_one(x, inputs_embeds)
        if x is not None:
            check_tokens(name, x, batch)
            n = x.shape[1]
        elif inputs_embeds is not None:
            check_vectors("inputs_embeds", inputs_embeds, self.token_emb.embedding_dim, batch)
            check_dtype("inputs_embeds", inputs_embeds, self.token_emb.weight)
            n = inputs_embeds.shape[1]
        if not self.legacy:
            check_length(name, n, self.max_seq_len)

    def embed(self, x: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Embeddings (b, n, d), with dropout."""
        out: Tensor = self.dropout(self.token_emb(x) if inputs_embeds is None else inputs_embeds)
        return out

    def read(self, hidden: Tensor) -> Tensor:
        """(b, n, d) -> what `forward` returns."""
        hidden = self.norm(hidden)
        if self.logits_bias is not None:
            hidden = hidden * self.token_emb.embedding_dim**-0.5
            hidden = multiply(hidden, self.token_emb.weight, self.logits_bias)
        elif self.to_logits is not None:
            hidden = project(self.to_logits, hidden)
        return hidden
