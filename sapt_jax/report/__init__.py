"""The command that makes one page, and figures as files, of runs: `python -m sapt_jax.report`."""
