"""GGUF files against Hugging Face folders of the same weights."""

import os
import struct

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from sira_jax.checkpoints import load_base_model, read_config
from sira_jax.checkpoints.gguf import GGUFSource, unpermute
from sira_jax.checkpoints.gguf_config import rope_divisors
from sira_jax.errors import ModelFileError
from sira_jax.models.decoder import Decoder
from sira_jax.models.rope import LinearRopeScaling, RopeScaling
from tests.gguf_models import permute, tokenizer_fields, write_gguf
from tests.hf_models import (
    TINY_GEMMA2,
    TINY_GEMMA3,
    TINY_LLAMA,
    TINY_QWEN2,
    TINY_QWEN3,
    assert_same_params,
    weights_by_rule,
    write_folder,
)

# Quantised rows are blocks of 32 values.
LLAMA = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 96}
QWEN2 = {**TINY_QWEN2, "hidden_size": 64, "intermediate_size": 96}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
QWEN3 = {**TINY_QWEN3, **WIDE}
# What llama.cpp takes as given: base 10000 of windowed layers, scale by the head's width, every sixth layer global.
GEMMA2 = {**TINY_GEMMA2, **WIDE, "query_pre_attn_scalar": 32}
GEMMA3 = {
    **TINY_GEMMA3,
    **WIDE,
    "query_pre_attn_scalar": 32,
    "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": 6,
    "num_hidden_layers": 7,
}
ALL = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3, "gemma2": GEMMA2, "gemma3": GEMMA3}
MIXED = {"embed_tokens": Kind.Q8_0, "down_proj": Kind.F16, "v_proj": Kind.BF16, "proj": Kind.Q4_1}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIRA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_equals_the_folder_of_the_same_weights(tmp_path, config, held):
    meant = write_gguf(tmp_path / "a.gguf", config, weights_by_rule(config), MIXED)
    folder = load_base_model(write_folder(tmp_path / "a", config, meant), param_dtype=held)
    first = load_base_model(tmp_path / "a.gguf", param_dtype=held)
    assert first.config == folder.config
    assert_same_params(first.params, folder.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(first.params)} == {jax.numpy.dtype(held)}
    (cached,) = (tmp_path / "cache" / "gguf").iterdir()
    written = cached.stat().st_mtime_ns
    second = load_base_model(tmp_path / "a.gguf", param_dtype=held)
    assert_same_params(second.params, folder.params)
    assert cached.stat().st_mtime_ns == written


def test_a_wrong_order_of_q_and_k_shows(tmp_path):
    """What the loader must not do: the model still runs, its logits are others."""
    weights = weights_by_rule(LLAMA)
    right = load_base_model(write_folder(tmp_path / "right", LLAMA, weights))
    for name in weights:
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                weights[name] = permute(weights[name], heads)
    wrong = load_base_model(write_folder(tmp_path / "wrong", LLAMA, weights))
    batch = {"decoder_input_tokens": np.arange(1, 13)[None]}
    apply = jax.jit(Decoder(right.config).apply)
    logits = [apply({"params": model.params}, batch) for model in (right, wrong)]
    assert np.abs(logits[0] - logits[1]).max() > 0.05


def test_unpermute_inverts_the_converter():
    rows = np.arange(48 * 5).reshape(48, 5)
    stored = permute(rows, 4)
    assert not np.array_equal(stored, rows)
    np.testing.assert_array_equal(unpermute(stored, 12), rows)
    # Within the first head, pairs (0, 6), (1, 7), ... stand side by side.
    np.testing.assert_array_equal(stored[:4, 0], rows[[0, 6, 1, 7], 0])


def test_rows_are_put_in_order_wherever_a_read_starts(tmp_path):
    weights = weights_by_rule(LLAMA)
    write_gguf(tmp_path / "a.gguf", LLAMA, weights)
    source = GGUFSource(str(tmp_path / "a.gguf"))
    name = "model.layers.1.self_attn.k_proj.weight"
    for start, stop in ((0, 32), (3, 5), (15, 17), (31, 32)):
        np.testing.assert_array_equal(
            source.read_rows(name, start, stop), weights[name][start:stop]
        )
    source.close()


def test_explicit_head_width_and_uniform_lists(tmp_path):
    config = {**LLAMA, "head_dim": 24, "counts_by_layer": True}
    weights = weights_by_rule(config)
    write_gguf(tmp_path / "a.gguf", config, weights, metadata={"llama.rope.dimension_count": 24})
    model = load_base_model(tmp_path / "a.gguf")
    assert (model.config.head_dim, model.config.norm_eps) == (24, 1e-5)
    folder = load_base_model(write_folder(tmp_path / "a", config, weights))
    assert_same_params(model.params, folder.params)


def test_a_key_depends_on_the_content_only(tmp_path):
    weights = weights_by_rule(LLAMA)
    write_gguf(tmp_path / "a.gguf", LLAMA, weights)
    load_base_model(tmp_path / "a.gguf")
    cache = tmp_path / "cache" / "gguf"
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    load_base_model(tmp_path / "b.gguf")
    assert len(os.listdir(cache)) == 1
    # One value changes; size and, as far as a test can tell, time stay.
    data = bytearray((tmp_path / "b.gguf").read_bytes())
    data[-4:] = struct.pack("<f", 123.0)
    stat = (tmp_path / "b.gguf").stat()
    (tmp_path / "b.gguf").write_bytes(data)
    os.utime(tmp_path / "b.gguf", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = load_base_model(tmp_path / "b.gguf")
    assert len(os.listdir(cache)) == 2
    assert any(float(leaf.max()) == 123.0 for leaf in jax.tree.leaves(changed.params))


def test_a_damaged_cache_is_written_anew(tmp_path):
    meant = write_gguf(tmp_path / "a.gguf", LLAMA, weights_by_rule(LLAMA), MIXED)
    load_base_model(tmp_path / "a.gguf")
    (cached,) = (tmp_path / "cache" / "gguf").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[:1000])
    model = load_base_model(tmp_path / "a.gguf")
    folder = load_base_model(write_folder(tmp_path / "a", LLAMA, meant))
    assert_same_params(model.params, folder.params)
    assert cached.read_bytes() == whole


def test_loads_without_a_cache_where_none_can_be_written(tmp_path):
    meant = write_gguf(tmp_path / "a.gguf", LLAMA, weights_by_rule(LLAMA), MIXED)
    (tmp_path / "file").write_text("no folder")
    model = load_base_model(tmp_path / "a.gguf", cache_dir=str(tmp_path / "file"))
    folder = load_base_model(write_folder(tmp_path / "a", LLAMA, meant))
    assert_same_params(model.params, folder.params)


def test_rope_factors_become_llama3_scaling(tmp_path):
    config = {**LLAMA, "head_dim": 64, "rope_theta": 500000.0}
    scaling = RopeScaling(factor=32.0)
    factors = rope_divisors(scaling, 500000.0, 64).astype(np.float32)
    assert factors[0] == 1
    assert factors[-1] == 32
    assert len(np.unique(factors)) > 3
    weights = weights_by_rule(config)
    write_gguf(tmp_path / "a.gguf", config, weights, extra={"rope_freqs.weight": factors})
    assert read_config(tmp_path / "a.gguf")[0].rope_scaling == scaling
    assert load_base_model(tmp_path / "a.gguf").config.rope_scaling == scaling
    ones = {"rope_freqs.weight": np.ones(32, np.float32)}
    write_gguf(tmp_path / "b.gguf", config, weights, extra=ones)
    assert read_config(tmp_path / "b.gguf")[0].rope_scaling is None
    other = {"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)}
    write_gguf(tmp_path / "c.gguf", config, weights, extra=other)
    with pytest.raises(ModelFileError, match=r"rope_freqs.weight is not supported.*Llama 3"):
        read_config(tmp_path / "c.gguf")


FIELDS = {
    "linear scaling by less than 1": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.5},
        "rope.scaling.factor=0.5",
    ),
    "caps": ({"llama.final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type='yarn'"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count=8"),
    "part of the head": ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8.*16"),
    "other value width": ({"llama.attention.value_length": 8}, "attention.value_length=8"),
    "window": ({"llama.attention.sliding_window": 4}, "attention.sliding_window=4"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_are_refused(tmp_path, case):
    metadata, message = FIELDS[case]
    write_gguf(tmp_path / "a.gguf", LLAMA, weights_by_rule(LLAMA), metadata=metadata)
    with pytest.raises(ModelFileError, match=message):
        read_config(tmp_path / "a.gguf")


def test_other_architectures_are_refused(tmp_path):
    config = {**LLAMA, "model_type": "gemma"}
    write_gguf(tmp_path / "a.gguf", config, weights_by_rule(LLAMA))
    with pytest.raises(ModelFileError, match=r"architecture='gemma'.*llama, qwen2"):
        load_base_model(tmp_path / "a.gguf")


def test_norms_of_gemma_are_stored_with_their_one(tmp_path):
    """Read as they are, they would be near 1, and the model would add another."""
    weights = weights_by_rule(GEMMA3)
    write_gguf(tmp_path / "a.gguf", GEMMA3, weights)
    source = GGUFSource(str(tmp_path / "a.gguf"))
    names = [name for name in weights if name.endswith("norm.weight")]
    assert len(names) == 7 * 6 + 1
    for name in names:
        np.testing.assert_allclose(source.read_rows(name, 0, 5), weights[name][:5], atol=1e-7)
        assert np.abs(weights[name]).max() < 0.5
    # Nothing else is changed, q and k least of all: they are stored as the decoder rotates them.
    for name in set(weights) - set(names):
        np.testing.assert_array_equal(source.read_rows(name, 3, 9), weights[name][3:9])
    source.close()


def read(path, config, **metadata):
    write_gguf(path / "a.gguf", config, weights_by_rule(config), metadata=metadata)
    return read_config(path / "a.gguf")[0]


def test_fields_of_gemma3(tmp_path):
    plain = read(tmp_path, GEMMA3)
    assert (plain.sliding_window, plain.window_pattern) == (5, (True,) * 5 + (False,))
    assert (plain.rope_theta, plain.local_rope_theta) == (1e6, 10000.0)
    scaling = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    assert read(tmp_path, GEMMA3, **scaling).rope_scaling == LinearRopeScaling(factor=8.0)
    period = {"gemma3.attention.sliding_window_pattern": 2}
    assert read(tmp_path, GEMMA3, **period).window_pattern == (True, False)
    listed = {"gemma3.attention.sliding_window_pattern": [True, True, False] * 2 + [True]}
    assert read(tmp_path, GEMMA3, **listed).window_pattern == (True, True, False)
    base = {"gemma3.rope.freq_base_swa": 500.0}
    assert read(tmp_path, GEMMA3, **base).local_rope_theta == 500.0
    whole = read(tmp_path, {**GEMMA3, "sliding_window": None})
    assert (whole.sliding_window, whole.local_rope_theta) == (None, None)
    with pytest.raises(ModelFileError, match="sliding_window_pattern=0"):
        read(tmp_path, GEMMA3, **{"gemma3.attention.sliding_window_pattern": 0})


@pytest.mark.parametrize(("config", "layers"), [(GEMMA2, 46), (GEMMA3, 62)])
def test_the_largest_gemmas_are_scaled_by_their_width(tmp_path, config, layers):
    """emb_dim / num_heads is 168 and 144 there, which no field says."""
    assert read(tmp_path, config).query_pre_attn_scalar is None
    assert read(tmp_path, {**config, "num_hidden_layers": layers}).query_pre_attn_scalar == 16


def test_caps_and_window_of_gemma2_where_the_file_is_silent(tmp_path):
    silent = {
        key: value
        for key, value in GEMMA2.items()
        if not key.endswith("softcapping") and key != "sliding_window"
    }
    config = read(tmp_path, silent)
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert (config.sliding_window, config.window_pattern) == (4096, (True, False))


def test_tensors_that_do_not_fit_are_named_as_the_file_does(tmp_path):
    weights = weights_by_rule(LLAMA)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    weights["model.layers.0.mlp.up_proj.weight"] = np.zeros((95, 64), np.float32)
    write_gguf(tmp_path / "a.gguf", LLAMA, weights, extra={"spare": np.zeros(3, np.float32)})
    with pytest.raises(ModelFileError) as caught:
        load_base_model(tmp_path / "a.gguf")
    message = str(caught.value)
    assert "missing tensors: blk.1.attn_q.weight;" in message
    assert "unexpected tensors: spare;" in message
    assert "blk.0.ffn_up.weight is (95, 64), expected (96, 64)" in message
    assert not (tmp_path / "cache").exists()


def test_missing_field_and_embedding(tmp_path):
    weights = weights_by_rule(LLAMA)
    write_gguf(tmp_path / "a.gguf", LLAMA, weights)
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"llama.block_count", b"llama.block_xount"))
    with pytest.raises(ModelFileError, match=r"b\.gguf: field llama.block_count is missing"):
        read_config(tmp_path / "b.gguf")
    (tmp_path / "c.gguf").write_bytes(data.replace(b"token_embd", b"token_xmbd"))
    with pytest.raises(ModelFileError, match=r"missing tensors: token_embd.weight"):
        read_config(tmp_path / "c.gguf")


def _header(tensors: int, fields: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


BAD = {
    "empty": (b"", "not a GGUF file"),
    "bad magic": (b"GGJT" + b"\0" * 60, "not a GGUF file: it starts with b'GGJT'"),
    "magic only": (b"GGUF", "truncated"),
    "version 1": (_header(0, 0, version=1), "GGUF version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "more fields than bytes": (_header(0, 2**60), "truncated or damaged"),
    "more tensors than bytes": (_header(2**60, 0), "truncated or damaged"),
    "endless string": (_header(0, 1, struct.pack("<Q", 2**62) + b"\0" * 32), "damaged"),
    "not UTF-8": (_header(0, 1, _string(b"\xff\xfe") + b"\0" * 32), "not UTF-8"),
    "unknown value type": (
        _header(0, 1, _string(b"a.b") + struct.pack("<I", 99) + b"\0" * 16),
        "unknown metadata type 99",
    ),
    "endless list": (
        _header(0, 1, _string(b"a.b") + struct.pack("<IIQ", 9, 4, 2**61) + b"\0" * 16),
        "damaged",
    ),
    "lists of lists": (
        _header(0, 1, _string(b"a.b") + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 32),
        "lists of lists",
    ),
    "unknown quantisation": (
        _header(1, 0, _string(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0) + b"\0" * 64),
        "tensor t has unknown quantisation type 999",
    ),
    "row no multiple of a block": (
        _header(1, 0, _string(b"t") + struct.pack("<IQQIQ", 2, 33, 2, 8, 0) + b"\0" * 128),
        r"tensor t of shape \(2, 33\) cannot be of type Q8_0",
    ),
    "tensor beyond the file": (
        _header(1, 0, _string(b"t") + struct.pack("<IQIQ", 1, 64, 0, 0) + b"\0" * 64),
        "truncated: tensor t ends at byte",
    ),
    "tensor twice": (
        _header(2, 0, (_string(b"t") + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2 + b"\0" * 64),
        "tensor t is listed twice",
    ),
    "no metadata": (_header(0, 0), "general.architecture=None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_clear_error(tmp_path, case):
    content, message = BAD[case]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_base_model(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_file_cut_off_anywhere_is_an_error(tmp_path, share):
    metadata = tokenizer_fields("smollm")
    write_gguf(tmp_path / "a.gguf", LLAMA, weights_by_rule(LLAMA), MIXED, metadata)
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelFileError, match="truncated"):
        load_base_model(tmp_path / "a.gguf")
