"""The rules, in the order they are tried: first those whose results others read, then special before general."""

from kreg.rewriters.rules import attention, grouped_matmul, lightning_indexer, sparse_attention
from kreg.rewriters.rules.rule import Context, Rule

RULES: list[Rule] = [lightning_indexer.RULE, sparse_attention.RULE, attention.RULE, grouped_matmul.RULE]

__all__ = ["RULES", "Context", "Rule"]
