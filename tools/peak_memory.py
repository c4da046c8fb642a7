"""The largest resident set of this process while something runs.

Only the standard library is used here, since an environment may hold nothing but a reference.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# Whether the mark can begin anew; elsewhere it is what the process has reached so far.
BEGINS_ANEW = _CLEAR_REFS.exists()


def peak(run: Callable[[], Any]) -> int:
    """Bytes that a run takes at its peak beyond what is there before.

    Memory that is free but kept by the C library is given back before. Where the mark cannot begin
    anew, it is the bytes by which the run raises it, which are fewer.
    """
    if BEGINS_ANEW:
        ctypes.CDLL(None).malloc_trim(0)
        # 5 sets the high-water mark to what is in use now; see proc_pid_clear_refs(5).
        _CLEAR_REFS.write_text("5")
    before = _high_water()
    result = run()
    bytes_taken = _high_water() - before
    del result
    return bytes_taken


def _high_water() -> int:
    if BEGINS_ANEW:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 2**10
    # Not on every system, and asked for only where it is needed.
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 2**10
