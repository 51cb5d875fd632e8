"""The exported PyTorch model against ours: attention, logits, answers; and the way back, bit for bit."""

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="the exported model is PyTorch's")
transformers = pytest.importorskip("transformers", reason="the exported model wraps one of transformers")

from sapt_jax.export import to_torch  # noqa: E402
from sapt_jax.export.learned import read_run  # noqa: E402
from sapt_jax.export.to_torch import read_model, write_model  # noqa: E402
from tests.helpers.learned_runs import EVERYWHERE, TASKS, Ours, make_base, make_rows, make_run  # noqa: E402
from tests.helpers.run_files import assert_same_arrays, committed  # noqa: E402

pytestmark = pytest.mark.slow

NEW_TOKENS = 9
DEFAULTS = {"sapt.pool_padding": False, "sapt.temperature": 1.0, "sapt.selection": "attention"}


def load_by_import(folder):
    """The exported file as a module of its own, no remote code of transformers involved."""
    spec = importlib.util.spec_from_file_location("modeling_sapt", folder / "modeling_sapt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SaptModel.from_pretrained(str(folder))


def tensors(batch):
    return torch.tensor(batch["source"]).long(), torch.tensor(batch["source_mask"]).long()


def export(folder, family, kind, include_base=False, **overrides):
    _, run = make_run(folder, family, kind, **overrides)
    write_model(read_run(run), include_base, folder / "export")
    return Ours(run), load_by_import(folder / "export")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model, the exported one) of a family and a kind, made once."""
    return functools.cache(lambda family, kind: export(tmp_path_factory.mktemp("export"), family, kind))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("t5", "lora"), ("t5", "prompt"), ("t5 tied", "lora"), ("llama grouped", "lora"), ("llama grouped", "prompt")],
)
def test_it_answers_as_ours_does(exported, family, kind):
    ours, theirs = exported(family, kind)
    batch = make_rows(family, seed=17)
    ids, mask = tensors(batch)
    skipped = 1 if family.startswith("t5") else ids.shape[1]
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    free = theirs.generate(ids, mask, eos_token_id=None, **options)[:, skipped:].numpy()
    assert len({tuple(row) for row in free}) > 2, "rows answer alike"
    # An end token that one row reaches for sure.
    eos = int(free[0, 3])
    tokens, weights = ours.generate(batch, NEW_TOKENS, eos)
    assert np.ptp(weights, axis=0).max() > 0.1, "every row attends alike: the batch mixes nothing"
    np.testing.assert_allclose(theirs.attention(ids, mask).numpy(), weights, atol=1e-5)
    found = theirs.generate(ids, mask, eos_token_id=eos, **options).numpy()
    if skipped > 1:
        np.testing.assert_array_equal(found[:, :skipped], ids.numpy())
    found = found[:, skipped:]
    np.testing.assert_array_equal(found, tokens[:, : found.shape[1]])
    assert not tokens[:, found.shape[1] :].any()
    # The mixture matters: the base alone says something else.
    plain = theirs.base.generate(input_ids=ids, attention_mask=mask, do_sample=False, eos_token_id=None, **options)
    assert not np.array_equal(plain[:, skipped:].numpy(), free)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("family", ["t5", "llama grouped"])
def test_logits(exported, family, kind):
    check_logits(*exported(family, kind), family)


@pytest.mark.parametrize("family", ["t5", "llama grouped"])
def test_blocks_on_every_kernel(tmp_path, family):
    ours, theirs = export(tmp_path, family, "lora", **EVERYWHERE)
    adapted = {module.rsplit(".", 1)[1] for module in theirs.config.modules.values()}
    t5, llama = {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}, {f"{name}_proj" for name in "q k v o gate up down".split()}
    assert adapted == (t5 if family == "t5" else llama)
    check_logits(ours, theirs, family)


def check_logits(ours, theirs, family):
    batch = make_rows(family, seed=8)
    wanted = ours.logits(batch, ours.attention(batch))
    ids, mask = tensors(batch)
    answer, answer_mask = torch.tensor(batch["target"]).long(), torch.tensor(batch["target_mask"])
    labels = answer.masked_fill(~answer_mask, -100)
    if family != "t5":
        labels = torch.cat([torch.full_like(ids, -100), labels], dim=1)
        ids, mask = torch.cat([ids, answer], dim=1), torch.cat([mask, answer_mask.long()], dim=1)
    with torch.no_grad():
        output = theirs(ids, mask, labels=labels)
    found = output.logits.numpy()
    if family != "t5":
        assert found.shape[1] == ids.shape[1]
        found = found[:, batch["source"].shape[1] - 1 : -1]
    np.testing.assert_allclose(found[batch["target_mask"]], wanted[batch["target_mask"]], atol=1e-4)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize(
    "overrides",
    [{"sapt.pool_padding": True}, {"sapt.temperature": 3.0}, {"sapt.selection": "mean"}],
    ids=lambda overrides: next(iter(overrides)),
)
def test_settings_of_the_attention(tmp_path, overrides):
    ours, theirs = export(tmp_path, "llama", "lora", **overrides)
    batch = make_rows("llama", seed=9)
    found = theirs.attention(*tensors(batch)).numpy()
    np.testing.assert_allclose(found, ours.attention(batch), atol=1e-5)
    theirs.config.update({name.split(".")[1]: DEFAULTS[name] for name in overrides})
    assert np.abs(theirs.attention(*tensors(batch)).numpy() - found).max() > 1e-2


def test_a_withdrawn_task_takes_no_part(tmp_path):
    ours, theirs = export(tmp_path, "t5", "lora", **{"disabled_tasks": TASKS[1]})
    batch = make_rows("t5", seed=10)
    found = theirs.attention(*tensors(batch)).numpy()
    np.testing.assert_allclose(found, ours.attention(batch), atol=1e-5)
    assert not found[:, 1].any() and np.allclose(found.sum(axis=1), 1)


@pytest.mark.parametrize("kind", ["lora", "prompt"])
@pytest.mark.parametrize("family", ["t5", "llama grouped"])
def test_beams_keep_the_mixture_of_their_row(exported, family, kind):
    _, theirs = exported(family, kind)
    ids, mask = tensors(make_rows(family, seed=11))
    options = {"max_new_tokens": 5, "num_beams": 3, "eos_token_id": 1, "pad_token_id": 0}
    together = theirs.generate(ids, mask, **options)
    alone = [theirs.generate(ids[[row]], mask[[row]], **options)[0] for row in range(len(ids))]
    for row, answer in enumerate(alone):
        np.testing.assert_array_equal(together[row][: len(answer)], answer)


def test_by_auto_model_in_a_process_without_this_package(tmp_path):
    _, imported = export(tmp_path, "t5", "lora", include_base=True)
    batch = make_rows("t5", seed=12)
    np.savez(tmp_path / "batch.npz", ids=batch["source"], mask=batch["source_mask"])
    script = f"""
import sys, numpy as np, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path / "moved")!r}, trust_remote_code=True)
batch = np.load({str(tmp_path / "batch.npz")!r})
ids, mask = torch.tensor(batch["ids"]).long(), torch.tensor(batch["mask"]).long()
tokens = model.generate(ids, mask, max_new_tokens=9, pad_token_id=0)
np.save({str(tmp_path / "tokens.npy")!r}, tokens.numpy())
assert "jax" not in sys.modules and "sapt_jax" not in sys.modules
"""
    # The export is complete in itself: neither the run nor its base model are there any more.
    (tmp_path / "export").rename(tmp_path / "moved")
    (tmp_path / "base").rename(tmp_path / "gone")
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    wanted = imported.generate(*tensors(batch), max_new_tokens=9, pad_token_id=0).numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), wanted)


def test_the_exported_file_needs_nothing_of_ours():
    code = Path(to_torch.__file__).with_name("modeling_sapt.py").read_text(encoding="utf-8")
    modules = set(re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE))
    assert modules <= {"contextlib", "torch", "safetensors", "transformers"}


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_there_and_back_is_exact(tmp_path, kind):
    _, run = make_run(tmp_path, "t5", kind, **{"pet.capacity": 5})
    write_model(read_run(run), False, tmp_path / "export")
    read_model(tmp_path / "export", "", tmp_path / "back")
    assert len(committed(run)) == len(TASKS)
    assert_same_arrays(committed(run), committed(tmp_path / "back"))
    assert json.loads((run / "config.json").read_text()) == json.loads((tmp_path / "back" / "config.json").read_text())


def test_bad_folders(tmp_path):
    _, run = make_run(tmp_path, "t5", "lora")
    out, back = tmp_path / "export", tmp_path / "back"
    write_model(read_run(run), False, out)
    with pytest.raises(FileExistsError, match="export exists"):
        write_model(read_run(run), False, out)
    with pytest.raises(
        FileNotFoundError, match="lacks model.safetensors, run.safetensors: give a folder that to-torch"
    ):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text("{}")
        read_model(tmp_path / "empty", "", back)
    make_base("llama", tmp_path / "other")
    with pytest.raises(ValueError, match="does not fit the base model"):
        read_model(out, str(tmp_path / "other"), back)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_model(out, str(tmp_path / "nowhere"), back)
    arrays = load_file(out / "model.safetensors")
    save_file({**arrays, "keys": arrays["keys"][:2]}, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"keys is float32\[2, 16\], not float32\[3, 16\]"):
        read_model(out, "", back)
    (out / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        read_model(out, "", back)
    (out / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="has no field run or run_tasks"):
        read_model(out, "", back)
    assert not list(tmp_path.glob("back*"))


def test_a_folder_that_someone_sends_writes_nowhere_else(tmp_path):
    _, run = make_run(tmp_path, "llama", "lora")
    out, back = tmp_path / "export", tmp_path / "inside" / "back"
    write_model(read_run(run), False, out)
    exported = json.loads((out / "config.json").read_text())
    files = sorted(tmp_path.rglob("*"))
    for names in (["../../x", "second", "third"], ["/tmp/x", "second", "third"], [".."], ["first", 3], [], ["a", "a"]):
        for order in (exported["run"]["task_order"], ",".join(map(str, names))):
            run = {**exported["run"], "task_order": order}
            (out / "config.json").write_text(json.dumps({**exported, "run": run, "run_tasks": names}))
            with pytest.raises(ValueError, match="config.json: run_tasks"):
                read_model(out, "", back)
    for changes in ({"pet.rank": "four"}, {"optimizer.learning_rate": None}, {"data.buckets": 64}, {"task_order": []}):
        (out / "config.json").write_text(json.dumps({**exported, "run": {**exported["run"], **changes}}))
        with pytest.raises(ValueError, match=f"config.json is not the config.json of a run: config.{[*changes][0]}="):
            read_model(out, "", back)
    assert sorted(tmp_path.rglob("*")) == files


def test_the_exported_model_refuses_a_config_that_does_not_fit(tmp_path):
    _, run = make_run(tmp_path, "llama", "lora")
    write_model(read_run(run), False, tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    config = json.loads(file.read_text())
    for changes in (
        {"kind": "other"}, {"kind": "prompt"}, {"selection": "none"}, {"temperature": 0}, {"temperature": float("nan")},
        {"temperature": "1"}, {"scale": -1.0}, {"tasks": config["tasks"][:2]}, {"tasks": []}, {"tasks": None},
        {"modules": {}}, {"modules": None}, {"modules": {**config["modules"], "more": "x"}},
    ):  # fmt: skip
        file.write_text(json.dumps({**config, **changes}))
        field = "modules" if changes == {"kind": "prompt"} else next(iter(changes))
        with pytest.raises(ValueError, match=f"config.json: {field}="):
            load_by_import(tmp_path / "export")


def test_the_exported_model_refuses_a_base_of_another_width(tmp_path):
    _, run = make_run(tmp_path, "t5", "lora")
    write_model(read_run(run), False, tmp_path / "export")
    make_base("llama", tmp_path / "other")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    changed = {**config, "base": str(tmp_path / "other"), "is_encoder_decoder": False}
    (tmp_path / "export" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="the base model is 32 wide, these blocks are of one with 16"):
        load_by_import(tmp_path / "export")


def test_a_random_base_cannot_leave(tmp_path):
    learned = dataclasses.replace(read_run(make_run(tmp_path, "t5", "lora")[1]))
    learned.config.model.path, learned.config.model.variant = "", "t5-tiny"
    for include_base in (False, True):
        with pytest.raises(ValueError, match="'t5-tiny' with random weights"):
            write_model(learned, include_base, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


def test_the_exported_model_refuses_a_base_of_other_layers(tmp_path):
    export(tmp_path, "llama", "lora")
    make_base("llama grouped", tmp_path / "other")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    (tmp_path / "export" / "config.json").write_text(json.dumps({**config, "base": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match="v_proj: the base model has Linear.*is of another model"):
        load_by_import(tmp_path / "export")


@pytest.mark.parametrize(("family", "kind"), [("t5", "lora"), ("llama", "prompt")])
def test_a_plain_sum_leaves_and_comes_back(tmp_path, family, kind):
    ours, theirs = export(tmp_path, family, kind, method="inc_lora")
    batch = make_rows(family, seed=13)
    np.testing.assert_array_equal(theirs.attention(*tensors(batch)).numpy(), np.ones((5, 3)))
    check_logits(ours, theirs, family)
    read_model(tmp_path / "export", "", tmp_path / "back")
    assert_same_arrays(committed(tmp_path / "back"), committed(tmp_path / "run"))


def test_sequential_lora_leaves_and_cannot_come_back(tmp_path):
    ours, theirs = export(tmp_path, "llama", "lora", method="sequential", disabled_tasks=TASKS[-1])
    batch = make_rows("llama", seed=13)
    tokens, weights = ours.generate(batch, NEW_TOKENS, eos_id=-1)
    assert weights.shape[1] == 1
    found = theirs.generate(*tensors(batch), max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(found[:, batch["source"].shape[1] :].numpy(), tokens)
    with pytest.raises(ValueError, match="sequential.*keeps the block of its last task alone"):
        read_model(tmp_path / "export", "", tmp_path / "back")
