"""Encoder and decoder with a recurrent slot memory (Wu et al. 2020, arXiv 2010.06891)."""

from memformer.autoregressive_wrapper import AutoregressiveWrapper as AutoregressiveWrapper
from memformer.model import EncOnlyResults as EncOnlyResults
from memformer.model import Generated as Generated
from memformer.model import Memformer as Memformer
from memformer.model import Results as Results
from memformer.mrbp import Replay as Replay
from memformer.mrbp import memory_replay_backprop as memory_replay_backprop
from memformer.segments import Context as Context
from memformer.state import DecoderState as DecoderState
from memformer.transformer import Decoder as Decoder
from memformer.transformer import Encoder as Encoder
from memformer.transformer import TransformerWrapper as TransformerWrapper

__version__ = "1.0.0"

__all__ = [
    "AutoregressiveWrapper",
    "Context",
    "Decoder",
    "DecoderState",
    "EncOnlyResults",
    "Encoder",
    "Generated",
    "Memformer",
    "Replay",
    "Results",
    "TransformerWrapper",
    "memory_replay_backprop",
]
