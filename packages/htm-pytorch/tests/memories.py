"""What a store holds, kept the obvious way; and a program that writes to stores until it is killed.

Neither pytest nor a fixture is known here: the program runs on its own.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from htm_pytorch import MemoryStore
from shared_core.testing import displace

DIM, CHUNK, ENVIRONMENTS, CAPACITY = 6, 3, 3, 15
Step = tuple[str, list[int], Tensor]


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Memories:
    """The tokens of each environment; beyond `capacity`, whole chunks are forgotten."""

    def __init__(self, capacity: int | None = None, dtype: torch.dtype = torch.float64) -> None:
        self.capacity = capacity
        self.tokens = [torch.empty(0, DIM, dtype=dtype) for _ in range(ENVIRONMENTS)]

    def append(self, tokens: Tensor, env_ids: list[int]) -> None:
        for row, env_id in enumerate(env_ids):
            old = self.tokens[env_id]
            chunks = torch.cat((old, tokens[row].to(old.dtype).cpu())).split(CHUNK)
            if self.capacity is not None:
                chunks = chunks[-(self.capacity // CHUNK) :]
            self.tokens[env_id] = torch.cat(chunks)

    def reset(self, env_ids: list[int]) -> None:
        for env_id in env_ids:
            self.tokens[env_id] = self.tokens[env_id][:0]

    def copy(self) -> Memories:
        other = Memories(self.capacity)
        other.tokens = list(self.tokens)
        return other

    def padded(self, env_ids: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Memories (e, m, d) and the mask (e, m) of what is there."""
        held = [self.tokens[env_id] for env_id in env_ids]
        m = max((len(tokens) for tokens in held), default=0)
        memories = [F.pad(tokens, (0, 0, 0, m - len(tokens))) for tokens in held]
        mask = torch.arange(m) < torch.tensor([len(tokens) for tokens in held])[:, None]
        return torch.stack(memories).to(like), mask.to(like.device)

    def attend(
        self, module: Any, queries: Tensor, env_ids: list[int], chunk_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        memories, mask = self.padded(env_ids, queries)
        found: tuple[Tensor, ...] = module(
            queries, memories, mask, chunk_mask, return_indices=True, return_weights=True
        )
        return found

    def same(self, store: MemoryStore) -> bool:
        """Whether the store holds exactly these tokens."""
        lengths = [len(tokens) for tokens in self.tokens]
        if store.lengths.tolist() != lengths:
            return False
        pairs = enumerate(self.tokens)
        return all(torch.equal(store.tokens(env_id).cpu(), tokens) for env_id, tokens in pairs)


def new_store(**changes: Any) -> MemoryStore:
    given = {"environments": ENVIRONMENTS, "chunk_size": CHUNK, "dtype": torch.float64}
    return MemoryStore(DIM, **(given | changes))


def filled(randn: Callable[..., Tensor], **settings: Any) -> tuple[MemoryStore, Memories]:
    """A store of 17, 4 and 10 tokens, and what it holds."""
    store, expected = new_store(**settings), Memories(settings.get("capacity"))
    for env_id, t in enumerate((17, 4, 10)):
        tokens = randn(1, t, DIM, seed=env_id + 10)
        store.append(tokens, [env_id])
        expected.append(tokens, [env_id])
    return store, expected


def contents(folder: Path) -> dict[str, bytes]:
    """What is in every file."""
    return {str(x): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


def make_module(cls: type[torch.nn.Module], device: torch.device, **changes: Any) -> Any:
    """For such a store, in float64, always with the same weights, none at its initial value."""
    torch.manual_seed(0)
    settings = {"dim": DIM, "heads": 2, "topk_mems": 2, "mem_chunk_size": CHUNK, "dim_head": 4}
    return displace(cls(**(settings | changes)).to(device, torch.float64))


def steps(seed: int) -> Iterator[Step]:
    """What to do with a store: always the same."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        (action,) = chance.choices(("append", "reset", "flush", "save"), (60, 10, 20, 10))
        env_ids = chance.sample(range(ENVIRONMENTS), chance.randint(1, ENVIRONMENTS))
        t = chance.choice((1, 1, 2, 5, 20))
        yield action, env_ids, draw(generator, len(env_ids), t, DIM)


def carry_out(step: Step, on: MemoryStore | Memories) -> None:
    """Does what changes the tokens; "flush" and "save" do not."""
    action, env_ids, tokens = step
    if action == "append":
        on.append(tokens, env_ids)
    elif action == "reset":
        on.reset(env_ids)


def write(folder: Path, seed: int) -> None:
    """Carries out steps until killed, and notes in a file each "flush" and "save" that returned."""
    notes = os.open(folder / "notes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    store = new_store(path=folder / "store", capacity=CAPACITY)
    for step in steps(seed):
        carry_out(step, store)
        if step[0] == "flush":
            store.flush()
        elif step[0] == "save":
            store.save(folder / "saved")
        if step[0] in ("flush", "save"):
            os.write(notes, step[0][:1].encode())


def serve() -> None:
    """Starts a writer for each line "folder seed" and tells its number; then waits for its end.

    So the libraries are loaded once for all writers.
    """
    for line in sys.stdin:
        folder, seed = line.rsplit(" ", 1)
        child = os.fork()
        if child == 0:
            # The time limit, should nobody kill it.
            signal.alarm(60)
            write(Path(folder), int(seed))
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
