"""Generates text, with a trained adapter, with several, or without.

  python scripts/generate.py --workdir=runs/sira --prompt="Write the date Wed 2031-07-09 in full in Swahili."
  python scripts/generate.py --workdir=runs/sira --file=prompts.txt > answers.txt
  python scripts/generate.py --workdir=runs/sira                       (asks for prompts)
  python scripts/generate.py --config=configs/experiments/starter.py:sira --checkpoint=none --prompt="..."
  python scripts/generate.py --adapters=sw=runs/sw,fi=runs/fi --adapter=sw --prompt="..."
  python scripts/generate.py --adapters=sw=runs/sw,fi=runs/fi --file=prompts.jsonl

A file holds one prompt a line (write \\n for a line break inside a prompt); the answers come in the same order, one a line. The
prompt goes through the experiment's template. How text is drawn is set by the config's `decode` section, for example
--config.decode.strategy=beam together with --config.

--adapters loads several adapters on one base, from run directories or adapter folders; the first one's experiment counts where
there is no --config. A line of a .jsonl file is {"prompt": "...", "adapter": "sw"}: null is the base alone, and without the key
--adapter counts. When prompts are asked for, /adapters lists, /use NAME picks, /load NAME=DIR and /unload NAME change them.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from scripts import adapters, assemble
from scripts.cli import run_main
from sira_jax import json_text
from sira_jax.errors import ConfigError, DataError, SiraError
from sira_jax.models import make_model
from sira_jax.training.adapter_bank import BASE
from sira_jax.training.train_state import merge_params, split_params

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment; default: the run directory's own."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "best, latest, a step, or none for the frozen model."
)
ADAPTERS = flags.DEFINE_string("adapters", None, "Several adapters, NAME=DIR,NAME=DIR.")
ADAPTER = flags.DEFINE_string(
    "adapter", None, "One of --adapters, or base for none of them; default: the first."
)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt; the answer is printed.")
FILE = flags.DEFINE_string("file", None, "A text file with a prompt a line, or a .jsonl file.")

COMMANDS = "/adapters, /use NAME, /use base, /load NAME=DIR, /unload NAME"


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and the name of the adapter that answers it: None for that of --adapter."""

    prompt: str
    adapter: str | None = None


Answer = Callable[[Sequence[Request]], list[str]]


def main(argv: list[str]) -> None:
    """Answers the prompts of the flags, or asks for them."""
    del argv
    _check_flags()
    directories = adapters.parse_adapters(ADAPTERS.value) if ADAPTERS.value is not None else {}
    current = ADAPTER.value or next(iter(directories), BASE)
    adapters.check_known(current, directories, "--adapter")
    requests = _read_requests(directories)
    loaded = None
    if directories:
        plan = assemble.Plan(adapters.read_experiment(CONFIG.value, directories))
        frozen = split_params(plan.load_base().params)[1]
        loaded = adapters.load_all(plan, frozen, directories, CHECKPOINT.value)
        answer = _answer_with_several(plan, loaded)
    else:
        answer = _answer_with_one()
    if requests is None:
        _converse(answer, loaded, current)
        return
    chosen = [dataclasses.replace(r, adapter=r.adapter or current) for r in requests]
    for text in answer(chosen):
        shown = text if FILE.value is None else text.replace("\\", "\\\\").replace("\n", "\\n")
        print(shown)


def _check_flags() -> None:
    if PROMPT.value is not None and FILE.value is not None:
        raise ConfigError("--prompt and --file exclude one another")
    if PROMPT.value == "":
        raise ConfigError("--prompt='' is not allowed: some text")
    if ADAPTERS.value is None:
        if ADAPTER.value is not None:
            raise ConfigError("--adapter needs --adapters=NAME=DIR,NAME=DIR")
        return
    if WORKDIR.value is not None:
        raise ConfigError("--workdir and --adapters exclude one another")
    if CHECKPOINT.value == "none":
        raise ConfigError(
            "--checkpoint=none and --adapters exclude one another: take --adapter=base"
        )


def _answer_with_one() -> Answer:
    """With the run directory's adapter, or the frozen model."""
    plan = assemble.Plan(assemble.read_experiment(CONFIG.value, WORKDIR.value))
    frozen = split_params(plan.load_base().params)[1]
    adapter, model = {}, make_model(plan.base.config)
    if CHECKPOINT.value != "none" and plan.experiment.adapter is not None:
        model = plan.model(0)
        adapter, _ = assemble.restore_adapter(
            plan.experiment, plan.mesh, model, frozen, WORKDIR.value or "", CHECKPOINT.value
        )
    params = merge_params(adapter, frozen)

    def answer(requests: Sequence[Request]) -> list[str]:
        return plan.decode(model, params, _encode(plan, requests), _description(requests))

    return answer


def _answer_with_several(plan: assemble.Plan, loaded: adapters.Adapters) -> Answer:
    """With the adapter of each request, all together in the batches."""

    def answer(requests: Sequence[Request]) -> list[str]:
        bank = loaded.bank
        ids = [bank.index(request.adapter) for request in requests]
        prompts = _encode(plan, requests)
        return plan.decode(bank.model(), bank.params(), prompts, _description(requests), ids)

    return answer


def _encode(plan: assemble.Plan, requests: Sequence[Request]) -> list[Sequence[int]]:
    return plan.vocabulary.encode_batch([plan.template.render(r.prompt) for r in requests])


def _description(requests: Sequence[Request]) -> str:
    return "generate" if len(requests) > 1 else ""


def _read_requests(names: Sequence[str]) -> list[Request] | None:
    """The prompts of --prompt or --file, None without either; `names` are the adapters that a file may name."""
    if PROMPT.value is not None:
        return [Request(PROMPT.value)]
    if FILE.value is None:
        return None
    try:
        text = Path(FILE.value).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--file={FILE.value}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--file={FILE.value}: is no UTF-8 text (byte {error.start})") from None
    is_json = FILE.value.endswith(".jsonl")
    # In JSON, what splitlines takes for line breaks may stand in a text.
    lines = text.removesuffix("\n").split("\n") if is_json and text else text.splitlines()
    if not lines:
        raise DataError(f"--file={FILE.value}: has no prompts")
    requests = []
    for number, line in enumerate(lines, 1):
        where = f"--file={FILE.value}, line {number}"
        if not line.strip():
            raise DataError(f"{where}: is empty")
        if is_json:
            requests.append(_read_object(line, where, names))
        else:
            requests.append(Request(line.replace("\\n", "\n")))
    return requests


def _read_object(line: str, where: str, names: Sequence[str]) -> Request:
    """A line of a .jsonl file."""
    try:
        fields = json_text.parse(line)
    except ValueError as error:
        raise DataError(f"{where}: is no JSON ({error})") from None
    if not isinstance(fields, dict) or not fields.keys() <= {"prompt", "adapter"}:
        raise DataError(f'{where}: is not {{"prompt": TEXT, "adapter": NAME}}')
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: prompt={prompt!r} is not allowed: some text")
    if "adapter" not in fields:
        return Request(prompt)
    adapter = BASE if fields["adapter"] is None else fields["adapter"]
    if not isinstance(adapter, str):
        raise DataError(f"{where}: adapter={adapter!r} is not allowed: a name, or null")
    if not names:
        raise ConfigError(f"{where}: adapter={adapter!r} needs --adapters=NAME=DIR,NAME=DIR")
    adapters.check_known(adapter, names, where)
    return Request(prompt, adapter)


def _converse(answer: Answer, loaded: adapters.Adapters | None, current: str) -> None:
    """Asks for prompts, and for commands where several adapters are loaded.

    On a terminal a mistake is told and the next line asked for; else it ends the script.
    """
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        commands = f" Commands: {COMMANDS}." if loaded else ""
        print(f"Type a prompt; an empty line or Ctrl-D ends.{commands}")
    while True:
        try:
            line = input("> " if on_terminal else "").strip()
        except EOFError:
            return
        if not line:
            return
        try:
            if loaded and line.startswith("/"):
                current = _obey(line, loaded, current)
            else:
                print(answer([Request(line, current)])[0], flush=True)
        except SiraError as error:
            if not on_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def _obey(line: str, loaded: adapters.Adapters, current: str) -> str:
    """Carries out a command; returns the name of the adapter that answers from now on."""
    command, *rest = line.split(maxsplit=1)
    names = [*loaded.bank.names(), BASE]
    if command == "/adapters" and not rest:
        for name in names:
            source = loaded.sources.get(name)
            method = f" {source['adapter']['method']} {source['directory']}" if source else ""
            print(f"{'*' if name == current else ' '} {name}{method}", flush=True)
    elif command == "/use" and rest:
        loaded.bank.index(rest[0])  # Raises where it is not loaded.
        current = rest[0]
    elif command == "/load" and rest:
        for name, directory in adapters.parse_pairs("/load", rest[0], "NAME=DIR"):
            loaded.load(name, directory)
    elif command == "/unload" and rest:
        loaded.unload(rest[0])
        current = BASE if current == rest[0] else current
    else:
        raise ConfigError(f"{line!r} is not allowed: {COMMANDS}")
    return current


if __name__ == "__main__":
    run_main(main)
