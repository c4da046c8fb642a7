"""parity.py finds every planted difference, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
import torch

import parity
from parity_worker import _default, _ks_distance, _largest_error, _undecorated
from workers import Worker

if TYPE_CHECKING:
    from conftest import Compared

THEIRS = """
    import torch
    from torch import nn

    class Thing(nn.Module):
        def __init__(self, dim, *, scale=1.0, **kwargs):
            super().__init__()
            self.inner = nn.Linear(dim, dim)
            self.scale = scale

        def forward(self, x, mask=None):
            out = self.inner(x) * self.scale
            return out if mask is None else out * mask[..., None]
"""
# The weight under another name, in two parts, with a hook that knows the reference's name.
OURS = """
    import os, time
    import torch
    from torch import nn

    class Thing(nn.Module):
        def __init__(self, dim, *, scale=1.0, legacy=False, fault=None):
            super().__init__()
            linear = nn.Linear(dim, dim)
            if fault == "initial":
                linear.weight.data *= 1.1
            self.upper = nn.Parameter(linear.weight[: dim // 2].detach().clone())
            self.lower = nn.Parameter(linear.weight[dim // 2 :].detach().clone())
            self.bias = linear.bias
            if fault == "size":
                self.more = nn.Parameter(torch.zeros(1))
            self.scale = scale
            self.fault = fault
            self.register_load_state_dict_pre_hook(translate)

        def forward(self, x, mask=None):
            weight = torch.cat((self.upper, self.lower))
            if self.fault == "weight gradient":
                weight = torch.cat((self.upper, self.lower.detach()))
            if self.fault == "input gradient":
                x = x.detach() + 0.5 * x - 0.5 * x.detach()
            out = (x @ weight.T + self.bias) * self.scale
            if self.fault == "output":
                out = out + 1e-4
            if self.fault == "nan":
                out = torch.where(torch.arange(out.shape[-1]) == 1, torch.nan, out)
            if self.fault == "shape":
                out = out[..., :1]
            if self.fault == "crash":
                os._exit(4)
            if self.fault == "hang":
                time.sleep(1000)
            if mask is None or self.fault == "mask":
                return out
            return out * mask[..., None]

    def translate(module, state, *_):
        if module.fault == "size":
            state["more"] = torch.zeros(1)
        if "inner.weight" in state and module.fault != "keys":
            state["upper"], state["lower"] = state.pop("inner.weight").chunk(2)
            state["bias"] = state.pop("inner.bias")
            if module.fault == "swapped":
                state["upper"], state["lower"] = state["lower"], state["upper"]

    def renamed(size, *, scale=2.0, more):
        pass
"""
CASES = """
    import torch
    from functools import partial
    from parity_case import Comparison, Initial, Signature

    FAULTS = {faults!r}

    def build(fault, side, legacy, dim=6, **settings):
        if side == "reference":
            from old_thing import Thing
            return Thing(dim, scale=1.5, **settings)
        from new_thing import Thing
        return Thing(dim, scale=1.5, legacy=legacy, fault=fault, **settings)

    def inputs():
        generator = torch.Generator().manual_seed(0)
        return {{
            "x": torch.randn(2, 5, 6, generator=generator),
            "mask": torch.tensor([[True, False, True, True, True]] * 2),
        }}

    def run(module, inputs):
        out = module(**inputs)
        return {{"out": out, "largest": out.argmax(-1)}}

    COMPARISONS = [Comparison(str(f), partial(build, f), inputs, run) for f in FAULTS]
    SIGNATURES = [Signature("old_thing:Thing", "new_thing:Thing")]
    INITIAL = [
        Initial(f"drawn {{f}}", partial(build, f, dim=40)) for f in FAULTS if f in (None, "initial")
    ]
    if None not in FAULTS:
        SIGNATURES.append(Signature("old_thing:Thing", "new_thing:renamed"))
"""
CHECKS = """
    import importlib
    from types import SimpleNamespace

    def library():
        for name in ("new_thing", "old_thing"):
            try:
                return SimpleNamespace(name=name, module=importlib.import_module(name))
            except ModuleNotFoundError:
                continue

    def check_good(lib, device):
        assert lib.name == "new_thing", "as the reference is"

    def check_neither(lib, device):
        raise AssertionError("everybody")

    def check_both(lib, device):
        pass

    CHECKS = {"a good check": check_good} | (%s)
"""
FAULTY = (
    "output",
    "nan",
    "shape",
    "mask",
    "weight gradient",
    "input gradient",
    "keys",
    "swapped",
    "size",
)


def prepare(compared: Compared, faults: tuple[str | None, ...], checks: str = "{}") -> None:
    compared.share_installed()
    compared.install_reference("0.1", THEIRS)
    compared.write_ours(OURS)
    compared.write("parity_cases.py", CASES.format(faults=list(faults)))
    compared.write("../tests/defect_checks.py", CHECKS % checks)


def lines(text: str, section: str) -> dict[str, str]:
    """By the name that a line begins with, what it says of it."""
    found = {}
    for line in text.partition(f"\n{section}")[2].splitlines()[1:]:
        if not line.startswith("  "):
            break
        if not line.startswith("   "):
            name, _, outcome = line.strip().partition("  ")
            found[name] = outcome.strip()
    return found


def test_equal_packages_are_equal(compared: Compared, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(compared, (None,))
    assert parity.main(compared.arguments()) == 0
    text = capsys.readouterr().out
    assert text.startswith("ours 1.0.0 (torch ")
    assert "DIFFERS" not in text
    assert text.endswith("new-thing: no mismatches\n")
    assert "gradients" in lines(text, "outputs and gradients")["None"]
    assert lines(text, "the reference's checkpoint")["None"].startswith("loaded")
    assert lines(text, "distributions")["drawn None"].startswith("3 parameters")
    assert lines(text, "defects")["a good check"].endswith("ok")


def test_every_planted_fault_is_found(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = '{"both have it": check_neither, "nobody has it": check_both}'
    prepare(compared, (*FAULTY, "initial"), checks)
    assert parity.main(compared.arguments()) == 1
    text = capsys.readouterr().out
    numbers = lines(text, "outputs and gradients")
    for name, part in (
        ("output", "DIFFERS: outputs differ by"),
        ("nan", "DIFFERS: outputs differ by inf in out"),
        ("shape", "DIFFERS: ours: ValueError: out: shape (2, 5, 1), the reference has (2, 5, 6)"),
        ("mask", "DIFFERS: outputs differ by"),
        ("weight gradient", "DIFFERS: gradients differ by 1.0e+00 in parameter lower"),
        ("input gradient", "DIFFERS: gradients differ by 5.0e-01 in input x"),
        ("keys", "DIFFERS: ours: RuntimeError: Error(s) in loading state_dict"),
        ("swapped", "DIFFERS: outputs differ by"),
        ("size", "DIFFERS: ours: ValueError: 43 trained parameters, the reference has 42"),
        # Weights that are loaded are not those that were drawn.
        ("initial", "outputs"),
    ):
        assert part in numbers[name], numbers[name]
    assert numbers["initial"].endswith("ok")
    loads = lines(text, "the reference's checkpoint")
    assert "DIFFERS" in loads["keys"]
    assert loads["output"].endswith("ok")
    signature = lines(text, "arguments")
    assert signature["Thing"].endswith("ok")
    assert "dim is missing" in signature["renamed"]
    drawn = lines(text, "distributions")["drawn initial"]
    assert "upper has deviation" in drawn
    assert "bias" not in drawn
    defects = lines(text, "defects")
    assert defects["a good check"].endswith("ok")
    assert "ours has it: AssertionError: everybody" in defects["both have it"]
    assert "the reference passes this check" in defects["nobody has it"]
    # Nine comparisons, one checkpoint, one signature, one distribution, two checks.
    assert text.endswith("new-thing: 14 mismatches\n")


def test_a_side_that_dies_or_hangs_is_a_mismatch(
    compared: Compared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(Worker):
        def call(self, function: str, *, limit: float, **arguments: Any) -> Any:
            # However long the worker takes to start, it never answers.
            hangs = function == "compare" and arguments["name"] == "hang"
            return super().call(function, limit=0.5 if hangs else limit, **arguments)

    monkeypatch.setattr(parity, "Worker", Impatient)
    prepare(compared, ("crash", "hang", None))
    assert parity.main(compared.arguments()) == 1
    text = capsys.readouterr().out
    numbers = lines(text, "outputs and gradients")
    assert "DIFFERS: ours: ended with code 4 during compare" in numbers["crash"]
    assert "DIFFERS: ours: compare took longer than 0.5 s" in numbers["hang"]
    assert numbers["None"].endswith("ok")
    assert text.endswith("new-thing: 2 mismatches\n")


def test_what_cannot_be_compared_ends_with_one_line(
    compared: Compared, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert parity.main(list(arguments)) == 2
        return capsys.readouterr().err

    root = ("--root", str(compared.root))
    theirs = ("--reference-python", str(compared.python))
    assert "there is no package no-thing" in error("no-thing", *root, *theirs)
    assert "parity_cases.py" in error("new-thing", *root, *theirs)
    prepare(compared, ())
    compared.install_reference("0.2", THEIRS)
    assert "must be old-thing 0.1, its environment has 0.2" in error("new-thing", *root, *theirs)
    compared.install_reference("0.1", THEIRS)
    assert "there is nothing to compare" in error("new-thing", *root, *theirs)


def argument(name: str, kind: str = "POSITIONAL_OR_KEYWORD", default: str = "1") -> dict[str, str]:
    return {"name": name, "kind": kind, "default": default}


BASE = [argument("a", default="none, it is required"), argument("b"), argument("c", "KEYWORD_ONLY")]


@pytest.mark.parametrize(
    ("ours", "faults"),
    [
        (BASE, []),
        ([*BASE, argument("new", "KEYWORD_ONLY")], []),
        ([BASE[0], BASE[2]], ["b is missing"]),
        (
            [BASE[0], argument("b", default="2"), BASE[2]],
            ["the default of b is 2, was 1"],
        ),
        (
            [BASE[0], argument("b", "KEYWORD_ONLY"), BASE[2]],
            ["the kind of b is KEYWORD_ONLY, was POSITIONAL_OR_KEYWORD"],
        ),
        ([BASE[1], BASE[0], BASE[2]], ["the order is b, a, c, was a, b, c"]),
        ([*BASE[:2], argument("new"), BASE[2]], ["the new new can be given by position"]),
        (
            [*BASE, argument("new", "KEYWORD_ONLY", "none, it is required")],
            ["the new new is required"],
        ),
        ([*BASE, argument("rest", "VAR_KEYWORD")], ["takes any rest"]),
    ],
)
def test_signatures(ours: list[dict[str, str]], faults: list[str]) -> None:
    assert parity.signature_faults(BASE, ours) == faults


def test_where_any_keyword_was_taken_new_ones_may_be_positional() -> None:
    theirs = [*BASE, argument("rest", "VAR_KEYWORD")]
    assert parity.signature_faults(theirs, [*BASE, argument("new")]) == []
    assert parity.signature_faults(theirs, theirs) == ["takes any rest"]
    assert parity.signature_faults(theirs, theirs, any_keyword=True) == []
    assert parity.signature_faults(BASE, theirs, any_keyword=True) == ["takes any rest"]


def test_a_signature_is_found_inside_its_decorators() -> None:
    def silent(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return inner

    def honest(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return inner

    def plain(a: int, *, b: int = 1) -> None: ...

    assert _undecorated(honest(silent(plain))) is plain
    assert _undecorated(torch.no_grad()(silent(plain))) is plain
    assert _undecorated(plain) is plain
    assert _undecorated(torch.nn.Linear) is torch.nn.Linear


def test_defaults_that_are_the_same() -> None:
    assert _default({}) == _default(MappingProxyType({})) == "{}"
    assert _default(None) == "None"
    assert _default(_default) == "function _default"
    assert _default(1) != _default(1.0)


def test_errors_are_relative_to_the_largest_number() -> None:
    theirs = {"a": torch.tensor([100.0, 0.0]), "b": torch.tensor([1e-6, 0.0])}
    ours = {"a": torch.tensor([100.0, 1e-3]), "b": torch.tensor([2e-6, 0.0])}
    found = _largest_error(ours, theirs)
    assert found["where"] == "a"
    # The other is rounding noise beside it.
    assert found["error"] == pytest.approx(1e-5)
    assert _largest_error({"a": theirs["a"]}, {"a": theirs["a"]})["error"] == 0
    assert _largest_error({"i": torch.tensor(1)}, {"i": torch.tensor(2)})["error"] == math.inf
    assert _largest_error({"e": torch.zeros(0)}, {"e": torch.zeros(0)})["error"] == 0
    with pytest.raises(ValueError, match=r"ours gives \['a'\], the reference \['b'\]"):
        _largest_error({"a": theirs["a"]}, {"b": theirs["a"]})


def test_the_distance_of_two_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5000, generator=generator) for _ in range(2))
    assert _ks_distance(a, a) == 0
    assert _ks_distance(a, b) * math.sqrt(2500) < parity.FARTHEST
    assert _ks_distance(a, b * 1.1) * math.sqrt(2500) > parity.FARTHEST
    assert _ks_distance(torch.zeros(5), torch.ones(5)) == 1
