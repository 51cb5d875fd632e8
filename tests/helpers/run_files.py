"""What a run leaves behind, as tests compare it."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def committed(workdir):
    """Every array of every committed task, by folder."""
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for folder in sorted(Path(workdir).glob("tasks/*/committed")):
            saved = checkpointer.metadata(folder.absolute()).item_metadata.tree
            # Onto this machine, whatever devices it was saved from.
            here = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ONE_DEVICE) for name, x in saved.items()}
            restored = checkpointer.restore(folder.absolute(), here)
            arrays[folder.parent.name] = {name: np.array(array) for name, array in restored.items()}
    return arrays


def assert_same_arrays(first, second):
    assert first.keys() == second.keys()
    for folder, arrays in first.items():
        assert arrays.keys() == second[folder].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, second[folder][name], err_msg=f"{folder} {name}")


def predictions(workdir):
    return {str(f.relative_to(workdir)): f.read_text() for f in sorted(Path(workdir).glob("predictions/*/*.jsonl"))}


def times_compiled(caplog, function):
    """How often a jitted function was compiled under `jax.log_compiles`."""
    messages = [record.getMessage() for record in caplog.records]
    return sum(f"jit({function})" in message for message in messages if "Finished XLA compilation" in message)
