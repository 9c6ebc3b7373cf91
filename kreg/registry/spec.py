"""`KernelSpec`: the declaration of one kernel, in Python or in YAML."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any

import torch
from packaging.requirements import InvalidRequirement, Requirement
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kreg.errors import SpecError
from kreg.registry.wording import did_you_mean, listing

DTYPES = frozenset(str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype))
"""Names of all torch dtypes."""

USUAL_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")

DEVICES = ("cpu", "cuda", "npu", "xpu", "mps", "hpu", "mtia", "xla", "meta")
"""Device types with a name of their own. "cuda" covers ROCm; "npu" is known without torch_npu."""

DEVICE_ALIASES = {"gpu": "cuda", "hip": "cuda", "rocm": "cuda", "ascend": "npu"}
"""What people call a device, and what torch calls it."""

NAME = re.compile(r"[A-Za-z]\w*\.\w[\w.-]*")
ENTRY = re.compile(r"[A-Za-z_]\w*(\.\w+)*:(\w+|<locals>|<lambda>)(\.(\w+|<locals>|<lambda>))*(#\d+)?")
MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
ARCHITECTURE = re.compile(r"sm_\d+[a-z]?\+?|[A-Za-z][\w*?\[\]-]*")
TAG = re.compile(r"\w[\w-]*")


def known_device(device: str) -> bool:
    """Whether torch, or a backend that can be installed, has a device type of this name."""
    if device in DEVICE_ALIASES:
        return False
    if device in DEVICES:
        return True
    try:
        return torch.device(device).index is None
    except RuntimeError:
        return False


def device_hint(device: str) -> str:
    """What an unknown device type was probably meant to be, and those there are."""
    alias = DEVICE_ALIASES.get(device.lower())
    hint = f" (torch calls it {alias!r})" if alias else did_you_mean(device, DEVICES)
    return f"{hint}. Known: {listing(DEVICES)}"


def _matching(pattern: re.Pattern[str], allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(allowed)
        return value

    return check


def _dtype_name(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dtype(value: str) -> str:
    if value not in DTYPES:
        same = getattr(torch, value, None)
        name = str(same).removeprefix("torch.") if isinstance(same, torch.dtype) else None
        hint = f" (write {name!r})" if name else did_you_mean(value, DTYPES)
        raise ValueError(f"the name of a torch dtype{hint}, such as {listing(USUAL_DTYPES)}")
    return value


def _device(value: str) -> str:
    if not known_device(value):
        raise ValueError(f"a device type without an index{device_hint(value)}")
    return value


def _not_empty(values: tuple[str, ...]) -> tuple[str, ...]:
    if not values:
        raise ValueError("a list of at least one")
    return values


def _requirement(value: str) -> str:
    try:
        Requirement(value)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"a requirement such as 'triton>=3.4,<4' ({reason})") from None
    return value


def _exclusion(value: str) -> str:
    if not (NAME.fullmatch(value) or (value.startswith("tag:") and TAG.fullmatch(value[4:]))):
        raise ValueError("a kernel's name such as 'provider.kernel', or 'tag:<tag>'")
    return value


KernelName = Annotated[str, AfterValidator(_matching(NAME, "'provider.kernel'"))]
Entry = Annotated[str, AfterValidator(_matching(ENTRY, "'package.module:function'"))]
Device = Annotated[str, AfterValidator(_device)]
Architecture = Annotated[
    str, AfterValidator(_matching(ARCHITECTURE, "one such as 'sm_80+', 'sm_90', 'gfx942', 'Ascend910B*'"))
]
Dtype = Annotated[str, BeforeValidator(_dtype_name), AfterValidator(_dtype)]
RequirementText = Annotated[str, AfterValidator(_requirement)]
Module = Annotated[str, AfterValidator(_matching(MODULE, "'package.module'"))]
Exclusion = Annotated[str, AfterValidator(_exclusion)]
Tag = Annotated[str, AfterValidator(_matching(TAG, "a word of letters, digits, _ and -"))]


class Cost(BaseModel):
    """Declared cost of a kernel, used where nothing has been measured.

    Attributes:
        efficiency: fraction of the device's peak that it reaches on large inputs.
        overhead_us: microseconds of a call that does no work.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    efficiency: float = Field(default=0.3, gt=0, le=1)
    overhead_us: float = Field(default=20.0, ge=0, allow_inf_nan=False)


class KernelSpec(BaseModel):
    """One way to compute an op, declared.

    Attributes:
        op: name of the op it computes.
        name: ``provider.kernel``, unique.
        provider: who makes it; the part of the name before the dot.
        summary: one line for ``kreg list``.
        entry: ``module:function`` with the op's arguments and results, imported only when it is chosen.
        backward: ``module:function`` of its gradient; without one, autograd differentiates ``entry``.
        devices: torch device types; "cuda" covers ROCm.
        architectures: conditions of which one must hold: ``sm_80+`` (that or newer), or a name with
            wildcards. None given: any.
        dtypes: dtypes of its first tensor, as torch names them.
        constraints: conditions on the op's named dimensions, attributes and ``has_<optional tensor>``, all of
            which must hold. See `kreg.registry.constraints`.
        trains: whether its gradient may be used.
        requires: packages, as pip writes them. A URL says where a package is that the index does not have.
        modules: modules of those packages that it calls, where another version or a placeholder of the same
            name would lack them. They are looked for, not imported.
        excludes: kernels, or ``tag:<tag>``, that may not be used in the same plan. It holds both ways.
        tags: words by which others can exclude it.
        deterministic: whether equal inputs give equal bits.
        cost: declared cost, for plans without measurements.
        source: paper, upstream function or documentation.

    Raises:
        SpecError: a field is unknown, missing or malformed; all of them are named.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: str = Field(min_length=1)
    name: KernelName
    provider: str = Field(min_length=1)
    summary: str = ""
    entry: Entry
    backward: Entry | None = None
    devices: Annotated[tuple[Device, ...], AfterValidator(_not_empty)]
    architectures: tuple[Architecture, ...] = ()
    dtypes: Annotated[tuple[Dtype, ...], AfterValidator(_not_empty)]
    constraints: tuple[str, ...] = ()
    trains: bool = False
    requires: tuple[RequirementText, ...] = ()
    modules: tuple[Module, ...] = ()
    excludes: tuple[Exclusion, ...] = ()
    tags: tuple[Tag, ...] = ()
    deterministic: bool = True
    cost: Cost = Cost()
    source: str = ""

    def __init__(self, /, **fields: Any) -> None:
        name = fields.get("name")
        if "provider" not in fields and isinstance(name, str):
            fields["provider"] = name.partition(".")[0]
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(_complaints(fields, error)) from None
        if self.provider != self.name.partition(".")[0]:
            raise SpecError(
                f"kernel {self.name!r}: field 'provider' is {self.provider!r}; "
                f"allowed: {self.name.partition('.')[0]!r}, the part of the name before the dot"
            )

    @staticmethod
    def read(fields: object, where: str) -> KernelSpec:
        """A spec from a mapping, such as one item of a YAML file; ``where`` names the file in errors.

        Raises:
            SpecError: it is not a mapping, or not a valid spec.
        """
        if not isinstance(fields, Mapping):
            raise SpecError(f"{where}: a spec is a mapping of fields, found {fields!r}")
        try:
            return KernelSpec(**{str(key): value for key, value in fields.items()})
        except SpecError as error:
            raise SpecError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None

    def entry_point(self) -> Callable[..., Any]:
        """The kernel's function, imported on first use.

        Raises:
            SpecError: its module cannot be imported, or has no such function.
        """
        return _resolved(self.name, self.entry)

    def backward_point(self) -> Callable[..., Any] | None:
        """The function of its gradient, imported on first use; None where it has none.

        Raises:
            SpecError: as `entry_point`.
        """
        return None if self.backward is None else _resolved(self.name, self.backward)


_FIELDS = tuple(KernelSpec.model_fields)


def _complaints(fields: Mapping[str, Any], error: ValidationError) -> str:
    """One line for each field that is wrong: kernel, field, value found, what is allowed."""
    kernel = f"kernel {fields.get('name', '(without a name)')!r}"
    lines = []
    for problem in error.errors(include_url=False):
        path, value, kind = problem["loc"], problem["input"], problem["type"]
        field = ".".join(str(part) for part in path)
        known = tuple(Cost.model_fields) if path[0] == "cost" else _FIELDS
        if kind == "extra_forbidden":
            lines.append(
                f"{kernel}: unknown field {field!r} with value {value!r}{did_you_mean(path[-1], known)}. "
                f"Fields: {listing(known)}"
            )
        elif kind == "missing":
            lines.append(f"{kernel}: field {field!r} is missing")
        else:
            allowed = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{kernel}: field {field!r} is {value!r}; allowed: {_plain(allowed)}")
    return "\n".join(lines)


def _plain(sentence: str) -> str:
    """Pydantic's "Input should be a valid tuple" as "a valid list": that is what YAML calls it."""
    return sentence.removeprefix("Input should be ").replace("tuple", "list")


# ----------------------------------------------------------------------------------------------- entry points

_given: dict[str, Callable[..., Any]] = {}
"""Functions registered as objects, by the entry that stands for them: not every function can be imported."""


def hold(function: Callable[..., Any]) -> str:
    """An entry that resolves to this very function object, importable or not."""
    base = f"{function.__module__}:{function.__qualname__}"
    entry, count = base, 1
    while _given.get(entry, function) is not function:
        count += 1
        entry = f"{base}#{count}"
    _given[entry] = function
    return entry


def _resolved(kernel: str, entry: str) -> Callable[..., Any]:
    try:
        return _given[entry] if entry in _given else _imported(entry)
    except Exception as error:  # importing runs foreign code, which may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise SpecError(f"kernel {kernel!r}: its entry {entry!r} cannot be used: {reason}") from error


@cache
def _imported(entry: str) -> Callable[..., Any]:
    module, _, path = entry.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{path} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function
