"""The model: a transformer with hierarchical attention.

Shapes: b batch, n tokens, t new tokens, d model width, h query heads, g key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor, nn

from h_transformer_1d.attention import (
    Attention,
    CausalHAttention1D,
    HAttention1D,
    RotaryOwner,
    rotary_angles,
)
from h_transformer_1d.checks import check_options, check_rotary
from h_transformer_1d.legacy import MODEL_KEYS, check_legacy_length
from h_transformer_1d.reversible import ReversibleSequence, SequentialSequence
from h_transformer_1d.state import (
    LayerState,
    State,
    close_block,
    empty_layer,
    state_logits,
    state_of_layers,
)
from shared_core import FeedForward, eval_mode, generate, register_key_map, stream
from shared_core.checks import (
    check_at_least,
    check_dropout,
    check_legacy_options,
    check_length,
    check_mask,
    check_tokens,
    check_vectors,
)


class _PreNorm(nn.Module):
    """A sub-layer: normalises, shifts some features by a token, calls its body."""

    def __init__(self, dim: int, body: nn.Module, shifts: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.body = body
        self.shifts = shifts

    def prepare(
        self, x: Tensor, mask: Tensor | None, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The body's input, and what the next token will take from this one.

        Args:
            before: (b, 1, features) taken from the token before x, zero where there is none.
        """
        x = self.norm(x)
        if not self.shifts:
            return x, None
        return shift_features(x, self.shifts, mask, before)


class _AttentionLayer(_PreNorm):
    body: Attention

    def forward(
        self, x: Tensor, mask: Tensor | None = None, angles: Tensor | None = None
    ) -> Tensor:
        out: Tensor = self.body(self.prepare(x, mask)[0], mask, angles=angles)
        return out


class _FeedForwardLayer(_PreNorm):
    body: FeedForward

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.body(self.prepare(x, mask)[0])
        return out


def shift_features(
    x: Tensor, shifts: tuple[int, ...], mask: Tensor | None, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token shift: part i of the features is taken from `shifts[i]` tokens earlier.

    Args:
        x: (b, n, d), divided into len(shifts) equal parts and a rest that stays.
        shifts: each -1, 0 or 1.
        mask: (b, n); what a masked token would hand on is 0.
        before: (b, 1, features) that the first token takes; 0 by default.

    Returns:
        (b, n, d), and what the token after x would take, (b, 1, features).
    """
    width = x.shape[-1] // len(shifts)
    parts = []
    handed_on = x[:, :1, :0]
    for i, shift in enumerate(shifts):
        part = x[..., i * width : (i + 1) * width]
        if shift and mask is not None:
            part = part.masked_fill(~mask[..., None], 0.0)
        edge = torch.zeros_like(part[:, :1])
        if shift > 0:
            # A copy, since a view would keep the whole sequence alive.
            handed_on = part[:, -1:].clone()
            part = torch.cat((edge if before is None else before, part[:, :-1]), 1)
        elif shift < 0:
            part = torch.cat((part[:, 1:], edge), 1)
        parts.append(part)
    return torch.cat((*parts, x[..., len(shifts) * width :]), -1), handed_on


class HTransformer1D(RotaryOwner):
    """A transformer with hierarchical attention (Zhu & Soricut 2021).

    Args:
        num_tokens: size of the vocabulary, or None for embeddings in and embeddings out.
        dim: model width.
        depth: layers.
        max_seq_len: longest sequence that `forward` accepts; `step` has no limit.
        causal: a token sees itself and what is before it.
        heads: query heads.
        dim_head: width of a head.
        ff_mult: hidden width of the feed-forward layers, in units of `dim`.
        block_size: tokens that are seen one by one around each token.
        pos_emb: rotary embedding; by default one over all of `dim_head`.
        reversible: keep the activations of one layer, not of all, while training.
        shift_tokens: take half of the features from the token before (causal), or a third each
            from the tokens before and after (bidirectional).
        scheme, query_resolution: see `h_attention`.
        level_bias: learn a bias for every level and head.
        kv_heads: key/value heads, each shared by heads / kv_heads query heads.
        attn_dropout: of attention weights while training.
        ff_dropout: of the feed-forward layers' hidden units while training.
        legacy: reproduce the numbers of h-transformer-1d 0.1.9.

    Raises:
        TypeError: a number has the wrong type.
        ValueError: a number is out of range, or a new option meets `legacy`.
    """

    def __init__(
        self,
        *,
        num_tokens: int | None,
        dim: int,
        depth: int,
        max_seq_len: int,
        causal: bool = False,
        heads: int = 8,
        dim_head: int = 64,
        ff_mult: int = 4,
        block_size: int = 128,
        pos_emb: RotaryEmbedding | None = None,
        reversible: bool = False,
        shift_tokens: bool = False,
        scheme: str = "sibling",
        query_resolution: str = "fine",
        level_bias: bool = False,
        kv_heads: int | None = None,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(
            1,
            num_tokens=1 if num_tokens is None else num_tokens,
            dim=dim,
            depth=depth,
            max_seq_len=max_seq_len,
            dim_head=dim_head,
            ff_mult=ff_mult,
            block_size=block_size,
        )
        check_dropout(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        if legacy:
            check_legacy_options(num_tokens=num_tokens is not None, ff_dropout=ff_dropout == 0.0)
            check_legacy_length(max_seq_len, block_size)
            # The reference takes a `pos_emb` and uses its own.
            pos_emb = None
        check_rotary(pos_emb, dim_head, legacy)
        if pos_emb is None and (dim_head % 2 or dim_head < 4):
            raise ValueError(
                f"dim_head must be even and at least 4 for rotary positions, got {dim_head}"
            )
        self.num_tokens = num_tokens
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.causal = causal
        self.block_size = block_size
        self.scheme = scheme
        self.legacy = legacy
        self.token_emb: nn.Embedding | None = None
        if num_tokens is not None:
            self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb: RotaryEmbedding = RotaryEmbedding(dim_head) if pos_emb is None else pos_emb

        def attention() -> Attention:
            options: dict[str, Any] = {
                "heads": heads,
                "dim_head": dim_head,
                "block_size": block_size,
                "scheme": scheme,
                "level_bias": level_bias,
                "kv_heads": kv_heads,
                "dropout": attn_dropout,
                "legacy": legacy,
            }
            if causal:
                check_options(block_size, scheme, query_resolution, causal)
                return CausalHAttention1D(dim, max_seq_len=max_seq_len, **options)
            return HAttention1D(dim, query_resolution=query_resolution, **options)

        shifts: tuple[int, ...] = ()
        if shift_tokens:
            shifts = (0, 1) if causal or legacy else (-1, 0, 1)
        pairs = [
            (
                _AttentionLayer(dim, attention(), shifts),
                _FeedForwardLayer(dim, FeedForward(dim, ff_mult, dropout=ff_dropout), shifts),
            )
            for _ in range(depth)
        ]
        routes = {
            "mask": ((True, shift_tokens and not legacy),) * depth,
            "angles": ((True, False),) * depth,
        }
        sequence = ReversibleSequence if reversible else SequentialSequence
        self.layers: ReversibleSequence | SequentialSequence = sequence(pairs, routes)
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.to_logits: nn.Linear | None = None
        if num_tokens is not None:
            self.to_logits = nn.Linear(dim, num_tokens)
        register_key_map(self, MODEL_KEYS)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, State]:
        """Maps tokens to logits.

        Args:
            x: (b, n) integer tokens, or (b, n, d) embeddings where `num_tokens` is None.
            mask: (b, n) boolean, True = take part.
            return_state: return the `State` after the last token as well, for `step`.

        Returns:
            (b, n, num_tokens) logits, or (b, n, d) embeddings; with `return_state` a pair.

        Raises:
            TypeError: x or `mask` has the wrong type.
            ValueError: a shape does not fit, the sequence is longer than `max_seq_len`, or a
                state is asked of a model that is not causal or legacy.
        """
        self._check_input(x, mask)
        check_length("x", x.shape[1], self.max_seq_len)
        if return_state:
            return self._prefill(x, mask)
        hidden = self._embed(x, mask)
        hidden = self.layers(hidden, mask=mask, angles=self._angles(0, x))
        return self._read(hidden)

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences that have seen nothing.

        Raises:
            TypeError: `batch` is no integer.
            ValueError: `batch` is negative, or the model is not causal, or is legacy.
        """
        self._check_stateful()
        check_at_least(0, batch=batch)
        like = self.norm.weight
        layers = []
        for attend, feed in self.layers.pairs():
            body = attend.body
            shifted = tuple(
                like.new_zeros(batch, 1, self.dim // len(sub.shifts))
                for sub in (attend, feed)
                if sub.shifts
            )
            layer = empty_layer(batch, body.kv_heads, body.dim_head, like)
            layers.append(layer._replace(shifted=shifted))
        mask = torch.ones(batch, 0, dtype=torch.bool, device=like.device)
        return state_of_layers(tuple(layers), mask, self.scheme, self.block_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Continues sequences by t >= 1 tokens, at any length.

        Args:
            x: (b, t) integer tokens, or (b, t, d) embeddings where `num_tokens` is None.
            state: from `init_state`, `forward(..., return_state=True)` or an earlier step. It
                stays valid.

        Returns:
            (b, t, num_tokens) logits, or (b, t, d) embeddings, and the state after them.

        Raises:
            TypeError: x has the wrong type.
            ValueError: a shape does not fit the model or the state.
        """
        self._check_stateful()
        self._check_input(x, None)
        sublayers = list(self.layers.pairs())
        attention, shifts = sublayers[0][0].body, sum(bool(sub.shifts) for sub in sublayers[0])
        state.check(
            x.shape[0],
            len(sublayers),
            attention.kv_heads,
            attention.dim_head,
            self.block_size,
            self.scheme,
            shifts,
        )
        outputs = []
        done = 0
        while done < x.shape[1]:
            room = self.block_size - state.length % self.block_size
            out, state = self._step_in_block(x[:, done : done + room], state)
            outputs.append(out)
            done += room
        return torch.cat(outputs, 1), state

    def stream(
        self,
        prompt: Tensor,
        length: int,
        *,
        temperature: float = 1.0,
        eos_token: int | None = None,
        pad_value: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields up to `length` tokens (b,) one by one; arguments as `generate`."""
        self._check_stateful(tokens=True)
        return stream(
            self.advance,
            prompt,
            length,
            temperature=temperature,
            eos_token=eos_token,
            pad_value=pad_value,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            generator=generator,
        )

    def generate(
        self,
        prompt: Tensor,
        length: int,
        *,
        temperature: float = 1.0,
        eos_token: int | None = None,
        pad_value: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples a continuation, each token at a cost that grows with log(n).

        Dropout is off meanwhile. Neither prompt nor continuation is bound by `max_seq_len`.

        Args:
            prompt: (b, t) tokens, t >= 1.
            length: number of tokens to sample.
            temperature: of the softmax; 0 takes the most probable token.
            eos_token: ends its row; the rest of the row is `pad_value`.
            top_k, top_p, min_p: keep the k most probable tokens; the most probable ones up to
                probability p; those of at least min_p times the highest probability.
            generator: source of randomness.

        Returns:
            (b, length) the new tokens.

        Raises:
            TypeError, ValueError: as `shared_core.generate`; the model is not causal, is legacy
                or has no tokens.
        """
        self._check_stateful(tokens=True)
        with eval_mode(self):
            return generate(
                self.advance,
                prompt,
                length,
                temperature=temperature,
                eos_token=eos_token,
                pad_value=pad_value,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                generator=generator,
            )

    def advance(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """`step` for sampling: without dropout, from nothing where `state` is None.

        Returns:
            The logits (b, 1, num_tokens) of the last token, and the state.
        """
        if self.training:
            with eval_mode(self):
                return self.advance(tokens, state)
        if state is None:
            self._check_input(tokens, None)
            return self._prefill(tokens, None, last_only=True)
        return self.step(tokens, state)

    def _prefill(
        self, x: Tensor, mask: Tensor | None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        self._check_stateful()
        angles = self._angles(0, x)
        layers: list[LayerState] = []

        def run(attend: _AttentionLayer, feed: _FeedForwardLayer) -> Pair:
            def attention(hidden: Tensor) -> Tensor:
                hidden, handed_on = attend.prepare(hidden, mask)
                out, layer = attend.body.prefill(hidden, mask, angles)
                layers.append(layer._replace(shifted=_present(handed_on)))
                return out

            def feed_forward(hidden: Tensor) -> Tensor:
                hidden, handed_on = feed.prepare(hidden, mask if feed.shifts else None)
                layers[-1] = layers[-1]._replace(shifted=layers[-1].shifted + _present(handed_on))
                out: Tensor = feed.body(hidden)
                return out

            return attention, feed_forward

        pairs = [run(attend, feed) for attend, feed in self.layers.pairs()]
        hidden = self.layers.run(self._embed(x, mask), pairs)
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        state = state_of_layers(tuple(layers), mask, self.scheme, self.block_size)
        return self._read(hidden[:, -1:] if last_only else hidden), state

    def _step_in_block(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Tokens that fit in the open block."""
        t = x.shape[1]
        angles = self._angles(state.length, x)
        opened = state.open_logit.new_zeros(x.shape[0], t)
        state = state._replace(
            open_logit=torch.cat((state.open_logit, opened), 1), length=state.length + t
        )
        logits = state_logits(state, t)
        layers: list[LayerState] = []

        def run(attend: _AttentionLayer, feed: _FeedForwardLayer, before: LayerState) -> Pair:
            shifted = before.shifted or (None, None)

            def attention(hidden: Tensor) -> Tensor:
                hidden, handed_on = attend.prepare(hidden, None, shifted[0])
                out, layer = attend.body.step(hidden, before, logits, angles)
                layers.append(layer._replace(shifted=_present(handed_on)))
                return out

            def feed_forward(hidden: Tensor) -> Tensor:
                hidden, handed_on = feed.prepare(hidden, None, shifted[1])
                layers[-1] = layers[-1]._replace(shifted=layers[-1].shifted + _present(handed_on))
                out: Tensor = feed.body(hidden)
                return out

            return attention, feed_forward

        pairs = [
            run(attend, feed, before)
            for (attend, feed), before in zip(self.layers.pairs(), state.layers, strict=True)
        ]
        hidden = self.layers.run(self._embed(x, None), pairs)
        state = state._replace(layers=tuple(layers))
        if state.length % self.block_size == 0:
            state = close_block(state, self.scheme, self.block_size)
        return self._read(hidden), state

    def _angles(self, start: int, x: Tensor) -> Tensor:
        return rotary_angles(self.pos_emb, start, x.shape[1], x.device, self.legacy)

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.token_emb is not None:
            x = self.token_emb(x)
        if mask is not None and not self.legacy:
            x = x.masked_fill(~mask[..., None], 0.0)
        return x

    def _read(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        return hidden if self.to_logits is None else self.to_logits(hidden)

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        if self.num_tokens is None:
            check_vectors("x", x, self.dim)
        else:
            check_tokens("x", x)
        check_mask("mask", mask, x.shape[:2])

    def _check_stateful(self, tokens: bool = False) -> None:
        if not self.causal:
            raise ValueError("only a causal model has a state, got causal=False")
        if self.legacy:
            raise ValueError(
                "a legacy model has no state, got legacy=True; AutoregressiveWrapper generates"
                " with it"
            )
        if tokens and self.num_tokens is None:
            raise ValueError("only a model with tokens can generate, got num_tokens=None")


Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _present(handed_on: Tensor | None) -> tuple[Tensor, ...]:
    return () if handed_on is None else (handed_on,)
