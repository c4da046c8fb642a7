"""Three claims of the papers in miniature: capacity, use of the slots, forgetting.

Lample et al. 2019 (arXiv 1907.05242) for the first two, Lin et al. 2025 (arXiv 2510.15103) for the
third. Every function draws its data and weights from its seed alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from facts import (
    ANSWERS,
    FactModel,
    Facts,
    feed_forward,
    learn,
    memory,
    multiply_adds,
    optimizers_of,
    take_step,
)
from torch import Tensor, nn

from demonstration import DemoError, Tick, silent
from product_key_memory import (
    PKM,
    PKMOptimizer,
    SlotStats,
    fetch_pkm_value_parameters,
    select_slots,
    sparse_finetune,
)

LESSON = 32
# A lesson counts as learned with this share of it; who has not learned after so many steps stops.
LEARNED = 0.99
MOST_STEPS = 200
# Slots that a lesson may change, of about 1000 that it reads, and the rate (Adagrad).
CHOSEN = 512
CHOSEN_RATE = 0.5
ADAM_RATE = 3e-4


@dataclass(frozen=True)
class Stored:
    """What a layer stored.

    Attributes:
        macs: multiplications with additions of a question, without the readout's.
        parameters: of the layer.
        recalled: share of the facts.
    """

    macs: int
    parameters: int
    recalled: float


def store(
    seed: int,
    kind: str,
    *,
    facts: int = 16384,
    steps: int = 1000,
    rows: int = 1024,
    tick: Tick = silent,
) -> tuple[Stored, FactModel, Facts]:
    """Stores facts in a "memory", or in a "feed-forward" layer that costs as much.

    Returns:
        The result, the model, and the facts, which are the same for both.
    """
    generator = torch.Generator().manual_seed(seed)
    known = Facts.draw(facts, generator)
    torch.manual_seed(seed)
    layer: nn.Module = memory()
    if kind == "feed-forward":
        layer = feed_forward(multiply_adds(layer))
    model = FactModel(layer)
    rows = min(rows, facts)
    learn(model, known, steps=steps, rows=rows, generator=generator, tick=tick)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    return Stored(multiply_adds(layer), parameters, _share(model.recalls(known))), model, known


@dataclass(frozen=True)
class Used:
    """How a layer uses its slots.

    Attributes:
        usage: share of slots that were read at all.
        kl: divergence of the sums of weights from uniform, in nats.
        mass: (slots,) sums of weights, the largest first.
    """

    usage: float
    kl: float
    mass: Tensor


def usage(seed: int, query_norm: str, *, tokens: int = 32768, tick: Tick = silent) -> Used:
    """Slots of a new layer of 16,384 which tokens read that lie in a narrow cone.

    Hidden states of language models do (Ethayarajh 2019, arXiv 1909.00512): two tokens have a
    cosine of 0.86 in the mean. The variances along the axes fall as 1 / i. A batch norm has seen
    64 batches of 256 tokens before, half of which were padding.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    width, rows = 512, 1024
    draw = _cone(width, generator)
    layer = PKM(width, num_keys=128, query_norm=query_norm)
    parts = math.ceil(tokens / rows)
    stats = SlotStats(layer)
    with torch.no_grad():
        for _ in range(64 if query_norm == "batch" else 0):
            real = torch.rand(256, generator=generator) < 0.5
            layer(torch.where(real[:, None], draw(256), 0.0), input_mask=real)
        layer.eval()
        with stats:
            for part in range(parts):
                layer(draw(min(rows, tokens - part * rows)))
                tick((part + 1) / parts)
    (pool,) = stats.pools.values()
    return Used(pool.usage, pool.kl, pool.mass.sort(descending=True).values)


def _cone(width: int, generator: torch.Generator) -> Callable[[int], Tensor]:
    """Draws tokens (n, width) of unit mean variance around a point far from the origin."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    variances = 1.0 / torch.arange(1, width + 1)
    axes = basis * (variances / variances.mean()).sqrt()[:, None]
    centre = 2.5 * math.sqrt(width) * F.normalize(torch.randn(width, generator=generator), dim=0)
    return lambda n: torch.randn(n, width, generator=generator) @ axes + centre


@dataclass(frozen=True)
class Taught:
    """What a model knows after lessons.

    Attributes:
        kept: of the facts it recalled before, the share it still does, after every lesson.
        learned: of all that the lessons taught, the share it recalls in the end.
        at_once: of each lesson, the share it recalled when the lesson ended; the least.
    """

    kept: list[float]
    learned: float
    at_once: float


def lessons(known: Facts, number: int, seed: int) -> tuple[list[Facts], Facts, Facts]:
    """Lessons of 32 facts, half of them other answers to known questions.

    Returns:
        The lessons, and two halves of what is to stay: one by which a teacher may choose slots, and
        one to examine by.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(known.answers), generator=generator)
    changed = known.at(order[: number // 2])
    shift = torch.randint(1, ANSWERS, (len(changed.answers),), generator=generator)
    changed = Facts(changed.questions, (changed.answers + shift) % ANSWERS)
    new = Facts.draw(number - len(changed.answers), generator)
    mixed = torch.randperm(number, generator=generator)
    both = Facts(*(torch.cat(pair)[mixed] for pair in zip(changed, new, strict=True)))
    rest = order[number // 2 :]
    half = len(rest) // 2
    return both.batches(LESSON), known.at(rest[:half]), known.at(rest[half:])


def fine_tune_all(model: FactModel, lesson: Facts) -> None:
    """Trains every weight, with the rates it was trained with."""
    _teach(model, lesson, optimizers_of(model))


def fine_tune_by_adam(model: FactModel, lesson: Facts) -> None:
    """Trains every weight by Adam at one rate, as is usual without a memory."""
    tables, rest = fetch_pkm_value_parameters(model)
    by_adam = PKMOptimizer(tables, ADAM_RATE, rule="adam")
    _teach(model, lesson, [torch.optim.Adam(rest, ADAM_RATE), by_adam])


def fine_tune_read_slots(model: FactModel, lesson: Facts) -> None:
    """Trains all slots that a lesson reads, and nothing else."""
    stats = SlotStats(model)
    with torch.no_grad(), stats:
        model(lesson.questions)
    read = {name: pool.counts > 0 for name, pool in stats.pools.items()}
    with sparse_finetune(model, read) as session:
        _teach(model, lesson, [torch.optim.Adagrad(session.parameters(), CHOSEN_RATE)])


def slot_teacher(model: FactModel, known: Facts) -> Callable[[FactModel, Facts], None]:
    """Trains only slots that are specific to a lesson, judged by what `known` facts read."""
    background = SlotStats(model)
    model.eval()
    with torch.no_grad(), background:
        for batch in known.batches(LESSON):
            model(batch.questions)

    def teach(model: FactModel, lesson: Facts) -> None:
        stats = SlotStats(model)
        with torch.no_grad(), stats:
            model(lesson.questions)
        with sparse_finetune(model, select_slots(stats, background, CHOSEN)) as session:
            _teach(model, lesson, [torch.optim.Adagrad(session.parameters(), CHOSEN_RATE)])

    return teach


def forgetting(
    model: FactModel,
    known: Facts,
    taught: list[Facts],
    teach: Callable[[FactModel, Facts], None],
    tick: Tick = silent,
) -> Taught:
    """Teaches a copy of a model one lesson after the other, and looks at what it knows.

    Raises:
        DemoError: the model recalls nothing that it could forget.
    """
    model = copy.deepcopy(model)
    before = model.recalls(known)
    if not before.any():
        raise DemoError(f"none of {len(before):,} facts was stored: give it more steps")
    kept, at_once = [], []
    for number, lesson in enumerate(taught, 1):
        teach(model, lesson)
        at_once.append(_share(model.recalls(lesson)))
        kept.append(_share(model.recalls(known)[before]))
        tick(number / len(taught))
    learned = _share(torch.cat([model.recalls(lesson) for lesson in taught]))
    return Taught(kept, learned, min(at_once))


def _teach(model: FactModel, lesson: Facts, optimizers: list[torch.optim.Optimizer]) -> None:
    """Trains until the lesson is learned. The statistics of the batch norm stand still."""
    for _ in range(MOST_STEPS):
        if _share(model.recalls(lesson)) >= LEARNED:
            return
        take_step(model, lesson, optimizers)


def _share(recalled: Tensor) -> float:
    return recalled.double().mean().item()
