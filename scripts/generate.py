"""Generates text, with a trained adapter or without.

  python scripts/generate.py --workdir=runs/sira --prompt="Write the date Wed 2031-07-09 in full in Swahili."
  python scripts/generate.py --workdir=runs/sira --file=prompts.txt > answers.txt
  python scripts/generate.py --workdir=runs/sira                       (asks for prompts)
  python scripts/generate.py --config=configs/experiments/starter.py:sira --checkpoint=none --prompt="..."

A file holds one prompt a line (write \\n for a line break inside a prompt); the answers come in the same order, one a line. The
prompt goes through the experiment's template. How text is drawn is set by the config's `decode` section, for example
--config.decode.strategy=beam together with --config.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from scripts import assemble
from scripts.cli import run_main
from sira_jax.errors import ConfigError, DataError
from sira_jax.models import Decoder
from sira_jax.training.train_state import merge_params, split_params

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment; default: the run directory's own."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "best, latest, a step, or none for the frozen model."
)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt; the answer is printed.")
FILE = flags.DEFINE_string("file", None, "A text file with a prompt a line.")


def main(argv: list[str]) -> None:
    """Answers the prompts of the flags, or asks for them."""
    del argv
    if PROMPT.value is not None and FILE.value is not None:
        raise ConfigError("--prompt and --file exclude one another")
    prompts = _read_prompts()
    plan = assemble.Plan(assemble.read_experiment(CONFIG.value, WORKDIR.value))
    base = plan.load_base()
    frozen = split_params(base.params)[1]
    adapter, model = {}, Decoder(plan.base.config)
    if CHECKPOINT.value != "none" and plan.experiment.adapter is not None:
        model = plan.model(0)
        adapter, _ = assemble.restore_adapter(
            plan, model, frozen, WORKDIR.value or "", CHECKPOINT.value
        )
    params = merge_params(adapter, frozen)

    def answer(texts: list[str]) -> list[str]:
        rendered = [plan.template.render(text) for text in texts]
        ids = plan.vocabulary.encode_batch(rendered)
        return plan.decode(model, params, ids, "generate" if len(texts) > 1 else "")

    if prompts is not None:
        for text in answer(prompts):
            shown = text if FILE.value is None else text.replace("\\", "\\\\").replace("\n", "\\n")
            print(shown)
        return
    _converse(answer)


def _read_prompts() -> list[str] | None:
    if PROMPT.value is not None:
        if not PROMPT.value:
            raise ConfigError("--prompt='' is not allowed: some text")
        return [PROMPT.value]
    if FILE.value is None:
        return None
    try:
        lines = Path(FILE.value).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"--file={FILE.value}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--file={FILE.value}: is no UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"--file={FILE.value}, line {number}: is empty")
    if not lines:
        raise DataError(f"--file={FILE.value}: has no prompts")
    return [line.replace("\\n", "\n") for line in lines]


def _converse(answer) -> None:
    if sys.stdin.isatty():
        print("Type a prompt; an empty line or Ctrl-D ends.")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not prompt:
            return
        print(answer([prompt])[0], flush=True)


if __name__ == "__main__":
    run_main(main)
