"""What a caller is told who asks for something impossible."""

from __future__ import annotations

import re
from collections.abc import Callable


def assert_refused(error: type[Exception], call: Callable[[], object], *fragments: object) -> None:
    """Asserts that a call raises this very error, and that its message has all the fragments.

    A subclass would be somebody else's error that happened to come by. What begins or ends with a
    digit is not found inside of a longer number.
    """
    try:
        call()
    except Exception as raised:
        if type(raised) is not error:
            raise AssertionError(
                f"{type(raised).__name__} instead of {error.__name__}: {raised}"
            ) from raised
        message = str(raised)
    else:
        raise AssertionError(f"no {error.__name__} was raised")
    for fragment in fragments:
        words = re.escape(str(fragment))
        before = r"(?<![\d.])(?<![^\w)\]]-)" if words[0].isdigit() else ""
        after = r"(?!\.?\d)" if words[-1].isdigit() else ""
        if not re.search(before + words + after, message):
            raise AssertionError(f"{str(fragment)!r} is not in the message: {message}")
