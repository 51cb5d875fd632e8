"""A base model with a mixture merged into it gives our logits under transformers alone."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="merged models are loaded by PyTorch")
transformers = pytest.importorskip("transformers", reason="merged models are transformers'")

from safetensors.numpy import load_file  # noqa: E402

from sapt_jax.export.learned import read_run  # noqa: E402
from sapt_jax.export.to_hf import write_merged  # noqa: E402
from sapt_jax.pretrained import llama_weights, rules  # noqa: E402
from sapt_jax.pretrained.hf import read_json  # noqa: E402
from tests.helpers import llama_reference, t5_reference  # noqa: E402
from tests.helpers.gguf_files import METADATA, write_gguf  # noqa: E402
from tests.helpers.learned_runs import EVERYWHERE, TASKS, Ours, make_rows, make_run  # noqa: E402

pytestmark = pytest.mark.slow

WEIGHTS = (0.2, 0.5, 0.3)


def their_logits(folder, family, batch):
    if family.startswith("t5"):
        return t5_reference.reference_logits(transformers.AutoModelForSeq2SeqLM.from_pretrained(folder), batch)[0]
    return llama_reference.reference_logits(transformers.AutoModelForCausalLM.from_pretrained(folder), batch)


@pytest.mark.parametrize("family", ["t5", "t5 tied", "llama grouped"])
def test_logits(tmp_path, family):
    _, run = make_run(tmp_path, family, "lora")
    ours = Ours(run)
    batch = make_rows(family, seed=4)
    write_merged(ours.learned, WEIGHTS, tmp_path / "merged")
    real = batch["target_mask"]
    wanted = ours.logits(batch, np.array(WEIGHTS, np.float32))[real]
    np.testing.assert_allclose(their_logits(tmp_path / "merged", family, batch)[real], wanted, atol=1e-4)
    assert np.abs(their_logits(tmp_path / "base", family, batch)[real] - wanted).max() > 0.1
    # Only q and v have changed.
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in after if name.rsplit(".", 2)[1] in ("q", "v", "q_proj", "v_proj")}


@pytest.mark.parametrize("family", ["t5", "llama grouped"])
def test_blocks_on_every_kernel(tmp_path, family):
    _, run = make_run(tmp_path, family, "lora", **EVERYWHERE)
    ours, batch = Ours(run), make_rows(family, seed=4)
    write_merged(ours.learned, WEIGHTS, tmp_path / "merged")
    real, wanted = batch["target_mask"], ours.logits(batch, np.array(WEIGHTS, np.float32))
    np.testing.assert_allclose(their_logits(tmp_path / "merged", family, batch)[real], wanted[real], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "weights"), [("inc_lora", (1.0, 0.0, 1.0)), ("sequential", (1.0,)), ("slao", (1.0,))]
)
def test_a_plain_mixture_needs_no_weights(tmp_path, method, weights):
    """What the method gives every input; a withdrawn task takes no part."""
    _, run = make_run(tmp_path, "llama", "lora", method=method, disabled_tasks=TASKS[1])
    ours, batch = Ours(run), make_rows("llama", seed=6)
    np.testing.assert_array_equal(ours.attention(batch), np.tile(np.float32(weights), (len(batch["source"]), 1)))
    write_merged(ours.learned, None, tmp_path / "merged")
    real, wanted = batch["target_mask"], ours.logits(batch, ours.attention(batch))
    np.testing.assert_allclose(their_logits(tmp_path / "merged", "llama", batch)[real], wanted[real], atol=1e-4)
    write_merged(ours.learned, weights, tmp_path / "given")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "given"))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_gguf_base(tmp_path):
    """The same model as a GGUF file gives the same folder, but for what only its own config.json could say."""
    _, run = make_run(tmp_path, "llama grouped", "lora")
    ours, config = Ours(run), read_json(tmp_path / "base" / "config.json")
    tensors = rules.to_foreign(
        ours.frozen.base,
        llama_weights.gguf_table({**config, "head_dim": config["hidden_size"] // config["num_attention_heads"]}),
    )
    metadata = {
        **METADATA,
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    file = write_gguf(tmp_path / "base.gguf", metadata, tensors)
    write_merged(ours.learned, WEIGHTS, tmp_path / "merged")
    write_merged(read_run(run, str(file)), WEIGHTS, tmp_path / "from gguf")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "from gguf"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    batch = make_rows("llama", seed=5)
    first, second = (their_logits(tmp_path / name, "llama", batch) for name in ("merged", "from gguf"))
    np.testing.assert_allclose(first[batch["target_mask"]], second[batch["target_mask"]], atol=1e-5)


def test_weights_are_stored_as_the_base_is(tmp_path):
    _, run = make_run(tmp_path, "llama", "lora", **{"model.param_dtype": "bfloat16"})
    write_merged(read_run(run), WEIGHTS, tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_merged(tmp_path):
    _, run = make_run(tmp_path, "t5", "prompt")
    with pytest.raises(ValueError, match="a soft prompt goes before the input.*cannot be merged: to-peft"):
        write_merged(read_run(run), WEIGHTS, tmp_path / "merged")
    (tmp_path / "lora").mkdir()
    learned = read_run(make_run(tmp_path / "lora", "t5", "lora")[1])
    with pytest.raises(ValueError, match="'sapt' mixes its blocks anew for each input: give --weights, one for"):
        write_merged(learned, None, tmp_path / "merged")
    with pytest.raises(ValueError, match="2 weights for 3 blocks"):
        write_merged(learned, (0.5, 0.5), tmp_path / "merged")
    learned.config.model.path, learned.config.model.variant = "", "t5-tiny"
    with pytest.raises(ValueError, match="random weights"):
        write_merged(learned, WEIGHTS, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
