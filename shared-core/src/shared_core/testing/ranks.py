"""One process of `run_ranks`: `python -m shared_core.testing.ranks file module function ...`."""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .poison import poison_uninitialised_memory
from .processes import STARTUP, resolve


def main(
    file: str, module: str, name: str, rank_text: str, world_size: str, timeout_text: str
) -> None:
    """Calls the function in the process group and stores what it returns."""
    rank, timeout = int(rank_text), float(timeout_text)
    # Tells where a hanging process is, and ends it.
    faulthandler.dump_traceback_later(STARTUP + timeout, exit=True)
    folder = Path.cwd()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    poison_uninitialised_memory()
    function = resolve(file, module, name)
    args = torch.load(folder / "args", weights_only=False)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=int(world_size),
        # Not the first to give up: its message would not tell where the rank is.
        timeout=timedelta(seconds=timeout + STARTUP),
    )
    # Anew: what the function may take begins here.
    faulthandler.dump_traceback_later(timeout, exit=True)
    result = function(*args)
    torch.save(result, folder / f"result{rank}")
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Past the destructors: threads of the process group that still run there abort the process.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
