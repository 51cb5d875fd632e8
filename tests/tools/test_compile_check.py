import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import llama2_7b_superni, t5_xl_superni
from sapt_jax import sharding
from sapt_jax.config import default_config
from sapt_jax.models.families import make_model
from sapt_jax.models.shapes import LLAMA_VARIANTS, T5_VARIANTS
from sapt_jax.pet import Mixture
from sapt_jax.tools.compile_check import model_flops, report, roofline, topologies
from sapt_jax.tools.compile_check.hlo import Collective, Operation
from sapt_jax.tools.compile_check.programs import programs_of, shape_of
from tests.helpers.paths import REPOSITORY


def tiny_config(variant, **overrides):
    c = default_config()
    c.model.variant = variant
    c.data.max_source_length, c.data.max_target_length = 64, 16
    c.train.batch_size, c.eval.batch_size, c.eval.max_new_tokens = 4, 4, 8
    c.update_from_flattened_dict(overrides)
    return c


def cpu_topology():
    """One CPU in the place of a v5e chip."""
    device = jax.devices("cpu")[0]
    return topologies.Topology("cpu:1", topologies.DEVICES["v5e"], (device,), {device.id: (0, 0)})


def programs(config):
    mesh = sharding.make_mesh(config.mesh, jax.devices("cpu")[:1])
    return {program.name: program for program in programs_of(config, mesh)}, mesh


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("t5-tiny", {}),
        ("t5-tiny", {"pet.targets": ".*/layers/.*/kernel"}),
        ("llama-tiny", {"train.accumulation": 2, "pet.kind": "prompt"}),
    ],
)
def test_the_compiled_train_step_does_the_flops_counted_by_hand(variant, overrides):
    config = tiny_config(variant, **overrides)
    found, mesh = programs(config)
    flops = {name: report.check(found[name], mesh, cpu_topology()).estimate.flops for name in ("train", "reflection")}
    # The count leaves out the query projection: of the batch, and of the pseudo-samples in the reflection loss.
    pseudo_samples = 15 * config.sapt.reflection_batch
    queries = flops["reflection"] * (1 + config.train.batch_size / pseudo_samples)
    assert flops["train"] - queries == pytest.approx(found["train"].model_flops, rel=3e-3)


@pytest.mark.slow
def test_a_method_without_a_penalty_has_no_program_for_it():
    found, mesh = programs(tiny_config("llama-tiny", method="sequential"))
    assert found.keys() == {"train", "attention", "decode"}
    result = report.check(found["train"], mesh, cpu_topology())
    assert result.estimate.flops == pytest.approx(found["train"].model_flops, rel=3e-3)


@pytest.mark.slow
def test_the_compiled_decoding_does_the_flops_counted_by_hand():
    found, mesh = programs(tiny_config("t5-tiny"))
    result = report.check(found["decode"], mesh, cpu_topology())
    assert found["decode"].model_flops < result.estimate.flops < 1.02 * found["decode"].model_flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "parameters"), [(LLAMA_VARIANTS["llama-2-7b"], 6.738e9), (T5_VARIANTS["t5-v1_1-xl"], 2.85e9)]
)
def test_a_token_costs_two_flops_for_each_parameter_that_it_meets(shape, parameters):
    embedding = shape.vocab_size * shape.d_model
    found = model_flops.teacher_forced(make_model(shape, "float32", "none"), Mixture(), 1, 1)
    assert found.frozen == pytest.approx(2 * (parameters - embedding), rel=1e-3)
    assert found.adapters == 0


def test_prompts_lengthen_the_input_and_have_no_adapters():
    model = make_model(LLAMA_VARIANTS["llama-tiny"], "float32", "none")
    short = model_flops.teacher_forced(model, Mixture(prompt=np.zeros((1, 8, 32))), 24, 4)
    assert short == model_flops.teacher_forced(model, Mixture(), 32, 4)
    assert short.adapters == 0


def test_adapters_count_the_blocks_that_are_there():
    """By hand: of t5-tiny's 2 layers, columns * (fan in + fan out) at 24 source or 4 target positions."""
    model = make_model(T5_VARIANTS["t5-tiny"], "float32", "none")

    def adapters(*path, fan_in, fan_out, count=model_flops.teacher_forced, lengths=(24, 4)):
        blocks = {"a": np.zeros((2, fan_in, 6)), "b": np.zeros((2, 6, fan_out))}
        for name in reversed(path):
            blocks = {name: blocks}
        return count(model, Mixture(blocks), *lengths).adapters

    cross = ("decoder", "layers", "encoder_decoder_attention")
    assert adapters("encoder", "layers", "mlp", "wo", fan_in=64, fan_out=32) == 2 * 2 * 6 * 96 * 24
    assert adapters(*cross, "key", fan_in=32, fan_out=64) == 2 * 2 * 6 * 96 * 24
    assert adapters(*cross, "out", fan_in=64, fan_out=32) == 2 * 2 * 6 * 96 * 4
    # Decoding 5 tokens in 3 beams: the source's keys once, all else for the first token and for 4 steps of each beam.
    decoding = {"count": model_flops.decoded, "lengths": (24, 5, 3)}
    assert adapters(*cross, "key", fan_in=32, fan_out=64, **decoding) == 2 * 2 * 6 * 96 * 24
    assert adapters(*cross, "out", fan_in=64, fan_out=32, **decoding) == 2 * 2 * 6 * 96 * 13


@pytest.mark.parametrize("name", ["v5p", "v5p:2x2", "v5e:0x4", "h100:2x4", "b300:8", "v5e:4x4x"])
def test_topologies_that_are_not_understood(name):
    with pytest.raises(ValueError, match="--topology"):
        topologies.parse(name)


def test_topologies_parse():
    assert topologies.parse("v5p:2x2x4") == (topologies.DEVICES["v5p"], (2, 2, 4))
    assert topologies.parse("h100:8") == (topologies.DEVICES["h100"], (8,))


def grid(device_name):
    """A 2 x 2 mesh of stand-ins; only ids and coordinates are looked at."""
    coordinates = {index: divmod(index, 2) for index in range(4)}
    return topologies.Topology("v5e:2x2", topologies.DEVICES[device_name], (None,) * 4, coordinates)


def test_a_group_has_the_links_of_the_axes_that_it_extends_over():
    topology = grid("v5e")
    assert topology.bandwidth((0, 1)) == topology.bandwidth((0, 2)) == 50e9
    assert topology.bandwidth((0, 1, 2, 3)) == 100e9


def operation(**fields):
    defaults = dict(
        name="", opcode="fusion", count=1, flops=0, bytes=0, overlaps=False, cycles=0, unknown=False, collectives=()
    )
    return Operation(**{**defaults, **fields})


def test_operations_follow_one_another_each_at_its_own_roofline():
    device, mesh = (
        topologies.DEVICES["v5e"],
        sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices("cpu")[:1]),
    )
    second = [operation(flops=int(device.flops)), operation(bytes=int(device.bandwidth))]
    found = roofline.estimate(second, mesh, cpu_topology())
    assert found.seconds == pytest.approx(2.0)
    assert (found.compute, found.memory) == pytest.approx((1.0, 1.0))
    beside = roofline.estimate([second[0], operation(bytes=int(device.bandwidth), overlaps=True)], mesh, cpu_topology())
    assert beside.seconds == pytest.approx(1.0)
    assert found.utilisation(device.flops, 1, device.flops) == pytest.approx(0.5)


def test_a_collective_takes_a_ring_of_its_groups_links():
    class Stub:
        def __init__(self, index):
            self.id = index

    class StubMesh:
        class devices:
            flat = [Stub(index) for index in range(4)]

    topology = grid("v5e")
    size, everyone = 100_000_000_000, (0, 1, 2, 3)
    times = {
        kind: roofline.transfer_seconds(Collective(kind, size, group, True), StubMesh, topology)
        for kind, group in (("all-gather", everyone), ("all-reduce", everyone), ("collective-permute", (0, 1)))
    }
    assert times == pytest.approx({"all-gather": 0.75, "all-reduce": 1.5, "collective-permute": 2.0})


def test_advice_where_a_program_does_not_fit():
    config = tiny_config("t5-tiny", **{"train.batch_size": 8})
    found, mesh = programs(config)
    topology = cpu_topology()

    def advice(name, **fields):
        return report.suggestion(
            report.Result(found[name], 0, 0, fields.pop("bytes"), None, **fields), config, mesh, topology
        )

    assert advice("train", bytes=2**30) == ""
    assert "remat=full" in advice("train", bytes=2**40)
    config.model.remat = "full"
    assert "--config.train.accumulation=2" in advice("train", bytes=2**40)
    assert "--config.eval.batch_size=2" in advice("decode", bytes=0, refusal="Ran out of memory")
    config.train.accumulation = 8
    assert "more devices" in advice("train", bytes=2**40)


def test_a_config_without_its_weights_falls_back_on_the_shape_that_its_path_names():
    assert shape_of(t5_xl_superni.get_config()) == T5_VARIANTS["t5-v1_1-xl"]
    assert shape_of(llama2_7b_superni.get_config()) == LLAMA_VARIANTS["llama-2-7b"]
    config = t5_xl_superni.get_config()
    config.model.path = "models/of-mine"
    with pytest.raises(ValueError, match="config.model.variant"):
        shape_of(config)
    config.model.variant = "t5-tiny"
    assert shape_of(config) == T5_VARIANTS["t5-tiny"]


# Where `make test` puts it: beside the environment, in which JAX would look for a TPU.
LIBTPU = Path(sys.prefix) / "libtpu"


def run_command(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(LIBTPU), os.environ.get("PYTHONPATH"))))
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    command = [sys.executable, "-m", "sapt_jax.tools.compile_check", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_an_unknown_topology_is_told():
    done = run_command("--config=configs/t5_tiny.py", "--topology=v9:1")
    assert done.returncode != 0 and "--topology='v9:1' is not understood" in done.stderr


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not LIBTPU.is_dir(), reason="needs the TPU compiler, libtpu"
)
TINY = (
    "--config=configs/t5_tiny.py",
    "--config.model.path=",
    "--config.model.variant=t5-tiny",
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
    "--config.mesh.data=1",
)


@pytest.mark.slow
@needs_libtpu
def test_a_small_config_is_compiled_for_a_tpu_that_is_not_here():
    done = run_command(*TINY)
    assert done.returncode == 0, done.stderr
    for words in ("share of memory", "all-gather", "all-reduce", "utilisation at it", "compiler's time"):
        assert words in done.stdout


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_ends_with_an_error_and_advice():
    done = run_command(*TINY, "--config.model.variant=llama-tiny", "--config.eval.batch_size=4000000")
    assert done.returncode == 1
    # LLaMA's attention on TPUs.
    assert "kernels not counted" in done.stdout
    assert "decode does not fit" in done.stdout and "--config.eval.batch_size=2000000" in done.stdout
