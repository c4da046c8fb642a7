"""What the reference gets wrong, this package gets right; defect_checks shows how each is seen."""

from __future__ import annotations

import pytest
import torch

from shared_core.testing import load_beside

defect_checks = load_beside(__file__, "defect_checks")
LIBRARY = defect_checks.library()


@pytest.mark.parametrize("name", defect_checks.CHECKS)
def test_defect_is_absent(device: torch.device, name: str) -> None:
    defect_checks.CHECKS[name](LIBRARY, device)


def test_every_name_is_found() -> None:
    assert set(vars(LIBRARY)) == set(defect_checks.NAMES)
