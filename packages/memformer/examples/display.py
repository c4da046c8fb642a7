"""What a person sees of the demonstration, and the files it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from recall import ASKED, CHANCE, TRAINED

from demonstration import new_figure, save_figure


def plot(
    shares: Mapping[str, Mapping[int, float]],
    losses: Sequence[float],
    peaks: Mapping[str, Mapping[int, float]],
    path: Path,
) -> None:
    """Draws what is recalled by the number of segments, the loss, and what a step takes."""
    figure = new_figure(13, 4)
    left, middle, right = figure.subplots(1, 3)
    for name, found in shares.items():
        values = [100 * share for share in found.values()]
        left.plot(list(found), values, marker=".", label=name)
    left.axvline(TRAINED, color="0.4", lw=1, ls="--", label="trained up to here")
    left.axhline(100 * CHANCE, color="0.4", lw=1, ls=":", label="by chance")
    left.set(xlabel="segments", ylabel="values recalled, %", xscale="log", ylim=(0, 105))
    left.set_xticks(list(ASKED), [str(count) for count in ASKED])
    left.legend(loc="center left")
    middle.plot(range(1, len(losses) + 1), losses, lw=0.7)
    middle.set(xlabel="steps", ylabel="loss after the last segment, nats", ylim=(0, None))
    for way, label in (("bptt", "all segments at once"), ("replay", "replay")):
        if way in peaks:
            right.plot(list(peaks[way]), list(peaks[way].values()), marker=".", label=label)
    right.set(xlabel="segments", ylabel="memory of a training step, MiB", ylim=(0, None))
    if peaks:
        right.legend(loc="upper left")
    save_figure(figure, path)
