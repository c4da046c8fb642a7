"""A package with a reference in an environment of its own, for the tools that compare the two."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

from shared_core.testing import load_beside

# What the tests import. They are imported by path, so it would not be found beside them.
load_beside(__file__, "results_tables")

TORCH = """
    __version__ = "9.9"
    threads = 4

    def get_num_threads():
        return threads

    def set_num_threads(number):
        global threads
        threads = number
"""


class Compared:
    """The package "new-thing" under `root`; its reference is "old-thing" 0.1."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.benchmarks = root / "packages" / "new-thing" / "benchmarks"
        self.tests = root / "packages" / "new-thing" / "tests"
        self.source = root / "packages" / "new-thing" / "src"
        for folder in (self.benchmarks, self.tests, self.source / "new_thing"):
            folder.mkdir(parents=True)
        (self.benchmarks / "reference.txt").write_text("# pinned\nold-thing==0.1\ntorch\n")
        self.write_ours("")
        venv.create(root / "theirs", with_pip=False, symlinks=True)
        self.python = root / "theirs" / "bin" / "python"
        (self._theirs,) = (root / "theirs").glob("lib/python*/site-packages")
        self.install_reference("0.1", "")

    def share_installed(self) -> None:
        """Let the environment of the reference import what is installed in this one."""
        here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        lines = [f"import site; site.addsitedir({folder!r})" for folder in sorted(here)]
        (self._theirs / "machine.pth").write_text("\n".join(lines))

    def stand_in_for_torch(self) -> None:
        """Give both sides a torch that starts quickly and only counts threads."""
        for folder in (self.source, self._theirs):
            (folder / "torch.py").write_text(textwrap.dedent(TORCH))

    def install_reference(self, version: str, text: str) -> None:
        """Put a release of the reference into its environment, in place of the one there."""
        for folder in self._theirs.glob("old_thing-*"):
            shutil.rmtree(folder)
        metadata = self._theirs / f"old_thing-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: old-thing\nVersion: {version}\n"
        )
        (self._theirs / "old_thing.py").write_text(textwrap.dedent(text))

    def write_ours(self, text: str) -> None:
        (self.source / "new_thing" / "__init__.py").write_text(
            '__version__ = "1.0.0"\n' + textwrap.dedent(text)
        )

    def write(self, name: str, text: str) -> None:
        """A file of the benchmarks folder."""
        (self.benchmarks / name).write_text(textwrap.dedent(text))

    def arguments(self, *more: str, reference: bool = True) -> list[str]:
        theirs = ["--reference-python", str(self.python)] if reference else []
        return ["new-thing", "--root", str(self.root), *theirs, *more]


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compared:
    made = Compared(tmp_path / "repository")
    monkeypatch.setenv("PYTHONPATH", str(made.source))
    # Cases are loaded in this process, too, and add the folders where they lie.
    monkeypatch.setattr(sys, "path", [*sys.path])
    return made
