"""Answers over HTTP, in the form of OpenAI's API: `python -m sapt_jax.serve`."""
