"""Building a specimen: a small model with random weights in evaluation mode, and inputs that it has been run on."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests.zoo.families import FAMILIES, Specimen, classes_of, specimens
from tests.zoo.inputs import candidates
from tests.zoo.overrides import overrides_for
from tests.zoo.shrink import shrunk, sub_configs

__all__ = ["FAMILIES", "CannotBuild", "Implementation", "Specimen", "build", "find", "specimens"]

Implementation = Literal["eager", "sdpa"]
LARGEST = 110_000_000
"""Parameters of the largest model that is built."""


class CannotBuild(Exception):
    """No small model of this architecture, or none in this attention implementation, and why."""


def find(name: str) -> Specimen:
    """The specimen of an id ("causal/llama")."""
    return next(s for s in specimens() if s.id == name)


def build(
    specimen: Specimen, implementation: Implementation, *, text_only: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A model in evaluation mode and keyword inputs that its forward takes.

    Small widths first; where an architecture does not work with them, its own widths with few layers.

    Args:
        text_only: token ids and nothing else.

    Raises:
        CannotBuild: the reasons of all attempts.
    """
    _quiet()
    reasons: list[str] = []
    for widths in (True, False):
        try:
            model = _model(specimen, implementation, widths)
            for inputs in candidates(model, specimen, text_only):
                try:
                    with torch.no_grad():
                        output = model(**inputs)
                except Exception as error:
                    reasons.append(_said(error))
                    continue
                _finite(output)
                return model, inputs
        except CannotBuild as reason:
            reasons.append(str(reason))
        except Exception as error:
            reasons.append(_said(error))
    raise CannotBuild("; ".join(dict.fromkeys(reasons)) or "no inputs are known for it")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _model(specimen: Specimen, implementation: Implementation, widths: bool) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        model_class = getattr(transformers, specimen.model_class)
        if implementation == "sdpa" and not model_class._supports_sdpa:
            raise CannotBuild("it has no SDPA form")
        if model_class.forward is nn.Module.forward:
            raise CannotBuild("it has no forward of its own")
        config_class = CONFIG_MAPPING[specimen.name]
        fields = overrides_for(specimen.name)
        if "is_decoder" in getattr(config_class, "__dataclass_fields__", {}):
            fields = {"is_decoder": specimen.family == "causal"} | fields
        config = shrunk(config_class, fields, widths=widths)
        config = _without_cache(_part_for(model_class, config))
    except CannotBuild:
        raise
    except Exception as error:
        raise CannotBuild(f"no configuration: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    torch.manual_seed(0)
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in model_class._from_config(config, dtype=torch.float32).parameters())
        except Exception:
            size = 0  # some cannot be made on meta; they are made below all the same
    if size > LARGEST:
        raise CannotBuild(f"not small: {size / 1e6:.0f} million parameters with what could be shrunk")
    config._attn_implementation = implementation
    if implementation == "sdpa":
        _eager_where_there_is_nothing_else(config, vars(sys.modules[model_class.__module__]).values())
    model = model_class._from_config(config, dtype=torch.float32)
    if config._experts_implementation == "eager" and model_class._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")  # the eager loop is over the experts that are hit
    return randomized(model.float()).eval()


def _part_for(model_class: Any, config: Any) -> Any:
    """The configuration itself, or the part of it that a model's class is configured by."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in sub_configs(config).values() if isinstance(part, wanted)), config)


def _eager_where_there_is_nothing_else(config: Any, beside: Collection[Any]) -> None:
    """Parts of a model that have no SDPA form, such as a backbone of convolutions, keep the eager one.

    Their classes are those of the auto classes, and those defined ``beside`` the model's own.
    """
    import transformers

    for part in sub_configs(config).values():
        classes = [getattr(transformers, name, None) for name in classes_of(part.model_type)]
        classes += [other for other in beside if getattr(other, "config_class", None) is type(part)]
        if all(getattr(model_class, "_supports_sdpa", True) for model_class in classes):
            _eager_where_there_is_nothing_else(part, beside)
        else:
            part._attn_implementation = "eager"


def _without_cache(config: Any) -> Any:
    """Some configurations take ``use_cache`` without declaring it."""
    for part in (config, *sub_configs(config).values()):
        if getattr(part, "use_cache", False):
            part.use_cache = False
    return config


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters drawn anew: vectors (sinks, norms, biases) around what they were, matrices to keep the scale.

    Fresh models have zeros for sinks, biases and hyper-connections, under which many a mistake has no effect.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                fan_in = max(parameter[0].numel(), 1)
                parameter.copy_(noise * min(0.15, 1.2 / fan_in**0.5))
            elif parameter.is_floating_point():
                parameter.add_(0.5 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts of each token, in hash-routed layers
                experts = model.config.n_routed_experts  # type: ignore[union-attr]
                order = torch.rand(len(buffer), experts, generator=generator).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])
    return model


def _finite(output: Any) -> None:
    values = output if not isinstance(output, Mapping) else dict(output)
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.isnan().any():
            raise CannotBuild("its output is not a number with random weights")


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
