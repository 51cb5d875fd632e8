"""How long a program would take if every device ran at its published peaks, and what share of them the model uses."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from sapt_jax.tools.compile_check.hlo import Collective, Operation
from sapt_jax.tools.compile_check.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One run of a program on one device.

    Attributes:
      flops, bytes: of matrix products, and through the device's memory.
      collectives: {kind: (how many, bytes of whole arrays)}.
      compute, memory, network: seconds that each would take alone at its peak.
      seconds: see `estimate`.
      compiler_seconds: the TPU compiler's own estimate of all computation, network left out; None where it has none.
      unknown_kernels: how many run whose FLOPs are in none of these figures.
    """

    flops: int
    bytes: int
    collectives: dict[str, tuple[int, int]]
    compute: float
    memory: float
    network: float
    seconds: float
    compiler_seconds: float | None
    unknown_kernels: int

    def utilisation(self, model_flops: float, devices: int, peak: float) -> float:
        """Share of the peak FLOP/s of all devices that `model_flops` in `seconds` would be."""
        return model_flops / (self.seconds * devices * peak)


def transfer_seconds(collective: Collective, mesh: Mesh, topology: Topology) -> float:
    """Time of a collective over rings at the bandwidth of its group's links."""
    n = len(collective.group)
    if n < 2:
        return 0.0
    members = [mesh.devices.flat[position].id for position in collective.group]
    passes = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
    sent = collective.bytes * passes.get(collective.kind, (n - 1) / n)
    return sent / topology.bandwidth(members)


def estimate(operations: Sequence[Operation], mesh: Mesh, topology: Topology) -> Estimate:
    """The roofline of a program (Williams et al., 2009), operation by operation.

    Operations follow one another, each as long as the slower of its FLOPs and its memory traffic; so do collectives
    that nothing overlaps. Copies and collectives beside the computation take no time of their own, but memory and
    network are never faster than their peaks allow for all that goes through them.
    """
    device = topology.device
    serial = memory = network = 0.0
    collectives: dict[str, tuple[int, int]] = {}
    # Rings in opposite directions go over links of their own.
    permutes: dict[tuple[int, ...], float] = {}
    for operation in operations:
        traffic = operation.count * operation.bytes / device.bandwidth
        memory += traffic
        if not operation.overlaps:
            serial += max(operation.count * operation.flops / device.flops, traffic)
        for collective in operation.collectives:
            seconds = operation.count * transfer_seconds(collective, mesh, topology)
            if collective.kind == "collective-permute":
                permutes[collective.group] = permutes.get(collective.group, 0.0) + seconds
            else:
                network += seconds
            serial += 0.0 if collective.overlaps else seconds
            number, size = collectives.get(collective.kind, (0, 0))
            size += operation.count * collective.bytes
            collectives[collective.kind] = (number + operation.count, size)
    network += max(permutes.values(), default=0.0)
    flops = sum(operation.count * operation.flops for operation in operations)
    cycles = sum(operation.count * operation.cycles for operation in operations)
    return Estimate(
        flops=flops,
        bytes=sum(operation.count * operation.bytes for operation in operations),
        collectives=collectives,
        compute=flops / device.flops,
        memory=memory,
        network=network,
        seconds=max(serial, memory, network),
        compiler_seconds=cycles / device.clock if device.clock and cycles else None,
        unknown_kernels=sum(operation.count for operation in operations if operation.unknown),
    )
