"""The contracts of kreg's own ops, one file each."""

from kreg.registry.ops.attention import ATTENTION
from kreg.registry.ops.lightning_indexer import LIGHTNING_INDEXER
from kreg.registry.ops.sparse_attention import SPARSE_ATTENTION

BUILTIN_OPS = (ATTENTION, SPARSE_ATTENTION, LIGHTNING_INDEXER)
