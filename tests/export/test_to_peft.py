"""PEFT adapters of a run, loaded by peft onto transformers' base model, give our logits."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="adapters are loaded by PyTorch")
peft = pytest.importorskip("peft", reason="adapters are loaded by Hugging Face's peft")
transformers = pytest.importorskip("transformers", reason="adapters are put on one of its models")

from sapt_jax.export.learned import read_run  # noqa: E402
from sapt_jax.export.to_peft import write_all, write_mixture, write_task  # noqa: E402
from tests.helpers.learned_runs import ALPHA, EVERYWHERE, PROMPT, RANK, TASKS, Ours, make_rows, make_run  # noqa: E402

pytestmark = pytest.mark.slow

WEIGHTS = (0.2, 0.5, 0.3)


def their_logits(base, adapter, family, batch):
    """Logits that predict the target, of a fresh base model with an adapter."""
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(base), adapter).eval()
    source, mask = torch.tensor(batch["source"]).long(), torch.tensor(batch["source_mask"]).long()
    target = torch.tensor(batch["target"]).long()
    with torch.no_grad():
        if family == "t5":
            labels = target.masked_fill(~torch.tensor(batch["target_mask"]), -100)
            return model(input_ids=source, attention_mask=mask, labels=labels).logits.numpy()
        ids = torch.cat([source, target], dim=1)
        mask = torch.cat([mask, torch.ones_like(target)], dim=1)
        options = {} if "PROMPT" in str(model.active_peft_config.peft_type) else {"position_ids": mask.cumsum(1) - 1}
        logits = model(input_ids=ids, attention_mask=mask, **options).logits.numpy()
    return logits[:, -target.shape[1] - 1 : -1]


@pytest.mark.parametrize(
    ("family", "kind"), [("t5", "lora"), ("t5", "prompt"), ("llama grouped", "lora"), ("llama grouped", "prompt")]
)
def test_logits(tmp_path, family, kind):
    base, run = make_run(tmp_path, family, kind)
    ours = Ours(run)
    # peft leaves a prompted LLaMA's positions to transformers, which then count padding.
    batch = make_rows(family, seed=3, rows=1 if kind == "prompt" and family != "t5" else 3)
    write_all(ours.learned, tmp_path / "all")
    write_mixture(ours.learned, WEIGHTS, tmp_path / "mixture")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(TASKS)
    real, seen = batch["target_mask"], []
    for folder, weights in [
        *((tmp_path / "all" / task, ours.learned.weights_of(task)) for task in TASKS),
        (tmp_path / "mixture", np.array(WEIGHTS, np.float32)),
    ]:
        wanted = ours.logits(batch, weights)[real]
        found = their_logits(tmp_path / "base", folder, family, batch)[real]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert all(np.abs(wanted - other).max() > 1e-2 for other in seen), "two adapters do the same"
        seen.append(wanted)


@pytest.mark.parametrize("family", ["t5", "llama grouped"])
def test_blocks_on_every_kernel(tmp_path, family):
    _, run = make_run(tmp_path, family, "lora", **EVERYWHERE)
    ours, batch = Ours(run), make_rows(family, seed=3)
    write_mixture(ours.learned, WEIGHTS, tmp_path / "mixture")
    real, wanted = batch["target_mask"], ours.logits(batch, np.array(WEIGHTS, np.float32))
    found = their_logits(tmp_path / "base", tmp_path / "mixture", family, batch)
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "layer", "names"),
    [
        ("decoder/.*/wo", 2, ["DenseReluDense.wo"]),
        ("decoder/.*/encoder_decoder_attention/(key|out)", 1, ["EncDecAttention.k", "EncDecAttention.o"]),
    ],
)
def test_a_name_that_occurs_elsewhere(tmp_path, targets, layer, names):
    """The adapter goes on what was adapted and on nothing else that is called so."""
    _, run = make_run(tmp_path, "t5", "lora", **{"pet.targets": f"{targets}/kernel"})
    ours, batch = Ours(run), make_rows("t5", seed=3)
    write_mixture(ours.learned, WEIGHTS, tmp_path / "mixture")
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "mixture").targeted_module_names
    wanted = {f"decoder.block.{number}.layer.{layer}.{name}" for number in range(2) for name in names}
    assert set(adapted) == wanted and len(adapted) == len(wanted)
    real, wanted = batch["target_mask"], ours.logits(batch, np.array(WEIGHTS, np.float32))
    found = their_logits(tmp_path / "base", tmp_path / "mixture", "t5", batch)
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)


def test_a_sum_of_blocks_needs_no_weights(tmp_path):
    _, run = make_run(tmp_path, "llama", "lora", method="inc_lora")
    ours, batch = Ours(run), make_rows("llama", seed=3)
    write_mixture(ours.learned, None, tmp_path / "mixture")
    real, wanted = batch["target_mask"], ours.logits(batch, np.ones(3, np.float32))
    found = their_logits(tmp_path / "base", tmp_path / "mixture", "llama", batch)
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)
    # A part of the sum as well.
    np.testing.assert_array_equal(ours.learned.mixture((1, 0, 1)), [1, 0, 1])


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_what_the_folder_says(tmp_path, kind):
    _, run = make_run(tmp_path, "t5", kind)
    learned = read_run(run)
    write_task(learned, TASKS[1], tmp_path / "one")
    write_mixture(learned, WEIGHTS, tmp_path / "mixture")
    one, mixture = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("one", "mixture"))
    assert one["base_model_name_or_path"] == str(tmp_path / "base") and one["task_type"] == "SEQ_2_SEQ_LM"
    if kind == "lora":
        assert (one["r"], one["lora_alpha"], one["target_modules"]) == (RANK, ALPHA, ["q", "v"])
        assert (mixture["r"], mixture["lora_alpha"]) == (RANK * len(TASKS), ALPHA * len(TASKS))
    else:
        assert one["num_virtual_tokens"] == mixture["num_virtual_tokens"] == PROMPT
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_bad_arguments(tmp_path):
    _, run = make_run(tmp_path, "llama", "lora")
    learned, out = read_run(run), tmp_path / "out"
    with pytest.raises(ValueError, match="no block of task 'fourth'; it has first, second, third"):
        write_task(learned, "fourth", out)
    for weights, message in [
        ((0.5, 0.5), "2 weights for 3 blocks: give one for each of first, second, third"),
        ((0.5, 0.5, 0.5), "sum to 1.5, and must sum to 1"),
        ((1.5, -0.5, 0.0), "must not be negative"),
        ((float("nan"), 0.5, 0.5), "must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_mixture(learned, weights, out)
    assert not list(tmp_path.glob("out*"))
    out.mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        write_all(learned, out)
