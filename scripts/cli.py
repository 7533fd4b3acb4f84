"""What the scripts' command lines share: errors of the user in one line, readable --help, config flags."""

import difflib
import os
import re
import runpy
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from sira_jax.errors import ConfigError, SiraError, check

USER_ERROR = 2
_format_any_warning = warnings.formatwarning


class _OrNone(flags.ArgumentParser):
    """Reads None besides what `parser` reads; the config's own checks say which fields may be None."""

    def __init__(self, parser: flags.ArgumentParser, allowed: str):
        self._parser, self._allowed = parser, allowed
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        if argument == "None":
            return None
        try:
            return self._parser.parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"not {self._allowed}") from None

    def flag_type(self) -> str:
        return self._parser.flag_type()


class _Names(tuple_parser.TupleParser):
    """Reads NAME,NAME besides Python's own notation of tuples."""

    def parse(self, argument: Any) -> tuple:
        if isinstance(argument, str) and argument[:1] not in ("(", "[", "{", "'", '"'):
            return tuple(name.strip() for name in argument.split(","))
        return super().parse(argument)


# How --config.SECTION.FIELD=VALUE is read, by the type of the field's default.
for _type, _parser in {
    int: _OrNone(flags.IntegerParser(), "a whole number"),
    float: _OrNone(flags.FloatParser(), "a number"),
    bool: _OrNone(flags.BooleanParser(), "true or false"),
    tuple: _Names(),
}.items():
    config_flags.register_flag_parser_for_type(_type, _parser)


def set_data_dir(folder: str | None) -> None:
    """Makes `folder` the place of data files, for this process and those it starts; None changes nothing.

    Raises ConfigError where it is no folder.
    """
    if folder is None:
        return
    check(os.path.isdir(folder), "data_dir", folder, "a folder that exists")
    os.environ["SIRA_DATA_DIR"] = os.path.abspath(folder)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line=None
) -> str:
    """One line of a warning of ours, which is on the user's data and not on a place in the code."""
    if category.__module__.split(".")[0] not in ("sira_jax", "tasks"):
        return _format_any_warning(message, category, filename, lineno, line)
    return f"warning: {' '.join(str(message).split())}\n"


def run_main(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> None:
    """Parses the absl flags and runs `main(remaining arguments)`.

    A SiraError, or a mistake in the flags, prints one line `error: ...` on standard error and exits with status 2. A warning
    of the library's prints one line `warning: ...`.
    Whatever else is raised is a defect and keeps its stack trace. The integer `main` returns is the exit status.
    """
    if "data_dir" not in flags.FLAGS:
        folder = "folder of the downloaded data sets (default $SIRA_DATA_DIR, or the cache)"
        flags.DEFINE_string("data_dir", None, folder)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.formatwarning = _format_warning
    absl_logging.set_verbosity(absl_logging.ERROR)

    def guarded(arguments: list[str]) -> Any:
        try:
            set_data_dir(flags.FLAGS.data_dir)
            return main(arguments)
        except SiraError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130

    try:
        try:
            app.run(guarded, argv=argv, flags_parser=_parse)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Output piped into `head` ends the script quietly, as it does any other command. The signal is left alone: with its
        # default action, a write to any closed socket would end a run without a word.
        if not _output_is_cut_off():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _output_is_cut_off() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    return USER_ERROR


def _parse(argv: list[str]) -> list[str]:
    if any(argument in ("-h", "--help", "-help") for argument in argv[1:]):
        _print_help(argv)
        sys.exit(0)
    try:
        if "config" in flags.FLAGS:
            _check_config(argv)
        rest = flags.FLAGS(argv)
    except (flags.Error, ConfigError) as error:
        sys.exit(_fail(f"{error} (--help lists the flags)"))
    if len(rest) > 1:
        sys.exit(_fail(f"unknown argument {rest[1]!r} (--help lists the flags)"))
    return rest


def _config_path(argv: list[str]) -> str | None:
    """What --config is given, as --config=FILE or --config FILE; None without it."""
    # Without arguments the second list is the longer one.
    for argument, following in zip(argv[1:], [*argv[2:], None], strict=False):
        if match := re.fullmatch(r"--?config(=(.*))?", argument, re.DOTALL):
            return match[2] if match[1] else following
    return None


def _check_config(argv: list[str]) -> None:
    """Raises ConfigError for mistakes in the config file and for fields it does not have.

    ml_collections, which reads both after this, reports the first with a stack trace and the second with a bare KeyError.
    """
    path = _config_path(argv)
    if path is None:
        return
    file, *arguments = path.split(":", 1)
    if not os.path.isfile(file):
        raise ConfigError(f"--config={path}: no such file")
    try:
        config = runpy.run_path(file).get("get_config", lambda *_: None)(*arguments)
    except Exception as error:  # the file is a program, and may raise anything
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines = [error.lineno]
        line = f", line {lines[-1]}" if lines else ""
        raise ConfigError(f"--config={path}{line}: {type(error).__name__}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: needs a function get_config that returns a ConfigDict")
    _check_fields(config, argv[1:])


def _check_fields(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Raises ConfigError for an argument --config.FIELD whose field the config does not have."""
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            # A place in a tuple, NAME[0], is of the field NAME.
            names = re.sub(r"\[-?\d+\]$", "", match[1]).split(".")
            _check_field(config, names)


def _check_field(config: ConfigDict, names: list[str]) -> None:
    holder = "config"
    for name in names:
        if not isinstance(config, ConfigDict):
            raise ConfigError(f"--{holder}.{name}: {holder} has no fields")
        if name not in config:
            close = difflib.get_close_matches(name, config.keys(), n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            known = ", ".join(config.keys())
            raise ConfigError(f"--{holder}.{name}: no such field; {hint}{holder} has {known}")
        config, holder = config[name], f"{holder}.{name}"


def _print_help(argv: list[str]) -> None:
    main = sys.modules["__main__"]
    print((main.__doc__ or "").strip())
    print("\nFlags:")
    known = flags.FLAGS.flags_by_module_dict().get(
        argv[0], []
    ) or flags.FLAGS.get_key_flags_for_module(main)
    for flag in sorted({*known, flags.FLAGS["data_dir"]}, key=lambda flag: flag.name):
        default = "" if flag.default in (None, "") else f" (default {flag.default})"
        text = " ".join((flag.help or "").split())
        print(f"  --{flag.name}: {text}{default}")
    config = _config_path(argv)
    if "config" not in flags.FLAGS:
        return
    if config is None:
        print("\nWith --config=FILE, --help also lists the config's fields.")
        return
    rest = [a for a in argv if a not in ("-h", "--help", "-help")]
    _parse(rest)
    print(f"\nFields of {config}, set by --config.SECTION.FIELD=VALUE:")
    for section, fields in flags.FLAGS.config.items():
        for name, value in fields.items():
            shown = value.to_dict() if hasattr(value, "to_dict") else value
            print(f"  {section}.{name} = {shown!r}")
