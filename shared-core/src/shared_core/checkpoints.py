"""Loading checkpoints whose parameters bear other names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn


def register_key_map(module: nn.Module, rules: Sequence[tuple[str, str | None]]) -> None:
    """Lets `module.load_state_dict`, or a parent's, accept checkpoints with foreign key names.

    A rule is a regular expression for a whole key, without the module's prefix, and its replacement
    as in `re.sub`, or None to drop the key. If a key below the prefix is not one of the module's
    own and matches a rule, every key there is translated: the first match wins, a key without one
    stays. The outcome must be exactly the module's own names. Otherwise nothing is touched, and
    foreign keys are left for strict loading to report. The module still pickles and deep-copies.

    Raises ValueError for an invalid rule; loading raises it for a set of keys that translates only
    in part, or twice to the same name.
    """
    try:
        compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
        for pattern, replacement in compiled:
            pattern.sub(replacement or "", "")
    except re.error as error:
        raise ValueError(f"{error.pattern!r} cannot be in a rule: {error}") from error
    module.register_load_state_dict_pre_hook(_KeyMap(compiled))


class _KeyMap:
    """An object and not a closure, so that the module that holds it can be pickled."""

    def __init__(self, rules: list[tuple[re.Pattern[str], str | None]]) -> None:
        self.rules: list[tuple[re.Pattern[str], str | None]] = rules

    def __call__(
        self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object
    ) -> None:
        """Renames the keys of `state_dict` below `prefix`, in place."""
        own = module.state_dict(keep_vars=True).keys()
        given = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        if not any(p.fullmatch(key) for key in given if key not in own for p, _ in self.rules):
            return
        pairs = [(self.translate(key), state_dict.pop(prefix + key)) for key in given]
        names = Counter(name for name, _ in pairs if name is not None)
        missing = [name for name in own if name not in names]
        unexpected = [name for name in names if name not in own]
        twice = [name for name, count in names.items() if count > 1]
        if missing or unexpected or twice:
            raise ValueError(
                f"{type(module).__name__} cannot translate {len(given)} keys below {prefix!r} to "
                f"its own {len(own)} names: {len(missing)} missing {missing[:3]}, {len(unexpected)}"
                f" unexpected {unexpected[:3]}, {len(twice)} under two names {twice[:3]}"
            )
        state_dict.update({f"{prefix}{name}": x for name, x in pairs if name is not None})

    def translate(self, key: str) -> str | None:
        for pattern, replacement in self.rules:
            if found := pattern.fullmatch(key):
                return None if replacement is None else found.expand(replacement)
        return key
