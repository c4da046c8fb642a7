"""What the distribution shows: names, types, pages."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shared_core
import shared_core.testing
from shared_core.testing import run_blocks

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
NAMES = [
    "FeedForward",
    "RelativePositionBias",
    "checks",
    "differentiate_twice",
    "eval_mode",
    "filter_logits",
    "generate",
    "masked_mean",
    "next_token_pairs",
    "register_key_map",
    "sample",
    "stream",
    "top_k",
    "transformed",
]


def test_the_public_names() -> None:
    """Names are added here and never taken away."""
    assert shared_core.__all__ == NAMES
    for name in NAMES:
        assert inspect.getdoc(getattr(shared_core, name))
    assert re.fullmatch(r"1\.\d+\.\d+", shared_core.__version__)


def test_it_is_typed() -> None:
    assert Path(shared_core.__file__).with_name("py.typed").is_file()


def test_every_assertion_is_documented() -> None:
    for name in shared_core.testing.__all__:
        assert inspect.getdoc(getattr(shared_core.testing, name))


def test_importing_it_imports_no_test_tools() -> None:
    code = (
        "import sys, shared_core\n"
        "tools = {'pytest', 'hypothesis', 'huggingface_hub', 'safetensors', 'einops'}\n"
        "assert not tools & set(sys.modules), tools & set(sys.modules)\n"
        "assert 'shared_core.testing' not in sys.modules\n"
        "import shared_core.testing\n"
        "assert not tools & set(sys.modules), tools & set(sys.modules)\n"
    )
    path = [part for part in sys.path if part]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{code}"],
        check=True,
        timeout=120,
    )


def test_the_examples_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks(README)
    assert capsys.readouterr().out.strip()


def test_the_readme_lists_every_name() -> None:
    page = README.read_text(encoding="utf-8")
    for module in (shared_core, shared_core.checks, shared_core.testing):
        for name in module.__all__:
            assert re.search(rf"^\|[^|]*`{name}`", page, re.M)
    assert "shared_core_2" in page


def test_the_changelog_has_the_version() -> None:
    page = (HERE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", page, re.MULTILINE)
    assert versions[0] == shared_core.__version__
