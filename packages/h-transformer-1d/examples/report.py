"""What a trained model is worth: bits per held-out byte, a sample, a plot of the loss."""

from __future__ import annotations

import codecs
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import FILE_START, as_tensor
from torch import Tensor

from demonstration import new_figure, save_figure
from h_transformer_1d import HTransformer1D

EVALUATION_ROWS = 16
# A terminal obeys these characters; none of them is shown but the tab and the end of a line.
CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\t\n"
}


@torch.no_grad()
def bits_per_byte(predict: Callable[[Tensor], Tensor], text: bytes, context: int) -> float:
    """Mean cost of a byte of `text`, every byte counted once, the first one as 8 bits.

    Windows of `context` bytes overlap by half: all but the first ones of the text are predicted
    from at least context / 2 bytes before them.

    Args:
        predict: maps bytes (b, n) to the logits (b, n, 256) of the bytes after them.
    """
    tokens = as_tensor(text).long()
    last = len(tokens) - 1
    length = min(context, last)
    starts = torch.arange(0, max(1, last - length // 2), max(1, length // 2))
    starts = starts.clamp(max=last - length).unique()
    # Index of the last byte that the windows before have counted.
    counted = torch.cat((torch.zeros(1, dtype=torch.long), starts[:-1] + length))
    bits = 8.0
    offsets = torch.arange(length + 1)
    batches = starts.split(EVALUATION_ROWS), counted.split(EVALUATION_ROWS)
    for rows, before in zip(*batches, strict=True):
        places = rows[:, None] + offsets
        windows = tokens[places]
        logits = predict(windows[:, :-1])
        costs = F.cross_entropy(
            logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none"
        )
        new = (places[:, 1:] > before[:, None]).flatten()
        bits += costs[new].double().sum().item() / math.log(2.0)
    return bits / len(tokens)


def sample(model: HTransformer1D, prompt: bytes, length: int, seed: int) -> Iterator[str]:
    """`prompt` and text that goes on from it, as it is decoded, up to the end of a file."""
    tokens = as_tensor(FILE_START + prompt).long()[None]
    generator = torch.Generator().manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(piece: bytes, final: bool = False) -> str:
        return decoder.decode(piece, final).translate(CONTROLS)

    yield decode(prompt)
    stream = model.stream(
        tokens, length, temperature=0.7, eos_token=FILE_START[0], generator=generator
    )
    for token in stream:
        if token.item() == FILE_START[0]:
            break
        yield decode(bytes(token.tolist()))
    yield decode(b"", final=True)


def plot(
    losses: list[tuple[int, float, float]], held_out: float, others: dict[str, float], path: Path
) -> None:
    """Draws the loss over the training time, beside what the compressors reach."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    minutes = [seconds / 60 for _, seconds, _ in losses]
    axes.plot(minutes, [bits for _, _, bits in losses], color="tab:blue", alpha=0.3, lw=0.8)
    axes.plot(minutes, _smooth([bits for _, _, bits in losses]), color="tab:blue", label="training")
    axes.plot(
        minutes[-1:] or [0.0], [held_out], "o", color="tab:blue", label=f"held out {held_out:.2f}"
    )
    styles = itertools.cycle(("--", "-.", ":", (0, (1, 4))))
    for (name, bits), style in zip(others.items(), styles, strict=False):
        axes.axhline(bits, color="0.4", lw=1, ls=style, label=f"{name} {bits:.2f}")
    axes.set(xlabel="minutes of training", ylabel="bits per byte")
    lowest = min([held_out, *others.values(), *(bits for _, _, bits in losses)])
    axes.set_ylim(max(0.0, lowest - 0.2), 4.0)
    axes.legend()
    save_figure(figure, path)


def _smooth(values: list[float]) -> list[float]:
    """Running means over about a fiftieth of the values."""
    weight = min(1.0, 50 / max(1, len(values)))
    means: list[float] = []
    for value in values:
        means.append(value if not means else means[-1] + weight * (value - means[-1]))
    return means
