"""What a run is: the size of the model, the budget, how it learns."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from corpus import Corpus

from demonstration import DemoError
from h_transformer_1d import HTransformer1D

# Found by trying: "small" is best after 2 minutes on 2 cores, "large" after 10.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"dim": 32, "depth": 2, "dim_head": 32, "block_size": 16, "context": 64, "rows": 4},
    "small": {"dim": 128, "depth": 4, "dim_head": 64, "block_size": 32, "context": 512, "rows": 8},
    "large": {"dim": 192, "depth": 6, "dim_head": 64, "block_size": 32, "context": 512, "rows": 16},
}
LARGE_FROM_MINUTES = 5.0


@dataclass(frozen=True)
class Settings:
    """What a run is; a resumed run takes it from the checkpoint.

    Attributes:
        corpus, corpus_path: its name, and where it lies if it is not the standard library.
        text_sha256: of its text, which a resumed run must meet again.
        minutes, steps: the budget; `steps` counts where both are given.
        precision: "bf16" or "fp32".
        dim, depth, dim_head, block_size: of the model, which has one head.
        context: bytes in a window.
        rows: windows in a step, over all processes.
        muon_rate, adam_rate: learning rates at their highest.
    """

    corpus: str
    corpus_path: str | None
    text_sha256: str
    minutes: float
    steps: int | None
    seed: int
    precision: str
    dim: int
    depth: int
    dim_head: int
    block_size: int
    context: int
    rows: int
    muon_rate: float
    adam_rate: float

    @staticmethod
    def new(
        text: Corpus,
        *,
        minutes: float | None,
        steps: int | None,
        seed: int | None,
        size: str | None,
        precision: str | None,
        accelerator: str,
    ) -> Settings:
        """Settings for a new run, with defaults where there is None."""
        minutes = 2.0 if minutes is None else minutes
        if size is None:
            size = "large" if minutes >= LARGE_FROM_MINUTES else "small"
        return Settings(
            corpus=text.name,
            corpus_path=text.path,
            text_sha256=text.sha256(),
            minutes=minutes,
            steps=steps,
            seed=0 if seed is None else seed,
            precision=precision or faster_precision(accelerator),
            muon_rate=0.04,
            adam_rate=6e-3,
            **SIZES[size],
        )

    def resumed(
        self,
        text: Corpus,
        *,
        minutes: float | None,
        steps: int | None,
        seed: int | None,
        size: str | None,
        precision: str | None,
    ) -> Settings:
        """The same run, with another budget where one is given, and the text where it lies now.

        Raises:
            DemoError: something else would be another run.
        """
        if size is not None and not SIZES[size].items() <= asdict(self).items():
            raise DemoError(f"the checkpoint's model is not {size}")
        if seed not in (None, self.seed):
            raise DemoError(f"the checkpoint's seed is {self.seed}, not {seed}")
        if precision not in (None, self.precision):
            raise DemoError(f"the checkpoint's precision is {self.precision}, not {precision}")
        if text.sha256() != self.text_sha256:
            raise DemoError(
                f"the checkpoint learned {self.corpus}, "
                + ("which has changed" if text.name == self.corpus else f"not {text.name}")
            )
        same = replace(self, corpus=text.name, corpus_path=text.path)
        if steps is not None:
            return replace(same, steps=steps)
        if minutes is not None:
            return replace(same, steps=None, minutes=minutes)
        return same

    def model(self) -> HTransformer1D:
        return HTransformer1D(
            num_tokens=256,
            dim=self.dim,
            depth=self.depth,
            max_seq_len=self.context,
            causal=True,
            heads=1,
            dim_head=self.dim_head,
            block_size=self.block_size,
            shift_tokens=True,
        )


def faster_precision(accelerator: str) -> str:
    """ "bf16" where that multiplies matrices faster: on accelerators, and on some CPUs."""
    if accelerator != "cpu":
        return "bf16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(4096, 256, dtype=dtype), torch.randn(512, 256, dtype=dtype)
        samples = []
        for _ in range(5):
            start = time.perf_counter()
            F.linear(x, weight)
            samples.append(time.perf_counter() - start)
        seconds[dtype] = min(samples)
    return "bf16" if seconds[torch.bfloat16] < 0.8 * seconds[torch.float32] else "fp32"
