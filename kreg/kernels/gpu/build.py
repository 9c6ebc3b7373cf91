"""Compiling launches ahead of time, without a GPU, and reading from the binary what it takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kreg.errors import KregError
from kreg.kernels.gpu.launch import Launch
from kreg.kernels.gpu.targets import Target


class BuildError(KregError, RuntimeError):
    """A kernel that does not compile for a target, or that the target cannot hold."""


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel takes of a GPU.

    Attributes:
        kernel: its function; ``target``: the architecture; ``config``: as in the table; ``label``: its row there.
        types: the launch's tensors and their types, "q:bf16".
        shared_bytes: shared memory of a block, static and dynamic.
        registers: 32-bit registers of a thread.
        spilled_bytes: memory of a thread's own, which registers that did not fit are kept in.
        code_bytes: size of the binary.
        threads: of a block.
    """

    kernel: str
    target: str
    label: str
    config: str
    types: str
    shared_bytes: int
    registers: int
    spilled_bytes: int
    code_bytes: int
    threads: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compile_for(launch: Launch, target: Target) -> Binary:
    """Compile a launch as Triton's runtime would on a GPU of this kind, and read its resources.

    Arguments are specialised as at run time: pointers and sizes that are divisible by 16 are known to be, ones are
    constants. Triton's own cache answers where the source is unchanged.

    Raises:
        BuildError: Triton is interpreting, or it rejects the kernel for the target.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(launch.kernel, JITFunction):
        raise BuildError(
            f"{launch.name} was made for Triton's interpreter: start Python without TRITON_INTERPRET to compile it"
        )
    described = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(described)
    kernel: Any = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    given = {**launch.arguments, **launch.config.options}
    try:
        bound, specialization, options = binder(**given, debug=False)
        options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = compile(source, target=described, options=options.__dict__)
    except Exception as error:  # Triton's own are of many kinds
        reason = f"{type(error).__name__}: {error}"
        raise BuildError(f"{launch.name} does not compile for {target.name} with {launch.config}: {reason}") from error
    threads = launch.config.num_warps * target.warp_size
    types = " ".join(f"{n}:{t.removeprefix('*')}" for n, t in signature.items() if t.startswith("*"))
    code = compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
    read = _cuda_resources if target.backend == "cuda" else _hip_resources
    static, registers, spilled, threads_compiled = read(compiled)
    shared = max(static, compiled.metadata.shared) if target.backend == "hip" else static + compiled.metadata.shared
    return Binary(
        launch.name,
        target.name,
        launch.config.label,
        str(launch.config),
        types,
        shared,
        registers,
        spilled,
        len(code),
        threads_compiled or threads,
    )


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
