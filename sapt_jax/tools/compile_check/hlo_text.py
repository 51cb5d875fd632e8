"""The text of a compiled HLO module as instructions, with the shapes, constants and device groups in it.

It is what `jax.stages.Compiled.as_text` gives on TPU, GPU and CPU.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: its size in bytes on one device, and whether it lies in the device's main memory."""

    dims: tuple[int, ...]
    bits: int
    in_hbm: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * self.bits // 8

    @property
    def traffic(self) -> int:
        """Bytes that reading or writing it moves through the main memory."""
        return self.bytes if self.in_hbm else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `text` is all that follows the opcode; `arrays` are those of its type."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """The computation that the attribute `name` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found and found[1]

    @property
    def traffic(self) -> int:
        return sum(array.traffic for array in self.arrays)


Computation = Mapping[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """{name: computation} of an HLO module, and the name of its entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)):
            instruction = _parse_instruction(found[2], line[found.end() :], bool(found[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is not that of an HLO module: it has no ENTRY computation.")
    return computations, entry


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _parse_instruction(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arrays = tuple(_parse_array(*found) for found in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape))
    inside = rest[opening + 1 : closing]
    operands = re.findall(r"%([\w.\-]+)", inside)
    text = (inside if rest.startswith(("constant", "parameter")) else "") + rest[closing + 1 :]
    return Instruction(name, arrays, rest[:opening], tuple(operands), text, is_root)


def _parse_array(kind: str, dims: str, layout: str) -> Array:
    bits = BITS.get(kind)
    if bits is None:
        bits = int(re.search(r"\d+", kind)[0])
    sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
    return Array(sizes, bits, not re.search(r"S\([1-9]", layout))


def replica_group(text: str) -> tuple[int, ...]:
    """Positions of the devices in the group of device 0, from an instruction's attributes.

    Groups are written as lists {{0,1},{2,3}}, as [2,2]<=[4] with an optional transpose T(1,0), or by mesh axes,
    mesh['a'=2,'b'=2] {'b'}.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(device) for device in found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, order, transpose = (_numbers(part) for part in found.groups())
        devices = np.arange(math.prod(order)).reshape(order)
        devices = devices.transpose(transpose) if transpose else devices
        return tuple(devices.reshape(shape)[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        return _mesh_group(sizes, re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", found[2]))
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return tuple(int(device) for device in found.groups())
    return ()


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def _mesh_group(sizes: Mapping[str, int], axes: Sequence[tuple[str, str, str]]) -> tuple[int, ...]:
    """Devices that differ from device 0 along `axes` only; an axis may be cut: (elements before it, its size)."""
    strides, stride = {}, 1
    for name, size in reversed(sizes.items()):
        strides[name], stride = stride, stride * size
    group = [0]
    for name, before, part in axes:
        size, step = sizes[name], strides[name]
        if part:
            step *= size // (int(before) * int(part))
            size = int(part)
        group = [device + index * step for device in group for index in range(size)]
    return tuple(sorted(group))
