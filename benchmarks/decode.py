"""Time, tokens per second and memory of greedy decoding, at the first and at the last task of a full bank.

    python -m benchmarks.decode --config=configs/smollm2_superni.py --rows=8 --source=96 --target=16

Tokens per second counts the source tokens that are read and the answer tokens that are written; no row ends early.
"""

import numpy as np
from absl import app

from benchmarks import setting
from sapt_jax.decoding.search import make_generate


def measure(config, dtype: str, mesh) -> tuple[list[float], object]:
    """(seconds at the first and at the last task, compiled program) for one type."""
    model, method, frozen, trainable = setting.make_setting(config, dtype, mesh)
    # An end token that no argmax can give.
    generate = make_generate(model, method, setting.TARGET.value, eos_id=-1, pad_id=0, beams=1, length_penalty=0.0)
    batch = setting.random_batch(model.config.vocab_size, mesh)
    arguments = (frozen, trainable, batch["source"], batch["source_mask"])
    slots = [np.int32(task) for task in (0, setting.TASKS.value - 1)]
    compiled = generate.lower(*arguments, slots[0]).compile()
    return setting.median_seconds([lambda slot=slot: compiled(*arguments, slot) for slot in slots]), compiled


if __name__ == "__main__":
    app.run(lambda _: setting.run("decoding", measure))
