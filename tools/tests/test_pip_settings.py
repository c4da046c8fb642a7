"""Pip's configured sources reach uv."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

import pip_settings
from pip_settings import uv_variables


def test_every_source_is_translated() -> None:
    listing = "\n".join(
        [
            "global.cert='/certificates.pem'",
            "global.extra-index-url='file:///one https://two/simple'",
            "global.find-links='/wheels https://three'",
            "global.index-url='https://four/simple'",
            "global.no-index='true'",
            "global.trusted-host='five'",
            "global.timeout='60'",
        ]
    )
    assert uv_variables(listing, {}) == {
        "SSL_CERT_FILE": "/certificates.pem",
        "UV_DEFAULT_INDEX": "https://four/simple",
        "UV_FIND_LINKS": "/wheels,https://three",
        "UV_INDEX": "file:///one https://two/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INSECURE_HOST": "five",
        "UV_NO_INDEX": "1",
    }


def test_values_over_several_lines() -> None:
    listing = r"global.find-links='\n/one\n/two'"
    assert uv_variables(listing, {}) == {"UV_FIND_LINKS": "/one,/two"}


def test_pip_order_of_sections() -> None:
    listing = ":env:.find-links='/c'\nglobal.find-links='/a'\ninstall.find-links='/b'"
    assert uv_variables(listing, {}) == {"UV_FIND_LINKS": "/c"}


@pytest.mark.parametrize("listing", ["", ":env:.extra-index-url=''\n:env:.no-index=''"])
def test_nothing_configured(listing: str) -> None:
    assert uv_variables(listing, {}) == {}


def test_what_uv_was_told_already_stays() -> None:
    listing = "global.find-links='/a'\nglobal.index-url='https://b'"
    environment = {"UV_FIND_LINKS": "/mine"}
    assert uv_variables(listing, environment) == {"UV_DEFAULT_INDEX": "https://b"}


def test_a_line_that_is_no_setting() -> None:
    with pytest.raises(ValueError, match=r"no setting: global\.find-links=/a b$"):
        uv_variables("global.find-links=/a b", {})


def test_pip_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 2, "global.cert='/a'", "one\nERROR: two\n")

    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 60)

    for run, message in ((fail, "failed: ERROR: two$"), (hang, "longer than 60 s")):
        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(ValueError, match=message):
            pip_settings.read()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert pip_settings.read() == ""


def test_reads_what_pip_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text("[global]\nfind-links = /a\n    /b\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("PIP_FIND_LINKS", "/c /d")
    assert uv_variables(pip_settings.read(), {})["UV_FIND_LINKS"] == "/c,/d"
