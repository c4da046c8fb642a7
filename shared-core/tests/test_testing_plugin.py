"""The pytest plugin, on this run itself and on small runs inside."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "shared_core.testing.plugin", "-p", "no:cacheprovider")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_uninitialised_floats_are_nan(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype, device=device)
    for made in (
        torch.empty(3, dtype=dtype, device=device),
        torch.empty_like(x),
        x.new_empty(3),
        torch.empty_strided((3, 2), (1, 3), dtype=dtype, device=device),
        torch.nn.Linear(2, 2).to_empty(device=device).weight,
        x.clone().resize_(1000)[3:],
    ):
        assert made.isnan().all()


def test_uninitialised_integers_are_the_largest(device: torch.device) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        made = torch.empty(3, dtype=dtype, device=device)
        assert (made == torch.iinfo(dtype).max).all()


def test_operations_without_a_deterministic_version_run(device: torch.device) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.zeros(4, device=device).put_(
            torch.tensor([1], device=device), torch.ones(1).to(device)
        )
    assert ["deterministic" in str(warning.message) for warning in caught] == [True]
    torch.zeros(4, device=device).put_(torch.tensor([1], device=device), torch.ones(1).to(device))
    torch.ones(4, 4, device=device).cumsum(0)
    torch.ones(4, 4, device=device) @ torch.ones(4, 4, device=device)


def test_other_warnings_are_still_errors(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import warnings

        def test_ours():
            warnings.warn("ours", UserWarning)
        """
    )
    result = pytester.runpytest_inprocess(*PLUGIN, "-W", "error")
    result.assert_outcomes(failed=1)


def test_threads_and_hypothesis() -> None:
    assert torch.get_num_threads() == 1
    profile = settings()
    assert profile.derandomize
    assert profile.deadline is None
    assert profile.database is None
    assert HealthCheck.too_slow in profile.suppress_health_check


seen: dict[int, list[float]] = {}


@given(st.integers(0, 3))
def test_every_example_draws_the_same_numbers(i: int) -> None:
    seen.setdefault(i, []).append(torch.rand(()).item())
    assert len({number for numbers in seen.values() for number in numbers}) == 1


def test_each_test_starts_alike(pytester: pytest.Pytester) -> None:
    """From the same seed, poisoned, whatever the test before has done."""
    pytester.makepyfile(
        """
        import random
        import pytest
        import torch

        drawn = []

        @pytest.fixture(scope="module", autouse=True)
        def wide():
            torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))
            assert torch.empty(2).isnan().all()
            return torch.rand(2), random.random()

        @pytest.mark.parametrize("i", range(3))
        def test_draw(i):
            assert torch.empty(2).isnan().all()
            drawn.append((torch.rand(3).tolist(), random.random()))
            assert drawn[0] == drawn[-1]
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = False
            assert not torch.empty(10_000).isnan().all()
        """
    )
    pytester.runpytest_inprocess(*PLUGIN, "-W", "error").assert_outcomes(passed=3)


def test_the_device_option(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import torch

        def test_device(device):
            assert device == torch.device("meta")
        """
    )
    pytester.runpytest_inprocess(*PLUGIN, "--device", "meta").assert_outcomes(passed=1)
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(failed=1)


@pytest.mark.parametrize("name", ["cuda:77", "nonsense", "cpu:x"])
def test_a_missing_device_is_an_error_and_no_skip(pytester: pytest.Pytester, name: str) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess(*PLUGIN, "--device", name)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --device {name} cannot be used: *"])


def test_slow_tests_are_deselected(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.slow
        def test_slow(): pass

        def test_quick(): pass
        """
    )
    options = (*PLUGIN, "--strict-markers")
    pytester.runpytest_inprocess(*options).assert_outcomes(passed=1, deselected=1)
    pytester.runpytest_inprocess(*options, "--slow").assert_outcomes(passed=2)
    result = pytester.runpytest_inprocess(*options, "-k", "quick", "--slow")
    result.assert_outcomes(passed=1, deselected=1)


def test_hypothesis_is_optional_and_its_own_option_wins(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile("def test_nothing(): pass")
    with monkeypatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.setitem(sys.modules, "hypothesis", None)
        result = pytester.runpytest_inprocess(*PLUGIN)
        result.assert_outcomes(passed=1)
    pytester.makepyfile(
        """
        from hypothesis import settings

        def test_profile():
            assert settings().deadline is not None
        """
    )
    try:
        result = pytester.runpytest_inprocess(*PLUGIN, "--hypothesis-profile", "default")
        result.assert_outcomes(passed=1)
    finally:
        settings.load_profile("shared_core")


def test_the_compiler_writes_no_trace(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import torch

        def test_compile(caplog):
            torch.compile(lambda x: x * 2, backend="eager")(torch.ones(2))
            assert "torch.__trace" not in caplog.text
        """
    )
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(passed=1)
