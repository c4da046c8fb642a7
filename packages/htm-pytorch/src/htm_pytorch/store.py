"""A memory that grows while it is attended to.

Shapes: e environments, t tokens appended, n queries, d width, c tokens a chunk, j chunks of the
environment with most of them, x chunks that are written to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.attention import attend_chosen, choose
from htm_pytorch.checks import (
    check_env_ids,
    check_mask,
    check_positive,
    check_rows,
    check_sequence,
)
from htm_pytorch.files import load_file, save_file
from htm_pytorch.layout import Layout
from htm_pytorch.model import HTMAttention, HTMBlock, asked_for
from htm_pytorch.retrieval import Summary
from htm_pytorch.search import Search
from htm_pytorch.storage import MappedPool, Pool, read_manifest

_KIND = "htm_pytorch memory store"
_DTYPES = ("float64", "float32", "bfloat16", "float16")


class MemoryStore:
    """Memories of several environments, to which tokens are appended, and which are attended to.

    A store holds the tokens as they came and the means of its chunks, nothing that depends on
    weights: attending to it is the same as calling the module on all tokens, padded at the end,
    before and after any training step. Tokens are stored without their gradients.

    Args:
        dim: width of tokens.
        environments: independent memories.
        chunk_size: tokens of a chunk; `mem_chunk_size` of the modules.
        capacity: tokens kept of an environment, a multiple of `chunk_size`. To begin a chunk
            beyond it, the oldest chunk is forgotten.
        dtype: of what is stored. Tokens in bfloat16 take half as much and are rounded.
        device: where the tokens lie, and where modules and queries must be.
        path: a folder, in whose files the tokens lie instead of in memory. It is made unless there;
            a store of the same settings in it is resumed as of its last `flush`.
        search: how to find chunks; exactly where None. An object serves one store.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or the folder is
            not one of a store, or of a store with other settings, or open.
    """

    def __init__(
        self,
        dim: int,
        *,
        environments: int = 1,
        chunk_size: int = 32,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        path: str | os.PathLike[str] | None = None,
        search: Search | None = None,
    ) -> None:
        check_positive(dim=dim, environments=environments, chunk_size=chunk_size)
        if capacity is not None:
            check_positive(capacity=capacity)
            if capacity % chunk_size:
                raise ValueError(f"capacity must be a multiple of {chunk_size}, got {capacity}")
        if dtype not in [getattr(torch, name) for name in _DTYPES]:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        self.dim: int = dim
        self.environments: int = environments
        self.chunk_size: int = chunk_size
        self.capacity: int | None = capacity
        self.dtype: torch.dtype = dtype
        self.device: torch.device = torch.device(device)
        # Files are opened again as they grow: the working directory may be another one then.
        self.path: Path | None = None if path is None else Path(path).absolute()
        self._search: Search | None = search
        self._closed: bool = False
        with torch.inference_mode(False):
            self._layout: Layout = self._make_layout()

    def _make_layout(self) -> Layout:
        kept = None if self.capacity is None else self.capacity // self.chunk_size
        if self.path is not None:
            self._check_folder_device(self.device)
            return Layout(self.environments, kept, MappedPool(self.path, self._settings()))
        # One more, which is taken before the oldest is given back.
        limit = None if kept is None else self.environments * (kept + 1)
        pool = Pool(self.chunk_size, self.dim, self.dtype, self.device, limit)
        return Layout(self.environments, kept, pool)

    @property
    def lengths(self) -> Tensor:
        """Tokens that each environment holds: (environments,) int64, on the CPU."""
        self._check_open()
        return self._layout.seen - self._layout.oldest(self._layout.seen) * self.chunk_size

    def append(self, tokens: Tensor, env_ids: Sequence[int] | Tensor | None = None) -> None:
        """Adds tokens at the end.

        Args:
            tokens: (e, t, d), for each of the environments as many.
            env_ids: e different environments; all of them where None.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or the store is closed.
        """
        ids = self._ids(env_ids)
        check_sequence("tokens", tokens, self.dim)
        check_rows("tokens", tokens, len(ids))
        if tokens.numel():
            with torch.inference_mode(False), torch.no_grad():
                self._tell(*self._layout.append(tokens.to(self.device, self.dtype), ids))

    def attend(
        self,
        module: HTMAttention | HTMBlock,
        queries: Tensor,
        *,
        env_ids: Sequence[int] | Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
        return_indices: bool = False,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """What `module(queries, tokens, mask, chunk_attn_mask)` gives for the tokens that are held.

        Chunks count from the oldest that is held; j is that of the longest memory in question.
        Gradients of the module and the queries may be taken later, after more has been appended,
        too, but not after a chunk was forgotten and its place taken. The module's `forward` is not
        called, and neither are hooks on it.

        Args:
            queries: (e, n, d).
            env_ids: e different environments; all of them where None.
            chunk_attn_mask: (e, n, j) boolean: the chunks that a query may attend to.
            return_indices: return the chunks (e, n, min(k, j)), too, as the module does.
            return_weights: return their weights (e, n, min(k, j)), too.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, the module is for other
                memories, or the store is closed.
        """
        ids = self._ids(env_ids)
        attention = module.attn if isinstance(module, HTMBlock) else module
        self._check_module(attention)
        check_sequence("queries", queries, self.dim)
        check_rows("queries", queries, len(ids))
        device = self._layout.means.device
        if queries.device != device:
            raise ValueError(f"queries must be on {device}, got {queries.device}")
        view = self._layout.view(ids)
        if chunk_attn_mask is not None:
            shape = *queries.shape[:2], view.table.shape[1]
            check_mask("chunk_attn_mask", chunk_attn_mask, shape)
            if view.ages is not None:
                ages = view.ages[:, None].expand_as(chunk_attn_mask)
                chunk_attn_mask = chunk_attn_mask.gather(2, ages)
        candidates = None if self._search is None else partial(self._search.search, env_ids=ids)
        summary = Summary(view.means, view.some)
        asking = module.norm(queries) if isinstance(module, HTMBlock) else queries
        columns, weights = choose(attention, asking, summary, chunk_attn_mask, candidates)
        out = self._attend(attention, asking, _look_up(view.table, columns), weights)
        if isinstance(module, HTMBlock):
            out = queries + out
        indices = columns if view.ages is None else _look_up(view.ages, columns)
        return asked_for(out, indices, weights, return_indices, return_weights)

    def tokens(self, env_id: int) -> Tensor:
        """A copy of the tokens that an environment holds: (length, d), oldest first."""
        self._ids([env_id])
        return self._layout.tokens(env_id)

    def reset(self, env_ids: Sequence[int] | Tensor | None = None) -> None:
        """Forgets all tokens of some environments; of all where None."""
        ids = self._ids(env_ids)
        with torch.inference_mode(False), torch.no_grad():
            self._tell(*self._layout.forget(ids))

    def flush(self) -> None:
        """Returns when everything up to now is safe in the folder of `path`; else does nothing."""
        self._check_open()
        self._layout.flush()

    def close(self) -> None:
        """Flushes, and lets go of everything. A closed store raises ValueError when it is used."""
        if not self._closed:
            try:
                self.flush()
            finally:
                self._closed = True
                self._layout.close()

    def __enter__(self) -> MemoryStore:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def to(self, device: torch.device | str) -> MemoryStore:
        """Moves what is stored to a device, and returns the store."""
        self._check_open()
        device = torch.device(device)
        if self.path is not None:
            self._check_folder_device(device)
        with torch.inference_mode(False):
            self._layout.to(device)
        self.device = device
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, whole or not at all. Takes as much memory as the tokens that are held.

        Raises:
            OSError: it cannot be written; a file that was there is as before.
        """
        tokens = [self.tokens(env_id).cpu() for env_id in range(self.environments)]
        content = {"settings": self._settings(), "tokens": tokens}
        save_file(_KIND, content, Path(path))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        search: Search | None = None,
    ) -> MemoryStore:
        """The store in a file of `save`.

        Raises:
            ValueError: the file is another one.
            OSError: it cannot be read.
        """
        content = load_file(_KIND, Path(path))
        settings = content["settings"]
        dtype = getattr(torch, settings.pop("dtype"))
        store = cls(**settings, dtype=dtype, device=device, search=search)
        for env_id, tokens in enumerate(content["tokens"]):
            store.append(tokens[None], [env_id])
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, search: Search | None = None) -> MemoryStore:
        """The store in a folder, as of its last `flush`.

        Raises:
            ValueError: it is no folder of a store, or open.
        """
        manifest = read_manifest(Path(path))
        if manifest is None:
            raise ValueError(f"{os.fspath(path)!r} holds no memory store")
        settings = dict(manifest["settings"])
        dtype = getattr(torch, settings.pop("dtype"))
        return cls(**settings, dtype=dtype, path=path, search=search)

    def _tell(self, env_ids: Tensor, chunks: Tensor) -> None:
        if self._search is not None:
            self._search.changed(env_ids, chunks)

    def _attend(
        self, attention: HTMAttention, asking: Tensor, places: Tensor, weights: Tensor
    ) -> Tensor:
        """Attention inside chunks (e, n, k) of the pool, which is one row of one batch."""
        pool, (e, n, k) = self._layout.pool, places.shape
        # A copy, so that the backward pass sees what the forward pass has seen.
        counts = pool.counts[places.clamp(min=0)]
        out = attend_chosen(
            attention,
            asking.reshape(1, e * n, self.dim),
            pool.tokens[: pool.used].flatten(0, 1)[None],
            counts.reshape(1, e * n, k),
            places.reshape(1, e * n, k),
            weights.reshape(1, e * n, k),
        )
        return out.view(e, n, self.dim)

    def _settings(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "environments": self.environments,
            "chunk_size": self.chunk_size,
            "capacity": self.capacity,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _ids(self, env_ids: Sequence[int] | Tensor | None) -> Tensor:
        """Environments as (e,) int64 on the CPU."""
        self._check_open()
        if env_ids is None:
            return torch.arange(self.environments)
        return check_env_ids(env_ids, self.environments)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the store is closed")

    def _check_folder_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"a store with a path is on the CPU, got device {device}")

    def _check_module(self, module: HTMAttention) -> None:
        if module.dim != self.dim:
            raise ValueError(f"the module must be of dim {self.dim}, got {module.dim}")
        if module.mem_chunk_size != self.chunk_size:
            raise ValueError(
                f"the module must have chunks of {self.chunk_size}, got {module.mem_chunk_size}"
            )
        if module.legacy:
            raise ValueError("a store pads at the end, and a module with legacy=True in front")


def _look_up(table: Tensor, columns: Tensor) -> Tensor:
    """What a table (e, j) has at columns (e, n, k); -1 stays."""
    found = table.gather(1, columns.clamp(min=0).flatten(1)).view_as(columns)
    return found.masked_fill(columns < 0, -1)
