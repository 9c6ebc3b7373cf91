"""Compiling launches ahead of time, without a GPU, and reading from the binary what it takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kreg.errors import KregError
from kreg.kernels.gpu.digest import digest
from kreg.kernels.gpu.launch import Launch
from kreg.kernels.gpu.targets import Target


class BuildError(KregError, RuntimeError):
    """A kernel that does not compile for a target, or that the target cannot hold."""


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel takes of a GPU.

    Attributes:
        target: the architecture; ``kernel``: its function; ``config``: as in the table.
        types: of what the launch's pointers point to, each once: "bf16 i64 fp32".
        digest: of everything that the compiler saw; see `kreg.kernels.gpu.digest`.
        shared_bytes: shared memory of a block, static and dynamic.
        registers: 32-bit registers of a thread.
        spilled_bytes: memory of a thread's own, which registers that did not fit are kept in.
        threads: of a block.
    """

    target: str
    kernel: str
    config: str
    types: str
    digest: str
    shared_bytes: int
    registers: int
    spilled_bytes: int
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Specialised:
    """A launch as the compiler sees it.

    Attributes:
        source: Triton's ``ASTSource``: function, types, constants, and what is known of sizes and pointers.
        options: of the back end.
        described: Triton's ``GPUTarget``.
        digest: of all this.
    """

    source: Any
    options: Any
    described: Any
    digest: str


def specialise(launch: Launch, target: Target) -> Specialised:
    """What Triton's runtime would hand its compiler for a launch on a GPU of this kind.

    Arguments are specialised as at run time: pointers and sizes that are divisible by 16 are known to be, ones are
    constants.

    Raises:
        BuildError: Triton is interpreting, or it rejects the arguments.
    """
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(launch.kernel, JITFunction):
        raise BuildError(
            f"{launch.name} was made for Triton's interpreter: start Python without TRITON_INTERPRET to compile it"
        )
    kernel: Any = launch.kernel
    described, backend, binder = _binder(kernel, target)
    given = {**launch.arguments, **launch.config.options}
    try:
        bound, specialization, options = binder(**given, debug=False)
        options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
        source = ASTSource(kernel, signature, constants, attributes)
    except Exception as error:  # Triton's own are of many kinds
        raise _rejected(launch, target, error) from error
    return Specialised(source, options, described, digest(source, options, described))


@cache
def _binder(kernel: Any, target: Target) -> tuple[Any, Any, Any]:
    """Triton's names for a target, its back end, and what takes a kernel's arguments apart for it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    described = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(described)
    return described, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def compile_for(launch: Launch, target: Target) -> Binary:
    """Compile a launch as Triton's runtime would on a GPU of this kind, and read its resources.

    Triton's own cache answers where the source is unchanged.

    Raises:
        BuildError: Triton is interpreting, or it rejects the kernel for the target.
    """
    from triton import compile

    found = specialise(launch, target)
    try:
        compiled = compile(found.source, target=found.described, options=found.options.__dict__)
    except Exception as error:
        raise _rejected(launch, target, error) from error
    types = (kind.removeprefix("*") for kind in found.source.signature.values() if kind.startswith("*"))
    read = _cuda_resources if target.backend == "cuda" else _hip_resources
    static, registers, spilled, threads = read(compiled)
    shared = max(static, compiled.metadata.shared) if target.backend == "hip" else static + compiled.metadata.shared
    return Binary(
        target.name,
        launch.name,
        str(launch.config),
        " ".join(dict.fromkeys(types)),
        found.digest,
        shared,
        registers,
        spilled,
        threads or launch.config.num_warps * target.warp_size,
    )


def _rejected(launch: Launch, target: Target, error: Exception) -> BuildError:
    reason = f"{type(error).__name__}: {error}"
    return BuildError(f"{launch.name} does not compile for {target.name} with {launch.config}: {reason}")


def misfits(binary: Binary, target: Target, spills_allowed: str = "") -> list[str]:
    """Why a binary does not fit a target: sentences, none where it does."""
    reasons = []
    what = f"{binary.kernel} on {target.name} with {binary.config}"
    if binary.shared_bytes > target.shared_bytes:
        reasons.append(f"{what}: {binary.shared_bytes:,} bytes of shared memory, at most {target.shared_bytes:,}")
    if binary.registers > target.registers:
        reasons.append(f"{what}: {binary.registers} registers a thread, at most {target.registers}")
    if binary.registers * binary.threads > target.register_file:
        reasons.append(
            f"{what}: {binary.threads} threads of {binary.registers} registers, "
            f"at most {target.register_file:,} registers a block"
        )
    if binary.spilled_bytes and not spills_allowed:
        reasons.append(f"{what}: {binary.spilled_bytes} bytes a thread are spilled, and the row does not say why")
    return reasons


def _cuda_resources(compiled: Any) -> tuple[int, int, int, int]:
    """Static shared bytes, registers, stack bytes; from the cubin, by NVIDIA's own tool, which Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout))
    if not {"REG", "STACK", "SHARED", "LOCAL"} <= found.keys():
        raise BuildError(f"cuobjdump does not say what the binary takes: {done.stdout}{done.stderr}")
    return int(found["SHARED"]), int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), 0


def _hip_resources(compiled: Any) -> tuple[int, int, int, int]:
    """LDS bytes, vector registers, scratch bytes, threads; from the assembly's metadata (LLVM, AMDGPU usage)."""
    text = compiled.asm["amdgcn"]
    names = ("group_segment_fixed_size", "vgpr_count", "private_segment_fixed_size", "max_flat_workgroup_size")
    found = {name: re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE) for name in names}
    if not all(found.values()):
        raise BuildError(f"the assembly does not say {', '.join(n for n, m in found.items() if not m)}")
    shared, registers, scratch, threads = (int(m[1]) for m in found.values() if m)
    return shared, registers, scratch, threads
