"""The rules, in the order they are tried: first those whose results others read, then special before general."""

from kreg.rewriters.rules import (
    attention,
    block_indexer,
    grouped_matmul,
    lightning_indexer,
    selected_attention,
    sparse_attention,
)
from kreg.rewriters.rules.rule import Context, Rule

RULES: list[Rule] = [
    lightning_indexer.RULE,
    block_indexer.RULE,
    sparse_attention.RULE,
    selected_attention.RULE,
    attention.RULE,
    grouped_matmul.RULE,
]

__all__ = ["RULES", "Context", "Rule"]
