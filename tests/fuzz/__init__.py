"""No wrong rewrite: random attention-like and indexer-like programs, bent and broken, judged against themselves.

    python -m tests.fuzz --examples 10000      the long run
    pytest tests/fuzz                          300 of them

A program is data (`forms`), drawn by hypothesis (`strategies`), made into a module that computes it in plain PyTorch
(`attention`, `indexer`), bent by what a table says (`twists`), and rewritten and compared (`judge`).
"""
