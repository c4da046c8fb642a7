"""One side of parity.py: python parity_worker.py ours|reference CASES DEFECT_CHECKS.

Tensors are exchanged as safetensors files in a folder that the caller names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import math
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parity_case import Comparison, Initial, Side, Tensors
from workers import load_module, serve

Named = TypeVar("Named", Comparison, Initial)


class Comparer:
    """The functions that the caller can use."""

    def __init__(self, side: Side, cases: Path, defects: Path) -> None:
        self._side = side
        self._paths = {"cases": cases, "defects": defects}
        self._modules: dict[str, ModuleType] = {}
        # The tensors are small, and threads that wait for each other cost more than they bring.
        torch.set_num_threads(1)

    def describe(self, distribution: str, import_name: str | None) -> dict[str, Any]:
        """What is installed here, and what there is to compare."""
        version = None
        if import_name is not None:
            version = getattr(importlib.import_module(import_name), "__version__", None)
        cases = self._module("cases")
        return {
            "version": version or importlib.metadata.version(distribution),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "comparisons": [
                {"name": c.name, "gradients": c.gradients, "loads": c.loads_by_default}
                for c in cases.COMPARISONS
            ],
            "signatures": [
                {"reference": s.reference, "ours": s.ours, "any_keyword": s.any_keyword}
                for s in getattr(cases, "SIGNATURES", ())
            ],
            "initial": [initial.name for initial in getattr(cases, "INITIAL", ())],
            "defects": sorted(self._module("defects").CHECKS)
            if self._paths["defects"].exists()
            else [],
        }

    def record(self, name: str, folder: str) -> None:
        """Runs a comparison on the reference's side and writes all that ours needs."""
        comparison = self._named("COMPARISONS", name)
        torch.manual_seed(0)
        module = comparison.build("reference", True)
        inputs = comparison.inputs()
        state = _state(module)
        _save(folder, "state", state)
        _save(folder, "inputs", inputs)
        inputs, outputs, cotangents = _run(comparison, module, inputs, None)
        _save(folder, "outputs", outputs)
        _save(folder, "cotangents", cotangents)
        _save(folder, "input_gradients", _input_gradients(inputs))
        gradients = {
            key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for key, parameter in module.named_parameters(remove_duplicate=False)
        }
        # Buffers stay among them: the set of names must be one that a state dict has.
        _save(folder, "gradients", {**state, **gradients})
        trained = [p for p in module.parameters() if p.requires_grad]
        _save(folder, "size", {"size": torch.tensor(sum(p.numel() for p in trained))})

    def compare(self, name: str, folder: str) -> dict[str, Any]:
        """Runs a comparison on our side; the largest errors, and where they are."""
        comparison = self._named("COMPARISONS", name)
        module = comparison.build("ours", True)
        module.load_state_dict(_load(folder, "state"))
        theirs = comparison.build("ours", True)
        theirs.load_state_dict(_load(folder, "gradients"))
        cotangents = _load(folder, "cotangents")
        inputs, outputs, _ = _run(comparison, module, _load(folder, "inputs"), cotangents)
        result = {"outputs": _largest_error(outputs, _load(folder, "outputs"))}
        if comparison.gradients:
            expected = dict(theirs.named_parameters())
            found = {
                key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for key, parameter in module.named_parameters()
            }
            found = {f"parameter {key}": gradient for key, gradient in found.items()}
            expected = {f"parameter {key}": value for key, value in expected.items()}
            found |= {f"input {k}": g for k, g in _input_gradients(inputs).items()}
            given = _load(folder, "input_gradients")
            expected |= {f"input {k}": g for k, g in given.items()}
            result["gradients"] = _largest_error(found, expected)
        size = sum(p.numel() for p in module.parameters() if p.requires_grad)
        their_size = int(_load(folder, "size")["size"])
        if size != their_size:
            raise ValueError(f"{size} trained parameters, the reference has {their_size}")
        return result

    def load_by_default(self, name: str, folder: str) -> None:
        """Loads the reference's state dict into our module without legacy=True."""
        self._named("COMPARISONS", name).build("ours", False).load_state_dict(
            _load(folder, "state")
        )

    def signature(self, name: str) -> list[dict[str, str]]:
        """Name, kind and default of every argument."""
        module_name, _, qualified = name.partition(":")
        target: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            target = getattr(target, part)
        return [
            {"name": p.name, "kind": p.kind.name, "default": _default(p.default)}
            for p in inspect.signature(_undecorated(target)).parameters.values()
        ]

    def record_initial(self, name: str, folder: str) -> None:
        """Writes the state dicts of fresh modules of the reference."""
        initial = self._named("INITIAL", name)
        for draw in range(initial.draws):
            torch.manual_seed(draw)
            _save(folder, str(draw), _state(initial.build("reference", True)))

    def compare_initial(self, name: str, folder: str) -> dict[str, dict[str, float]]:
        """For each of our parameters how far the two distributions are apart.

        "distance" is the Kolmogorov-Smirnov statistic times sqrt(size / 2), which is above 2.5 once
        in 100,000 draws from the same distribution; "ours" and "reference" are the deviations.
        """
        initial = self._named("INITIAL", name)
        ours: dict[str, list[Tensor]] = {}
        theirs: dict[str, list[Tensor]] = {}
        for draw in range(initial.draws):
            torch.manual_seed(1000 + draw)
            module = initial.build("ours", True)
            for key, parameter in module.named_parameters():
                ours.setdefault(key, []).append(parameter.detach().flatten().clone())
            module.load_state_dict(_load(folder, str(draw)))
            for key, parameter in module.named_parameters():
                theirs.setdefault(key, []).append(parameter.detach().flatten().clone())
        found = {}
        for key in ours:
            a, b = torch.cat(ours[key]).double(), torch.cat(theirs[key]).double()
            found[key] = {
                "distance": _ks_distance(a, b) * math.sqrt(len(a) / 2),
                "ours": a.std(correction=0).item(),
                "reference": b.std(correction=0).item(),
            }
        return found

    def defect(self, name: str) -> str | None:
        """Runs a check; None if it passed, else what it raised."""
        checks = self._module("defects")
        try:
            checks.CHECKS[name](checks.library(), torch.device("cpu"))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _named(self, kind: str, name: str) -> Any:
        found: Iterable[Any] = getattr(self._module("cases"), kind)
        return next(case for case in found if case.name == name)

    def _module(self, name: str) -> ModuleType:
        if name not in self._modules:
            self._modules[name] = load_module(self._paths[name])
        return self._modules[name]


def _run(
    comparison: Comparison, module: nn.Module, inputs: Tensors, cotangents: Tensors | None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The inputs as they were used, the outputs, and what the outputs were differentiated with."""
    used = {
        key: x.clone().requires_grad_(comparison.gradients and x.is_floating_point())
        for key, x in inputs.items()
    }
    torch.manual_seed(1)
    outputs = dict(comparison.run(module, used))
    if cotangents is None:
        generator = torch.Generator().manual_seed(2)
        cotangents = {
            key: torch.randn(out.shape, generator=generator).to(out.dtype)
            for key, out in outputs.items()
            if out.is_floating_point()
        }
    for key, cotangent in cotangents.items():
        # Otherwise they would be broadcast.
        _check_shape(key, outputs[key], cotangent)
    if comparison.gradients:
        total = torch.stack([(outputs[key] * w).sum() for key, w in cotangents.items()]).sum()
        total.backward()
    return used, {key: out.detach() for key, out in outputs.items()}, dict(cotangents)


def _input_gradients(inputs: Tensors) -> dict[str, Tensor]:
    return {
        key: torch.zeros_like(x) if x.grad is None else x.grad
        for key, x in inputs.items()
        if x.is_floating_point()
    }


def _largest_error(found: Tensors, expected: Tensors) -> dict[str, Any]:
    """The largest difference, relative to the largest number of its tensor, and its place.

    NaN on one side only, and other shapes or names, are errors without bound.
    """
    if set(found) != set(expected):
        raise ValueError(f"ours gives {sorted(found)}, the reference {sorted(expected)}")
    worst, place = 0.0, ""
    largest = max((x.abs().max().item() for x in expected.values() if x.numel()), default=0.0)
    for key, theirs in expected.items():
        ours = found[key]
        _check_shape(key, ours, theirs)
        if not theirs.numel():
            continue
        if theirs.is_floating_point():
            # Where all of a tensor is rounding noise beside the others, it is no scale.
            scale = max(theirs.abs().max().item(), 1e-3 * largest, 1e-30)
            error = ((ours.double() - theirs.double()).abs().max() / scale).item()
        else:
            error = 0.0 if torch.equal(ours, theirs) else math.inf
        if not error <= worst:
            worst, place = math.inf if math.isnan(error) else error, key
    return {"error": worst, "where": place}


def _check_shape(key: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{key}: shape {tuple(ours.shape)}, the reference has {tuple(theirs.shape)}"
        )


def _ks_distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of the two empirical distribution functions."""
    values = torch.cat((a, b))
    below = (
        torch.searchsorted(x.sort().values, values, right=True).double() / len(x) for x in (a, b)
    )
    first, second = below
    return (first - second).abs().max().item()


def _undecorated(target: Any) -> Any:
    """The function inside decorators, also inside those that do not say what they wrap."""
    while inspect.isfunction(target):
        target = inspect.unwrap(target)
        kinds = {p.kind for p in inspect.signature(target).parameters.values()}
        inside = [
            cell.cell_contents
            for cell in target.__closure__ or ()
            if inspect.isfunction(cell.cell_contents)
        ]
        if (
            len(inside) != 1
            or not {
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            }
            <= kinds
        ):
            break
        target = inside[0]
    return target


def _default(value: Any) -> str:
    """A default as text that two packages share."""
    if value is inspect.Parameter.empty:
        return "none, it is required"
    if inspect.isfunction(value) or inspect.isclass(value):
        return f"{type(value).__name__} {value.__name__}"
    if isinstance(value, dict | MappingProxyType):
        # A mapping that cannot be changed is the same default, without its trap.
        return repr(dict(value))
    return repr(value)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def _save(folder: str, name: str, tensors: Tensors) -> None:
    # A file holds no two tensors of the same memory.
    separate = {key: x.detach().clone().contiguous() for key, x in tensors.items()}
    save_file(separate, Path(folder) / f"{name}.safetensors")


def _load(folder: str, name: str) -> dict[str, Tensor]:
    return load_file(Path(folder) / f"{name}.safetensors")


if __name__ == "__main__":
    side, cases, defects = sys.argv[1:]
    if side not in ("ours", "reference"):
        raise SystemExit(f"no side {side!r}")
    comparer = Comparer(side, Path(cases), Path(defects))  # type: ignore[arg-type]
    serve(
        {
            name: getattr(comparer, name)
            for name in (
                "describe",
                "record",
                "compare",
                "load_by_default",
                "signature",
                "record_initial",
                "compare_initial",
                "defect",
            )
        }
    )
