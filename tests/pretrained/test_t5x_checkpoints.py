"""T5X checkpoints: layouts that the test writes itself, the way back, errors, and two real ones."""

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from sapt_jax.pretrained import t5x_checkpoints
from sapt_jax.pretrained.loading import load_pretrained, read_model_config
from tests.helpers.paths import SHARED
from tests.helpers.t5x_files import (
    BUCKETS,
    DECODER_LAYERS,
    ENCODER_LAYERS,
    FF,
    HEAD_DIM,
    HEADS,
    VOCAB,
    WIDTH,
    abstract_params,
    assert_loads_as,
    make_params,
    model_of,
    scanned,
    unscanned,
    write_t5x,
)

REAL = {
    "native": SHARED / "fixtures/t5x/test_t5_1_1_tiny/checkpoint_3",
    "msgpack only": SHARED / "fixtures/t5x/test_t5_tiny.checkpoint_0",
}


@pytest.mark.slow
@pytest.mark.parametrize("driver", ("gfile", "gcs", "file"))
def test_separate_layers(tmp_path, driver):
    params = make_params(seed=1)
    assert_loads_as(write_t5x(tmp_path / "checkpoint_3", unscanned(params), driver=driver), params)


@pytest.mark.slow
@pytest.mark.parametrize("axis", (1, 0))
@pytest.mark.parametrize("bias_per_layer", (False, True))
def test_scanned_layers(tmp_path, axis, bias_per_layer):
    params = make_params(seed=2, bias_per_layer=bias_per_layer)
    path = write_t5x(tmp_path / "checkpoint_3", scanned(params, axis))
    assert read_model_config(path)["scanned"]
    assert model_of(path).config.bias_per_layer == bias_per_layer
    assert_loads_as(path, params)


def test_tied_and_ungated(tmp_path):
    params = make_params(seed=3, gated=False, tied=True)
    path = write_t5x(tmp_path / "checkpoint_3", unscanned(params))
    config = model_of(path).config
    assert config.tie_embeddings and not config.gated and config.activation == "relu"
    assert_loads_as(path, params)


def test_old_file_without_arrays_beside_it(tmp_path):
    params = make_params(seed=4)
    folder = write_t5x(tmp_path / "checkpoint_3", unscanned(params), zarr=False)
    file = (folder / "checkpoint").rename(tmp_path / "model.checkpoint_3")
    assert_loads_as(file, params)


@pytest.mark.slow
def test_without_optimizer_state(tmp_path):
    params = make_params(seed=5)
    assert_loads_as(write_t5x(tmp_path / "checkpoint_3", unscanned(params), state=False), params)


@pytest.mark.slow
def test_bfloat16_kept_as_uint16_before_version_3(tmp_path):
    params = make_params(seed=6, dtype=ml_dtypes.bfloat16)
    arrays = {k: v.view(np.uint16) if v.ndim > 1 else v for k, v in unscanned(params).items()}
    assert_loads_as(write_t5x(tmp_path / "old", arrays, version=2), params, jnp.bfloat16)
    assert_loads_as(write_t5x(tmp_path / "new", unscanned(params)), params, jnp.bfloat16)


def test_config_is_read_off_the_arrays(tmp_path):
    config = model_of(write_t5x(tmp_path / "checkpoint_3", unscanned(make_params(seed=7)))).config
    assert (config.vocab_size, config.d_model, config.d_ff) == (VOCAB, WIDTH, FF)
    assert (config.num_encoder_layers, config.num_decoder_layers) == (ENCODER_LAYERS, DECODER_LAYERS)
    assert (config.num_heads, config.head_dim, config.relative_buckets) == (HEADS, HEAD_DIM, BUCKETS)
    assert config.gated and config.activation == "gelu_new" and not config.tie_embeddings


def test_any_part_of_a_kernel_with_heads_apart():
    rng = np.random.default_rng(8)
    array = rng.standard_normal((2, 5, HEADS, HEAD_DIM))
    for axis, stored in ((2, array), (1, array.transpose(0, 2, 3, 1))):
        view = t5x_checkpoints.StoredArray(stored, heads_axis=axis)
        whole = stored.reshape(view.shape)
        for _ in range(50):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False)) for size in view.shape]
            index = tuple(slice(*map(int, ends)) for ends in bounds)
            np.testing.assert_array_equal(view[index], whole[index])


@pytest.mark.slow
@pytest.mark.parametrize("bias_per_layer", (False, True))
@pytest.mark.parametrize("dtype", (np.float32, ml_dtypes.bfloat16))
def test_written_checkpoint_reads_back(tmp_path, bias_per_layer, dtype):
    params = make_params(seed=9, bias_per_layer=bias_per_layer, dtype=dtype)
    folder = tmp_path / "out" / "checkpoint_1100"
    t5x_checkpoints.write_checkpoint(unflatten_dict(params, sep="/"), folder)
    assert_loads_as(folder, params, jnp.dtype(dtype))
    assert [child.name for child in folder.parent.iterdir()] == ["checkpoint_1100"]
    index = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert index["version"] == 3 and index["optimizer"]["state"]["step"] == 1100


def test_written_checkpoint_has_t5x_layout(tmp_path):
    """Read with nothing but msgpack and TensorStore's own spec from the index."""
    params = make_params(seed=10)
    folder = tmp_path / "checkpoint_0"
    t5x_checkpoints.write_checkpoint(unflatten_dict(params, sep="/"), folder)
    target = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())["optimizer"]["target"]
    spec = target["decoder"]["layers_2"]["encoder_decoder_attention"]["value"]["kernel"]
    assert spec["kvstore"]["path"] == "target.decoder.layers_2.encoder_decoder_attention.value.kernel"
    spec["kvstore"]["path"] = str(folder / spec["kvstore"]["path"])
    stored = tensorstore.open(spec).result().read().result()
    np.testing.assert_array_equal(stored, params["decoder/layers/encoder_decoder_attention/value/kernel"][2])
    norm = target["encoder"]["layers_1"]["pre_mlp_layer_norm"]["scale"]
    np.testing.assert_array_equal(norm, params["encoder/layers/pre_mlp_layer_norm/scale"][1])


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="choose another folder"):
        t5x_checkpoints.write_checkpoint(unflatten_dict(make_params(seed=11), sep="/"), tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
    params = unflatten_dict(make_params(seed=12), sep="/")
    params["decoder"]["prompt"] = np.zeros(3)
    with pytest.raises(ValueError, match="decoder/prompt"):
        t5x_checkpoints.write_checkpoint(params, tmp_path / "checkpoint_1")
    params["decoder"].pop("prompt")
    params["decoder"]["decoder_norm"]["scale"] = np.array([object()] * WIDTH)
    with pytest.raises(Exception):  # noqa: B017
        t5x_checkpoints.write_checkpoint(params, tmp_path / "checkpoint_1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", (unscanned, scanned))
def test_checkpoint_of_another_size_names_both_sides(tmp_path, layout):
    path = write_t5x(tmp_path / "checkpoint_3", layout(make_params(seed=13)))
    target = abstract_params(path)
    target["token_embedder"]["embedding"] = jax.ShapeDtypeStruct((VOCAB + 1, WIDTH), jnp.float32)
    with pytest.raises(ValueError) as error:
        load_pretrained(path, target)
    assert f"token_embedder/embedding is ({VOCAB}, {WIDTH}), the model needs ({VOCAB + 1}, {WIDTH})" in str(error.value)
    assert str(path) in str(error.value)


def test_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        t5x_checkpoints.open_checkpoint(tmp_path)


def test_missing_array_is_named(tmp_path):
    path = write_t5x(tmp_path / "checkpoint_3", unscanned(make_params(seed=14)))
    place = path / "target.encoder.layers_1.mlp.wo.kernel"
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{path} lacks .*target.encoder.layers_1.mlp.wo.kernel"):
        read_model_config(path)


def test_a_gap_between_layers_is_named(tmp_path):
    arrays = unscanned(make_params(seed=15))
    arrays = {name: array for name, array in arrays.items() if not name.startswith("decoder/layers_1/")}
    path = write_t5x(tmp_path / "checkpoint_3", arrays)
    with pytest.raises(ValueError, match="missing: decoder/layers_1/self_attention/query/kernel"):
        load_pretrained(path, abstract_params(path))


@pytest.mark.parametrize(
    ("content", "message"),
    (
        (b"\xc1 no msgpack", "not a T5X checkpoint in msgpack"),
        (flax.serialization.msgpack_serialize({"a": 1}), "holds a"),
    ),
)
def test_broken_index(tmp_path, content, message):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_model_config(tmp_path)


def test_not_a_t5(tmp_path):
    path = write_t5x(tmp_path / "checkpoint_3", {"decoder/layers_0/mlp/wi/kernel": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="it is not a T5 checkpoint"):
        read_model_config(path)


def stored_arrays(path):
    """Every target array of a real checkpoint, read with msgpack and TensorStore alone."""
    file = path / "checkpoint" if path.is_dir() else path
    target = flax.serialization.msgpack_restore(file.read_bytes())["optimizer"]["target"]

    def visit(tree, prefix):
        for name, value in tree.items():
            if isinstance(value, np.ndarray):
                yield prefix + name, value
            elif "kvstore" in value:
                place = {"driver": "file", "path": str(path / value["kvstore"]["path"])}
                yield (
                    prefix + name,
                    tensorstore.open({"driver": "zarr", "kvstore": place}).result().read().result(),
                )
            else:
                yield from visit(value, f"{prefix}{name}/")

    return dict(visit(target, ""))


def put_into_pytorch(arrays, torch, transformers):
    """A PyTorch T5 with T5X's arrays, put in one by one."""
    heads, buckets = arrays["encoder/relpos_bias/rel_embedding"].shape
    vocab, width = arrays["token_embedder/embedding"].shape
    inner = arrays["encoder/layers_0/attention/query/kernel"].shape[1]
    config = transformers.T5Config(
        vocab_size=vocab, d_model=width, d_kv=inner // heads, num_heads=heads, num_layers=2, num_decoder_layers=2,
        d_ff=arrays["encoder/layers_0/mlp/wi_0/kernel"].shape[1], relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(vocab, width))
    left = dict(arrays)

    def put(parameter, name, transpose=True):
        array = left.pop(name)
        with torch.no_grad():
            parameter.copy_(torch.tensor(array.T if transpose else array))

    put(model.shared.weight, "token_embedder/embedding", transpose=False)
    put(model.lm_head.weight, "decoder/logits_dense/kernel")
    for stack, module in (("encoder", model.encoder), ("decoder", model.decoder)):
        put(module.final_layer_norm.weight, f"{stack}/{stack}_norm/scale")
        bias = module.block[0].layer[0].SelfAttention.relative_attention_bias
        put(bias.weight, f"{stack}/relpos_bias/rel_embedding")
        for layer, block in enumerate(module.block):
            at = f"{stack}/layers_{layer}"
            parts = [("attention", "pre_attention_layer_norm", block.layer[0].SelfAttention)]
            if stack == "decoder":
                parts = [
                    ("self_attention", "pre_self_attention_layer_norm", block.layer[0].SelfAttention),
                    (
                        "encoder_decoder_attention",
                        "pre_cross_attention_layer_norm",
                        block.layer[1].EncDecAttention,
                    ),
                ]
            for place, (name, norm, attention) in enumerate(parts):
                put(block.layer[place].layer_norm.weight, f"{at}/{norm}/scale")
                for kernel, projection in zip(
                    ("query", "key", "value", "out"),
                    (attention.q, attention.k, attention.v, attention.o),
                    strict=True,
                ):
                    put(projection.weight, f"{at}/{name}/{kernel}/kernel")
            put(block.layer[-1].layer_norm.weight, f"{at}/pre_mlp_layer_norm/scale")
            for kernel in ("wi_0", "wi_1", "wo"):
                put(getattr(block.layer[-1].DenseReluDense, kernel).weight, f"{at}/mlp/{kernel}/kernel")
    assert not left
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoint_matches_pytorch(name):
    if not REAL[name].exists():
        pytest.skip(f"{REAL[name]} is not there; set SAPT_DATA_DIR to the data folder")
    torch = pytest.importorskip("torch", reason="parity with transformers needs PyTorch")
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    arrays = stored_arrays(REAL[name])
    params = load_pretrained(REAL[name], abstract_params(REAL[name]))
    flat = unscanned({k: np.asarray(v) for k, v in flatten_dict(params, sep="/").items()})
    assert flat.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(flat[key], array, err_msg=key)

    rng = np.random.default_rng(16)
    source, target = rng.integers(2, 32000, (2, 9)), rng.integers(2, 32000, (2, 6))
    source_mask = np.arange(9) < np.array([[9], [5]])
    reference = put_into_pytorch(arrays, torch, transformers)
    with torch.no_grad():
        want = reference(
            input_ids=torch.tensor(source),
            attention_mask=torch.tensor(source_mask).long(),
            labels=torch.tensor(target),
        ).logits.numpy()
    got = model_of(REAL[name]).apply({"params": params}, source, source_mask, target, np.ones_like(target, bool))
    assert np.std(want) > 0.01
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
