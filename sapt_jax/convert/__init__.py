"""The commands of `python -m sapt_jax.convert`."""
