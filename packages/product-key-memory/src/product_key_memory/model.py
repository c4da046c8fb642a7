"""The layer: a router that finds slots by product keys, and a memory that reads their values.

Shapes: n tokens, d model width, h heads, d_k width of a sub-query, K1 x K2 sub-keys, k slots
that a head keeps of a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from product_key_memory.checks import as_dtype, check_at_least_0, check_input
from product_key_memory.legacy import (
    PKM_KEYS,
    differentiable_top_k,
    normalise_over_time,
    widen_statistics,
)
from product_key_memory.lookup import choose, product_top_k
from product_key_memory.norm import MaskedBatchNorm1D
from product_key_memory.operators import match_known
from product_key_memory.values import MemoryPool
from shared_core import register_key_map
from shared_core.checks import (
    check_at_least,
    check_choice,
    check_legacy_options,
    check_mask,
    check_probability,
)

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


class _Routing(nn.Module):
    """Queries, keys, and the search for a token's best slots."""

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int | tuple[int, int],
        heads: int,
        topk: int,
        dim_head: int,
        query_norm: str,
        key_norm: bool,
        query_dropout: float,
        differentiable_topk: bool,
        legacy: bool,
    ) -> None:
        sizes = (num_keys, num_keys) if isinstance(num_keys, int) else num_keys
        if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
            raise ValueError(f"num_keys must be an integer or a pair of them, got {num_keys!r}")
        sizes = (sizes[0], sizes[1])
        check_at_least(1, dim=dim, heads=heads, topk=topk, dim_head=dim_head, num_keys=sizes[0])
        check_at_least(1, num_keys=sizes[1])
        if topk > min(sizes):
            raise ValueError(
                f"topk must be at most the number of sub-keys, got topk={topk} and {sizes} keys"
            )
        check_choice("query_norm", query_norm, ("layer", "batch", "none"))
        check_probability(query_dropout=query_dropout)
        super().__init__()
        self.dim: int = dim
        self.heads: int = heads
        self.topk: int = topk
        self.dim_head: int = dim_head
        self.num_keys: int | tuple[int, int] = sizes[0] if sizes[0] == sizes[1] else sizes
        self.key_sizes: tuple[int, int] = sizes
        self.num_memories: int = sizes[0] * sizes[1]
        self.legacy = legacy
        self.differentiable_topk = differentiable_topk
        self.to_queries: nn.Linear = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.norm: nn.Module = nn.Identity()
        if query_norm == "layer":
            self.norm = nn.LayerNorm(dim_head)
        elif query_norm == "batch":
            features = dim_head if legacy else 2 * heads * dim_head
            self.norm = MaskedBatchNorm1D(nn.BatchNorm1d(features))
            if not legacy:
                self.register_load_state_dict_pre_hook(widen_statistics)  # type: ignore[no-untyped-call]
        self.key_norm: nn.Module = nn.LayerNorm(dim_head) if key_norm else nn.Identity()
        self.query_dropout: nn.Dropout = nn.Dropout(query_dropout)
        # Unequal halves do not fit side by side, so they follow each other.
        shape = (sizes[0], 2) if sizes[0] == sizes[1] else (sum(sizes),)
        self.keys: nn.Parameter = nn.Parameter(torch.empty(heads, *shape, dim_head))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the keys anew; the parts of the layer do so for themselves."""
        nn.init.normal_(self.keys, std=self.dim_head**-0.5)

    def sub_keys(self) -> tuple[Tensor, Tensor]:
        """(h, K1, d_k) and (h, K2, d_k)."""
        return self._halves(self.key_norm(self.keys))

    def _halves(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        first, second = keys.unbind(2) if keys.ndim == 4 else keys.split(self.key_sizes, 1)
        return first, second

    def route(
        self, x: Tensor, mask: Tensor | None, gumbel_noise_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Slots and scores of tokens x (..., d), both (n, h, k), n their number; `mask` (...)."""
        queries = self.query_dropout(self._normalise(self.to_queries(x), mask))
        # (n, 2, h, d_k): the first halves of all heads, then the second halves.
        queries = queries.reshape(-1, 2, self.heads, self.dim_head)
        keys: Tensor = self.key_norm(self.keys)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable_topk):
            first, second = self._score(queries, keys)
            if gumbel_noise_scale > 0.0 and (self.training or self.legacy):
                noise = gumbel_noise(first, second)
                first = first + noise[0] * gumbel_noise_scale
                second = second + noise[1] * gumbel_noise_scale
        if self.differentiable_topk:
            scores, indices = product_top_k(
                first, second, self.topk, sub_top_k=differentiable_top_k
            )
            return indices, scores
        at_1, at_2 = choose(first, second, self.topk)
        found = first.gather(-1, at_1), second.gather(-1, at_2)
        indices = at_1 * self.key_sizes[1] + at_2
        if not torch.is_grad_enabled():
            return indices, found[0] + found[1]
        return indices, self._with_gradient(queries, keys, (at_1, at_2), found)

    def _score(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of all sub-keys, (n, h, K1) and (n, h, K2), for queries (n, 2, h, d_k)."""
        first, second = (
            torch.matmul(half.transpose(0, 1), of.mT).transpose(0, 1)
            for half, of in zip(queries.unbind(1), self._halves(keys), strict=True)
        )
        return first, second

    def _with_gradient(
        self,
        queries: Tensor,
        keys: Tensor,
        at: tuple[Tensor, Tensor],
        found: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The sum of the scores (n, h, k) found of sub-keys, whose gradient is sparse.

        Only the chosen sub-keys get one, so it is not spread over scores of all.
        """
        size_1, size_2 = self.key_sizes
        head = torch.arange(self.heads, device=keys.device)[:, None] * (size_1 + size_2)
        if keys.ndim == 4:
            rows = torch.stack((head + 2 * at[0], head + 2 * at[1] + 1), 1)
        else:
            rows = torch.stack((head + at[0], head + at[1] + size_1), 1)
        scores: Tensor = match_known(
            keys.reshape(-1, self.dim_head),
            rows.flatten(0, 2),
            queries.flatten(0, 2),
            torch.stack(found, 1).flatten(0, 2),
        )
        return scores.view_as(rows).sum(1)

    def _normalise(self, queries: Tensor, mask: Tensor | None) -> Tensor:
        """(..., 2 h d_k) -> the same."""
        if isinstance(self.norm, MaskedBatchNorm1D):
            if self.legacy:
                return normalise_over_time(self.norm.fn, queries, self.dim_head)
            normalised: Tensor = self.norm(queries, mask)
            return normalised
        halves: Tensor = self.norm(queries.unflatten(-1, (-1, self.dim_head)))
        return halves.flatten(-2)


class ProductKeyRouter(_Routing):
    """Finds the best of K1 x K2 slots for a token and scores them, in sqrt of their number.

    Lample et al. 2019, section 3.1. For layers that do with the slots something of their own.

    Args:
        dim: width of a token.
        num_keys: sub-keys of both halves, or of each, (K1, K2).
        heads: independent lookups.
        topk: slots that a head keeps, at most min(K1, K2).
        dim_head: width of a sub-query.
        query_norm: "layer", "batch" over all query features, or "none".
        key_norm: normalise keys, too (Berges et al. 2024).
        query_dropout: of query features while training.
        differentiable_topk: choose sub-keys by coordinate descent, with a gradient to those that
            were nearly chosen.

    Raises:
        TypeError, ValueError: a number or option is out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int | tuple[int, int] = 128,
        heads: int = 4,
        topk: int = 32,
        dim_head: int = 128,
        query_norm: str = "layer",
        key_norm: bool = False,
        query_dropout: float = 0.0,
        differentiable_topk: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_keys=num_keys,
            heads=heads,
            topk=topk,
            dim_head=dim_head,
            query_norm=query_norm,
            key_norm=key_norm,
            query_dropout=query_dropout,
            differentiable_topk=differentiable_topk,
            legacy=False,
        )

    def forward(
        self, x: Tensor, input_mask: Tensor | None = None, gumbel_noise_scale: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Looks tokens up.

        Args:
            x: (..., d).
            input_mask: (...) boolean, True = take part; the others score 0 at slot 0.
            gumbel_noise_scale: of noise on the scores of sub-keys while training.

        Returns:
            Slots (..., h, k), int64, and their scores (..., h, k), best first.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
        """
        check_input(x, self.dim)
        check_at_least_0(gumbel_noise_scale=gumbel_noise_scale)
        if input_mask is not None:
            check_mask("input_mask", input_mask, x.shape[:-1])
            x = x.masked_fill(~input_mask[..., None], 0.0)
        indices, scores = self.route(x, input_mask, gumbel_noise_scale)
        if input_mask is not None:
            masked = ~input_mask.reshape(-1, 1, 1)
            indices, scores = indices.masked_fill(masked, 0), scores.masked_fill(masked, 0.0)
        shape = (*x.shape[:-1], self.heads, self.topk)
        return indices.reshape(shape), scores.reshape(shape)


class PKM(_Routing):
    """A layer with num_keys**2 slots of which a token reads heads * topk (Lample et al. 2019).

    Args:
        dim: width of tokens.
        heads: independent lookups, added up.
        num_keys: sub-keys of both halves, or of each, (K1, K2); K1 * K2 slots.
        topk: slots that a head keeps, at most min(K1, K2).
        dim_head: width of a sub-query.
        input_dropout, query_dropout, value_dropout, attn_dropout: while training, of the tokens,
            the query features, the result and the weights.
        use_layernorm: normalise each sub-query; otherwise all query features over the batch.
        pre_layernorm: normalise tokens first.
        differentiable_topk: see `ProductKeyRouter`.
        concat_values_and_combine: values of width `dim_head`, read by each head for itself,
            concatenated and projected to `dim`.
        norm_output: normalise the result.
        non_competitive_gates: weights by ReLU instead of softmax (Csordas et al. 2023).
        query_norm: "layer", "batch" or "none", in place of `use_layernorm`.
        key_norm: see `ProductKeyRouter`.
        gate: "softmax", "relu" or "sigmoid" makes weights of scores.
        pool: a `MemoryPool` to read, shared with other layers; otherwise the layer has its own.
        values_grad: "dense" or "factored", see `MemoryPool`.
        values_dtype: see `dtype` of `MemoryPool`.
        gated_output: multiply the result by silu of a projection of the token and project it
            (Berges et al. 2024, section 3.2).
        experts: slots are neurons which answer the token (PEER, He 2024).
        legacy: reproduce the numbers of product-key-memory 0.3.0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number or option is out of range, two contradict each other, the pool does
            not fit, or a new option meets `legacy`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        num_keys: int | tuple[int, int] = 128,
        topk: int = 32,
        dim_head: int = 128,
        input_dropout: float = 0.0,
        query_dropout: float = 0.0,
        value_dropout: float = 0.0,
        attn_dropout: float = 0.0,
        use_layernorm: bool = True,
        pre_layernorm: bool = False,
        differentiable_topk: bool = False,
        concat_values_and_combine: bool = False,
        norm_output: bool = False,
        non_competitive_gates: bool = False,
        *,
        query_norm: str | None = None,
        key_norm: bool = False,
        gate: str | None = None,
        pool: MemoryPool | None = None,
        values_grad: str = "dense",
        values_dtype: torch.dtype | str | None = None,
        gated_output: bool = False,
        experts: bool = False,
        legacy: bool = False,
    ) -> None:
        check_probability(
            input_dropout=input_dropout, value_dropout=value_dropout, attn_dropout=attn_dropout
        )
        norm = ("layer" if use_layernorm else "batch") if query_norm is None else query_norm
        if not use_layernorm and norm != "batch":
            raise ValueError(f"query_norm={norm!r} contradicts use_layernorm=False")
        if gate is None:
            gate = "relu" if non_competitive_gates else "softmax"
        if non_competitive_gates and gate != "relu":
            raise ValueError(f"gate={gate!r} contradicts non_competitive_gates=True")
        check_choice("gate", gate, tuple(GATES))
        check_choice("values_grad", values_grad, ("dense", "factored"))
        dtype = as_dtype("values_dtype", values_dtype)
        if experts and concat_values_and_combine:
            raise ValueError("experts=True excludes concat_values_and_combine=True")
        if legacy:
            check_legacy_options(
                num_keys=isinstance(num_keys, int),
                query_norm=norm != "none",
                key_norm=not key_norm,
                gate=gate != "sigmoid",
                pool=pool is None,
                values_grad=values_grad == "dense",
                values_dtype=values_dtype is None,
                gated_output=not gated_output,
                experts=not experts,
            )
        super().__init__(
            dim,
            num_keys=num_keys,
            heads=heads,
            topk=topk,
            dim_head=dim_head,
            query_norm=norm,
            key_norm=key_norm,
            query_dropout=query_dropout,
            differentiable_topk=differentiable_topk,
            legacy=legacy,
        )
        self.use_layernorm: bool = norm == "layer"
        self.gate: str = gate
        self.experts: bool = experts
        self.concat_values_and_combine: bool = concat_values_and_combine
        self.pre_layernorm: nn.Module = nn.LayerNorm(dim) if pre_layernorm else nn.Identity()
        width = dim_head if concat_values_and_combine else dim
        if pool is None:
            pool = MemoryPool(
                self.num_memories,
                width,
                experts=experts,
                values_grad=values_grad,
                dtype=dtype,
            )
        else:
            _check_pool(pool, self.num_memories, width, experts, values_grad, values_dtype)
        self.values: MemoryPool = pool
        self.combine: nn.Linear | None = None
        if concat_values_and_combine:
            self.combine = nn.Linear(heads * dim_head, dim, bias=False)
        self.to_gate: nn.Linear | None = None
        self.to_out: nn.Linear | None = None
        if gated_output:
            self.to_gate = nn.Linear(dim, dim, bias=False)
            self.to_out = nn.Linear(dim, dim, bias=False)
        self.input_dropout: nn.Dropout = nn.Dropout(input_dropout)
        self.attn_dropout: nn.Dropout = nn.Dropout(attn_dropout)
        self.value_dropout: nn.Dropout = nn.Dropout(value_dropout)
        self.output_norm: nn.Module = nn.LayerNorm(dim) if norm_output else nn.Identity()
        register_key_map(self, PKM_KEYS)

    def forward(
        self,
        x: Tensor,
        input_mask: Tensor | None = None,
        mem_trainable_mask: Tensor | None = None,
        gumbel_noise_scale: float = 0.0,
    ) -> Tensor:
        """Reads the memory for every token.

        Args:
            x: (..., d).
            input_mask: (...) boolean, True = take part. A masked token's result is 0; it counts
                in no statistics and gets no gradient.
            mem_trainable_mask: (slots,) boolean; other slots get a gradient of exactly zero. An
                optimizer's weight decay still moves them: see `sparse_finetune`.
            gumbel_noise_scale: of noise on the scores of sub-keys, while training.

        Returns:
            (..., d).

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape.
        """
        check_input(x, self.dim)
        check_at_least_0(gumbel_noise_scale=gumbel_noise_scale)
        mask = None
        if input_mask is not None:
            check_mask("input_mask", input_mask, x.shape[:-1])
            # The reference takes a mask, and does nothing with it.
            mask = None if self.legacy else input_mask
        check_mask("mem_trainable_mask", mem_trainable_mask, (self.num_memories,))
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        x = self.input_dropout(self.pre_layernorm(x))
        indices, scores = self.route(x, mask, gumbel_noise_scale)
        weights = self.attn_dropout(GATES[self.gate](scores))
        tokens = x.reshape(-1, self.dim)
        if mask is not None:
            weights = weights.masked_fill(~mask.reshape(-1, 1, 1), 0.0)
        if self.legacy and self.concat_values_and_combine:
            weights = torch.ones_like(weights)
        out: Tensor = self._read(tokens, indices, weights, mem_trainable_mask).to(x.dtype)
        if self.combine is not None:
            out = self.combine(out)
        if self.to_gate is not None and self.to_out is not None:
            out = self.to_out(out * F.silu(self.to_gate(tokens)))
        out = self.output_norm(self.value_dropout(out)).view_as(x)
        return out if mask is None else out.masked_fill(~mask[..., None], 0.0)

    def _read(
        self, tokens: Tensor, indices: Tensor, weights: Tensor, trainable: Tensor | None
    ) -> Tensor:
        """Values of slots (n, h, k) by their weights: (n, d), or (n, h d_k) side by side."""
        if self.combine is not None:
            rows: Tensor = self.values(indices.flatten(0, 1), weights.flatten(0, 1), trainable)
            return rows.reshape(-1, self.heads * self.dim_head)
        asked = tokens if self.experts else None
        # One call of the pool, so that hooks which gather its tables reach both of them.
        out: Tensor = self.values(indices.flatten(1), weights.flatten(1), trainable, asked)
        return out


ProductKeyMemory = PKM


def gumbel_noise(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Standard Gumbel noise, -log(-log(u)), for two tensors of one leading shape."""
    sizes = (first.shape[-1], second.shape[-1])
    # In float32, since float16 would overflow.
    uniform = torch.rand(*first.shape[:-1], sum(sizes), device=first.device)
    noise = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    noise_1, noise_2 = noise.to(first.dtype).split(sizes, -1)
    return noise_1, noise_2


def _check_pool(
    pool: MemoryPool,
    slots: int,
    width: int,
    experts: bool,
    values_grad: str,
    values_dtype: torch.dtype | str | None,
) -> None:
    """Raises unless a given pool is what the layer would have made, its own options aside."""
    if not isinstance(pool, MemoryPool):
        raise TypeError(f"pool must be a MemoryPool, got {type(pool).__name__}")
    if (pool.slots, pool.dim) != (slots, width):
        raise ValueError(
            f"the layer needs a pool of {slots} slots of width {width}, got {pool.slots} of "
            f"{pool.dim}"
        )
    if experts != (pool.inputs is not None):
        raise ValueError(f"the layer has experts={experts}, the pool experts={not experts}")
    if values_grad != "dense" or values_dtype is not None:
        raise ValueError("a pool brings its own values_grad and values_dtype: give them to it")
