"""A study: methods x orders x seeds, each a run with a workdir of its own, and one table of them all."""
