"""Host memory while a model is loaded: at most 1.3 times the model in the type it is held in."""

import json
import os
import subprocess
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file

from tests.gguf_models import add_config, gguf_name
from tests.hf_models import TINY_LLAMA, tensor_shapes

SIZES = {**TINY_LLAMA, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
DEEP = {**SIZES, "vocab_size": 8192, "intermediate_size": 1536, "num_hidden_layers": 22}
# Nearly all of it is one leaf: a second copy of that leaf would show.
WIDE = {**SIZES, "vocab_size": 131072, "intermediate_size": 1024, "tie_word_embeddings": True}

# The peak is counted from after the imports and the start of the backend.
MEASURE = """
import sys
import jax, numpy as np
from sira_jax.checkpoints import load_base_model
jax.device_put(np.zeros(3)).block_until_ready()

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

before = peak()
model = load_base_model(sys.argv[1], param_dtype=sys.argv[2])
used = peak() - before
held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
assert held > 0.9 * int(sys.argv[3]), held
print(used / held)
"""


def measure(path, param_dtype: str, size: int, cache) -> float:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "SIRA_CACHE": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), param_dtype, str(size)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


linux_only = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="reads the peak from /proc"
)


@linux_only
@pytest.mark.parametrize(
    ("config", "stored", "held"),
    [
        (DEEP, np.float32, "float32"),
        (DEEP, ml_dtypes.bfloat16, "float32"),
        (WIDE, np.float32, "float32"),
    ],
    ids=["as stored", "converted", "one large leaf"],
)
def test_folder(tmp_path, config, stored, held):
    rng = np.random.default_rng(0)
    weights = {
        name: rng.random(shape, np.float32).astype(stored)
        for name, shape in tensor_shapes(config).items()
    }
    size = sum(array.size for array in weights.values()) * 4
    assert size > 280e6
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert measure(tmp_path, held, size, tmp_path) < 1.3


@linux_only
def test_gguf_first_and_cached(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_config(writer, DEEP)
    rng = np.random.default_rng(0)
    size = 0
    for name, shape in tensor_shapes(DEEP).items():
        size += 2 * int(np.prod(shape))
        if len(shape) == 1:
            writer.add_tensor(gguf_name(name), np.ones(shape, np.float32))
            continue
        # Blocks of Q8_0 made directly: a float16 scale, then 32 signed bytes.
        blocks = rng.integers(0, 256, (shape[0], shape[1] // 32, 34), np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        rows = blocks.reshape(shape[0], -1)
        writer.add_tensor(gguf_name(name), rows, raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for _ in range(2):
        assert measure(path, "bfloat16", size, tmp_path / "cache") < 1.3
    # Without a cache the file itself is streamed.
    (tmp_path / "file").write_text("no folder")
    assert measure(path, "bfloat16", size, tmp_path / "file") < 1.3
