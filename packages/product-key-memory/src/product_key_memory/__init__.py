"""Product-key memory: layers with millions of slots (Lample et al. 2019, arXiv 1907.05242)."""

from product_key_memory.finetune import SlotDiff as SlotDiff
from product_key_memory.finetune import sparse_finetune as sparse_finetune
from product_key_memory.lookup import product_top_k as product_top_k
from product_key_memory.model import PKM as PKM
from product_key_memory.model import ProductKeyMemory as ProductKeyMemory
from product_key_memory.model import ProductKeyRouter as ProductKeyRouter
from product_key_memory.norm import MaskedBatchNorm1D as MaskedBatchNorm1D
from product_key_memory.optim import PKMOptimizer as PKMOptimizer
from product_key_memory.optim import fetch_optimizer_parameters as fetch_optimizer_parameters
from product_key_memory.optim import fetch_pkm_value_parameters as fetch_pkm_value_parameters
from product_key_memory.sharding import ColumnwiseValues as ColumnwiseValues
from product_key_memory.sharding import RowwiseValues as RowwiseValues
from product_key_memory.stats import SlotStats as SlotStats
from product_key_memory.stats import select_slots as select_slots
from product_key_memory.transformer import Transformer as Transformer
from product_key_memory.values import MemoryPool as MemoryPool

__version__ = "1.0.0"

__all__ = [
    "PKM",
    "ColumnwiseValues",
    "MaskedBatchNorm1D",
    "MemoryPool",
    "PKMOptimizer",
    "ProductKeyMemory",
    "ProductKeyRouter",
    "RowwiseValues",
    "SlotDiff",
    "SlotStats",
    "Transformer",
    "fetch_optimizer_parameters",
    "fetch_pkm_value_parameters",
    "product_top_k",
    "select_slots",
    "sparse_finetune",
]
