"""`normal`, `wave`, `displace` and the fixture `randn`."""

from __future__ import annotations

import math

import torch

from shared_core.testing import Randn, displace, normal, wave


def test_normal_numbers_depend_on_the_seed_alone(device: torch.device) -> None:
    x = normal(2, 5000, device=device)
    assert x.shape == (2, 5000)
    assert (x.dtype, x.device.type) == (torch.float64, device.type)
    torch.manual_seed(7)
    assert torch.equal(x.cpu(), normal(2, 5000))
    assert torch.equal(x.bfloat16(), normal(2, 5000, device=device, dtype=torch.bfloat16))
    assert not (x == normal(2, 5000, device=device, seed=2)).any()
    assert abs(x.mean().item()) < 0.05
    assert abs(x.std().item() - 1.0) < 0.05


def test_the_fixture_draws_on_the_device(randn: Randn, device: torch.device) -> None:
    assert torch.equal(randn(3, seed=4), normal(3, seed=4, device=device))


def test_a_wave_needs_no_generator() -> None:
    before = torch.get_rng_state()
    x = wave((3, 4), 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (x.shape, x.dtype) == ((3, 4), torch.float64)
    assert len(x.unique()) == 12
    expected = [0.4 * math.sin(1.0), 0.4 * math.sin(1.41 + 1.0), 0.4 * math.sin(11 * 1.41 + 1.0)]
    torch.testing.assert_close(x.flatten()[[0, 1, 11]].tolist(), expected)
    assert not torch.equal(x, wave((3, 4), 2))


def test_every_trained_parameter_is_displaced() -> None:
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)).double()
        module[1].bias.requires_grad_(False)
        before = {name: x.clone() for name, x in module.named_parameters()}
        assert displace(module) is module
        moved = {name: x - before[name] for name, x in module.named_parameters()}
        assert not moved.pop("1.bias").any()
        assert all(x.all() for x in moved.values())
        made.append(moved)
    for name, x in made[0].items():
        torch.testing.assert_close(x, made[1][name], rtol=0.0, atol=1e-12)
