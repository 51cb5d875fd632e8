"""Time, tokens per second and memory of decoding, at the first and at the last task of a full bank.

    python -m benchmarks.decode --config=configs/smollm2_superni.py --rows=8 --source=96 --target=16

Of any method, as `benchmarks.train_step`, and with beams: --config.eval.beams=4. Tokens per second counts the source
tokens that are read and the answer tokens that are written; no row ends early.
"""

from typing import Any

from absl import app
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import setting


def measure(config: ConfigDict, dtype: str, mesh: Mesh) -> tuple[list[float], Any]:
    """(seconds at the first and at the last task, compiled program) for one type."""
    own = setting.make_setting(config, dtype, mesh)
    batch = own.batch()
    arguments = (*own.trees(), batch["source"], batch["source_mask"])
    tasks = [own.task(index) for index in (0, setting.TASKS.value - 1)]
    compiled = own.programs.generate.lower(*arguments, tasks[0]).compile()
    return setting.median_seconds([lambda task=task: compiled(*arguments, task) for task in tasks]), compiled


if __name__ == "__main__":
    app.run(lambda _: setting.run("decoding", measure))
