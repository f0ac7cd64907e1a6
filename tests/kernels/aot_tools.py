"""What aot_compile.py does with every kernel: compile it for Hopper without a GPU, and ask what the assembler used."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(
    kernel: Any, signature: dict[str, Any], constants: dict[str, Any], warps: int, odd: Any = ("draw",), **options: Any
) -> Any:
    """Ahead-of-time compilation; every argument is divisible by 16 but the `odd` ones, as is no float."""
    signature = signature | dict.fromkeys(constants, "constexpr")
    attributes = {}
    for i, (name, kind) in enumerate(signature.items()):
        paths = [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
        if kind not in ("constexpr", "fp32") and name not in odd and not str(kind).startswith("tensordesc"):
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": warps, "enable_fp_fusion": False} | options)


def usage(kernel: Any, *, rounds: bool = True) -> dict[str, Any]:
    """Registers, stack and local bytes a thread, fused multiply-adds; the PTX's memory and rounding instructions.

    rounds: the kernel rounds every operation; others are not disassembled, which takes longer than compiling them.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        text, code = cuobjdump("-res-usage", cubin), cuobjdump("-sass", cubin) if rounds else ""
    found = {what: int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL")}
    ptx = kernel.asm["ptx"]
    matrix = r"wgmma\.mma_async[\w.]+|cp\.async\.(?:c[ag]\.shared\.global|bulk\.tensor)"
    moving = rf"\b(?:{matrix}|[ls][dt]\.global\.[\w.]+|cvt\.rn[\w.]*16[\w.]*|(?:fma|sqrt|div)\.[\w.]+)"
    told = sorted(set(re.findall(moving, ptx)))
    fused = len(re.findall(r"\bFFMA", code))  # a correctly rounded square root has some
    target = re.search(r"\.target (\w+)", ptx)[1]
    numbers = {
        "shared": kernel.metadata.shared,
        "registers": found["REG"],
        "stack": found["STACK"],
        "local": found["LOCAL"],
        "fused": fused if rounds else None,
    }
    return {"target": target, "ptx": told} | numbers


def cuobjdump(what: str, cubin: Path) -> str:
    """Output of the tool that comes with triton."""
    return subprocess.run([BIN / "cuobjdump", what, cubin], capture_output=True, text=True, check=True).stdout
