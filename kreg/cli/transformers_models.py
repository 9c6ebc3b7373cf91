"""Models from a Hugging Face config: random weights, eager attention, nothing downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kreg.cli.models import Shape, Subject, placed
from kreg.cli.output import BadInput

SEQ_LEN = 512
"""Tokens in the example input, if nothing else is asked."""


def build(folder: Path, shape: Shape, device: str | None, *, weightless: bool) -> Subject:
    """The model that a folder's config.json describes, with token ids or an image as its input.

    Args:
        folder: holds the config.json.
        shape: of the example input.
        device: where to put it.
        weightless: shapes are enough: weights and inputs are fake tensors.

    Raises:
        BadInput: transformers is missing, or does not know the model, or it does not fit into memory.
    """
    transformers = _transformers()
    config = _config(transformers, folder)
    dtype = shape.dtype or _declared(config) or torch.float32
    with FakeTensorMode() if weightless else torch.device("meta") as without:
        model = _model(transformers, config, dtype, folder)
    inputs = example(model, shape)
    if isinstance(without, FakeTensorMode):
        return Subject(type(model).__name__, model.eval(), {k: without.from_tensor(v) for k, v in inputs.items()})
    _refuse_too_large(model, folder)
    torch.manual_seed(0)
    model = _model(transformers, config, dtype, folder)
    return placed(Subject(type(model).__name__, model.eval(), inputs), device)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise BadInput(
            'a config.json needs transformers, which is not installed: pip install "kreg[transformers]"'
        ) from None
    library: Any = transformers
    library.logging.set_verbosity_error()
    return library


def _config(transformers: Any, folder: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many types
        which = f"transformers {transformers.__version__}"
        raise BadInput(f"{str(folder / 'config.json')!r} cannot be used by {which}: {_short(error)}") from error
    for part in (config, config.get_text_config()):
        part.use_cache = False  # a cache is state, and a captured graph has none
    return config


def _model(transformers: Any, config: Any, dtype: torch.dtype, folder: Path) -> nn.Module:
    names = getattr(config, "architectures", None) or []
    known = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    options = {"attn_implementation": "eager", "dtype": dtype}
    try:
        if known is not None:
            made: nn.Module = known._from_config(config, **options)
        elif type(config) in transformers.AutoModelForCausalLM._model_mapping:
            made = transformers.AutoModelForCausalLM.from_config(config, **options)
        else:
            made = transformers.AutoModel.from_config(config, **options)
    except Exception as error:  # transformers raises many types
        raise BadInput(f"the model of {str(folder / 'config.json')!r} cannot be built: {_short(error)}") from error
    return made


def _declared(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def example(model: nn.Module, shape: Shape) -> dict[str, torch.Tensor]:
    """Inputs of the kind that a model's main input is.

    Raises:
        BadInput: it takes neither token ids nor images.
    """
    config: Any = model.config
    batch = shape.batch or (2 if shape.dynamic else 1)
    generator = torch.Generator().manual_seed(0)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        text = config.get_text_config()
        most = getattr(text, "max_position_embeddings", None) or SEQ_LEN
        tokens = torch.randint(text.vocab_size, (batch, shape.seq_len or min(SEQ_LEN, most)), generator=generator)
        decoder = {"decoder_input_ids": tokens.clone()} if getattr(config, "is_encoder_decoder", False) else {}
        return {"input_ids": tokens} | decoder
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and size:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        dtype = next(model.parameters()).dtype
        return {main: torch.randn(batch, channels, height, width, generator=generator).to(dtype)}
    raise BadInput(
        f"no example inputs are known for {type(model).__name__}, whose main input is {main!r}: write a "
        "function that returns (model, example_inputs), and give package.module:function"
    )


def _refuse_too_large(model: nn.Module, folder: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system: let it try
        return
    if needed > free:
        raise BadInput(
            f"{str(folder)!r} needs {needed / 2**30:,.1f} GiB for its weights, and {free / 2**30:,.1f} GiB "
            "are free: use --dry-run, which needs none, or a config with fewer layers"
        )


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"
