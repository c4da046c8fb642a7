"""A release's files: whoever installs by its lock file gets our bytes, or nothing."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from uv import find_uv_bin

from assets import make
from building import stub_wheel
from verify import check as verify

if TYPE_CHECKING:
    from conftest import Repository

PIP_QUIET = ("--no-compile", "--disable-pip-version-check", "--no-cache-dir", "--quiet")


class Index:
    """A package index and the files of releases, served on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        handler = functools.partial(Silent, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def offer(self, name: str, version: str) -> None:
        stub_wheel(self.folder / "simple" / name, name, version)


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    (tmp_path / "served").mkdir()
    served = Index(tmp_path / "served")
    yield served
    served.close()


@pytest.fixture
def lock(released: Repository, index: Index, tmp_path: Path) -> Path:
    """The lock file of a-one 1.0.0, whose files are served under its tag."""
    url = f"{index.url}/releases"
    for name, core in (("shared-core", None), ("a-one", tmp_path / "shared-core" / "files")):
        log = next(released.root.glob(f"**/{name}/CHANGELOG.md"))
        log.write_text("# Changelog\n\n## [1.0.0] - 2026-01-01\n\n- First.\n")
        files = make(released.root, f"{name}-v1.0.0", url, tmp_path / name, core)
        shutil.copytree(files[0].parent, index.folder / "releases" / f"{name}-v1.0.0")
    index.offer("torch", "2.13.0")
    return tmp_path / "a-one" / "files" / "a-one-1.0.0.lock.txt"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an empty environment."""
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    return tmp_path / "environment" / "bin" / "python"


def install(python: Path, index: Index, *arguments: str) -> subprocess.CompletedProcess[str]:
    outside = {name: text for name, text in os.environ.items() if not name.startswith("PIP_")}
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *PIP_QUIET]
    return subprocess.run(
        [*command, "--index-url", f"{index.url}/simple", *arguments],
        env=outside | {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "localhost"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def site(python: Path) -> Path:
    (found,) = python.parents[1].glob("lib/python*/site-packages")
    return found


def test_the_files_of_a_release(lock: Path, index: Index) -> None:
    files = lock.parent
    names = ["a-one-1.0.0.cdx.json", "a-one-1.0.0.lock.txt", "a_one-1.0.0-py3-none-any.whl"]
    assert sorted(path.name for path in files.iterdir()) == [
        "SHA256SUMS",
        *names,
        "a_one-1.0.0.tar.gz",
    ]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=files, check=True)
    assert (files.parent / "notes.md").read_text() == "- First.\n"
    _, ours, core = lock.read_text().splitlines()
    wheel = (files / names[2]).read_bytes()
    assert ours == (
        f"a-one @ {index.url}/releases/a-one-v1.0.0/{names[2]}"
        f"#sha256={hashlib.sha256(wheel).hexdigest()}"
    )
    folder = f"{index.url}/releases/shared-core-v1.0.0"
    assert core.startswith(f"shared-core @ {folder}/shared_core-1.0.0")


def test_a_stranger_with_a_higher_number_is_not_taken(
    lock: Path, index: Index, python: Path
) -> None:
    for name in ("a-one", "shared-core"):
        index.offer(name, "99.0")
    # As a bare name it would be.
    result = install(python, index, "--dry-run", "--report", "-", "a-one")
    assert '"version": "99.0"' in result.stdout
    result = install(python, index, "-r", str(lock))
    assert result.returncode == 0, result.stderr
    (found,) = site(python).glob("a_one-*.dist-info")
    assert found.name == "a_one-1.0.0.dist-info"
    for manifest in (lock, lock.with_name("SHA256SUMS")):
        assert list(verify(manifest, site(python))) == []


def install_by_uv(python: Path, lock: Path) -> subprocess.CompletedProcess[str]:
    outside = {name: text for name, text in os.environ.items() if not name.startswith("UV_")}
    command = [find_uv_bin(), "pip", "install", "--python", str(python), "--no-cache"]
    return subprocess.run(
        [*command, "--no-deps", "-r", str(lock)],
        env=outside | {"NO_PROXY": "localhost"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_uv_takes_the_lock_file_too(lock: Path, index: Index, python: Path) -> None:
    assert install_by_uv(python, lock).returncode == 0
    assert list(verify(lock, site(python))) == []
    # Where neither address nor hash is known, nothing is proved.
    (fault,) = verify(lock.with_name("SHA256SUMS"), site(python))
    assert fault.startswith(f"a-one 1.0.0 came from {index.url}/releases/a-one-v1.0.0/")
    text = lock.read_text()
    lock.write_text(text[:-2] + ("0" if text[-2] != "0" else "1") + "\n")
    shutil.rmtree(site(python))
    result = install_by_uv(python, lock)
    assert result.returncode != 0
    assert "Hash mismatch" in result.stderr


@pytest.mark.parametrize("name", ["a-one", "shared-core"])
def test_a_flipped_byte_is_refused(lock: Path, index: Index, python: Path, name: str) -> None:
    (wheel,) = (index.folder / "releases" / f"{name}-v1.0.0").glob("*.whl")
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    result = install(python, index, "-r", str(lock))
    assert result.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in result.stderr
    assert list(site(python).glob("*.dist-info")) == []


def test_what_is_not_as_released(lock: Path, index: Index, python: Path) -> None:
    core, ours = "shared-core is not installed", "a-one is not installed"
    assert list(verify(lock, site(python))) == [ours, core]
    index.offer("shared-core", "1.0.0")
    index.offer("a-one", "2.0.0")
    assert install(python, index, "shared-core", "a-one").returncode == 0
    core = "shared-core 1.0.0 came from an index, not from the wheel named"
    assert list(verify(lock, site(python))) == ["a-one is 2.0.0, not 1.0.0", core]
    assert install(python, index, "-r", str(lock), "--force-reinstall").returncode == 0
    assert list(verify(lock, site(python))) == []
    module = site(python) / "a_one" / "__init__.py"
    module.write_text(module.read_text() + "\n")
    (site(python) / "shared_core" / "numbers.py").unlink()
    changed = "a-one: a_one/__init__.py has been changed"
    missing = "shared-core: shared_core/numbers.py is missing"
    assert list(verify(lock, site(python))) == [changed, missing]


def test_verify_from_the_command_line(lock: Path, python: Path, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "verify.py"
    command = [sys.executable, str(script), str(lock), "--python", str(python)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == "a-one is not installed\nshared-core is not installed\n"
    empty = tmp_path / "empty.txt"
    empty.write_text("a-one==1.0.0\n")
    with pytest.raises(ValueError, match="names no wheel with its SHA-256"):
        list(verify(empty, site(python)))


@pytest.mark.parametrize(
    ("tag", "core", "message"),
    [
        ("a-one-v1.0.1", "1.0.0", "a-one-v1.0.1 is a tag of a-one 1.0.0"),
        ("c-three-v1.0.0", "1.0.0", "c-three-v1.0.0 is no tag"),
        ("a-one-v1.0.0", None, "a-one needs one wheel of shared-core in the folder of --core"),
        ("a-one-v1.0.0", "0.9", "needs shared-core>=1.0.0, which shared-core 0.9 is not"),
        ("b-two-v1.0.0", "1.0.0", "the changelog of b-two says nothing of this version"),
    ],
)
def test_what_cannot_be_released(
    lock: Path, released: Repository, tmp_path: Path, tag: str, core: str | None, message: str
) -> None:
    assert lock.exists()
    if core is not None:
        stub_wheel(tmp_path / "cores", "shared-core", core)
    with pytest.raises(ValueError, match=message):
        make(released.root, tag, "https://example.org", tmp_path / "out", tmp_path / "cores")
