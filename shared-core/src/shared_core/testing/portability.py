"""Where a module can go: other processes, devices, dtypes, files, the hub."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .trees import assert_close, fresh_leaves, map_tensors, random_sum, tensors, to_float


def assert_portable(
    build: Callable[[], nn.Module],
    inputs: Sequence[Any],
    device: torch.device | str = "cpu",
    *,
    half_error: float = 0.1,
) -> None:
    """A module survives all that people do with modules.

    Deep copy, pickling, initialisation on the meta device, safetensors, float64, bfloat16, bfloat16
    autocast, activation checkpointing: outputs stay equal, or close and finite where the dtype
    changes, and gradients reach the same parameters.

    Args:
        build: makes the module on the default device, in float32, without active dropout.
        inputs: positional arguments.
        device: where to run.
        half_error: how far outputs in bfloat16 may be off, relative to their norm.

    Raises:
        AssertionError: names the way that failed; what a way raises itself is not caught.
    """
    device = torch.device(device)
    module = build().to(device)
    given = map_tensors(lambda x: x.to(device), tuple(inputs))
    with torch.no_grad():
        expected = module(*given)
    weights = module.state_dict()

    with torch.device("meta"):
        blank = build()
    if any(x.device.type != "meta" for x in blank.state_dict().values()):
        raise AssertionError("meta device: a parameter or buffer was made elsewhere")
    blank.to_empty(device=device)
    blank.load_state_dict(weights)
    loaded = build().to(device)
    loaded.load_state_dict(_through_safetensors(weights))
    ways = {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "meta device": blank,
        "safetensors": loaded,
    }
    with torch.no_grad():
        for way, other in ways.items():
            other.train(module.training)
            assert_close(other(*given), expected, way, atol=0.0)

    reached = _gradients(module, given, module)
    plain = _gradients(module, given, lambda *args: checkpoint(module, *args, use_reentrant=False))
    _same_names(plain, reached, "activation checkpointing")
    assert_close(plain, reached, "activation checkpointing, gradients", atol=1e-6, rtol=1e-5)

    for dtype in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(module).to(dtype)
        got = _gradients(other, to_float(given, dtype), other, outputs_in=dtype)
        _same_names(got, reached, str(dtype))
        with torch.no_grad():
            outputs = other(*to_float(given, dtype))
        if dtype == torch.float64:
            got, outputs = to_float((got, outputs), torch.float32)
            assert_close(got, reached, "float64, gradients", atol=1e-3, rtol=1e-2)
            assert_close(outputs, expected, "float64", atol=1e-4, rtol=1e-3)
        else:
            _assert_near(outputs, expected, str(dtype), half_error)

    def under_autocast(*args: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return module(*args)

    _same_names(_gradients(module, given, under_autocast), reached, "autocast")
    with torch.no_grad():
        _assert_near(under_autocast(*given), expected, "autocast", half_error)


def assert_hub_round_trip(
    cls: type[nn.Module], kwargs: Mapping[str, Any], inputs: Sequence[Any], tmp_path: Path
) -> None:
    """A plain subclass with `PyTorchModelHubMixin` saves itself and comes back equal.

    Args:
        cls: the module's class.
        kwargs: keyword arguments of its constructor, storable as JSON.
        inputs: positional arguments of its forward.
        tmp_path: an empty folder.

    Raises:
        AssertionError: the copy has other constructor arguments or other outputs.
    """
    from huggingface_hub import PyTorchModelHubMixin

    hub = type("Hub", (cls, PyTorchModelHubMixin), {})
    model: Any = hub(**kwargs)
    model.eval()
    model.save_pretrained(tmp_path)
    copied: Any = hub.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    stored = {name: copied._hub_mixin_config.get(name) for name in kwargs}
    if stored != dict(kwargs):
        raise AssertionError(f"saved {dict(kwargs)}, got back {stored}")
    with torch.no_grad():
        assert_close(copied(*inputs), model(*inputs), "hub round trip", atol=0.0)


def _through_safetensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(weights, path)
        return load_file(path)


def _gradients(
    module: nn.Module,
    inputs: tuple[Any, ...],
    run: Callable[..., Any],
    *,
    outputs_in: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The gradients of the parameters that have one; finite, as the outputs must be."""
    module.zero_grad()
    outputs = run(*fresh_leaves(inputs))
    for y in tensors(outputs):
        if y.is_floating_point() and not bool(y.isfinite().all()):
            raise AssertionError("an output is not finite")
        if outputs_in is not None and y.is_floating_point() and y.dtype != outputs_in:
            raise AssertionError(f"an output is {y.dtype}, not {outputs_in}")
    random_sum(outputs).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    for name, gradient in found.items():
        if not bool(gradient.isfinite().all()):
            raise AssertionError(f"the gradient of {name} is not finite")
    return found


def _assert_near(found: Any, expected: Any, way: str, error: float) -> None:
    """Each floating-point tensor within a relative error of its norm."""
    for x, y in zip(tensors(found), tensors(expected), strict=True):
        if y.is_floating_point() and (distance := (x.to(y) - y).norm()) > error * y.norm():
            share = float(distance / y.norm())
            raise AssertionError(f"{way}: an output is off by {share:.2g} of its norm")


def _same_names(found: dict[str, Tensor], expected: dict[str, Tensor], way: str) -> None:
    if found.keys() != expected.keys():
        names = sorted(found.keys() ^ expected.keys())
        raise AssertionError(f"{way}: gradients differ in whether they exist: {names}")
