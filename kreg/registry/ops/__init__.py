"""The contracts of kreg's own ops, one file each."""

from kreg.registry.ops.attention import ATTENTION
from kreg.registry.ops.grouped_matmul import GROUPED_MATMUL
from kreg.registry.ops.lightning_indexer import LIGHTNING_INDEXER
from kreg.registry.ops.sparse_attention import SPARSE_ATTENTION

BUILTIN_OPS = (ATTENTION, SPARSE_ATTENTION, LIGHTNING_INDEXER, GROUPED_MATMUL)

__all__ = ["ATTENTION", "BUILTIN_OPS", "GROUPED_MATMUL", "LIGHTNING_INDEXER", "SPARSE_ATTENTION"]
