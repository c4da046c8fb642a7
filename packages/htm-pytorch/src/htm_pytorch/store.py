"""A memory that grows while it is attended to.

Shapes: e environments, t tokens appended, n queries, d width, k chunks a query, j chunks of the
environment with most of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htm_pytorch.attending import attend_view, eagerly, look_up, parts
from htm_pytorch.attention import choose
from htm_pytorch.checks import check_env_ids, check_overflow, check_rows
from htm_pytorch.files import load_file, save_file
from htm_pytorch.layout import Layout
from htm_pytorch.mapped import check_on_cpu, make_pool, read_manifest
from htm_pytorch.model import HTMAttention, HTMBlock, asked_for
from htm_pytorch.retrieval import Summary
from htm_pytorch.search import Search
from htm_pytorch.settings import Settings
from shared_core.checks import check_mask, check_vectors

_KIND = "htm_pytorch memory store"


class MemoryStore:
    """Memories of several environments, to which tokens are appended, and which are attended to.

    A store holds the tokens as they came and the means of its chunks, nothing that depends on
    weights: attending to it is the same as calling the module on all tokens, padded at the end,
    before and after any training step. Tokens are stored without their gradients, also where the
    module has `detach_memories=False`.

    Memory: the tokens, unless they are in files, and always the means, of as many chunks for each
    environment as the longest one has, in float32 or wider. So where memories are of very different
    lengths, a store for each takes less. `capacity` bounds what is held. There is room for more
    where an append brings many chunks, since all are written before any is forgotten, and where
    graphs wait for their backward pass, since chunks that were forgotten after they had attended
    to the store are kept for them. Such room is used again, and given back with the store.

    An append or reset that fails, or is interrupted, has changed nothing.

    Args:
        dim: width of tokens.
        environments: independent memories.
        chunk_size: tokens of a chunk; `mem_chunk_size` of the modules.
        capacity: tokens kept of an environment, a multiple of `chunk_size`. To begin a chunk
            beyond it, the oldest chunk is forgotten.
        dtype: of what is stored. Tokens in bfloat16 take half as much and are rounded.
        device: where the tokens lie, and where modules and queries must be.
        path: a folder, in whose files the tokens lie instead of in memory. It is made unless there;
            a store of the same settings in it is resumed as of its last `flush`. It is for the
            process that made it, and not for one forked from that.
        search: how to find chunks; exactly where None. An object serves one store.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or the folder is
            not one of a store, or of a store with other settings, or open.
        OSError: the folder cannot be made or read, or the system has no locks, such as Windows.
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
        settings = Settings(dim, environments, chunk_size, capacity, dtype)
        settings.check()
        self._set(settings, torch.device(device), path, search, read_only=False)

    def _set(
        self,
        settings: Settings,
        device: torch.device,
        path: str | os.PathLike[str] | None,
        search: Search | None,
        *,
        read_only: bool,
    ) -> None:
        self.dim: int = settings.dim
        self.environments: int = settings.environments
        self.chunk_size: int = settings.chunk_size
        self.capacity: int | None = settings.capacity
        self.dtype: torch.dtype = settings.dtype
        self.device: torch.device = device
        # Files are opened again as they grow: the working directory may be another one then.
        self.path: Path | None = None if path is None else Path(path).absolute()
        self.read_only: bool = read_only
        self._settings: Settings = settings
        self._search: Search | None = search
        self._closed: bool = False
        with torch.inference_mode(False):
            tell = None if search is None else search.changed
            pool = make_pool(settings, device, self.path, read_only=read_only)
            self._layout: Layout = Layout(settings.environments, settings.kept, pool, tell)

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
            TypeError, ValueError: an argument has the wrong type or shape, a finite number is too
                large for float16, or the store is closed or read-only.
        """
        ids = self._ids(env_ids)
        self._check_writable()
        check_vectors("tokens", tokens, self.dim, least=0)
        check_rows("tokens", tokens, len(ids))
        if tokens.numel():
            with torch.inference_mode(False), torch.no_grad():
                stored = tokens.to(self.device, self.dtype)
                check_overflow(tokens, stored)
                self._layout.append(stored, ids)

    @eagerly
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
        Gradients of the module and the queries may be taken later, whatever was appended or
        forgotten since, but not after a store with a path was closed. The module's `forward` and
        its hooks are not called. All runs eagerly, compiled or not. Under `torch.utils.checkpoint`
        the second forward pass would see what is held then.

        Args:
            queries: (e, n, d).
            env_ids: e different environments; all of them where None.
            chunk_attn_mask: (e, n, j) boolean: the chunks that a query may attend to.
            return_indices: return the chunks (e, n, min(k, j)), too, as the module does.
            return_weights: return their weights (e, n, min(k, j)), too.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or the store is closed.
        """
        ids = self._ids(env_ids)
        block, attention = parts(module, self._settings)
        check_vectors("queries", queries, self.dim, least=0)
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
        asking = queries if block is None else block.norm(queries)
        columns, weights = choose(attention, asking, summary, chunk_attn_mask, candidates)
        out = attend_view(attention, asking, self._layout.pool, view, columns, weights)
        if block is not None:
            out = queries + out
        indices = columns if view.ages is None else look_up(view.ages, columns)
        return asked_for(out, indices, weights, return_indices, return_weights)

    def tokens(self, env_id: int) -> Tensor:
        """A copy of the tokens that an environment holds: (length, d), oldest first."""
        self._ids([env_id])
        return self._layout.tokens(env_id)

    def reset(self, env_ids: Sequence[int] | Tensor | None = None) -> None:
        """Forgets all tokens of some environments; of all where None."""
        ids = self._ids(env_ids)
        self._check_writable()
        with torch.inference_mode(False), torch.no_grad():
            self._layout.forget(ids)

    def flush(self) -> None:
        """Returns when everything up to now is safe in the folder of `path`; else does nothing."""
        self._check_open()
        self._check_writable()
        self._layout.flush()

    def close(self) -> None:
        """Flushes, and lets go of everything. A closed store raises ValueError when it is used.

        Does nothing in a process that was forked from the one of a store with a path.
        """
        if not self._closed and not self._layout.pool.is_foreign:
            try:
                if not self.read_only:
                    self.flush()
            finally:
                self._closed = True
                self._layout.close()

    def __getstate__(self) -> dict[str, Any]:
        if self.path is not None:
            raise TypeError("a store with a path cannot be copied or pickled: save it, or open it")
        return self.__dict__

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
            check_on_cpu(device)
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
        content = {"settings": self._settings.written(), "tokens": tokens}
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
            ValueError: the file is another one, or of another version, or damaged.
            OSError: it cannot be read.
        """
        content = load_file(_KIND, Path(path))
        try:
            settings = Settings.read(content.get("settings"))
            memories = settings.check_tokens(content.get("tokens"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is damaged: {error}") from error
        store = cls(**settings._asdict(), device=device, search=search)
        for env_id, tokens in enumerate(memories):
            store.append(tokens[None], [env_id])
        return store

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        search: Search | None = None,
        read_only: bool = False,
    ) -> MemoryStore:
        """The store in a folder, as of its last `flush`.

        Args:
            path: the folder.
            search: how to find chunks; exactly where None.
            read_only: change nothing, and let others read it, too. `append`, `reset` and `flush`
                raise ValueError then.

        Raises:
            ValueError: it is no folder of a store, or open, or of another version, or damaged.
            OSError: it cannot be read, or the system has no locks, such as Windows.
        """
        manifest = read_manifest(Path(path))
        if manifest is None:
            raise ValueError(f"{os.fspath(path)!r} holds no memory store")
        store = cls.__new__(cls)
        store._set(manifest.settings, torch.device("cpu"), path, search, read_only=read_only)
        return store

    def _ids(self, env_ids: Sequence[int] | Tensor | None) -> Tensor:
        """Environments as (e,) int64 on the CPU."""
        self._check_open()
        if env_ids is None:
            return torch.arange(self.environments)
        return check_env_ids(env_ids, self.environments)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the store is closed")
        if self._layout.pool.is_foreign:
            raise ValueError("a store with a path is for the process that made it, not for a fork")

    def _check_writable(self) -> None:
        if self.read_only:
            raise ValueError("the store is read-only")
