"""LFPT5's losses and updates against loops in float64, what it holds on to, and a run that writes its own rows."""

import json

import jax
import numpy as np
import pytest

from sapt_jax import continual
from sapt_jax.data.lesson import make_lesson
from sapt_jax.data.pseudo_samples import read_pseudo_samples
from sapt_jax.methods.lfpt5 import Lfpt5
from sapt_jax.models.families import VARIANTS, make_model
from sapt_jax.pet import Lora, Prompt
from sapt_jax.pretrained.tokenizer import load_tokenizer
from sapt_jax.programs import make_apply
from sapt_jax.pseudo_samples import writer
from sapt_jax.state import Trainable
from tests.helpers.replayed import PET, SHARE, Linear, batches, sides, third_task
from tests.helpers.run_files import assert_same_arrays, committed, predictions, times_compiled
from tests.helpers.stopped import run_stopped_once
from tests.helpers.tiny import tiny_config, write_tasks
from tests.helpers.trees import at, init_base, noise, random_frozen

KAPPA, WRITING = 0.3, 0.6
METHOD = Lfpt5(PET, share=SHARE, distillation=KAPPA, writing=WRITING)


def parts_of(model, before, prompt, batch, index):
    """(Value, gradient) of NLL, writing NLL and KL of a batch, written out."""
    earlier, own = sides(batch, index)
    shares = {True: (1 - SHARE, SHARE), False: (1.0, 0.0)}[bool(earlier)]

    def mean(part):
        both = [model.mean_nll(prompt, part, rows) for rows in (own, earlier)]
        return tuple(shares[0] * of_own + shares[1] * of_earlier for of_own, of_earlier in zip(*both, strict=True))

    return mean(batch), mean(batch["writing"]), model.mean_kl(before, prompt, batch, earlier)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_five_updates_before_and_after_a_task_equal_numpy(seed):
    model, (lesson, splits) = Linear(seed), third_task(seed, texts=True)
    frozen, trainable = model.trees(METHOD, seed)
    prompt = np.array(trainable.slot["prompt"], np.float64)
    before = np.zeros_like(prompt)
    alone = batches(make_lesson(1, {1: splits[2]}, {}, SHARE), steps=5)
    for index, lesson_batches in ((1, alone), (2, batches(lesson, steps=5))):
        trained, metrics = model.train(METHOD, (frozen, trainable), lesson_batches, index)
        for batch, told in zip(lesson_batches, metrics, strict=True):
            (nll, of_nll), (writing, of_writing), (kl, of_kl) = parts_of(model, before, prompt, batch, index)
            np.testing.assert_allclose(told["writing_loss"], writing, rtol=1e-5)
            np.testing.assert_allclose(told["distillation"], kl, rtol=1e-4, atol=1e-7)
            loss = (1 - KAPPA) * (nll + WRITING * writing) + KAPPA * kl
            np.testing.assert_allclose(told["loss"], loss, rtol=1e-5)
            prompt = prompt - model.rate * ((1 - KAPPA) * (of_nll + WRITING * of_writing) + KAPPA * of_kl)
        np.testing.assert_allclose(trained.slot["prompt"], prompt, rtol=1e-5, atol=1e-6)
        found = [told["distillation"] for told in metrics]
        assert not any(found) if index == 1 else found[0] == 0 and min(found[1:]) > 0
        frozen = METHOD.end_task(frozen, trained, None, at(index, slot=0))
        _, trainable = model.trees(METHOD, seed, index + 1, frozen, trained)
        before = prompt


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pet"), [("t5-tiny", Prompt(2)), ("llama-tiny", Lora(2, 8.0))])
def test_the_kl_is_nothing_where_a_task_begins_and_grows_as_the_slot_moves(name, pet):
    model = make_model(VARIANTS[name], "float32", "none")
    base, method = init_base(model), Lfpt5(pet, share=SHARE)
    frozen = random_frozen(method, model, base, 1, 4)
    (batch,) = batches(third_task(5, texts=True)[0], steps=1)
    batch = jax.tree.map(lambda x: x % 90 if x.dtype == np.int32 and x.ndim == 2 else x, batch)
    before = method.pet.read(frozen.bank, 0)
    direction = noise(6, before)

    @jax.jit
    def distillation(distance):
        slot = jax.tree.map(lambda x, y: x + distance * y, before, direction)
        _, logs = method.task_loss(
            make_apply(model), jax.random.key(0), frozen, Trainable(slot, {}), batch, at(2, slot=0)
        )
        return logs["distillation"]

    found = [float(distillation(np.float32(distance))) for distance in (0.0, 0.05, 0.1, 0.2)]
    assert found[0] == 0 and 0 < 2 * found[1] < found[2] and 2 * found[2] < found[3]


def texts_of(tasks, asked):
    """In place of a block that has learned it: a writer that answers every task's cue, and notes who asked."""
    tokenizer = load_tokenizer("bytes")

    def make_sample(apply, method, ends, sampling):
        def sample(frozen, trainable, source, source_mask, task, rng):
            asked.add((tokenizer.decode(np.array(source)[0][np.array(source_mask)[0]]), type(method)))
            name = tasks[int(task.index)]
            rows = np.full((len(source), ends.new_tokens), tokenizer.pad_id, np.int32)
            for i, row in enumerate(rows):
                text = f"{name} it.__inp__{'abcd'[i % 4] * (1 + i)}__ans__{'ABCD'[i % 4] * (1 + i)}"
                # Every third text lacks its answer.
                ids = tokenizer.encode(text.split("__ans__")[0] if i % 3 == 2 else text)
                row[: len(ids) + 1] = [*ids, tokenizer.eos_id]
            return rows

        return sample

    return make_sample


@pytest.mark.slow
def test_a_run_on_rows_that_it_writes_stops_goes_on_and_compiles_once(tmp_path, monkeypatch, caplog):
    data_dir, asked = write_tasks(tmp_path / "data", tasks=("shout", "mirror")), set()
    monkeypatch.setattr(writer, "make_sample", texts_of(("shout", "mirror"), asked))
    overrides = {"method": "lfpt5", "model.variant": "t5-tiny", "pet.kind": "prompt", "pet.prompt_length": 4}
    overrides |= {"task_order": "shout,mirror", "train.epochs": 1, "train.log_every_steps": 1, "data.dev_size": 0}
    overrides |= {"pseudo_samples.source": "generate", "pseudo_samples.minimum": 5, "optimizer.learning_rate": 0.3}
    overrides |= {"pseudo_samples.writer.answers": True, "pseudo_samples.writer.max_length": 60}
    config = tiny_config(data_dir, **overrides)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        scores = continual.run(config, tmp_path / "whole")
    for function in ("step", "generate"):
        assert times_compiled(caplog, function) == 1
    ((cue, kind),) = asked
    assert cue.startswith("__gen__ shout") and kind is Lfpt5
    assert not list((tmp_path / "whole").glob("tasks/*/writer/steps"))
    pool = read_pseudo_samples(tmp_path / "whole/tasks/00-shout/generated_data", "shout")
    pairs = [(instance.input, instance.outputs) for instance in pool.instances]
    assert pairs == [("a", ("A",)), ("bb", ("BB",)), ("dddd", ("DDDD",)), ("aaaaa", ("AAAAA",)), ("c" * 7, ("C" * 7,))]
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    found = [[r["distillation"] for r in train if r["task_index"] == task] for task in (0, 1)]
    # A task begins as the one before left the block, and has six of its twenty rows in a batch.
    assert not any(found[0]) and found[1][0] == 0 and min(found[1][1:]) > 0 and len(found[1]) == 4
    again = run_stopped_once(config, tmp_path / "stopped", monkeypatch, checks=5)
    np.testing.assert_array_equal(again["matrix"], scores["matrix"])
    assert_same_arrays(committed(tmp_path / "stopped"), committed(tmp_path / "whole"))
    assert predictions(tmp_path / "stopped") == predictions(tmp_path / "whole")
