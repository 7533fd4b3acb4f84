"""The training's command line, and quoting on its way to shells and Kubernetes."""

import shlex
from collections.abc import Mapping, Sequence

from scripts.launch.config import JobConfig

# What train.py ends with after a stop that saved. 0 would tell a cluster that the job is complete. (EX_TEMPFAIL of sysexits.h.)
STOPPED_STATUS = 75
# What every script of the project ends with after a mistake of the user's: a restart would only repeat it.
MISTAKE_STATUS = 2


def command(job: JobConfig, index: int, processes: int) -> list[str]:
    """The arguments, the program first, of each process of run `index` of the job's sweep."""
    return [
        *job.command,
        *job.points[index],
        f"--workdir={job.workdir(index)}",
        f"--stopped_status={STOPPED_STATUS}",
        *(["--multihost"] if processes > 1 else []),
    ]


def assign(name: str, value: object) -> str:
    """A shell line that sets `name`, a plain name of ours, to any text."""
    return f"{name}={shlex.quote(str(value))}"


def assign_list(name: str, values: Sequence[str]) -> str:
    """A bash line that sets the array `name`."""
    return f"{name}=({shlex.join(values)})"


def exports(env: Mapping[str, str]) -> list[str]:
    """Shell lines that export the variables."""
    return [f"export {assign(name, value)}" for name, value in env.items()]


def select_command(job: JobConfig, processes: int) -> list[str]:
    """Bash lines that set the array COMMAND to that of the run whose number is in $RUN."""
    cases = [
        f"  {i}) {assign_list('COMMAND', command(job, i, processes))} ;;"
        for i in range(len(job.points))
    ]
    return [
        'case "$RUN" in',
        *cases,
        f'  *) echo "launch: there is no run $RUN" >&2; exit {MISTAKE_STATUS} ;;',
        "esac",
    ]


def kubernetes_literal(text: str) -> str:
    """`text` as Kubernetes must be given it in commands and variables, where it expands $(NAME) and reads $$ as $."""
    return text.replace("$", "$$")
