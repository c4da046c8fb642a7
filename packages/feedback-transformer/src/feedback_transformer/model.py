"""The module: a language model whose layers all see what all layers have made of the past.

Shapes: b batch, n tokens, d model width, h heads, e width of a head, g groups of keys (1 where all
layers share theirs, else as many as layers).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from feedback_transformer.checks import check_context, check_every, check_input, check_part
from feedback_transformer.feedback import Context, bias_table, context_keys
from feedback_transformer.generation import Stepper
from feedback_transformer.layers import Layer
from feedback_transformer.legacy import KEY_MAP, run_legacy
from feedback_transformer.packing import Packs
from feedback_transformer.sequence import Run
from feedback_transformer.sharding import gather, shard, sharded
from feedback_transformer.state import Memory, as_memory
from feedback_transformer.weights import ContextWeights, LayerWeights, Sizes, Weights
from feedback_transformer.window import Window
from shared_core import RelativePositionBias, generate, register_key_map, stream
from shared_core.checks import (
    check_at_least,
    check_choice,
    check_legacy_options,
    check_mask,
    check_probability,
)

SOLVERS = ("sequential", "jacobi")


class FeedbackTransformer(nn.Module):
    """A causal language model with feedback memory (Fan et al. 2020, section 3).

    Tokens go through the layers a segment of `seq_len` after the other (1 in the paper). All layers
    attend to one memory: of each past token the weighted sum of its embedding and of what every
    layer made of it. A segment's tokens also see those before them in it, and themselves; segments
    of one token see the memory alone, and the first token of a sequence nothing.

    Args:
        num_tokens: size of the vocabulary.
        dim: model width.
        depth: layers.
        mem_len: slots of the memory, one a token; 0 is no memory.
        seq_len: tokens of a segment.
        heads: attention heads.
        dim_head: width of a head.
        attn_dropout: share of attention weights that is dropped while training.
        ff_dropout: share of hidden feed-forward units that is dropped while training.
        keep_last_hidden: the memory holds what the last layer made of a token, nothing else.
        shared_kv: all layers share keys and values of the memory, the paper's shortcut; if not,
            each has its own, and the memory is as many times as large.
        norm_memory: normalise what goes into the memory, once for all layers.
        dim_context: width of a context that every layer attends to, too; None for none.
        legacy: reproduce the numbers of feedback-transformer-pytorch 0.0.11.

    Raises:
        TypeError, ValueError: a number is out of range, or a new option meets `legacy`.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        mem_len: int,
        seq_len: int = 2,
        heads: int = 8,
        dim_head: int = 64,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        keep_last_hidden: bool = False,
        shared_kv: bool = True,
        norm_memory: bool = False,
        dim_context: int | None = None,
        legacy: bool = False,
    ) -> None:
        check_at_least(
            1,
            num_tokens=num_tokens,
            dim=dim,
            depth=depth,
            seq_len=seq_len,
            heads=heads,
            dim_head=dim_head,
        )
        check_at_least(0, mem_len=mem_len)
        check_probability(attn_dropout=attn_dropout, ff_dropout=ff_dropout)
        if dim_context is not None:
            check_at_least(1, dim_context=dim_context)
        if legacy:
            check_legacy_options(
                shared_kv=shared_kv, norm_memory=not norm_memory, dim_context=dim_context is None
            )
        super().__init__()
        self.num_tokens: int = num_tokens
        self.dim: int = dim
        self.depth: int = depth
        self.mem_len: int = mem_len
        self.seq_len: int = seq_len
        self.heads: int = heads
        self.dim_head: int = dim_head
        self.attn_dropout: float = attn_dropout
        self.ff_dropout: float = ff_dropout
        self.keep_last_hidden: bool = keep_last_hidden
        self.groups: int = 1 if shared_kv else depth
        self.dim_context: int | None = dim_context
        self.legacy: bool = legacy
        self.token_emb: nn.Embedding = nn.Embedding(num_tokens, dim)
        self.pos_emb: RelativePositionBias = RelativePositionBias(heads)
        self.layers: nn.ModuleList = nn.ModuleList(
            Layer(dim, heads, dim_head, ff_dropout, dim_context) for _ in range(depth)
        )
        self.to_kv: nn.Linear = nn.Linear(dim, self.groups * 2 * heads * dim_head, bias=False)
        self.memory_norm: nn.LayerNorm | None = nn.LayerNorm(dim) if norm_memory else None
        self.layer_weight: nn.Parameter = nn.Parameter(torch.ones(depth + 1))
        self.norm: nn.LayerNorm = nn.LayerNorm(dim)
        self.to_logits: nn.Linear = nn.Linear(dim, num_tokens)
        self._packs: Packs = Packs()
        register_key_map(self, KEY_MAP)

    def forward(
        self,
        x: Tensor,
        memory: Memory | Sequence[Tensor] | None = None,
        return_memory: bool = False,
        *,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        return_embeddings: bool = False,
        detach_every: int | None = None,
        checkpoint_every: int | None = None,
        solver: str = "sequential",
    ) -> Tensor | tuple[Tensor, Memory]:
        """Logits of the next token at every place.

        Calls with carried memory give what one call with all tokens gives, wherever the sequence is
        split.

        Args:
            x: tokens (b, n), integers, or embeddings (b, n, d), n >= 1.
            memory: what an earlier call returned, or a plain pair of keys and values.
            return_memory: return the memory for the next call, too.
            mask: (b, n) boolean, True = take part. Masked tokens keep their places, and change
                nothing at others, NaN in their embeddings included.
            context: (b, m, dim_context), for a model with `dim_context`.
            context_mask: (b, m) boolean, True = take part.
            return_embeddings: return the normalised states of the last layer, not logits.
            detach_every: cut the gradients' way through the memory every so many tokens, a multiple
                of `seq_len`: truncated back-propagation through time.
            checkpoint_every: keep no activations, but compute them again for so many tokens at a
                time, a multiple of `seq_len`, when gradients are wanted.
            solver: "jacobi" iterates over all segments at once until nothing changes, and falls
                back to "sequential" where that takes too long. It holds attention of all tokens to
                all slots, (b, h, n, m + n) whatever `mem_len`. With gradients, dropout or a context
                it is the sequential one.

        Returns:
            Logits (b, n, num_tokens), or states (b, n, d); with `return_memory` a pair of it and
            a `Memory`.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape; nothing is broadcast.
        """
        check_input(x, self.dim, self.num_tokens, self.token_emb.weight.dtype)
        b = x.shape[0]
        check_mask("mask", mask, x.shape[:2])
        check_context(context, context_mask, self.dim_context, b)
        check_every("detach_every", detach_every, self.seq_len)
        check_every("checkpoint_every", checkpoint_every, self.seq_len)
        check_choice("solver", solver, SOLVERS)
        given = None if memory is None else self._given(memory, b)
        if self.legacy:
            check_legacy_options(
                mask=mask is None and (given is None or given.mask is None),
                open_segment=given is None or given.open_length == 0,
                detach_every=detach_every is None,
                checkpoint_every=checkpoint_every is None,
                solver=solver == "sequential",
            )
        # The root gathers itself where it is called.
        gathered = self._gather([part for part in sharded(self.modules()) if part is not self])
        try:
            states, left = self._run(
                x,
                given,
                mask,
                self._contexts(context, context_mask),
                detach_every,
                checkpoint_every,
                jacobi=solver == "jacobi",
            )
            states = self.norm(states)
            out = states if return_embeddings else self.to_logits(states)
        finally:
            # With gradients the backward pass needs them, and gives them back.
            if not torch.is_grad_enabled():
                shard(gathered)
        return (out, left) if return_memory else out

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
        memory: Memory | Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues prompts (b, n) by up to `length` tokens, (b, length) int64; 0 is greedy.

        A row that has drawn `eos_token` goes on with `pad_value`. Each token takes one step with
        carried memory, in evaluation mode. Filters are those of `shared_core.filter_logits`.

        Args:
            memory: of what came before the prompt, as an earlier call returned it.
            mask: (b, n) boolean of the prompt, True = take part. The last token of a row must:
                shorter prompts are padded in front. By a multiple of `seq_len`, a row goes on as it
                does alone; by other numbers its tokens fall into other segments.

        Raises:
            TypeError, ValueError: a prompt or number is out of range.
        """
        step = self._stepper(prompt, length, memory, mask, context, context_mask)
        gathered = self._gather(sharded(self.modules()))
        try:
            return generate(
                step,
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
        finally:
            shard(gathered)

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
        memory: Memory | Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The tokens of `generate`, (b,) int64 as they come.

        While they come, weights must not be changed: some are laid out anew, others are not.

        Raises:
            TypeError, ValueError: as `generate`, by the call and not by the first `next`.
        """
        tokens = stream(
            self._stepper(prompt, length, memory, mask, context, context_mask),
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
        return self._while_gathered(tokens)

    def _run(
        self,
        x: Tensor,
        given: Memory | None,
        mask: Tensor | None,
        contexts: list[Context] | None,
        detach_every: int | None,
        checkpoint_every: int | None,
        *,
        jacobi: bool,
    ) -> tuple[Tensor, Memory]:
        """States (b, n, d) of the last layer, not normalised, and the memory behind them."""
        states = self._embed(x, mask)
        weights, sizes = self._weights(), self._sizes()
        if self.legacy:
            return run_legacy(states, weights, sizes, self.pos_emb, given)
        window = Window.of(given, states, self.depth, sizes)
        table = bias_table(self.pos_emb, self.seq_len, window.most_slots(x.shape[1], sizes))
        # A pass must give the same where it is given the same.
        dropping = sizes.attn_dropout > 0.0 or sizes.ff_dropout > 0.0
        jacobi = jacobi and not torch.is_grad_enabled() and not dropping
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Weights that are learnt change with each step.
            self._packs.clear()
        run = Run(weights, sizes, table, contexts, jacobi, self._packs)
        states, window = run.all(states, window, mask, detach_every, checkpoint_every)
        return states, window.memory()

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Embeddings (b, n, d) of tokens, or those that are given; 0 where masked."""
        # Under autocast an earlier layer may have made them of another type than the weights.
        dtype = self.token_emb.weight.dtype
        states = x.to(dtype) if x.is_floating_point() else self.token_emb(x)
        # 0 times NaN would be NaN.
        return states if mask is None else states.masked_fill(~mask[..., None], 0.0)

    def _weights(self) -> Weights:
        """All that the recurrence multiplies by; TypeError for a part that has none of its own."""
        layers = self._layer_weights()
        mix = self.layer_weight.softmax(0)
        if self.keep_last_hidden:
            # A gradient of 0, not none, as data parallelism wants it.
            mix = mix * 0.0
            mix = torch.cat((mix[:-1], mix[-1:] + 1.0))
        norm = self.memory_norm
        return Weights(
            layers,
            self.to_kv.weight,
            mix,
            None if norm is None else (norm.weight, norm.bias),
            None,
            self._cross() or None,
        )

    def _layer_weights(self) -> tuple[LayerWeights, ...]:
        """Of each layer; TypeError for a part, of the memory too, that has none of its own."""
        check_part("to_kv", self.to_kv, nn.Linear)
        check_part("memory_norm", self.memory_norm, nn.LayerNorm)
        return tuple(layer.weights(f"layers.{i}") for i, layer in enumerate(self._layers()))

    def _layers(self) -> list[Layer]:
        for i, layer in enumerate(self.layers):
            check_part(f"layers.{i}", layer, Layer)
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _cross(self) -> tuple[ContextWeights, ...]:
        """What the layers attend to a context with; nothing where there is none."""
        return tuple(
            layer.cross.weights(f"layers.{i}.cross")
            for i, layer in enumerate(self._layers())
            if layer.cross is not None
        )

    def _sizes(self, training: bool | None = None) -> Sizes:
        training = self.training if training is None else training
        return Sizes(
            self.seq_len,
            self.mem_len,
            self.heads,
            self.dim_head,
            self.groups,
            self.attn_dropout if training else 0.0,
            self.ff_dropout if training else 0.0,
        )

    def _given(self, memory: Memory | Sequence[Tensor], batch: int) -> Memory:
        inner = self.heads * self.dim_head
        return as_memory(memory, batch, self.groups * inner, (self.depth, inner), self.seq_len)

    def _contexts(self, context: Tensor | None, mask: Tensor | None) -> list[Context] | None:
        if context is None:
            return None
        return [context_keys(context, weights, self.heads, mask) for weights in self._cross()]

    def _gather(self, parts: list[nn.Module]) -> list[nn.Module]:
        """Has parts that are sharded hold all of their weights; those that did not before.

        Their weights are used segment by segment, and never by calling them.
        """
        gathered = gather(parts)
        if gathered:
            # What is gathered anew moves no version.
            self._packs.clear()
        return gathered

    def _while_gathered(self, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        parts = sharded(self.modules())
        gathered = self._gather(parts)
        try:
            for token in tokens:
                yield token
                # Another stream may have ended meanwhile, and given them back.
                gathered += self._gather(parts)
        finally:
            shard(gathered)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeedbackTransformer:
        """What moves or casts all parameters: packed ones would stay behind."""
        self._packs.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _stepper(
        self,
        prompt: Tensor,
        length: int,
        memory: Memory | Sequence[Tensor] | None,
        mask: Tensor | None,
        context: Tensor | None,
        context_mask: Tensor | None,
    ) -> Callable[[Tensor, Window | None], tuple[Tensor, Window]]:
        """What generates: a step with weights that are laid out for it, once they are gathered."""
        if self.legacy:
            raise ValueError("legacy=True cannot generate: its answers depend on how it is fed")
        if prompt.is_floating_point():
            raise TypeError(f"prompt must hold integer tokens, got {prompt.dtype}")
        check_input(prompt, self.dim, self.num_tokens, self.token_emb.weight.dtype)
        if mask is not None:
            check_mask("mask", mask, prompt.shape)
            if not bool(mask[:, -1].all()):
                row = int(mask[:, -1].int().argmin())
                raise ValueError(f"the last token of a prompt must take part, masked in row {row}")
        check_context(context, context_mask, self.dim_context, prompt.shape[0])
        given = None if memory is None else self._given(memory, prompt.shape[0])
        check_part("to_logits", self.to_logits, nn.Linear)
        self._layer_weights()
        self._cross()

        @functools.cache
        def stepper() -> Stepper:
            return Stepper(
                self.token_emb,
                self.pos_emb,
                self.norm,
                self.to_logits,
                self._weights(),
                self._sizes(training=False),
                self._contexts(context, context_mask),
                given,
                mask,
                self._packs,
                length,
            )

        def step(tokens: Tensor, window: Window | None) -> tuple[Tensor, Window]:
            return stepper()(tokens, window)

        return step
