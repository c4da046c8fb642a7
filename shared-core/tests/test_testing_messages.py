"""`assert_refused`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared_core.testing import assert_refused


def fails(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def test_the_error_with_all_that_it_names() -> None:
    call = fails(ValueError("heads must be at least 1, got -12 (1.5) of 3. Or 2-4"))
    assert_refused(ValueError, call)
    assert_refused(ValueError, call, "heads", "ds must", 1, -12, "(1.5)", 1.5, "of 3", 3, 2, 4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: None, "no ValueError was raised"),
        (fails(TypeError("got 12")), "TypeError instead of ValueError: got 12"),
        (fails(UnicodeError("got 12")), "UnicodeError instead of ValueError: got 12"),
        (fails(ValueError("got 2")), "'12' is not in the message: got 2"),
        (fails(ValueError("got 123")), "'12' is not in the message: got 123"),
        (fails(ValueError("got 312")), "'12' is not in the message: got 312"),
        (fails(ValueError("got -12")), "'12' is not in the message: got -12"),
        (fails(ValueError("got 1.12")), "'12' is not in the message: got 1.12"),
        (fails(ValueError("got 12.5")), "'12' is not in the message: got 12.5"),
    ],
)
def test_all_else_is_not_that_error(call: Callable[[], object], said: str) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_refused(ValueError, call, 12)
    assert str(caught.value) == said


def test_what_is_no_error_passes_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        assert_refused(ValueError, fails(KeyboardInterrupt()))
