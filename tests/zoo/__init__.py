"""Small random-weight models of every architecture that transformers names, and what kreg makes of them."""
