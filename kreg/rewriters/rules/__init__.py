"""The rules, in the order they are tried: those whose results others read first, then the special before the general."""

from kreg.rewriters.rules import attention, grouped_matmul, lightning_indexer, sparse_attention
from kreg.rewriters.rules.rule import Context, Rule

RULES: list[Rule] = [lightning_indexer.RULE, sparse_attention.RULE, attention.RULE, grouped_matmul.RULE]

__all__ = ["RULES", "Context", "Rule"]
