"""Hierarchical transformer memory: attention to the few relevant chunks of a huge memory."""

from htm_pytorch.model import HTMAttention as HTMAttention
from htm_pytorch.model import HTMBlock as HTMBlock
from htm_pytorch.model import SinusoidalPosition as SinusoidalPosition
from htm_pytorch.retrieval import Summary as Summary
from htm_pytorch.search import FaissSearch as FaissSearch
from htm_pytorch.search import Search as Search
from htm_pytorch.store import MemoryStore as MemoryStore

__version__ = "1.0.0"

__all__ = [
    "FaissSearch",
    "HTMAttention",
    "HTMBlock",
    "MemoryStore",
    "Search",
    "SinusoidalPosition",
    "Summary",
]
