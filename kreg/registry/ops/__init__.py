"""The contracts of kreg's own ops, one file each."""

from kreg.registry.ops.attention import ATTENTION
from kreg.registry.ops.block_indexer import BLOCK_INDEXER
from kreg.registry.ops.grouped_matmul import GROUPED_MATMUL
from kreg.registry.ops.indexer_topk import INDEXER_TOPK
from kreg.registry.ops.lightning_indexer import LIGHTNING_INDEXER
from kreg.registry.ops.selected_attention import SELECTED_ATTENTION
from kreg.registry.ops.sparse_attention import SPARSE_ATTENTION
from kreg.registry.ops.sparse_mqa_sink import SPARSE_MQA_SINK

BUILTIN_OPS = (
    ATTENTION,
    SPARSE_ATTENTION,
    SELECTED_ATTENTION,
    LIGHTNING_INDEXER,
    BLOCK_INDEXER,
    GROUPED_MATMUL,
    INDEXER_TOPK,
    SPARSE_MQA_SINK,
)

__all__ = [
    "ATTENTION",
    "BLOCK_INDEXER",
    "BUILTIN_OPS",
    "GROUPED_MATMUL",
    "INDEXER_TOPK",
    "LIGHTNING_INDEXER",
    "SELECTED_ATTENTION",
    "SPARSE_ATTENTION",
    "SPARSE_MQA_SINK",
]
