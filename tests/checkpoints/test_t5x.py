"""Checkpoints in T5X's format, written by these tests."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec

from sira_jax.checkpoints.t5x import T5XSource, find_checkpoint, load_t5x
from sira_jax.errors import ModelFileError
from tests.checkpoints.spiece import train
from tests.checkpoints.t5x_files import t5x_weights, write_checkpoint
from tests.tiny_t5 import t5_config


def leaf(params, path):
    for name in path:
        params = params[name]
    return np.asarray(params)


def assert_holds(params, config, weights):
    """Every array of the checkpoint is where our tree has it, and no other leaf is there."""
    seen = 0
    for path, array in weights.items():
        stack, *inner = path
        if inner[:1] == [stack]:
            layers = [(layer, inner[1:], array[:, layer]) for layer in range(array.shape[1])]
        elif inner[0].startswith("layers_"):
            layers = [(int(inner[0].removeprefix("layers_")), inner[1:], array)]
        else:
            np.testing.assert_array_equal(leaf(params, path), array)
            seen += array.size
            continue
        for layer, below, own in layers:
            if config.scan_layers:
                found = leaf(params, (stack, "layers", *below))[layer]
            else:
                found = leaf(params, (stack, f"layers_{layer}", *below))
            # The scalable T5's kernels have an axis of heads.
            np.testing.assert_array_equal(found, own.reshape(found.shape))
            seen += own.size
    assert sum(x.size for x in jax.tree.leaves(params)) == seen


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("scanned", [True, False], ids=["scalable", "minimal"])
def test_both_layouts_are_read_into_both(tmp_path, scanned, scan_layers):
    config = t5_config(scan_layers=scan_layers, relpos_per_layer=scanned)
    weights = t5x_weights(config, scanned)
    inline = [path for path in weights if path[-1] == "scale"]
    folder = write_checkpoint(tmp_path / "checkpoint_7", weights, inline=inline)
    model = load_t5x(folder, config)
    assert model.config == config
    assert_holds(model.params, config, weights)
    assert (model.special.eos_ids, model.special.pad_id) == ((1,), 0)


@pytest.mark.parametrize("inline", [True, False])
def test_rows_are_read_across_heads(tmp_path, inline):
    """Large arrays are read a few rows at a time, which need not end where a head does."""
    weights = t5x_weights(t5_config(), scanned=True)
    folder = write_checkpoint(tmp_path / "checkpoint_1", weights, inline=weights if inline else ())
    source = T5XSource(folder)
    for name in ("out", "query"):
        expected = weights["decoder", "decoder", "self_attention", name, "kernel"][:, 1]
        expected = expected.reshape((12, 8) if name == "out" else (8, 12))
        stored = f"decoder/layers_1/self_attention/{name}/kernel"
        assert source.shapes[stored] == expected.shape
        for start, stop in ((0, 3), (3, 8), (5, 6), (4, 8)):
            np.testing.assert_array_equal(
                source.read_rows(stored, start, stop), expected[start:stop]
            )


def test_t5_1_0_in_bfloat16_from_a_bucket(tmp_path):
    """Public checkpoints were written to a bucket; what matters is that the arrays lie beside the file."""
    config = t5_config(mlp_activations=("relu",), tie_embeddings=True)
    weights = t5x_weights(config, dtype=ml_dtypes.bfloat16)
    folder = write_checkpoint(tmp_path / "checkpoint_1", weights, driver="gcs")
    model = load_t5x(folder, config)
    assert model.params["token_embedder"]["embedding"].dtype == np.float32
    assert_holds(model.params, config, weights)
    held = load_t5x(folder, t5_config(**vars(config) | {"param_dtype": "bfloat16"}))
    assert held.params["token_embedder"]["embedding"].dtype == ml_dtypes.bfloat16


def test_leaves_are_sharded_as_they_are_read(tmp_path):
    config = t5_config(relpos_per_layer=True)
    weights = t5x_weights(config, scanned=True)
    folder = write_checkpoint(tmp_path / "checkpoint_1", weights)
    mesh = jax.make_mesh((1,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    model = load_t5x(folder, config, sharding_fn=lambda path, shape: sharding)
    assert_holds(model.params, config, weights)
    assert all(x.sharding == sharding for x in jax.tree.leaves(model.params))


def test_a_checkpoint_is_found_by_its_file_its_folder_or_as_the_newest(tmp_path):
    config = t5_config()
    for step in (9, 100):
        write_checkpoint(tmp_path / f"checkpoint_{step}", t5x_weights(config, seed=step))
    newest = str(tmp_path / "checkpoint_100" / "checkpoint")
    assert find_checkpoint(tmp_path) == newest
    assert find_checkpoint(tmp_path / "checkpoint_100") == newest
    assert find_checkpoint(newest) == newest
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match="no T5X checkpoint: neither"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(ModelFileError, match="nowhere: no such file or folder"):
        find_checkpoint(tmp_path / "nowhere")


def test_the_vocabulary_is_given_beside(tmp_path):
    config = t5_config(vocab_size=384)
    folder = write_checkpoint(tmp_path / "checkpoint_1", t5x_weights(config))
    with pytest.raises(ModelFileError, match="has no tokenizer: give its spiece file"):
        load_t5x(folder, config).tokenizer()
    (tmp_path / "sentencepiece.model").write_bytes(train())
    model = load_t5x(folder, config, spiece=tmp_path / "sentencepiece.model")
    assert model.tokenizer().encode("the fox").ids[-1] == 1
    with pytest.raises(ModelFileError, match=r"no\.model: no such file"):
        load_t5x(folder, config, spiece=tmp_path / "no.model")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    config = t5_config()
    weights = t5x_weights(config)
    return write_checkpoint(tmp_path_factory.mktemp("t5x") / "checkpoint_3", weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_layers": 1}, r"unexpected tensors: decoder/layers_1/"),
        ({"num_encoder_layers": 4}, r"missing tensors: encoder/layers_3/"),
        ({"mlp_dim": 16}, r"encoder/layers_0/mlp/wi_0/kernel is \(8, 12\), expected \(8, 16\)"),
        ({"tie_embeddings": True}, r"unexpected tensors: decoder/logits_dense/kernel"),
        ({"relpos_per_layer": True}, r"missing tensors: encoder/layers_0/relpos_bias/.*unexpected"),
        ({"mlp_activations": ("relu",)}, r"missing tensors: encoder/layers_0/mlp/wi/kernel"),
    ],
)
def test_parameters_of_another_config_are_named(written, changes, message):
    with pytest.raises(ModelFileError, match=rf"{re.escape(str(written))}/checkpoint: .*{message}"):
        load_t5x(written, t5_config(**changes))


def test_scanned_parameters_are_called_as_the_file_does(tmp_path):
    config = t5_config(relpos_per_layer=True)
    weights = t5x_weights(config, scanned=True)
    folder = write_checkpoint(tmp_path / "checkpoint_1", weights)
    with pytest.raises(ModelFileError, match=r"encoder/encoder/mlp/wo/kernel \(layer 0\) is"):
        load_t5x(folder, t5_config(relpos_per_layer=True, mlp_dim=16))


def rewrite(folder, change):
    """Changes what the msgpack file holds."""
    path = folder / "checkpoint"
    content = serialization.msgpack_restore(path.read_bytes())
    path.write_bytes(serialization.msgpack_serialize(change(content) or content))


def set_leaf(value):
    def change(content):
        content["optimizer"]["target"]["token_embedder"]["embedding"] = value

    return change


def change_spec(**fields):
    def change(content):
        spec = content["optimizer"]["target"]["token_embedder"]["embedding"]
        spec |= fields

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [1], "holds a"),
        (lambda content: content | {"version": 1}, "version=1 is not supported"),
        (lambda content: {"version": 3, "optimizer": {}}, "optimizer.target.*is missing"),
        (set_leaf(3.5), "token_embedder/embedding is float, expected an array"),
        (
            set_leaf(np.ones((23, 8), np.uint16)),
            "embedding has dtype uint16, supported are float32",
        ),
        (change_spec(driver="n5"), "embedding must be a zarr array in a folder beside"),
        (change_spec(kvstore={"driver": "file", "path": "../x"}), "must be a zarr array"),
        (change_spec(kvstore={"driver": "file", "path": "/etc"}), "must be a zarr array"),
        (change_spec(kvstore={"driver": "file", "path": "target.no"}), "target.no: no such zarr"),
        (change_spec(metadata={"shape": [23, 9]}), r"of shape \(23, 8\), but .* says \(23, 9\)"),
    ],
)
def test_files_that_are_wrong_are_said_to_be(tmp_path, change, message):
    folder = write_checkpoint(tmp_path / "checkpoint_1", t5x_weights(t5_config()))
    rewrite(folder, change)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_t5x(folder, t5_config())
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, 0.999])
def test_a_truncated_file_is_said_to_be(tmp_path, keep):
    folder = write_checkpoint(tmp_path / "checkpoint_1", t5x_weights(t5_config()))
    data = (folder / "checkpoint").read_bytes()
    size = keep if isinstance(keep, int) else int(keep * len(data))
    (folder / "checkpoint").write_bytes(data[:size])
    with pytest.raises(ModelFileError, match="checkpoint_1/checkpoint: not a"):
        load_t5x(folder, t5_config())


def test_a_damaged_array_is_said_to_be(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint_1", t5x_weights(t5_config()))
    place = folder / "target.token_embedder.embedding"
    (place / "0.0").write_bytes(b"no gzip")
    with pytest.raises(ModelFileError, match="token_embedder/embedding cannot be read"):
        load_t5x(folder, t5_config())
    (place / ".zarray").write_text("{}")
    with pytest.raises(ModelFileError, match="embedding: cannot be opened"):
        load_t5x(folder, t5_config())
