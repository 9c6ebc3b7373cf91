"""A model as transformers' own exporter prepares it, for those that no trace holds as they are.

Vision towers that take images of any size in one row cut it by a list of lengths, which are numbers read from a tensor.
`transformers.exporters` computes such numbers beforehand, as inputs, and puts one call of
`F.scaled_dot_product_attention` over images of one size in the place of the loop over them. What is measured is then
that form, which is the one that transformers exports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def with_caches(model: nn.Module) -> nn.Module:
    """The model, after the caches that it may give back are made known to PyTorch as containers of tensors."""
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    register_cache_pytrees_for_model(model)
    return model


@contextmanager
def prepared(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs to export a model with, while its code is replaced where transformers has a replacement."""
    from transformers.exporters.exporter_dynamo import patch_forward_signature, reset_model_state
    from transformers.exporters.utils import apply_patches, prepare_for_export

    _, ready, _ = prepare_for_export(model, dict(inputs))
    with apply_patches("dynamo"), reset_model_state(model), patch_forward_signature(model, ready):
        yield dict(ready)
