"""Time, tokens per second and memory of a train step, at the first and at the last task of a full bank.

python -m benchmarks.train_step --config=configs/smollm2_superni.py --rows=8 --source=96 --target=16

Of any method: --config.method=sequential, --config.pet.kind=prompt.
"""

from collections.abc import Callable
from typing import Any

from absl import app
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import setting


def prepare(config: ConfigDict, dtype: str, mesh: Mesh) -> tuple[Callable[[int], Callable[[], Any]], Any]:
    """(task -> a call of one step at that task, compiled program) for one type."""
    own = setting.make_setting(config, dtype, mesh)
    frozen, trainable = own.trees()
    state, batch, samples = own.programs.open_state(trainable), own.batch(), own.samples()
    compiled = own.programs.train_step.lower(frozen, state, batch, samples, own.task(0)).compile()

    def call_at(index: int) -> Callable[[], Any]:
        task = own.task(index)

        def call() -> Any:
            nonlocal state
            state, metrics = compiled(frozen, state, batch, samples, task)
            return metrics

        return call

    return call_at, compiled


def measure(config: ConfigDict, dtype: str, mesh: Mesh) -> tuple[list[float], Any]:
    """(seconds at the first and at the last task, compiled program) for one type."""
    call_at, compiled = prepare(config, dtype, mesh)
    return setting.median_seconds([call_at(0), call_at(setting.TASKS.value - 1)]), compiled


if __name__ == "__main__":
    app.run(lambda _: setting.run("train step", measure))
