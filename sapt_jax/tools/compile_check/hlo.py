"""What a compiled program does, read from its HLO text: matrix FLOPs, memory traffic and collectives, loops unrolled.

XLA's own `cost_analysis` counts the body of a loop once. Here every operation carries how often it runs. For what the
instructions mean see openxla.org/xla/operation_semantics.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from sapt_jax.tools.compile_check.hlo_text import Computation, Instruction, parse, replica_group

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These move no data of their own.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "add-dependency",
}
FREE_CUSTOM_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
SLICES = {"dynamic-slice", "slice", "gather"}
# Kernels of Pallas on TPU and GPU, and cuDNN's attention.
KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|__cudnn\$fmha\w*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication on one device.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: the whole array, gathered or before it is scattered: what a ring sends is (n - 1) / n of it, twice that
        for an all-reduce.
      group: positions in the mesh of the devices that the first device talks to, itself included.
      overlaps: whether other work goes on meanwhile.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    overlaps: bool

    @property
    def traffic(self) -> int:
        """Bytes that a device reads and writes for it."""
        parts = {"all-gather": len(self.group), "reduce-scatter": len(self.group)}
        return self.bytes + self.bytes // max(1, parts.get(self.kind, 1))


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something a device does `count` times in one run of the program.

    Attributes:
      name: where it comes from in the model, by JAX's name stack.
      flops: of matrix products and convolutions, two for each multiply-add, in one run of the operation.
      bytes: read from and written to the device's memory, in one run of the operation.
      overlaps: whether it is a copy beside the computation.
      cycles: the compiler's own estimate on TPU, 0 where it has none.
      unknown: whether it is a kernel of its own, such as Pallas', that does not state its FLOPs.
    """

    name: str
    opcode: str
    count: int
    flops: int
    bytes: int
    overlaps: bool
    cycles: int
    unknown: bool
    collectives: tuple[Collective, ...]


def operations(text: str, loop_trips: int = 1) -> list[Operation]:
    """Everything that one device does in one run of a compiled program.

    Args:
      text: the optimised HLO module.
      loop_trips: how often a loop runs that may end early, such as that of decoding.
    """
    computations, entry = parse(text)
    return list(_walk(computations, entry, 1, loop_trips))


def _walk(computations: Mapping[str, Computation], name: str, count: int, loop_trips: int) -> Iterator[Operation]:
    computation = computations[name]
    # A TPU spreads one asynchronous collective over several fusions, which all name its channel.
    channels: set[str] = set()
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(computations, computation, instruction)
            trips = loop_trips if trips is None else trips
            for part in ("condition", "body"):
                yield from _walk(computations, instruction.attribute(part), count * trips, loop_trips)
        elif opcode == "conditional":
            yield from _longest_branch(computations, instruction, count, loop_trips)
        elif opcode in ("call", "async-start") and (called := _called(instruction)):
            yield from _walk(computations, called, count, loop_trips)
        elif opcode not in FREE and not opcode.endswith(("-done", "-update")):
            yield _operation(computations, computation, instruction, count, channels)


def _called(instruction: Instruction) -> str | None:
    return instruction.attribute("calls") or instruction.attribute("to_apply")


def _longest_branch(computations, instruction: Instruction, count: int, loop_trips: int) -> list[Operation]:
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    names += [name for part in ("true", "false") if (name := instruction.attribute(f"{part}_computation"))]
    walked = [list(_walk(computations, name, count, loop_trips)) for name in names]
    return max(walked, key=lambda branch: sum(o.count * (o.flops + o.bytes) for o in branch), default=[])


def _operation(
    computations, computation: Computation, instruction: Instruction, count: int, channels: set[str]
) -> Operation:
    fused = instruction.opcode == "fusion"
    if fused:
        parts = _with_nested(computations, computations[_called(instruction)])
        traffic = _fusion_bytes(computations, computation, instruction)
    else:
        parts = [(computation, instruction)]
        traffic = 0 if _is_collective(instruction) else _bytes(computation, instruction)
    collectives = []
    for where, part in parts:
        channel = re.search(r"channel_id=\d+", part.text)
        if not _is_collective(part) or (channel and channel[0] in channels):
            continue
        channels.update([channel[0]] if channel else [])
        collectives.append(_collective(where, part, instruction if fused else None))
    traffic += sum(one.traffic for one in collectives)
    source = re.search(r'op_name="([^"]*)"', instruction.text)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
    return Operation(
        name=source[1] if source else instruction.name,
        opcode=instruction.opcode,
        count=count,
        flops=sum(_flops(where, part) for where, part in parts),
        bytes=traffic,
        overlaps=instruction.opcode.endswith("-start"),
        cycles=int(cycles[1]) if cycles else 0,
        unknown=any(KERNEL.search(part.text) and not _flops(where, part) for where, part in parts),
        collectives=tuple(collectives),
    )


def _with_nested(computations, computation: Computation) -> list[tuple[Computation, Instruction]]:
    """The instructions of a fused computation and of the fusions in it."""
    parts = []
    for instruction in computation.values():
        parts.append((computation, instruction))
        if instruction.opcode == "fusion":
            parts += _with_nested(computations, computations[_called(instruction)])
    return parts


# Loops.


def trip_count(computations: Mapping[str, Computation], computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs: as XLA says, or by the constants of a counter compared with `<`; None if neither."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
    if known:
        return int(known[1])
    condition = computations[loop.attribute("condition")]
    body = computations[loop.attribute("body")]
    compare = _root(condition)
    if compare.opcode != "compare" or "direction=LT" not in compare.text:
        return None
    initial = computation[loop.operands[0]]
    counter, limit = (condition[name] for name in compare.operands)
    bound = _constant(limit)
    if bound is None and initial.opcode == "tuple" and (index := _tuple_index(limit)) is not None:
        bound = _constant(computation[initial.operands[index]])
    index = _tuple_index(counter)
    if bound is None or index is None or initial.opcode != "tuple" or _root(body).opcode != "tuple":
        return None
    start = _constant(_behind_copies(computation, initial.operands[index]))
    following = _behind_copies(body, _root(body).operands[index])
    steps = [_constant(body[name]) for name in following.operands] if following.opcode == "add" else []
    step = next((step for step in steps if step), None)
    return None if start is None or step is None else max(0, math.ceil((bound - start) / step))


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"(-?\d+)(?:,|$)", instruction.text) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None


def _tuple_index(instruction: Instruction) -> int | None:
    found = re.search(r"index=(\d+)", instruction.text) if instruction.opcode == "get-tuple-element" else None
    return int(found[1]) if found else None


def _behind_copies(computation: Computation, name: str) -> Instruction:
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        instruction = computation[instruction.operands[0]]
    return instruction


# Matrix products.


def _flops(computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dot":
        return _dot_flops(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        return _custom_call_flops(computation, instruction)
    return 0


def _dims(text: str, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", text)
    return [int(dim) for dim in found[1].split(",") if dim] if found else []


def _dot_flops(computation: Computation, instruction: Instruction) -> int:
    (left,) = computation[instruction.operands[0]].arrays
    contracted = math.prod(left.dims[dim] for dim in _dims(instruction.text, "lhs_contracting_dims"))
    return 2 * math.prod(instruction.arrays[0].dims) * contracted


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """TPUs compile matrix products to convolutions, with a batch dimension as a dilated spatial one.

    Positions of the window that fall on padding or between dilated elements do no work.
    """
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text).groups()
    inputs, kernel = (computation[name].arrays[0].dims for name in instruction.operands[:2])
    outputs = instruction.arrays[0].dims
    products = outputs[out.index("b")] * outputs[out.index("f")] * kernel[right.index("i")]
    window = _window(instruction.text)
    for place, axis in enumerate(label for label in right if label.isdigit()):
        sizes = (inputs[left.index(axis)], kernel[right.index(axis)], outputs[out.index(axis)])
        products *= _window_products(*sizes, {name: values[place] for name, values in window.items()})
    return 2 * products


def _window(text: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    return {
        name: [tuple(map(int, part.split("_"))) if name == "pad" else int(part) for part in value.split("x")]
        for name, value in fields.items()
    }


def _window_products(size: int, kernel: int, outputs: int, window: dict) -> int:
    """Pairs of an output and a kernel position that meet an element of the input, along one spatial dimension."""
    low, _ = window.get("pad", (0, 0))
    dilation = window.get("lhs_dilate", 1)
    reversed_order = window.get("rhs_reversal", 0)
    positions = np.arange(kernel)[::-1] if reversed_order else np.arange(kernel)
    at = np.arange(outputs)[:, None] * window.get("stride", 1) + positions * window.get("rhs_dilate", 1) - low
    return int(np.sum((at >= 0) & (at < (size - 1) * dilation + 1) & (at % dilation == 0)))


def _custom_call_flops(computation: Computation, instruction: Instruction) -> int:
    if "gemm_backend_config" in instruction.text:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.text)
        left = computation[instruction.operands[0]].arrays[0]
        contracted = math.prod(left.dims[int(dim)] for dim in re.findall(r"\d+", found[1])) if found else 0
        return 2 * math.prod(instruction.arrays[0].dims) * contracted
    # What the author of a kernel states, as Pallas passes it on.
    stated = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', instruction.text)
    return int(stated[1]) if stated else 0


# Memory traffic.


def _bytes(computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    inputs = [computation[name] for name in instruction.operands if name in computation]
    if opcode == "custom-call" and any(f'"{name}"' in instruction.text for name in FREE_CUSTOM_CALLS):
        return 0
    if "gemm_backend_config" in instruction.text:
        # Behind the product comes cuBLAS' workspace.
        return instruction.arrays[0].traffic + sum(one.traffic for one in inputs)
    if opcode.endswith("-start"):
        moved = instruction.arrays[0 if opcode == "copy-start" else -2]
        return moved.traffic + (moved.bytes if inputs[0].arrays[0].in_hbm else 0)
    if opcode in SLICES:
        return instruction.traffic + (instruction.arrays[0].bytes if inputs[0].arrays[0].in_hbm else 0)
    if opcode == "dynamic-update-slice":
        return inputs[1].traffic + (inputs[1].arrays[0].bytes if instruction.arrays[0].in_hbm else 0)
    if opcode in ("broadcast", "iota"):
        return instruction.traffic
    return instruction.traffic + sum(one.traffic for one in inputs)


def _fusion_bytes(computations, computation: Computation, fusion: Instruction) -> int:
    """A fusion reads of an operand what it slices from it, and writes of a result what it updates in it."""
    inner = computations[_called(fusion)]
    total = 0
    for place, name in enumerate(fusion.operands):
        if traffic := computation[name].traffic:
            total += min(traffic, _read_of(computations, inner, _parameter(inner, place)))
    root = _root(inner)
    results = root.operands if root.opcode == "tuple" else (root.name,)
    for result, array in zip(results, fusion.arrays, strict=False):
        total += _written_of(computations, inner, result) if array.in_hbm else 0
    return total


def _parameter(computation: Computation, place: int) -> str:
    return next(
        one.name for one in computation.values() if one.opcode == "parameter" and re.match(rf"{place}(?!\d)", one.text)
    )


def _read_of(computations, inner: Computation, source: str) -> int:
    """Bytes that a fused computation reads of its instruction `source`; what it passes on, it does not read."""
    read = 0
    for user in inner.values():
        for place, name in enumerate(user.operands):
            if name != source:
                continue
            if user.opcode == "bitcast":
                read += _read_of(computations, inner, user.name)
            elif user.opcode == "fusion":
                nested = computations[_called(user)]
                read += _read_of(computations, nested, _parameter(nested, place))
            elif user.opcode in SLICES and place == 0:
                read += user.arrays[0].bytes
            elif (
                user.opcode != "tuple"
                and not _is_collective(user)
                and not (user.opcode == "dynamic-update-slice" and place == 0)
            ):
                return inner[source].arrays[0].bytes
    return read


def _written_of(computations, inner: Computation, result: str) -> int:
    instruction = _behind_copies(inner, result)
    if instruction.opcode == "fusion":
        nested = computations[_called(instruction)]
        return _written_of(computations, nested, _root(nested).name)
    if instruction.opcode == "parameter" or _is_collective(instruction):
        return 0
    if instruction.opcode == "dynamic-update-slice":
        instruction = inner[instruction.operands[1]]
    return sum(array.bytes for array in instruction.arrays)


# Communication.


def _is_collective(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def _collective(computation: Computation, instruction: Instruction, fusion: Instruction | None) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    size = sum(array.bytes for name in instruction.operands for array in computation[name].arrays)
    group = replica_group(instruction.text)
    if kind == "all-gather":
        size *= len(group)
    elif kind == "all-reduce" and fusion and sum(array.bytes for array in fusion.arrays) * len(group) <= 2 * size:
        # TPUs compile a reduce-scatter to a fusion of an all-reduce with the slice that a device keeps.
        kind = "reduce-scatter"
    asynchronous = instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.text
    return Collective(kind, size, group, fusion is not None or asynchronous)
