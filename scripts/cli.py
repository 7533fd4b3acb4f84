"""What the scripts' command lines share: errors of the user in one line, readable --help, config flags."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from sira_jax.errors import SiraError

USER_ERROR = 2


def run_main(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> None:
    """Parses the absl flags and runs `main(remaining arguments)`.

    A SiraError, or a mistake in the flags, prints one line `error: ...` on standard error and exits with status 2.
    Whatever else is raised is a defect and keeps its stack trace. The integer `main` returns is the exit status.
    """
    # Output piped into `head` ends the script quietly, as it does any other command.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    absl_logging.set_verbosity(absl_logging.ERROR)

    def guarded(arguments: list[str]) -> Any:
        try:
            return main(arguments)
        except SiraError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130

    app.run(guarded, argv=argv, flags_parser=_parse)


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    return USER_ERROR


def _parse(argv: list[str]) -> list[str]:
    if any(argument in ("-h", "--help", "-help") for argument in argv[1:]):
        _print_help(argv)
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
        # ml_collections reports an unknown field of a config as a KeyError or AttributeError.
        sys.exit(_fail(f"{error.args[0] if error.args else error} (--help lists the flags)"))
    except (OSError, ImportError) as error:
        sys.exit(_fail(f"the config file cannot be read: {error}"))
    if len(rest) > 1:
        sys.exit(_fail(f"unknown argument {rest[1]!r} (--help lists the flags)"))
    return rest


def _print_help(argv: list[str]) -> None:
    main = sys.modules["__main__"]
    print((main.__doc__ or "").strip())
    print("\nFlags:")
    known = flags.FLAGS.flags_by_module_dict().get(
        argv[0], []
    ) or flags.FLAGS.get_key_flags_for_module(main)
    for flag in sorted(known, key=lambda flag: flag.name):
        default = "" if flag.default in (None, "") else f" (default {flag.default})"
        text = " ".join((flag.help or "").split())
        print(f"  --{flag.name}: {text}{default}")
    config = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
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
