"""`register_key_map`: which sets of keys it translates, refuses, and leaves alone."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared_core import register_key_map
from shared_core.testing import run_ranks

RULES = (
    (r"net\.0\.(.+)", r"first.\1"),
    (r"net\.2\.(.+)", r"second.\1"),
    (r"(?:old_)?mask", None),
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 2)
        register_key_map(self, RULES)


class Parent(nn.Module):
    """Two mapped models, and a parameter whose name a rule of theirs would match."""

    def __init__(self) -> None:
        super().__init__()
        self.left = Model()
        self.right = nn.ModuleList([Model()])
        self.mask = nn.Parameter(torch.zeros(2))


def foreign(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that another implementation would give, and a buffer that is not needed here."""
    found = {
        key.replace("first.", "net.0.").replace("second.", "net.2."): x
        for key, x in weights.items()
    }
    prefixes = {key.rpartition("net.0.")[0] for key in found if "net.0." in key}
    return found | {f"{prefix}old_mask": torch.ones(1) for prefix in prefixes}


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, x in ours.state_dict().items():
        assert torch.equal(x, expected[name]), name


def test_foreign_keys_are_translated() -> None:
    source, model = Model(), Model()
    weights = foreign(source.state_dict())
    assert "net.0.weight" in weights
    before = dict(weights)
    model.load_state_dict(weights)
    assert_same(model, source)
    assert weights.keys() == before.keys()


def test_own_keys_pass_untouched() -> None:
    source, model = Model(), Model()
    model.load_state_dict(source.state_dict())
    assert_same(model, source)
    # Also where a rule matches a name of one's own.
    swap = nn.Linear(2, 2)
    register_key_map(swap, [("weight", "bias"), ("bias", "weight")])
    other = nn.Linear(2, 2)
    swap.load_state_dict(other.state_dict())
    assert_same(swap, other)


def test_own_keys_with_one_to_drop() -> None:
    source, model = Model(), Model()
    model.load_state_dict(source.state_dict() | {"mask": torch.ones(1)})
    assert_same(model, source)


def test_the_first_rule_that_matches_wins() -> None:
    model = nn.Linear(2, 2)
    register_key_map(model, [("w", "weight"), ("[wb]", "bias")])
    model.load_state_dict({"w": torch.eye(2), "b": torch.ones(2)})
    assert torch.equal(model.weight, torch.eye(2))
    assert torch.equal(model.bias, torch.ones(2))


def test_groups_that_took_no_part_are_empty() -> None:
    model = nn.Linear(2, 2)
    register_key_map(model, [(r"a\.(weight)|b\.(bias)", r"\1\2")])
    model.load_state_dict({"a.weight": torch.eye(2), "b.bias": torch.ones(2)})
    assert torch.equal(model.bias, torch.ones(2))


def test_the_whole_key_must_match() -> None:
    model = nn.Linear(2, 2)
    register_key_map(model, [("eight", "weight")])
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"weights\""):
        model.load_state_dict({"weights": torch.eye(2), "bias": torch.ones(2)})


def test_foreign_keys_that_no_rule_knows_are_left_for_strict_loading() -> None:
    source, model = Model(), Model()
    weights = source.state_dict() | {"third.weight": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"third.weight\""):
        model.load_state_dict(weights)
    assert model.load_state_dict(weights, strict=False).unexpected_keys == ["third.weight"]
    assert_same(model, source)
    part = {"first.weight": torch.ones(3, 2)}
    assert len(model.load_state_dict(part, strict=False).missing_keys) == 7
    assert (model.first.weight == 1).all()


@pytest.mark.parametrize("strict", [True, False])
def test_a_set_translated_in_part_is_refused(strict: bool) -> None:
    model = Model()
    before = copy.deepcopy(model)
    weights = foreign(Model().state_dict())

    missing = {key: x for key, x in weights.items() if not key.startswith("net.2")}
    message = (
        "Model cannot translate 8 keys below '' to its own 9 names: "
        "2 missing ['second.weight', 'second.bias'], 0 unexpected [], 0 under two names []"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_state_dict(missing, strict=strict)

    unexpected = weights | {f"net.3.{i}": torch.ones(1) for i in range(4)}
    message = "0 missing [], 4 unexpected ['net.3.0', 'net.3.1', 'net.3.2'], 0 under two names []"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_state_dict(unexpected, strict=strict)

    both = weights | {"first.weight": torch.ones(3, 2)}
    message = "0 missing [], 0 unexpected [], 1 under two names ['first.weight']"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_state_dict(both, strict=strict)
    assert_same(model, before)


def test_nested_in_parents() -> None:
    source, model = Parent(), Parent()
    nn.init.normal_(source.mask)
    weights = foreign(source.state_dict())
    assert "right.0.net.2.bias" in weights
    assert "right.0.old_mask" in weights
    model.load_state_dict(weights)
    assert_same(model, source)

    # One child in foreign names, the other in its own.
    model = Parent()
    own = {key: x for key, x in source.state_dict().items() if not key.startswith("left.")}
    left = {key: x for key, x in weights.items() if key.startswith("left.")}
    model.load_state_dict(own | left)
    assert_same(model, source)

    with pytest.raises(ValueError, match=r"below 'left\.' to its own 9 names: 0 missing"):
        model.load_state_dict(weights | {"left.other": torch.ones(1)})


def test_maps_on_parent_and_child() -> None:
    """The parent's map runs first, over the keys of its children too."""
    model = nn.Sequential(Model())
    register_key_map(model, [(r"child\.(.+)", r"0.\1")])
    source = Model()
    model.load_state_dict({f"child.{key}": x for key, x in source.state_dict().items()})
    assert_same(model[0], source)
    model.load_state_dict({f"0.{key}": x for key, x in foreign(source.state_dict()).items()})
    assert_same(model[0], source)


def test_copies_have_the_map() -> None:
    source = Model()
    weights = foreign(source.state_dict())
    stored = io.BytesIO()
    torch.save(Model(), stored)
    stored.seek(0)
    for model in (
        copy.deepcopy(Model()),
        pickle.loads(pickle.dumps(Model())),
        torch.load(stored, weights_only=False),
        copy.deepcopy(pickle.loads(pickle.dumps(nn.Sequential(Model()))))[0],
    ):
        model.load_state_dict(weights)
        assert_same(model, source)


def test_a_copy_looks_at_its_own_names() -> None:
    model = copy.deepcopy(Model())
    model.third = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="to its own 11 names: 2 missing"):
        model.load_state_dict(foreign(Model().state_dict()))


def test_assign_and_metadata(device: torch.device) -> None:
    source = Model().to(device)
    with torch.device("meta"):
        model = Model()
    model.load_state_dict(OrderedDict(foreign(source.state_dict())), assign=True)
    assert model.first.weight.device.type == device.type
    assert_same(model, source)


def test_in_compiled_modules() -> None:
    source, model = Model(), Model()
    compiled = torch.compile(model, backend="eager")
    compiled.load_state_dict(
        {f"_orig_mod.{key}": x for key, x in foreign(source.state_dict()).items()}
    )
    assert_same(model, source)


def load_in_ddp(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(Parent())
    model.load_state_dict({f"module.{key}": x for key, x in weights.items()})
    assert dist.get_world_size() == 1
    return model.module.state_dict()


def test_in_a_parent_wrapped_by_ddp() -> None:
    source = Parent()
    (loaded,) = run_ranks(load_in_ddp, 1, foreign(source.state_dict()))
    for name, x in source.state_dict().items():
        assert torch.equal(loaded[name], x)


def test_rules_are_checked() -> None:
    for pattern, replacement in (("(", "a"), ("a", r"\1"), ("*", None)):
        with pytest.raises(ValueError, match="cannot be in a rule: "):
            register_key_map(nn.Linear(1, 1), [(pattern, replacement)])
