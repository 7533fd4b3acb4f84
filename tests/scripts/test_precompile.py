"""scripts/precompile.py: what it compiles is what trains and decodes; the floor; mistakes; on a topology (slow)."""

import dataclasses
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scripts import precompile_measure, precompile_topology
from scripts.chips import CHIPS
from scripts.hlo_collectives import Collective
from scripts.hlo_text import Array
from scripts.precompile import make_parser
from scripts.precompile_measure import beyond_floor, measure, needed_flops, shard_bytes
from scripts.precompile_programs import Setting, decode_program, train_program
from scripts.precompile_report import against, as_data, format_program, format_ratios
from scripts.precompile_setting import make_setting, parse_adapters, parse_mesh
from sira_jax.adapters import LoRAConfig, SiRAConfig
from sira_jax.errors import ConfigError
from sira_jax.models import make_model
from sira_jax.training import partitioning
from sira_jax.training.config import MeshConfig
from sira_jax.training.decoding import prefill
from tests.tiny import decoder_config, decoder_params, make_batch
from tests.tiny_t5 import t5_config

REPOSITORY = Path(__file__).parents[2]
V5E = CHIPS["v5e"]
SIRA = SiRAConfig(num_experts=4, num_selected_experts=2, rank=2)


def setting(config=None, **changes) -> Setting:
    mesh_config = MeshConfig()
    fields = {
        "config": config or decoder_config(remat_policy="full"),
        "mesh": partitioning.make_mesh(mesh_config, jax.devices()[:1]),
        "rules": partitioning.make_rules(mesh_config),
        "batch_size": 4,
        "length": 16,
        "target_length": 16,
        "accumulation_steps": 1,
        "loss_chunk_size": 0,
        "decode_batch": 4,
        "cache_length": 16,
    }
    return Setting(**fields | changes)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


@functools.cache
def measured(name):
    adapter = {"floor": None, "sira": SIRA}[name]
    one = setting()
    return measure(name, train_program(one, adapter), one.mesh, V5E)


def test_the_floors_loss_is_the_frozen_models_and_its_gradient_reaches_the_embeddings():
    one = setting()
    model = make_model(one.config)
    params = decoder_params(model)
    batch = make_batch([(5, 3), (7,), (4, 2, 2), (8,)], 16)
    del batch["task_ids"]
    program = train_program(one, None)
    scale, metrics = program.jitted(jnp.float32(1), params, batch)

    def loss(scale):
        table = {"embedding": params["token_embedder"]["embedding"] * scale}
        # The logits of this model reuse the table, and are not scaled.
        features = model.apply(
            {"params": params | {"token_embedder": table}}, batch, method="features"
        )
        logits = model.apply({"params": params}, features, method="logits")
        nats = -jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["decoder_target_tokens"][..., None], axis=-1
        )[..., 0]
        weights = batch["decoder_loss_weights"]
        return jnp.sum(nats * weights) / jnp.sum(weights)

    expected, gradient = jax.value_and_grad(loss)(jnp.float32(1))
    assert abs(gradient) > 1e-3
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(1 - scale, gradient, rtol=1e-4)


@pytest.mark.slow
def test_the_floor_in_microbatches_is_the_floor():
    model = make_model(decoder_config())
    params = decoder_params(model)
    batch = make_batch([(5, 3), (7,), (4, 2, 2), (8,)], 16)
    results = [
        train_program(setting(accumulation_steps=steps), None).jitted(1.0, params, batch)
        for steps in (1, 2)
    ]
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_train_step_takes_what_the_pipeline_makes_and_gives_back_its_state():
    program = train_program(setting(), SIRA)
    state, frozen, batch = program.order
    made = make_batch([(5, 3), (7,), (4, 2, 2), (8,)], 16)
    assert shapes(batch) == shapes(made)
    new, _ = jax.eval_shape(program.jitted, state, frozen, batch)
    assert shapes(new) == shapes(state)
    assert not [
        path for path in jax.tree_util.tree_leaves_with_path(frozen) if "adapter" in str(path)
    ]


@pytest.mark.parametrize("adapter", [pytest.param(None, marks=pytest.mark.slow), SIRA])
def test_the_decode_step_goes_on_from_a_prompts_cache(adapter):
    one = setting()
    model = make_model(one.config, adapter)
    params = decoder_params(model)
    program = decode_program(one, adapter)
    tokens = np.random.default_rng(0).integers(1, 23, (4, 9)).astype(np.int32)
    full = {"decoder_input_tokens": tokens}
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    prompt = {
        "decoder_input_tokens": tokens[:, :8],
        "decoder_segment_ids": np.ones((4, 8), np.int32),
        "decoder_positions": positions[:, :8],
    }
    _, cache = prefill(model, params, prompt, one.cache_length)
    assert shapes(cache) == shapes(program.inputs["cache"])
    last = {"decoder_input_tokens": tokens[:, 8:], "decoder_positions": positions[:, 8:]}
    _, found = program.jitted(cache, params, last)
    expected = jnp.argmax(model.apply({"params": params}, full)[:, -1], axis=-1)
    np.testing.assert_array_equal(found, expected)


def test_programs_of_an_encoder_decoder_are_traced():
    one = setting(t5_config(), target_length=8)
    for make, adapter in ((train_program, None), (decode_program, SIRA)):
        program = make(one, adapter)
        jax.eval_shape(program.jitted, *program.order)
    assert "encoder_input_tokens" in train_program(one, None).inputs["batch"]


def test_what_is_measured_is_of_the_real_step():
    floor, sira = map(measured, ("floor", "sira"))
    for one in (floor, sira):
        # On one device, and with all layers in one loop: the compiler's count of the loops' bodies.
        assert one.once.flops == pytest.approx(one.reported[0], rel=0.01)
        assert one.cost.flops > 1.5 * one.once.flops
        assert not one.unknown_loops
        assert one.memory.peak > sum(one.memory.inputs.values())
    assert floor.cost.matrix_flops < sira.cost.matrix_flops
    assert floor.memory.inputs["adapter"] == floor.memory.inputs["optimizer"] == 0
    assert sira.memory.inputs["base"] == floor.memory.inputs["base"]


def test_the_floors_products_are_those_of_a_forward_and_a_backward_pass():
    """With recomputation three passes through the layers, two through the logits; of a product one operand's gradient."""
    one = setting()
    block = sum(d_in * d_out for d_in, d_out in one.config.projections.values())
    tokens = one.batch_size * one.length
    # What a block ends with is not needed to go back through it.
    last = one.config.mlp_dim * one.config.emb_dim
    layers = 2 * 2 * (3 * block - last) * tokens
    logits = 2 * 2 * one.config.vocab_size * one.config.emb_dim * tokens
    pairs = one.batch_size * one.length**2 * one.config.num_heads * one.config.head_dim
    # Attention has two products forwards, twice, and four backwards.
    attention = 2 * (2 * 2 + 4) * 2 * pairs
    assert measured("floor").cost.matrix_flops == pytest.approx(
        layers + logits + attention, rel=0.02
    )


def test_needed_flops_are_those_of_no_recomputation():
    one = setting()
    block = sum(d_in * d_out for d_in, d_out in one.config.projections.values())
    matrices = 2 * block + one.config.vocab_size * one.config.emb_dim
    pairs = 2 * one.config.num_heads * one.config.head_dim * 16 * 16
    assert needed_flops(one) == 4 * (4 * matrices * 16 + 12 * pairs)


def test_needed_flops_of_an_encoder_decoder():
    config = t5_config()
    few = setting(config, length=16, target_length=8)
    sizes = {path: d_in * d_out for path, (d_in, d_out) in config.projections.items()}
    read = [path for path in sizes if "encoder_decoder_attention/key" in path or "/value" in path]
    assert any("encoder_decoder" in path for path in read)
    # More tokens for the encoder alone: its own matrices, and the keys and values that the decoder takes from it.
    more = dataclasses.replace(few, length=17)
    of_encoder = sum(size for path, size in sizes.items() if path.startswith("encoder/"))
    cross = sum(sizes[f"decoder/encoder_decoder_attention/{name}"] for name in ("key", "value"))
    matrices = config.num_encoder_layers * of_encoder + config.num_decoder_layers * cross
    heads = config.num_heads * config.head_dim
    pairs = config.num_encoder_layers * (17**2 - 16**2) + config.num_decoder_layers * 8
    expected = few.batch_size * (4 * matrices + 12 * heads * pairs)
    assert needed_flops(more) - needed_flops(few) == pytest.approx(expected)


def collective(elements, kind="all-reduce", times=1, axes=("fsdp",)):
    return Collective(kind, (Array("f32", (elements,)),), 4, axes, times, "here")


def test_collectives_beyond_the_floor_are_told_by_what_they_are_for():
    base = measured("floor")
    floor = dataclasses.replace(base, collectives=[collective(5000), collective(5000)])
    gradient, metric, other = collective(3000, times=2), collective(16), collective(2000)
    gathered = collective(3000, kind="all-gather")
    adapter = dataclasses.replace(
        base,
        trained=frozenset({3000}),
        collectives=[collective(5000), gradient, metric, other, gathered, *[collective(5000)] * 2],
    )
    found = beyond_floor(adapter, floor)
    assert found == [
        (gradient, "gradients"),
        (metric, "metrics"),
        (other, "other"),
        (gathered, "other"),
        # One more than the floor has.
        (collective(5000), "other"),
    ]
    lines = format_ratios("sira", against(adapter, floor))
    assert "collectives beyond the floor's, gradients: 1, 23.44 KiB" in lines
    assert "collectives beyond the floor's, other: 3" in lines


def test_a_routers_gradient_is_known_in_parts_beside_that_of_a():
    """See routing/joined.py: three parts of a router (D, E) beside A's (D, E R)."""
    d_in, d_out = setting().config.projections["attention/q"]
    known = measured("sira").trained
    assert d_in * (4 * 2 + 3 * 4) in known
    assert {d_in * 4, d_in * 4 * 2, d_out * 4 * 2} <= known


def test_padding_makes_no_metric_large():
    base = measured("floor")
    padded = dataclasses.replace(collective(32), arrays=(Array("f32", (32, 16), (1, 0), (8, 128)),))
    adapter = dataclasses.replace(base, collectives=[padded])
    floor = dataclasses.replace(base, collectives=[])
    assert beyond_floor(adapter, floor) == [(padded, "metrics")]


def test_the_report_says_what_does_not_fit_and_what_holds_it_up():
    one = measured("sira")
    data = as_data(one, dataclasses.replace(V5E, memory_bytes=1000), 1, needed_flops(setting()))
    text = format_program(json.loads(json.dumps(data)))
    assert "DOES NOT FIT" in text
    assert "base" in text
    assert f"{data['estimate']['bound']}-bound" in text
    mfu = needed_flops(setting()) / (V5E.peak_flops * one.estimate.step)
    assert f"MFU {mfu:.1%}" in text
    assert "DOES NOT FIT" not in format_program(as_data(one, V5E, 1, None))


def test_bytes_of_a_shard():
    one = setting()
    everywhere = partitioning.replicated(one.mesh)
    tree = {
        "a": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16, sharding=everywhere),
        "b": jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    }
    assert shard_bytes(tree) == 34


class Device:
    """Stands for a chip at a place of the torus."""

    def __init__(self, *coords):
        self.coords = coords


def test_axes_of_the_torus_that_a_mesh_axis_spans():
    devices = np.empty((4, 2), object)
    for row in range(4):
        for column in range(2):
            devices[row, column] = Device(row % 2, column, row // 2)
    mesh = type("Mesh", (), {"axis_names": ("fsdp", "tensor"), "devices": devices})
    assert precompile_measure.torus_axes(mesh, ("fsdp",)) == 2
    assert precompile_measure.torus_axes(mesh, ("tensor",)) == 1
    assert precompile_measure.torus_axes(mesh, ("fsdp", "tensor")) == 3


def arguments(*more):
    return make_parser().parse_args(["--topology=v5e:2x2", "--model=tiny", "--length=64", *more])


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--model=llama-9"], "model.preset"),
        (["--mesh=fsdp"], "--mesh"),
        (["--mesh=rows=2"], "--mesh"),
        (["--mesh=fsdp=two"], "--mesh"),
        (["--mesh=fsdp=3"], "mesh="),
        (["--layers=3"], "--layers"),
        (["--length=257"], "--length"),
        (["--cache_length=300"], "--cache_length"),
        (["--batch_size=3", "--accumulation_steps=2"], "--accumulation_steps"),
    ],
)
def test_mistakes_in_the_setting(more, field):
    with pytest.raises(ConfigError, match=re.escape(field)):
        make_setting(arguments(*more), jax.devices()[:1])


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("lorra", "--adapters"),
        ("lora:rank", "--adapters"),
        ("lora:rank=0", "adapter.rank"),
        ("lora:width=3", "width"),
        ("lora:targets=nowhere", "adapter.targets"),
    ],
)
def test_mistakes_in_adapters(text, field):
    with pytest.raises(ConfigError, match=field):
        parse_adapters([text], setting())


@pytest.mark.parametrize(
    "more",
    [["--layers=0"], ["--programs=eval"], ["--remat=some"], ["--dtype=float8"], ["--speed=1"]],
)
def test_mistakes_of_the_command_line_end_with_one_line(more, capsys):
    with pytest.raises(SystemExit) as end:
        arguments(*more)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_meshes():
    assert parse_mesh("") == MeshConfig(data=1, fsdp=-1)
    assert parse_mesh("fsdp=4,tensor=2") == MeshConfig(data=1, fsdp=4, tensor=2)
    assert parse_mesh("data=-1") == MeshConfig(data=-1)


def test_adapters_are_named_as_they_are_written():
    text = "lora:rank=2:targets=q"
    assert parse_adapters([text], setting()) == {text: LoRAConfig(rank=2, targets="q")}


def test_without_libtpu_the_script_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(precompile_topology, "find_library", lambda: None)
    with pytest.raises(ConfigError, match="make precompile-setup"):
        precompile_topology.describe("v5e:2x2")


def test_the_library_is_looked_for_where_it_may_be(monkeypatch, tmp_path):
    monkeypatch.setattr(precompile_topology, "FOLDER", tmp_path)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(precompile_topology.importlib.util, "find_spec", lambda name: None)
    assert precompile_topology.find_library() is None
    library = tmp_path / "libtpu" / "libtpu.so"
    library.parent.mkdir()
    library.touch()
    assert precompile_topology.find_library() == library
    other = tmp_path / "other.so"
    other.touch()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(other))
    assert precompile_topology.find_library() == other


def test_the_makefile_installs_the_version_that_jax_names():
    named = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
    (version,) = re.findall(r"libtpu(==[\d.*]+)", named[0])
    assert f"'libtpu{version}'" in (REPOSITORY / "Makefile").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    precompile_topology.find_library() is None, reason="needs libtpu: make precompile-setup"
)
def test_a_small_model_compiles_for_a_small_topology(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "scripts/precompile.py", "--topology=v5e:2x4", "--model=tiny"]
    command += ["--mesh=fsdp=4,tensor=2", "--batch_size=16", "--length=128", f"--json={out}"]
    command += ["--adapters", "sira:num_experts=4:num_selected_experts=2", "lora:rank=4"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["chips"] == 8
    for programs in result["programs"].values():
        assert len(programs) == 3
        for data in programs.values():
            assert 0 < data["peak_bytes"] < data["memory_bytes"]
            assert data["estimate"]["step_s"] > 0
            assert not data["unknown_loops"]
            assert data["check_once"]["flops"] == pytest.approx(1, rel=0.05)
            assert data["collectives"]
    assert (
        "other"
        not in result["programs"]["train"]["lora:rank=4"]["over_floor"]["collectives_beyond"]
    )


@pytest.mark.slow
@pytest.mark.skipif(
    precompile_topology.find_library() is None, reason="needs libtpu: make precompile-setup"
)
def test_an_unknown_topology_ends_with_one_line():
    command = [sys.executable, "scripts/precompile.py", "--topology=v5e:3x5", "--model=tiny"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --topology='v5e:3x5'")
