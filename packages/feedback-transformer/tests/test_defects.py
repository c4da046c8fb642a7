"""What the reference gets wrong, this package gets right; defect_checks shows how each is seen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

# By path: the checks are also read where the tests' folder is no package and no search path.
_SPEC = importlib.util.spec_from_file_location(
    "defect_checks", Path(__file__).with_name("defect_checks.py")
)
defect_checks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(defect_checks)
LIBRARY = defect_checks.library()


@pytest.mark.parametrize("name", defect_checks.CHECKS)
def test_defect_is_absent(device: torch.device, name: str) -> None:
    defect_checks.CHECKS[name](LIBRARY, device)


def test_every_name_is_found() -> None:
    assert set(vars(LIBRARY)) == set(defect_checks.NAMES)
