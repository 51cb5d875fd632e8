"""Asking a run that has learned: `sapt_jax.load(workdir)` gives a model that answers, and learns more."""
