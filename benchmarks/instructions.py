"""Counts the machine instructions per element of the Triton kernels, without a GPU.

python benchmarks/instructions.py                  # for sm_80, sm_90 and sm_100
python benchmarks/instructions.py --capability 90

Triton's own compiler makes the code and NVIDIA's disassembler, which comes with Triton, lists it. Counted
is all of the code for tiles that are whole, with the few instructions that a program needs once and those
that a rare case needs, over the elements that a thread has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flatlora_optim.kernels import jit
from flatlora_optim.kernels import triton as kernels

KERNELS = (
    "perturb", "restore", "norms", "checksum", "fill", "factors", "perturb NF4", "norms NF4", "unpack NF4",
)  # fmt: skip
"""Those of NF4 are for double quantization; W + eps goes elsewhere, without a journal."""
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
BARS = {"perturb": 90, "restore": 80}

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def compiled(kernel: str, dtype: str, capability: int, regular: bool = False) -> Any:
    """The kernel for weights of this dtype, compiled for a GPU; ``regular`` leaves out what tiles need that
    are not whole."""
    words = dict.fromkeys(("key0", "key1", "step", "replica"), "i32")
    where = {"table": "*i64", "entries": "*i32", "first": "i32", "elsewhere": "i64", "scales": "*fp32"}
    bits = tl.int32 if dtype == "fp32" else tl.int16
    journal = {
        "positions": "*i16",
        "originals": f"*i{bits.primitive_bitwidth}",
        "starts": "*i64",
        "counts": "*i32",
    }
    kernel, _, packed = kernel.partition(" ")
    sizes = {"SIZE": 64, "OUTER": 256} if packed else {"SIZE": 0, "OUTER": 0}
    flags = {"DTYPE": DTYPES[dtype], "KEEP": jit.JOURNAL, "REGULAR": regular, "TILE": kernels.TILE}
    options = kernels._EXACT | {"num_warps": kernels.WARPS}
    if kernel == "perturb":
        arguments = where | words | journal | {"control": "*i64"}
        constants = flags | sizes | {"BITS": bits, "THREADS": 32 * kernels.WARPS}
        if packed:
            constants |= dict.fromkeys((*journal, "control")) | {"KEEP": jit.NOTHING}
    elif kernel == "restore":
        arguments, constants = where | words | journal, flags
    elif kernel == "norms":
        arguments = {"table": "*i64", "entries": "*i32", "terms": "*i64", "factors": "*fp32", "out": "*fp32"}
        constants = {"DTYPE": DTYPES[dtype], "LEFT": tl.float32, "RIGHT": tl.float32, "FACTORS": tl.bfloat16}
        constants |= sizes | {"ALIGNED": bool(packed), "RANK": 16, "IS_ONE": regular, "TRANSPOSED": False}
        constants |= {"ROWS": kernels._ROWS, "COLUMNS": kernels._COLUMNS}
        options = kernels._FUSED | {"num_warps": kernels._NORM_WARPS}
    elif kernel == "checksum":
        arguments, constants = {"table": "*i64", "out": "*i64"}, {}
        options |= {"num_warps": 1}
    elif kernel == "unpack":
        arguments, constants = {"packed": "*i64", "out": f"*{dtype}", "numel": "i32"}, sizes
        constants |= {"DTYPE": DTYPES[dtype], "TILE": kernels.TILE}
    elif kernel == "factors":
        arguments = {"table": "*i64", "entries": "*i32", "scales": "*fp32"} | words
        constants = {"DTYPE": DTYPES[dtype], "TILE": kernels.TILE}
    else:
        arguments = {"out": "*fp32", "numel": "i32"} | words | {"block": "i32"}
        constants = {"TILE": kernels.TILE}
    signature = arguments | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=getattr(jit, f"{kernel}_kernel"), signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def instructions(binary: Any) -> list[str]:
    """The names of all machine instructions."""
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(disassembler), "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [name for name in _INSTRUCTION.findall(listing) if name != "NOP"]


def per_element(kernel: str, dtype: str, capability: int) -> float:
    """Instructions that a thread executes for each element of a weight."""
    elements, warps = kernels.TILE, kernels.WARPS
    if kernel.startswith("norms"):
        elements, warps = kernels._ROWS * kernels._COLUMNS, kernels._NORM_WARPS
    found = instructions(compiled(kernel, dtype, capability, regular=True))
    return len(found) * 32 * warps / elements


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    columns = {
        "perturb": "perturb, with journal",
        "restore": "restore",
        "norms": "norms at rank 16",
        "perturb NF4": "W + eps of NF4",
        "norms NF4": "norms of NF4",
    }
    print(f"| GPU | dtype | {' | '.join(columns.values())} |\n|---|---|{'---|' * len(columns)}")
    for capability in parser.parse_args().capability:
        for dtype in DTYPES:
            counts = [per_element(kernel, dtype, capability) for kernel in columns]
            print(
                f"| sm_{capability} | {dtype} | {' | '.join(f'{count:.0f}' for count in counts)} |",
                flush=True,
            )
    print(f"\nAim: at most {BARS['perturb']} in perturb and {BARS['restore']} in restore.")


if __name__ == "__main__":
    main()
