"""What a caller may get wrong, refused before any work with the numbers that are wrong."""

from __future__ import annotations

from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor

from shared_core.checks import check_at_least, check_choice

SCHEMES = ("sibling", "neighbor")
RESOLUTIONS = ("fine", "coarse")
IMPLEMENTATIONS = ("auto", "fused", "plain", "flex")


def check_options(block_size: int, scheme: str, query_resolution: str, causal: bool) -> None:
    """Raises ValueError for an unusable combination."""
    check_at_least(1, block_size=block_size)
    check_choice("scheme", scheme, SCHEMES)
    check_choice("query_resolution", query_resolution, RESOLUTIONS)
    if scheme == "neighbor" and block_size % 2:
        raise ValueError(f"scheme 'neighbor' needs an even block_size, got {block_size}")
    if causal and query_resolution == "coarse":
        raise ValueError(
            "query_resolution 'coarse' cannot be causal: a mean query would see later queries"
        )


def check_angles(angles: Tensor, n: int, dim_head: int) -> None:
    """Raises ValueError unless `angles` is (n, r) with r <= dim_head."""
    if angles.dim() != 2 or angles.shape[0] != n or angles.shape[1] > dim_head:
        raise ValueError(
            f"angles must be ({n}, r) with r <= dim_head={dim_head}, got {tuple(angles.shape)}"
        )


def check_rotary(pos_emb: RotaryEmbedding | None, dim_head: int, legacy: bool) -> None:
    if pos_emb is None:
        return
    if not isinstance(pos_emb, RotaryEmbedding):
        raise TypeError(f"pos_emb must be a RotaryEmbedding, got {type(pos_emb).__name__}")
    rotated = 2 * pos_emb.freqs.numel()
    if rotated > dim_head:
        raise ValueError(f"pos_emb rotates {rotated} features, dim_head is {dim_head}")
    if pos_emb.use_xpos and not legacy:
        raise ValueError("pos_emb with use_xpos=True scales keys by length, which is not supported")
