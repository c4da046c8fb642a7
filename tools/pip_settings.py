"""Pip's configured package sources, handed to uv, which does not read them itself."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Mapping

# Pip's setting, uv's variable, and what uv puts between several values.
SOURCES = (
    ("find-links", "UV_FIND_LINKS", ","),
    ("index-url", "UV_DEFAULT_INDEX", " "),
    ("extra-index-url", "UV_INDEX", " "),
    ("trusted-host", "UV_INSECURE_HOST", " "),
    ("cert", "SSL_CERT_FILE", " "),
)
# A later section wins, as in pip.
SECTIONS = ("global", "install", ":env:")


def read() -> str:
    """What `pip config list` prints; nothing where there is no pip.

    Raises ValueError where pip fails, for then its sources are not known.
    """
    if importlib.util.find_spec("pip") is None:
        return ""
    command = [sys.executable, "-m", "pip", "config", "list"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError("pip config list took longer than 60 s") from None
    if result.returncode:
        last = result.stderr.rstrip().rpartition("\n")[2]
        raise ValueError(f"pip config list failed: {last}")
    return result.stdout


def uv_variables(listing: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that give uv the sources in `listing`, as `pip config list` prints them.

    A variable that `environment` sets already is left to it. Raises ValueError for a line that pip
    does not print.
    """
    settings: dict[str, str] = {}
    sections = _parse(listing)
    for section in SECTIONS:
        settings |= sections.get(section, {})
    variables = {
        variable: separator.join(settings[setting].split())
        for setting, variable, separator in SOURCES
        if settings.get(setting)
    }
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        variables["UV_NO_INDEX"] = "1"
    if settings.get("extra-index-url"):
        # Pip compares the versions of all indexes; uv would stop at the first that has the name.
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in variables.items() if name not in environment}


def _parse(listing: str) -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    for line in listing.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            section, _, setting = key.rpartition(".")
            try:
                sections.setdefault(section, {})[setting] = str(ast.literal_eval(value))
            except (ValueError, SyntaxError):
                raise ValueError(f"pip config list has a line that is no setting: {line}") from None
    return sections
