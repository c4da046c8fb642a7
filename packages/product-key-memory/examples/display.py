"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

from pathlib import Path

from miniatures import LESSON, Taught, Used

from demonstration import new_figure, percent, save_figure


def plot(used: dict[str, Used], taught: dict[str, Taught], path: Path) -> None:
    """Draws what each slot is used, and what is kept lesson by lesson."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    for name, use in used.items():
        share = use.mass * len(use.mass) / use.mass.sum()
        label = f"{name}: {percent(use.usage)} used, KL {use.kl:.2f}"
        left.plot(range(1, len(share) + 1), share.clamp(min=1e-3).tolist(), label=label)
    left.axhline(1.0, color="0.4", lw=1, ls="--", label="all slots alike")
    left.set(
        xlabel="slots, the most used first",
        ylabel="weight, mean = 1",
        yscale="log",
    )
    left.legend(loc="upper right")
    for name, result in taught.items():
        right.plot([100.0, *(100 * kept for kept in result.kept)], marker=".", label=name)
    right.set(xlabel=f"lessons of {LESSON} facts", ylabel="old facts kept, %", ylim=(0, 105))
    right.legend(loc="lower left")
    save_figure(figure, path)
