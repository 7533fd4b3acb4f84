"""Writes the adapter of a T5X checkpoint as an adapter folder, which scripts/generate.py and scripts/convert.py read.

  python scripts/t5x_export.py --gin_file=models/t5_1_1.gin --gin_file=sizes/t5_1_1_small.gin --gin_file=adapters/sira.gin \\
    --gin_file=runs/export.gin --gin.CHECKPOINT_PATH="'/tmp/run/checkpoint_1000'" --gin.OUTPUT_DIR="'/tmp/adapter'" \\
    --gin.BASE_CHECKPOINT_PATH="'gs://t5-data/pretrained_models/t5x/t5_1_1_small/checkpoint_1000000'"
"""

from absl import flags

from scripts.t5x_launch import guard

_FILES = flags.DEFINE_multi_string("gin_file", None, "Gin files; later ones override.")
_BINDINGS = flags.DEFINE_multi_string("gin_bindings", [], "Gin bindings; --gin.NAME=VALUE too.")
_PATHS = flags.DEFINE_list("gin_search_paths", ["."], "Where gin files are looked for first.")


def main(argv: list[str]) -> None:
    import gin

    from sira_jax.t5x_integration import export
    from sira_jax.t5x_integration.compat import import_t5x

    del argv
    run = gin.configurable(export.export, module="export")
    import_t5x("t5x.gin_utils").parse_gin_flags(_PATHS.value, _FILES.value, _BINDINGS.value)
    run()


def start() -> None:
    from sira_jax.t5x_integration.compat import import_t5x

    import_t5x("t5x.gin_utils").run(main)


if __name__ == "__main__":
    guard(start)
