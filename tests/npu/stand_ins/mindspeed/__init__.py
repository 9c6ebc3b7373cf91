"""Stands in for MindSpeed, which is not on the package index: two functions of its 0.17 core branch, by signature.

They check what they are given and compute what the documentation says, with operations of PyTorch: on fake tensors of
any device they give shapes, on real ones numbers and gradients. `readings` holds what the documentation leaves open.
"""
