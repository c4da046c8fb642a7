"""Memformer: an encoder and a decoder around a memory that is read and written by segments.

Shapes: b batch, n source tokens, t target tokens, m memory slots, d model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memformer.autoregressive_wrapper import AutoregressiveWrapper
from memformer.checks import check_dtype, check_heads
from memformer.layers import Attention, FeedForwardLayer
from memformer.legacy import FEED_FORWARD_KEYS
from memformer.segments import Context, Segment, split_segments
from memformer.sharding import Gathered, Step
from memformer.transformer import Decoder, Encoder, TransformerWrapper
from memformer.writers import BMN_BIAS, WRITERS, normalise, write_bmn, write_gru
from shared_core import eval_mode, generate, register_key_map, stream
from shared_core.checks import (
    check_at_least,
    check_choice,
    check_legacy_options,
    check_mask,
    check_tokens,
    check_vectors,
)


class Results(NamedTuple):
    """What a model with a decoder returns.

    Attributes:
        enc_out: (b, n, d).
        mem: (b, m, d), after the segment.
        dec_out: the loss; 0 without a target; logits (b, t, num_tokens) if they were asked for.
    """

    enc_out: Tensor
    mem: Tensor
    dec_out: Tensor


class EncOnlyResults(NamedTuple):
    """What a model without a decoder returns: see `Results`."""

    enc_out: Tensor
    mem: Tensor


class Generated(NamedTuple):
    """New tokens (b, length), and the memory (b, m, d) after the segments that were read."""

    tokens: Tensor
    mem: Tensor


class Memformer(nn.Module):
    """A sequence model with a memory of m slots (Wu et al. 2020, arXiv 2010.06891).

    The encoder reads the memory by attention from every token of a segment; then each slot attends
    to itself and to the segment, and is updated; the decoder attends to the encoder's output.

    Args:
        dim: width of tokens and slots.
        num_memory_slots: slots.
        num_mem_updates: how often a segment is written.
        encoder_only: without a decoder; its arguments are then unused.
        mem_update_attn_heads: heads of the slots' attention.
        enc_num_tokens, enc_depth, enc_heads, enc_max_seq_len: of the encoder; the last one is the
            length of a segment at most.
        dec_num_tokens, dec_depth, dec_heads, dec_max_seq_len: of the decoder.
        writer: "gru", the reference's rule, or "bmn", the paper's: biased memory normalisation.
        temperature: of the slots' softmax, for "bmn"; the lower, the longer a slot can be kept.
        dropout: of embeddings, of what each sublayer adds, inside feed-forward layers.
        tie_embeddings: the decoder's logits are products with its token embeddings.
        max_distance: from which on all distances share a position bias.
        checkpoint_layers: run each layer again for its gradient, and keep only what it was given:
            less memory, more time. Numbers stay, dropout included.
        legacy: reproduce the numbers of memformer 0.3.1.

    Raises:
        TypeError: an argument of the decoder is missing, or a number is not an integer.
        ValueError: a number is out of range, or a new option meets `legacy`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_memory_slots: int,
        num_mem_updates: int = 1,
        encoder_only: bool = False,
        mem_update_attn_heads: int = 8,
        enc_num_tokens: int,
        enc_depth: int,
        enc_heads: int = 8,
        enc_max_seq_len: int,
        dec_num_tokens: int | None = None,
        dec_depth: int | None = None,
        dec_heads: int = 8,
        dec_max_seq_len: int | None = None,
        writer: str = "gru",
        temperature: float = 0.25,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        max_distance: int = 128,
        checkpoint_layers: bool = False,
        legacy: bool = False,
    ) -> None:
        check_at_least(1, num_memory_slots=num_memory_slots)
        # The reference takes 0, which writes nothing.
        check_at_least(0 if legacy else 1, num_mem_updates=num_mem_updates)
        check_heads(dim, mem_update_attn_heads, "mem_update_attn_heads")
        check_choice("writer", writer, WRITERS)
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if legacy:
            check_legacy_options(
                writer=writer == "gru",
                temperature=temperature == 0.25,
                tie_embeddings=not tie_embeddings,
            )
        super().__init__()
        self.dim: int = dim
        self.num_mem: int = num_memory_slots
        self.num_mem_updates: int = num_mem_updates
        self.writer: str = writer
        self.temperature: float = temperature
        self.legacy: bool = legacy
        gru = writer == "gru"

        self.encoder: TransformerWrapper = TransformerWrapper(
            num_tokens=enc_num_tokens,
            max_seq_len=enc_max_seq_len,
            dim=dim,
            layer_blocks=Encoder(
                dim,
                enc_depth,
                enc_heads,
                max_distance=max_distance,
                dropout=dropout,
                context_scale=1.0 if gru else dim**0.5,
                checkpoint_layers=checkpoint_layers,
                legacy=legacy,
            ),
            return_logits=False,
            dropout=dropout,
        )
        self.decoder: AutoregressiveWrapper | None = None
        if not encoder_only:
            if dec_num_tokens is None or dec_depth is None or dec_max_seq_len is None:
                raise TypeError(
                    "a model with a decoder needs dec_num_tokens, dec_depth and dec_max_seq_len, "
                    f"got {dec_num_tokens}, {dec_depth} and {dec_max_seq_len}"
                )
            net = TransformerWrapper(
                num_tokens=dec_num_tokens,
                max_seq_len=dec_max_seq_len,
                dim=dim,
                layer_blocks=Decoder(
                    dim,
                    dec_depth,
                    dec_heads,
                    max_distance=max_distance,
                    dropout=dropout,
                    checkpoint_layers=checkpoint_layers,
                    legacy=legacy,
                ),
                tie_embeddings=tie_embeddings,
                dropout=dropout,
            )
            self.decoder = AutoregressiveWrapper(net)

        # What "bmn" adds decides how fast slots return to where they began: little, at first.
        scale = 1.0 if gru else BMN_BIAS * dim**-0.5
        self.memory_slots: nn.Parameter = nn.Parameter(torch.randn(num_memory_slots, dim) * scale)
        self.mem_updater: Attention = Attention(dim, mem_update_attn_heads, project_out=gru)
        self.gru: nn.GRUCell | None = None
        self.mem_ff: FeedForwardLayer | None = None
        if gru:
            self.gru = nn.GRUCell(dim, dim)
            self.mem_ff = FeedForwardLayer(dim, dropout)
            register_key_map(self.mem_ff, FEED_FORWARD_KEYS)

    def get_initial_mem(self, batch_size: int) -> Tensor:
        """The memory before the first segment, (b, m, d)."""
        slots: Tensor = self.memory_slots
        if self.writer == "bmn":
            slots = normalise(slots)
        return slots.expand(batch_size, -1, -1)

    def forward(
        self,
        src: Tensor | None,
        tgt: Tensor | Sequence[Tensor] | None = None,
        mems: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        reset: Tensor | None = None,
        earlier: Context | None = None,
        return_logits: bool = False,
    ) -> Results | EncOnlyResults:
        """One segment.

        Args:
            src: (b, n) tokens; None where `inputs_embeds` takes their place.
            tgt: (b, t) tokens to predict from those before them, or a list of 1-D tensors.
            mems: (b, m, d), the memory; the initial one by default.
            src_mask: (b, n) boolean, True = take part. A row that is masked whole keeps its memory.
            tgt_mask: (b, t) or (b, t - 1) boolean; masked targets do not count.
            inputs_embeds: (b, n, d) in place of the embeddings of `src`.
            reset: (b,) boolean, rows that begin with the initial memory whatever `mems` holds.
            earlier: what the decoder attends to for rows that `src_mask` masks whole: the output of
                an earlier segment, see `Context.after`.
            return_logits: `dec_out` is logits of all target tokens, not the loss.

        Returns:
            `Results`, or `EncOnlyResults` without a decoder. `mem` has the dtype of `mems`.

        Raises:
            TypeError, ValueError: a dtype or shape does not fit, a sequence is too long, a target
                meets a model without a decoder, or logits are asked for without a target tensor.
        """
        b = self.check(
            src,
            tgt,
            mems,
            src_mask,
            tgt_mask,
            inputs_embeds=inputs_embeds,
            reset=reset,
            earlier=earlier,
            return_logits=return_logits,
        )
        if mems is None:
            mems = self.get_initial_mem(b)
        elif reset is not None:
            mems = torch.where(reset[:, None, None], self.get_initial_mem(b).to(mems.dtype), mems)
        enc = self.encoder(src, context=mems, src_mask=src_mask, inputs_embeds=inputs_embeds)
        # Before the decoder, so that dropout draws the same for it whether there is a target.
        written = self.write(mems, enc, src_mask)
        if self.decoder is None:
            return EncOnlyResults(enc, written)
        # A zero that has a gradient, as the reference's.
        out = enc[:0].sum()
        if tgt is not None:
            context = Context(enc, src_mask).after(earlier, reset)
            out = self.decoder(
                tgt,
                return_loss=not return_logits,
                context=context.enc_out,
                src_mask=tgt_mask,
                tgt_mask=context.mask,
            )
        return Results(enc, written, out)

    def write(self, mems: Tensor, segment: Tensor, src_mask: Tensor | None = None) -> Tensor:
        """The memory (b, m, d) after a segment (b, n, d) that the encoder has returned."""
        if src_mask is not None and not self.legacy:
            # NaN in what is masked must not reach a sum with weight 0.
            segment = segment.masked_fill(~src_mask[..., None], 0.0)
        new = mems
        for _ in range(self.num_mem_updates):
            if self.gru is None or self.mem_ff is None:
                new = write_bmn(
                    new,
                    segment,
                    src_mask,
                    attention=self.mem_updater,
                    bias=self.memory_slots,
                    temperature=self.temperature,
                )
            else:
                new = write_gru(
                    new,
                    segment,
                    src_mask,
                    attention=self.mem_updater,
                    gru=self.gru,
                    feed_forward=self.mem_ff,
                    bounded=not self.legacy,
                )
        new = new.to(mems.dtype)
        if src_mask is None or self.legacy:
            return new
        return torch.where(src_mask.any(1)[:, None, None], new, mems)

    def encode(
        self,
        src: Tensor | Sequence[Tensor],
        mems: Tensor | None = None,
        src_mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> tuple[Context, Tensor]:
        """Reads segments one after the other: what an answer attends to, and the memory.

        Args:
            src: (b, n) tokens, split after every `enc_max_seq_len`, or a list of segments.
            mems: (b, m, d), the memory before the first; the initial one by default.
            src_mask: split as `src`. Rows may end before others do: the output is that of a row's
                last segment that is not masked whole, of those in this call.

        Returns:
            The context, with a mask where there are masks, and then as long as the longest segment;
            and the memory (b, m, d) after all segments.
        """
        return self.read_segments(self.segments(src, mems, src_mask), mems)

    def segments(
        self,
        src: Tensor | Sequence[Tensor],
        mems: Tensor | None,
        src_mask: Tensor | Sequence[Tensor | None] | None,
    ) -> Sequence[Segment]:
        """Source and mask by segments; raises what `encode` raises for them."""
        pieces = split_segments(src, src_mask, self.encoder.max_seq_len)
        for piece in pieces:
            self.check(piece.src, None, mems, piece.mask)
            check_tokens("src", piece.src, pieces[0].src.shape[0])
        return pieces

    def read_segments(
        self, pieces: Sequence[Segment], mems: Tensor | None
    ) -> tuple[Context, Tensor]:
        """What `encode` returns, of segments that have been checked."""
        context: Context | None = None
        mem: Any = mems
        for piece in pieces:
            found = self(piece.src, mems=mem, src_mask=piece.mask)
            # In the reference a row that is masked whole is a segment like others.
            earlier = None if self.legacy else context
            context, mem = Context(found.enc_out, piece.mask).after(earlier), found.mem
        if context is None:
            raise RuntimeError("no segment was read")
        return context, mem

    def generate(
        self,
        src: Tensor | Sequence[Tensor],
        length: int,
        *,
        prompt: Tensor | None = None,
        mems: Tensor | None = None,
        src_mask: Tensor | Sequence[Tensor | None] | None = None,
        return_mem: bool = False,
        temperature: float = 1.0,
        eos_token: int | None = None,
        pad_value: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | Generated:
        """Reads segments, then samples an answer to the last one. Dropout is off meanwhile.

        For a row that ends before others do it is the last one in `src` that is not masked whole.

        Args:
            src, mems, src_mask: see `encode`.
            length: number of tokens to sample.
            prompt: (b, t) tokens that the answer begins with; by default one of 0.
            return_mem: the memory after the segments is returned too, to go on with.
            temperature: of the softmax; 0 takes the most probable token.
            eos_token: ends its row; the rest of the row is `pad_value`.
            top_k, top_p, min_p: keep the k most probable tokens; the most probable ones up to
                probability p; those of at least min_p times the highest probability.
            generator: source of randomness.

        Returns:
            (b, length) the new tokens; with `return_mem` a `Generated`.

        Raises:
            TypeError, ValueError: as `shared_core.generate` and `forward`; prompt and answer are
                longer than `dec_max_seq_len`; there is no decoder.
        """
        answer = _Answer(self, src, length, prompt, mems, src_mask)
        with answer.weights:
            tokens = generate(
                answer.step,
                answer.prompt,
                length,
                temperature=temperature,
                eos_token=eos_token,
                pad_value=pad_value,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                generator=generator,
            )
        return Generated(tokens, answer.read()[1]) if return_mem else tokens

    def stream(
        self,
        src: Tensor | Sequence[Tensor],
        length: int,
        *,
        prompt: Tensor | None = None,
        mems: Tensor | None = None,
        src_mask: Tensor | Sequence[Tensor | None] | None = None,
        temperature: float = 1.0,
        eos_token: int | None = None,
        pad_value: int = 0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields up to `length` tokens (b,) one by one; arguments as `generate`."""
        answer = _Answer(self, src, length, prompt, mems, src_mask)
        tokens = stream(
            answer.step,
            answer.prompt,
            length,
            temperature=temperature,
            eos_token=eos_token,
            pad_value=pad_value,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            generator=generator,
        )
        return answer.weights.stream(tokens)

    def check(
        self,
        src: Tensor | None,
        tgt: Tensor | Sequence[Tensor] | None = None,
        mems: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        reset: Tensor | None = None,
        earlier: Context | None = None,
        return_logits: bool = False,
    ) -> int:
        """Raises what `forward` raises; returns the batch."""
        self.encoder.check(src, inputs_embeds, "src")
        given = src if src is not None else inputs_embeds
        b, n = given.shape[:2]  # type: ignore[union-attr]  # one of them is there
        if mems is not None:
            check_vectors("mems", mems, self.dim, b)
            if mems.shape[1] != self.num_mem:
                raise ValueError(f"mems must have {self.num_mem} slots, got {mems.shape[1]}")
            check_dtype("mems", mems, self.memory_slots)
        check_mask("src_mask", src_mask, (b, n))
        check_mask("reset", reset, (b,))
        if earlier is not None:
            if self.legacy or self.decoder is None:
                raise ValueError("earlier is for a decoder, and not for a legacy one")
            if not isinstance(earlier, Context):
                raise TypeError(f"earlier must be a Context, got {type(earlier).__name__}")
            check_vectors("earlier.enc_out", earlier.enc_out, self.dim, b)
            check_mask("earlier.mask", earlier.mask, earlier.enc_out.shape[:2])
        if self.decoder is None:
            if (tgt is not None or tgt_mask is not None or return_logits) and not self.legacy:
                raise ValueError("a model with encoder_only=True takes no tgt, tgt_mask or logits")
            return b
        if tgt is None:
            if tgt_mask is not None or return_logits:
                raise ValueError("tgt_mask and return_logits need a tgt, got None")
            return b
        # Not `len` of a tensor, which would bind a graph to one batch.
        rows = tgt.shape[0] if isinstance(tgt, Tensor) else len(tgt)
        if rows != b:
            raise ValueError(f"tgt must have {b} rows, got {rows}")
        net: Any = self.decoder.net
        if return_logits:
            if not isinstance(tgt, Tensor):
                raise TypeError(f"return_logits needs tgt as a tensor, got {type(tgt).__name__}")
            net.check(tgt, None, "tgt")
            check_mask("tgt_mask", tgt_mask, tgt.shape)
        else:
            net.check(self.decoder.pairs(tgt, tgt_mask)[0], None, "tgt")
        return b


class _Answer:
    """What `generate` and `stream` step through: segments are read when the first token is due."""

    def __init__(
        self,
        model: Memformer,
        src: Tensor | Sequence[Tensor],
        length: int,
        prompt: Tensor | None,
        mems: Tensor | None,
        src_mask: Tensor | Sequence[Tensor | None] | None,
    ) -> None:
        if model.decoder is None:
            raise ValueError("only a model with a decoder can generate, got encoder_only=True")
        self.decoder: AutoregressiveWrapper = model.decoder
        self.model: Memformer = model
        self.pieces: Sequence[Segment] = model.segments(src, mems, src_mask)
        self.mems: Tensor | None = mems
        segment = self.pieces[0].src
        if prompt is None:
            prompt = segment.new_zeros(segment.shape[0], 1)
        check_tokens("prompt", prompt, segment.shape[0])
        self.prompt: Tensor = prompt
        self.length: int = length
        self.weights: Gathered = Gathered((model, *self.decoder.modules()))
        # For what it raises.
        self.decoder.stepper(prompt, length)
        self._read: tuple[Context, Tensor] | None = None
        self._step: Step | None = None

    @torch.no_grad()
    def read(self) -> tuple[Context, Tensor]:
        """What the answer attends to, and the memory."""
        if self._read is None:
            with eval_mode(self.model):
                self._read = self.model.read_segments(self.pieces, self.mems)
        return self._read

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self._step is None:
            (enc_out, mask), _ = self.read()
            step = self.decoder.stepper(tokens, self.length, enc_out, None, mask)
            self._step = self.weights.step(step)
        return self._step(tokens, state)
