"""What the machine code of a compiled kernel says, without a GPU that runs it.

Triton brings the assembler and disassemblers of CUDA along; where a loop begins and ends is read
from its branches.
"""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

from triton import knobs

_OPCODE = re.compile(r"^(@!?U?P\w+ )?(\w+)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_PREDICATES = {"ISETP", "FSETP", "DSETP", "PLOP3", "P2R", "R2P", "SEL", "FSEL"}
_SPILLS = {"LDL", "STL"}
_EXCHANGES = {"SHFL", "LDS", "STS", "BAR"}


class Loop(NamedTuple):
    """An innermost loop that reads from global memory.

    Attributes:
        instructions: of a thread, once around.
        loads: how many of them load, by bytes.
        at_once: loads under way before the first of their results is used.
        predicates: those that compute a mask, or select by one.
        spills: those that move a register to memory or back.
        exchanges: those by which threads exchange values, or wait for each other.
    """

    instructions: int
    loads: dict[int, int]
    at_once: int
    predicates: int
    spills: int
    exchanges: int


class Code(NamedTuple):
    """A kernel's code. `stack` are the bytes that a thread spills; `loads` are as in a `Loop`."""

    registers: int
    stack: int
    shared: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    loops: list[Loop]


def read_code(kernel: Any) -> Code:
    """Disassemble what `warmup` returned."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    # A function of its own is the division of 64-bit integers; a kernel is the first.
    registers, stack, shared = (
        int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "SHARED")
    )
    code, labels = _parse(listing)
    return Code(
        registers,
        stack,
        shared,
        len(code),
        _accesses(code, "LDG"),
        _accesses(code, "STG"),
        _innermost(code, labels),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _parse(listing: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions, and at which of them the labels are."""
    code: list[str] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x?_?\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def _innermost(code: list[str], labels: dict[str, int]) -> list[Loop]:
    spans: list[tuple[int, int]] = []
    for end, instruction in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\S+)\)", instruction)
        if target and labels[target[1]] < end:
            begin = labels[target[1]]
            if not any(begin <= inner for inner, _ in spans):
                spans.append((begin, end + 1))
    bodies = [code[begin:end] for begin, end in spans]
    return [
        Loop(
            len(body),
            _accesses(body, "LDG"),
            _at_once(body),
            *(
                sum(_opcode(line) in opcodes for line in body)
                for opcodes in (_PREDICATES, _SPILLS, _EXCHANGES)
            ),
        )
        for body in bodies
        if _accesses(body, "LDG")
    ]


def _accesses(code: list[str], opcode: str) -> dict[int, int]:
    widths: dict[int, int] = {}
    for line in code:
        if _opcode(line) == opcode:
            parts = line.split(opcode, 1)[1].split(" ", 1)[0].split(".")
            width = next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)
            widths[width] = widths.get(width, 0) + 1
    return widths


def _at_once(body: list[str]) -> int:
    loaded: set[str] = set()
    loads = 0
    for line in body:
        if _opcode(line) == "LDG":
            first = re.search(r"\bR(\d+),", line)
            loaded |= {f"R{int(first[1]) + k}" for k in range(4)} if first else set()
            loads += 1
        elif loaded & set(re.findall(r"\bR\d+", line)):
            break
    return loads


def _opcode(instruction: str) -> str:
    match = _OPCODE.match(instruction)
    return match[2] if match else ""
