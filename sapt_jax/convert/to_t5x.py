"""Writes a pretrained T5 as a T5X checkpoint, for T5X users to go on with.

python -m sapt_jax.convert.to_t5x models/t5-v1_1-xl checkpoints/checkpoint_0
"""

import argparse
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from sapt_jax.convert import t5x
from sapt_jax.convert.loading import load_pretrained, read_model_config
from sapt_jax.models.t5 import T5
from sapt_jax.models.variants import t5_config_from_hf


def main(arguments: list[str]) -> None:
    """Converts what the command line names; see --help."""
    parser = argparse.ArgumentParser(prog="python -m sapt_jax.convert.to_t5x", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a Hugging Face folder of model_type t5, mt5 or umt5, or a T5X checkpoint")
    parser.add_argument("folder", type=Path, help="the checkpoint's folder, to be created, such as checkpoint_0")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen = parser.parse_args(arguments)
    try:
        config = t5_config_from_hf(read_model_config(chosen.source), f"{chosen.source}: config.json")
        ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), bool)
        model = T5(config, jnp.float32, "none")
        shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, ids, mask)["params"])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(chosen.dtype)), shapes)
        t5x.write_checkpoint(load_pretrained(chosen.source, target), chosen.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
