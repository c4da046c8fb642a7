"""Hierarchical attention for long sequences (Zhu & Soricut 2021, arXiv 2107.11906)."""

from h_transformer_1d.attention import CausalHAttention1D as CausalHAttention1D
from h_transformer_1d.attention import HAttention1D as HAttention1D
from h_transformer_1d.autoregressive_wrapper import AutoregressiveWrapper as AutoregressiveWrapper
from h_transformer_1d.hierarchy import h_attention as h_attention
from h_transformer_1d.model import HTransformer1D as HTransformer1D
from h_transformer_1d.reversible import ReversibleSequence as ReversibleSequence
from h_transformer_1d.reversible import SequentialSequence as SequentialSequence
from h_transformer_1d.state import State as State

__version__ = "1.0.0"

__all__ = [
    "AutoregressiveWrapper",
    "CausalHAttention1D",
    "HAttention1D",
    "HTransformer1D",
    "ReversibleSequence",
    "SequentialSequence",
    "State",
    "h_attention",
]
