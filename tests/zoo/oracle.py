"""The denominator: what attention a model computes, counted while it runs, by no rule of kreg.

An attention is one of these, each call counted once and nothing inside it again:

- ``interface``: a call of an attention function of transformers: one that is registered in ``ALL_ATTENTION_FUNCTIONS``
  or whose name says that it is its eager form (``eager_attention_forward`` and its likes).
- ``sdpa``: a call of ``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward``, or the fused forms that
  ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` take for inference.
- ``softmax``: a softmax whose result, through pointwise and layout operations, is an operand of a matrix product with
  something that depends on the input.

So these count as attention, though some would call them pooling or routing: a softmax over one key, a softmax-weighted
sum of tokens if it is written as a matrix product, experts that are mixed by one. Each is recorded with its kind,
module and shapes, to be looked at. These do not count: a softmax whose weights are multiplied and summed pointwise; one
that meets nothing but parameters and constants (a projection of probabilities: that is what talking heads do before
the values, and how a number is read off a distribution over bins).

What is computed and then not used (the last layer of a vision tower of which an earlier one is read) is told apart:
nothing that the model returns has a derivative by it. That alone is no proof, since codes and choices have no
derivative either; it is left out of the count only if an exported graph has nothing of its module left.

An indexer is a top-k of scores that derive from a matrix product of two things that depend on the input, through
pointwise operations, layouts, reductions and further such products. Routers score by a parameter and are none.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Kind = Literal["interface", "sdpa", "softmax"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """One attention that was computed.

    Attributes:
        kind: see the module's text.
        module: path of the innermost module whose forward was running.
        function: the function that was called.
        shapes: of queries, keys and values, or of the probabilities and the other operand of the product.
        softmaxes: softmaxes and fused attentions inside an ``interface`` call: none is worth a look.
        used: whether something that the model returns has a derivative by the result.
    """

    kind: Kind
    module: str
    function: str
    shapes: tuple[Shape, ...]
    softmaxes: int = 1
    used: bool = True


@dataclass(frozen=True)
class Indexer:
    """One selection of keys.

    Attributes:
        module: path of the innermost module whose forward was running.
        scores: shape of what the top-k is taken of.
        k: how many.
        relu: whether a rectifier lies between the product and the top-k.
    """

    module: str
    scores: Shape
    k: int
    relu: bool


@dataclass(frozen=True)
class Census:
    """What one forward computed."""

    attentions: tuple[Attention, ...]
    indexers: tuple[Indexer, ...]
    other_softmaxes: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def census(model: nn.Module, inputs: Mapping[str, Any]) -> Census:
    """Runs a model's forward once and counts."""
    try:
        watch, output = _watched(model, inputs, grad=True)
    except Exception:  # in-place changes that autograd refuses
        watch, output = _watched(model, inputs, grad=False)
    used = _used(output, watch.results)
    attentions = (replace(found, used=flag) for found, flag in zip(watch.attentions, used, strict=True))
    return Census(tuple(attentions), tuple(watch.indexers), len(watch.softmaxes))


def _watched(model: nn.Module, inputs: Mapping[str, Any], grad: bool) -> tuple[_Watch, Any]:
    watch = _Watch(_Path(model))
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(watch.path.followed())
        stack.enter_context(watch)
        stack.enter_context(_calls(watch))
        return watch, model(**inputs)


def _used(output: Any, results: Sequence[Any]) -> list[bool]:
    """Whether the output has a derivative by each result; yes where that cannot be told."""
    firsts = [next((leaf for leaf in tree_leaves(r) if isinstance(leaf, torch.Tensor)), None) for r in results]
    roots = [
        leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None
    ]
    asked = [i for i, first in enumerate(firsts) if first is not None and first.grad_fn is not None]
    used = [True] * len(results)
    if not roots or not asked:
        return used
    ones = [torch.ones_like(root) for root in roots]
    try:
        found = torch.autograd.grad(roots, [firsts[i] for i in asked], ones, allow_unused=True)
    except RuntimeError:
        return used
    for i, gradient in zip(asked, found, strict=True):
        used[i] = gradient is not None
    return used


def _plain(output: Any) -> Any:
    """An output and those that it holds as tuples, registered with pytree or not."""
    if isinstance(output, Mapping):
        return [_plain(value) for value in output.values()]
    return [_plain(value) for value in output] if isinstance(output, (list, tuple)) else output


def is_causal(model: nn.Module, inputs: Mapping[str, Any]) -> bool | None:
    """Whether no position depends on a later one, by changing the last token; None if there are no logits by token."""
    ids = inputs.get("input_ids")
    if ids is None or set(inputs) != {"input_ids"} or ids.dim() != 2:
        return None
    other = ids.clone()
    other[:, -1] = ids[:, 0]
    other[:, -1] += (other[:, -1] == ids[:, -1]).long()
    with torch.no_grad():
        before, after = (getattr(model(input_ids=i), "logits", None) for i in (ids, other))
    if not isinstance(before, torch.Tensor) or before.dim() != 3 or before.shape[1] != ids.shape[1]:
        return None
    return torch.allclose(before[:, :-1], after[:, :-1], rtol=1e-3, atol=1e-3)


NAMED = re.compile(r"(\w+_)?eager_(\w+_)?attention_forward(_\w+)?")
"""Names of eager forms, which models define for themselves."""

SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
FUSED = {
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}
PRODUCT = {"matmul", "bmm", "mm", "mv", "baddbmm", "addbmm", "addmm", "einsum", "tensordot", "linear", "dot", "inner"}
CONSTANT = {
    *("zeros", "ones", "full", "eye", "arange", "linspace", "logspace", "zeros_like", "ones_like", "full_like"),
    *("new_zeros", "new_ones", "new_full"),
}
"""What makes a tensor out of no tensor's values."""
TOPK = {"topk", "sort", "argsort"}
RECTIFIER = {"relu", "relu_", "clamp_min", "threshold"}
POINTWISE = {
    *("add", "sub", "rsub", "mul", "div", "true_divide", "neg", "exp", "log", "pow", "sqrt", "abs", "sigmoid", "tanh"),
    *("where", "masked_fill", "clamp", "clip", "nan_to_num", "dropout", "softplus", "gelu", "silu", "maximum"),
    *("minimum", "to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous", "detach"),
    *("copy_", "bernoulli", "round", "lerp", "addcmul", "relu", "threshold", "clamp_min", "clamp_max"),
}
LAYOUT = {
    *("view", "reshape", "view_as", "reshape_as", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim"),
    *("moveaxis", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "tile", "flip"),
    *("repeat_interleave", "split", "chunk", "unbind", "narrow", "select", "index_select", "gather", "scatter", "cat"),
    *("concat", "concatenate", "stack", "hstack", "vstack", "pad", "getitem", "roll", "broadcast_to", "index_put"),
    *("index_put_", "scatter_", "scatter_add", "scatter_add_", "tril", "triu", "as_strided", "unfold", "T", "mT"),
    *("broadcast_tensors", "take_along_dim", "masked_select", "diagonal", "split_with_sizes", "tensor_split", "index"),
}
REDUCTION = {"sum", "mean", "max", "min", "amax", "amin", "logsumexp", "cumsum", "prod"}
"""Functions by name, dunder and in-place marks taken off."""


@dataclass(frozen=True)
class _Mark:
    """What is known of a tensor.

    Attributes:
        softmaxes: those that it is a pointwise function of.
        axis: along which a softmax was taken, for its very result and pointwise functions of it.
        sums: softmaxes of which this is a sum along another axis than their own.
        product: whether it derives from a product of two things that depend on the input.
        relu: whether it was rectified since.
        fixed: whether it derives from parameters and constants alone.
    """

    softmaxes: frozenset[int] = frozenset()
    product: bool = False
    relu: bool = False
    fixed: bool = False
    axis: int | None = None
    sums: frozenset[int] = frozenset()


_NOTHING = _Mark()


@dataclass
class _Path:
    """The path of the module whose forward is running."""

    model: nn.Module
    stack: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.stack[-1] if self.stack else ""

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Keeps the path up to date for the time of a block."""
        names = {id(module): name for name, module in self.model.named_modules()}

        def enters(module: nn.Module, _: Any) -> None:
            self.stack.append(names.get(id(module), str(self)))

        def leaves(module: nn.Module, _: Any, result: Any) -> None:
            self.stack.pop()

        enter = hooks.register_module_forward_pre_hook(enters)
        leave = hooks.register_module_forward_hook(leaves, always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()


class _Watch(TorchFunctionMode):
    """Follows tensors through the calls of torch's functions, and counts."""

    def __init__(self, path: _Path) -> None:
        super().__init__()
        self.path = path
        self.attentions: list[Attention] = []
        self.results: list[Any] = []  # of the attentions, in their order
        self.indexers: list[Indexer] = []
        self.softmaxes: dict[int, Shape] = {}  # those that have met no product yet
        self.marks = WeakTensorKeyDictionary()
        self.inside: list[tuple[FrameType, Attention, int]] = []  # calls of attention functions that have not returned
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = _name(func)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in SOFTMAX or name in FUSED:
            self._attention(name, tensors, args, kwargs, result)
        elif name in PRODUCT:
            self._product(name, tensors, result)
        elif name in CONSTANT:
            self._put(result, _Mark(fixed=True))
        elif name in TOPK:
            self._topk(name, tensors, args, kwargs)
        elif name == "setitem":
            self._write(args[0], [args[0], *tensors[1:]])
        elif name in POINTWISE or name in LAYOUT or name in REDUCTION:
            self._pass(name, tensors, args, kwargs, result)
        return result

    def _mark(self, tensor: torch.Tensor) -> _Mark:
        if isinstance(tensor, nn.Parameter):
            return _Mark(fixed=True)
        return self.marks.get(tensor, _NOTHING)

    def _write(self, result: Any, sources: Iterable[torch.Tensor], without: AbstractSet[int] = frozenset()) -> None:
        """Marks a result by what it was made of."""
        marks = [self._mark(tensor) for tensor in sources]
        merged = _Mark(
            frozenset().union(*(mark.softmaxes for mark in marks)) - without,
            any(mark.product for mark in marks),
            any(mark.relu for mark in marks),
            bool(marks) and all(mark.fixed for mark in marks),
            next((mark.axis for mark in marks if mark.axis is not None), None),
            frozenset().union(*(mark.sums for mark in marks)),
        )
        self._put(result, merged)

    def _put(self, result: Any, mark: _Mark) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter) and mark != _NOTHING:
                self.marks[leaf] = mark

    def _pass(self, name: str, tensors: list[torch.Tensor], args: Any, kwargs: Any, result: Any) -> None:
        if not tensors:
            return
        first = self._mark(tensors[0])
        if name in REDUCTION:  # a sum of probabilities is no probability any more, but scores stay scores
            along = _axis(args, kwargs, tensors[0].dim())
            other = name == "sum" and first.axis is not None and along is not None and along != first.axis
            sums = first.softmaxes if other else frozenset()
            self._put(result, _Mark(product=first.product, relu=first.relu, fixed=first.fixed, sums=sums))
        elif name == "div" and len(tensors) == 2:
            self._write(result, tensors, without=first.softmaxes & self._mark(tensors[1]).sums)
        else:
            self._write(result, tensors)
        for leaf in tree_leaves(result):
            if not isinstance(leaf, torch.Tensor) or leaf not in self.marks:
                continue
            mark = self.marks[leaf]
            if name in LAYOUT and mark.axis is not None:
                self.marks[leaf] = replace(mark, axis=None)
            if name in RECTIFIER and mark.product:
                self.marks[leaf] = replace(mark, relu=True)

    def _attention(self, name: str, tensors: list[torch.Tensor], args: Any, kwargs: Any, result: Any) -> None:
        if self.inside:
            frame, attention, count = self.inside[-1]
            self.inside[-1] = (frame, attention, count + 1)
            return
        if name in FUSED:
            shapes = tuple(_shape(t) for t in tensors[:3])
            self.attentions.append(Attention("sdpa", str(self.path), name, shapes))
            self.results.append(result)
            return
        self.seen += 1
        self.softmaxes[self.seen] = _shape(tensors[0])
        axis = _axis(args, kwargs, tensors[0].dim())
        self._put(result, _Mark(softmaxes=frozenset([self.seen]), axis=axis))

    def _product(self, name: str, tensors: list[torch.Tensor], result: Any) -> None:
        marks = [self._mark(tensor) for tensor in tensors]
        moving = [tensor for tensor, mark in zip(tensors, marks, strict=True) if not mark.fixed]
        if len(moving) < 2:
            if len(moving) == 0:
                self._write(result, tensors)
            return
        for tensor, mark in zip(tensors, marks, strict=True):
            met = [index for index in mark.softmaxes if index in self.softmaxes]
            for index in met:
                others = [_shape(t) for t in moving if t is not tensor]
                probabilities = self.softmaxes.pop(index)
                self.attentions.append(Attention("softmax", str(self.path), name, (probabilities, *others)))
                self.results.append(result)
        self._put(result, _Mark(product=True, relu=any(mark.relu for mark in marks)))

    def _topk(self, name: str, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> None:
        scores = tensors[0]
        mark = self._mark(scores)
        if mark.product and not self.inside:
            k = kwargs.get("k", args[1] if name == "topk" and len(args) > 1 else scores.shape[-1])
            self.indexers.append(Indexer(str(self.path), _shape(scores), int(k), mark.relu))


def _name(func: Any) -> str:
    """A function's own name: ``__rmul__``, ``mul_`` and ``mul`` are one."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # a property, such as ``tensor.T``
        return getattr(getattr(func, "__self__", None), "__name__", "")
    bare = name.strip("_") if name.startswith("__") else name
    if bare.startswith("r") and bare[1:] in POINTWISE | PRODUCT:
        bare = bare[1:]
    if bare.startswith("i") and bare[1:] in POINTWISE:
        bare = bare[1:]
    if bare in {"truediv", "rtruediv", "itruediv", "floordiv"}:
        return "div"
    return bare if bare in POINTWISE | LAYOUT | FUSED | SOFTMAX else bare.rstrip("_") or bare


def _axis(args: Any, kwargs: Any, dimensions: int) -> int | None:
    """The one dimension that a call names, counted from the end."""
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(axis, (tuple, list)) and len(axis) == 1:
        axis = axis[0]
    if not isinstance(axis, int) or isinstance(axis, bool):
        return None
    return axis - dimensions if axis >= 0 else axis


def _shape(tensor: Any) -> Shape:
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()


@contextmanager
def _calls(watch: _Watch) -> Iterator[None]:
    """Sees the calls of attention functions, however a model holds them."""
    registered = _registered()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if not watch.inside and (code in registered or NAMED.fullmatch(code.co_name)):
                shapes = tuple(_shape(frame.f_locals.get(name)) for name in ("query", "key", "value"))
                found = Attention("interface", str(watch.path), code.co_name, shapes, 0)
                watch.inside.append((frame, found, 0))
        elif event == "return" and watch.inside and watch.inside[-1][0] is frame:
            _, found, count = watch.inside.pop()
            watch.attentions.append(replace(found, softmaxes=count))
            watch.results.append(argument)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def _registered() -> set[CodeType]:
    """The functions behind transformers' attention interface."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return {
        function.__code__
        for function in (ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS)
        if hasattr(function, "__code__")
    }


__all__ = ["Attention", "Census", "Indexer", "census", "is_causal"]
