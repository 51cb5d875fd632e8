"""The commands from-hf, from-gguf, from-t5x and to-t5x: what they write loads as the original does, bit for bit."""

import json

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from sapt_jax import sharding
from sapt_jax.convert.__main__ import main
from sapt_jax.models.families import load_params, make_model, read_shape
from sapt_jax.pretrained import base_checkpoint, rules, t5_weights
from sapt_jax.pretrained.loading import read_model_config
from sapt_jax.pretrained.tokenizer import load_tokenizer
from tests.helpers.gguf_files import METADATA, as_stored, weights, write_gguf
from tests.helpers.hf_files import LLAMA_CONFIG, hf_tensors, write_hf
from tests.helpers.t5x_files import T5_CONFIG, assert_loads_as, make_params, scanned, unscanned, write_t5x
from tests.helpers.tiny_tokenizers import (
    CHAT_TEMPLATE,
    PRE_TOKENIZERS,
    TEXTS,
    bpe_fields,
    train_bpe,
    train_sentencepiece,
    under,
)
from tests.helpers.told import error_of


@pytest.fixture
def out(tmp_path):
    return tmp_path / "bases" / "base"


def t5_folder(folder, dtype=np.float32):
    """A Hugging Face T5 whose config calls the head tied, as transformers 5 writes it, though it is not."""
    folder.mkdir()
    params = unflatten_dict(make_params(seed=1, dtype=dtype), sep="/")
    save_file(rules.to_foreign(params, t5_weights.hf_table(T5_CONFIG)), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(T5_CONFIG))
    return folder


def llama_folder(folder, seed=2):
    folder.mkdir()
    write_hf(folder, hf_tensors(seed), shards=2, config=LLAMA_CONFIG)
    return folder


def load(path, dtype):
    """What a run loads from a path."""
    shape = read_shape(str(path), "")
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return shape, load_params(make_model(shape, "float32", "none"), str(path), dtype, mesh, seed=0)


def assert_same(path, other, dtype="float32"):
    (shape, want), (other_shape, got) = load(path, dtype), load(other, dtype)
    assert shape == other_shape
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for one, two in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert one.dtype == two.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def same_tokenizer(path, other):
    one, two = load_tokenizer(path), load_tokenizer(other)
    for text in TEXTS:
        assert one.encode(text) == two.encode(text)
        assert one.decode(one.encode(text)) == two.decode(one.encode(text))
    fields = ("vocab_size", "pad_id", "eos_id", "bos_id", "add_bos")
    assert [getattr(one, name) for name in fields] == [getattr(two, name) for name in fields]
    assert one.has_chat_template == two.has_chat_template
    if one.has_chat_template:
        assert one.encode_chat((("user", "the task"),)) == two.encode_chat((("user", "the task"),))


@pytest.mark.slow
@pytest.mark.parametrize("make", (t5_folder, llama_folder))
def test_from_hf(tmp_path, out, make, capsys):
    source = make(tmp_path / "hf")
    main(["from-hf", f"--model={source}", f"--out={out}"])
    assert_same(source, out)
    assert [child.name for child in out.parent.iterdir()] == ["base"]
    printed = capsys.readouterr().out
    assert "has no tokenizer): name one in config.model.tokenizer" in printed
    assert "100%" in printed or "/" in printed.splitlines()[0], "no bar of progress"


def test_a_base_may_be_stored_in_half_the_bytes(tmp_path, out):
    source = t5_folder(tmp_path / "hf")
    main(["from-hf", f"--model={source}", f"--out={out}", "--dtype=bfloat16"])
    assert_same(source, out, dtype="bfloat16")
    arrays = base_checkpoint.open_params(out).arrays
    assert {array.store.dtype.numpy_dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_the_tokenizer_is_copied(tmp_path, out):
    source = llama_folder(tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(train_sentencepiece("llama", tmp_path).read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    main(["from-hf", f"--model={source}", f"--out={out}"])
    same_tokenizer(source, out)


def test_a_chat_template_of_its_own_file_is_copied(tmp_path, out):
    source = llama_folder(tmp_path / "hf")
    train_bpe(PRE_TOKENIZERS["smollm"]).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|start|>", "eos_token": "<|end|>"}))
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    main(["from-hf", f"--model={source}", f"--out={out}"])
    assert load_tokenizer(out).has_chat_template
    same_tokenizer(source, out)


@pytest.mark.parametrize("pre", ("smollm", "llama-bpe"))
def test_from_gguf(tmp_path, out, pre):
    tokenizer = bpe_fields(train_bpe(PRE_TOKENIZERS[pre]), pre, padding_token_id=2)
    tokenizer["tokenizer.chat_template"] = CHAT_TEMPLATE
    stored = as_stored(weights(seed=3, tied=False))
    file = write_gguf(tmp_path / "model.gguf", METADATA | tokenizer, stored)
    main(["from-gguf", f"--model={file}", f"--out={out}"])
    assert_same(file, out)
    same_tokenizer(file, out)


def test_from_gguf_with_sentencepiece(tmp_path, out):
    model = sentencepiece.SentencePieceProcessor(model_file=str(train_sentencepiece("llama", tmp_path)))
    kinds = [gguf.TokenType.BYTE if model.is_byte(i) else gguf.TokenType.NORMAL for i in range(len(model))]
    kinds[:3] = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokenizer = under(
        {
            "model": "llama",
            "tokens": [model.id_to_piece(i) for i in range(len(model))],
            "scores": [model.get_score(i) for i in range(len(model))],
            "token_type": [int(kind) for kind in kinds],
            "unknown_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )
    file = write_gguf(tmp_path / "m.gguf", METADATA | tokenizer, weights(seed=4))
    main(["from-gguf", f"--model={file}", f"--out={out}"])
    same_tokenizer(file, out)


def test_from_gguf_without_a_vocabulary(tmp_path, out, capsys):
    file = write_gguf(tmp_path / "model.gguf", METADATA, as_stored(weights(seed=5)))
    main(["from-gguf", f"--model={file}", f"--out={out}"])
    assert_same(file, out)
    assert "without a tokenizer" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "bias_per_layer"), ((unscanned, False), (scanned, False), (scanned, True)))
def test_from_t5x(tmp_path, out, layout, bias_per_layer):
    arrays = layout(make_params(seed=6, bias_per_layer=bias_per_layer))
    source = write_t5x(tmp_path / "checkpoint_3", arrays)
    main(["from-t5x", f"--model={source}", f"--out={out}"])
    assert_same(source, out)
    assert "scanned" not in json.loads((out / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_to_t5x_and_back(tmp_path, out, dtype):
    source = t5_folder(tmp_path / "hf", dtype=np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    checkpoint = tmp_path / "checkpoint_1100"
    main(["to-t5x", f"--model={source}", f"--out={checkpoint}", f"--dtype={dtype}"])
    main(["from-t5x", f"--model={checkpoint}", f"--out={out}", f"--dtype={dtype}"])
    assert_same(source, out, dtype=dtype)


@pytest.mark.slow
def test_to_t5x_takes_layers_apart(tmp_path, out):
    params = make_params(seed=7)
    source = write_t5x(tmp_path / "scanned", scanned(params))
    main(["from-t5x", f"--model={source}", f"--out={out}"])
    for origin, checkpoint in ((source, tmp_path / "checkpoint_1"), (out, tmp_path / "checkpoint_2")):
        main(["to-t5x", f"--model={origin}", f"--out={checkpoint}"])
        assert_loads_as(checkpoint, params)
        assert not read_model_config(checkpoint)["scanned"]


def test_outputs_that_t5x_cannot_scale_are_refused(tmp_path, out):
    source = t5_folder(tmp_path / "hf")
    (source / "config.json").write_text(json.dumps(T5_CONFIG | {"scale_decoder_outputs": True}))
    assert "T5X scales the decoder's outputs" in error_of(main, "to-t5x", f"--model={source}", f"--out={out}")


def test_mistakes_are_told_and_nothing_is_left(tmp_path, out):
    t5_hf, llama_hf = t5_folder(tmp_path / "t5"), llama_folder(tmp_path / "llama")
    file = write_gguf(tmp_path / "m.gguf", METADATA, as_stored(weights(seed=8)))
    to = f"--out={out}"
    assert error_of(main, "from-hf", f"--model={tmp_path / 'absent'}", to).startswith(
        f"error: {tmp_path / 'absent'} does not exist"
    )
    assert error_of(main, "from-t5x", f"--model={t5_hf}", to) == (
        f"error: from-t5x reads a T5X checkpoint; {t5_hf} is a Hugging Face model folder: use from-hf"
    )
    assert error_of(main, "from-hf", f"--model={file}", to).endswith("is a .gguf file: use from-gguf")
    assert f"{llama_hf} is of model_type 'llama': T5X has t5, mt5, umt5 only" in error_of(
        main, "to-t5x", f"--model={llama_hf}", to
    )
    (llama_hf / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"model_type": "bert"}))
    assert "model_type 'bert' is not supported" in error_of(main, "from-hf", f"--model={llama_hf}", to)
    (llama_hf / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"intermediate_size": 12}))
    assert f"{llama_hf} does not hold the weights of this model" in error_of(main, "from-hf", f"--model={llama_hf}", to)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    main(["from-hf", f"--model={t5_hf}", to])
    before = sorted(out.rglob("*"))
    for command in ("from-hf", "to-t5x"):
        assert error_of(main, command, f"--model={t5_hf}", to) == (
            f"error: {out} exists: choose another folder or remove it"
        )
    assert "is one already" in error_of(main, "from-hf", f"--model={out}", f"--out={tmp_path / 'second'}")
    assert sorted(out.rglob("*")) == before


def test_a_stopped_conversion_leaves_nothing(tmp_path, out, monkeypatch):
    source = t5_folder(tmp_path / "hf")
    read = rules.Parameter.read

    def stop(parameter, place):
        if parameter.rule.path.endswith("wo/kernel"):
            raise KeyboardInterrupt
        return read(parameter, place)

    monkeypatch.setattr(rules.Parameter, "read", stop)
    for command in ("from-hf", "to-t5x"):
        with pytest.raises(KeyboardInterrupt):
            main([command, f"--model={source}", f"--out={out}"])
        assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("command", ("from-hf", "from-gguf", "from-t5x", "to-t5x"))
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert f"example:\n  python -m sapt_jax.convert {command} --model=" in printed and "--out=" in printed
