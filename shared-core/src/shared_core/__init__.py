"""The few helpers that at least two of the transformer-memory packages call."""

from __future__ import annotations

from . import checks
from .checkpoints import register_key_map
from .derivatives import differentiate_twice, transformed
from .generation import generate, next_token_pairs, stream
from .layers import FeedForward, eval_mode
from .positions import RelativePositionBias
from .sampling import filter_logits, sample, top_k
from .tensors import masked_mean

__version__ = "1.0.0"

__all__ = [
    "FeedForward",
    "RelativePositionBias",
    "checks",
    "differentiate_twice",
    "eval_mode",
    "filter_logits",
    "generate",
    "masked_mean",
    "next_token_pairs",
    "register_key_map",
    "sample",
    "stream",
    "top_k",
    "transformed",
]
