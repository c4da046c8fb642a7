"""The largest resident set of this process while something runs.

Only the standard library is used here, since an environment may hold nothing but a reference.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak(run: Callable[[], Any], *, exact: bool = True) -> int:
    """Bytes that a run takes at its peak beyond what is there before.

    Memory that is free but kept by the C library is given back before.

    Args:
        run: what to measure.
        exact: where the high-water mark of the resident set cannot be set back, that is anywhere
            but on Linux, raise RuntimeError; else return by how much the run raises it, which is
            less if there was more before.
    """
    resets = _CLEAR_REFS.exists()
    if exact and not resets:
        raise RuntimeError("peak memory is measured on Linux only")
    gc.collect()
    if resets:
        ctypes.CDLL(None).malloc_trim(0)
        # 5 sets the mark to what is in use now; see proc_pid_clear_refs(5).
        _CLEAR_REFS.write_text("5")
    before = _high_water(resets)
    result = run()
    taken = _high_water(resets) - before
    del result
    return taken


def _high_water(resets: bool) -> int:
    if resets:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 2**10
    # Not on every system, and asked for only where it is needed.
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 2**10
