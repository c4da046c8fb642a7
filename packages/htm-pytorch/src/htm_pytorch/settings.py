"""What a store is made with, and its files say."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared_core.checks import check_at_least

_DTYPES = ("float64", "float32", "bfloat16", "float16")


class Settings(NamedTuple):
    """Arguments of `MemoryStore`, in the words of its docstring."""

    dim: int
    environments: int
    chunk_size: int
    capacity: int | None
    dtype: torch.dtype

    def check(self) -> None:
        """Raises TypeError or ValueError where one is out of range."""
        check_at_least(1, dim=self.dim, environments=self.environments, chunk_size=self.chunk_size)
        if self.capacity is not None:
            check_at_least(1, capacity=self.capacity)
            if self.capacity % self.chunk_size:
                raise ValueError(
                    f"capacity must be a multiple of {self.chunk_size}, got {self.capacity}"
                )
        if self.dtype not in [getattr(torch, name) for name in _DTYPES]:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    @property
    def kept(self) -> int | None:
        """Chunks that an environment holds at most."""
        return None if self.capacity is None else self.capacity // self.chunk_size

    def written(self) -> dict[str, Any]:
        """As a file has them."""
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def read(cls, found: Any) -> Settings:
        """From what `written` has returned.

        Raises:
            TypeError, ValueError: it is something else.
        """
        if not isinstance(found, dict) or set(found) != set(cls._fields):
            raise ValueError(f"settings must be {', '.join(cls._fields)}, got {found!r}")
        dtype = found["dtype"]
        known = isinstance(dtype, str) and dtype in _DTYPES
        settings = cls(**found | {"dtype": getattr(torch, dtype) if known else dtype})
        settings.check()
        return settings

    def check_tokens(self, found: Any) -> list[Tensor]:
        """Tokens (length, d) of each environment, as a file has them.

        Raises:
            ValueError: they are not.
        """
        if not isinstance(found, list) or len(found) != self.environments:
            raise ValueError(f"it must hold tokens of {self.environments} environments")
        for x in found:
            fits = isinstance(x, Tensor) and x.dtype == self.dtype and x.shape[1:] == (self.dim,)
            if not fits or (self.capacity is not None and len(x) > self.capacity):
                most = "" if self.capacity is None else f", length at most {self.capacity}"
                raise ValueError(f"tokens must be (length, {self.dim}) {self.dtype}{most}")
        return found
