"""Prints what a task or a mixture yields: texts, token ids, and the packed features of a batch.

python scripts/show_task.py --list
python scripts/show_task.py cldr_date_sw
python scripts/show_task.py cldr_sw --num=3 --split=test --template=plain
python scripts/show_task.py bfcl_simple --vocabulary=tokenizers:/path/to/tokenizer.json
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence

import numpy as np

import tasks
from scripts.arguments import Parser, at_least_one
from scripts.cli import run_main, set_data_dir
from tasks import specs
from tasks.converters import DecoderFeatures
from tasks.loading import TokenizedTask, load_task
from tasks.pipeline import eval_batches
from tasks.templates import make_template
from tasks.vocabularies import Vocabulary, make_vocabulary

_MAX_TASKS_LISTED = 20
# Positions printed at either end of a prompt.
_PROMPT_ENDS = 4


def _parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", nargs="?", help="a task or a mixture")
    add("--list", action="store_true", help="list all tasks and mixtures")
    add(
        "--vocabulary",
        default="bytes",
        help="bytes (default), sentencepiece:/path or tokenizers:/path/tokenizer.json",
    )
    add("--split", default="train", help="train (default), validation or test")
    add("--num", type=at_least_one, default=2, help="examples to print (default 2)")
    add("--length", type=at_least_one, help="positions a row (default: what two examples need)")
    add("--rows", type=at_least_one, default=1, help="rows of the batch (default 1)")
    add("--full", action="store_true", help="print every position of the batch")
    add(
        "--template",
        default="none",
        choices=["none", "plain"],
        help="prompt template (default none)",
    )
    add(
        "--data_dir",
        help="folder of the downloaded data sets (default $SIRA_DATA_DIR, or the cache)",
    )
    add("--seqio", action="store_true", help="read the task through seqio (imports TensorFlow)")
    return parser


def _size_text(spec: specs.TaskSpec, split: str) -> str:
    size = spec.sizes.get(split, "-")
    return "?" if size is None else str(size)


def list_tasks() -> None:
    """Prints every task and mixture with its sizes: ? is known once the files are there, - is no such split."""
    width = max(map(len, [*specs.TASKS, *specs.MIXTURES]))
    print(f"{len(specs.TASKS)} tasks (train/validation/test examples)")
    for spec in specs.TASKS.values():
        sizes = "/".join(_size_text(spec, split) for split in specs.SPLITS)
        print(f"  {spec.name:{width}}  {sizes:>13}  {spec.description}")
    print(f"\n{len(specs.MIXTURES)} mixtures (tasks, train examples)")
    for mixture in specs.MIXTURES.values():
        counts = [specs.TASKS[task].sizes["train"] for task in mixture.tasks]
        size = f"{len(counts)}, {'?' if None in counts else sum(counts)}"
        print(f"  {mixture.name:{width}}  {size:>13}  {mixture.description}")


def _load(args, vocabulary: Vocabulary) -> list[TokenizedTask]:
    """`num` examples: the first ones of a task, or one each of a mixture's first tasks."""
    members, _ = specs.members(args.name)
    template = make_template(args.template)
    if len(members) == 1:
        counts = [(members[0], args.num)]
    else:
        counts = [(member, -(-args.num // len(members))) for member in members[: args.num]]
    return [
        load_task(member.name, args.split, vocabulary, limit=count, template=template)
        for member, count in counts
    ]


def _print_header(args, vocabulary: Vocabulary) -> None:
    members, rates = specs.members(args.name)
    if args.name in specs.MIXTURES:
        print(f"mixture {args.name}: {specs.MIXTURES[args.name].description}")
        total = sum(rates)
        for member, rate in list(zip(members, rates, strict=True))[:_MAX_TASKS_LISTED]:
            print(f"  {rate / total:7.2%}  {member.name}")
        if len(members) > _MAX_TASKS_LISTED:
            print(f"  ... and {len(members) - _MAX_TASKS_LISTED} more")
    else:
        print(f"task {args.name}: {members[0].description}")
        print(f"metrics: {', '.join(members[0].metrics)}")
    print(f"split: {args.split}, vocabulary: {args.vocabulary} ({vocabulary.vocab_size} ids)")


def _print_ids(label: str, text: str, ids: Sequence[int]) -> None:
    print(f"  {label:8} {text!r}")
    print(f"  {len(ids):4} ids {' '.join(map(str, ids))}")


def _print_examples(loaded: Sequence[TokenizedTask]) -> None:
    for task in loaded:
        for index, example in enumerate(task.examples):
            print(f"\n{task.name}, {task.split} example {index}")
            _print_ids("inputs", example["inputs"], task.inputs[index])
            _print_ids("targets", example["targets"], task.targets[index])
            for field in sorted(set(example) - {"inputs", "targets"}):
                print(f"  {field:8} {example[field]}")


def _shown(batch: dict[str, np.ndarray], row: int, used: int) -> Iterator[int | None]:
    """Positions to print; None stands for the middle of a long prompt."""
    positions, weights = batch["decoder_positions"][row], batch["decoder_loss_weights"][row]
    for at in range(used):
        ahead = weights[at : at + _PROMPT_ENDS]
        if weights[at] or positions[at] < _PROMPT_ENDS or ahead.any():
            yield at
        elif positions[at] == _PROMPT_ENDS:
            yield None


def _print_batch(args, loaded: Sequence[TokenizedTask], vocabulary: Vocabulary) -> None:
    sizes = [
        len(inputs) + len(targets) - 1
        for task in loaded
        for inputs, targets in zip(task.inputs, task.targets, strict=True)
    ]
    length = args.length or sum(sorted(sizes)[-2:])
    converter = DecoderFeatures(length=length)
    batch = next(eval_batches(loaded, batch_size=args.rows, converter=converter, too_long="drop"))
    print(f"\npacked for a decoder-only model: {args.rows} x {length} positions")
    for task_id, task in enumerate(loaded):
        print(f"  task {task_id} is {task.name}")
    columns = ("decoder_segment_ids", "decoder_positions", "decoder_loss_weights", "task_ids")
    for row in range(args.rows):
        used = int(np.count_nonzero(batch["decoder_segment_ids"][row]))
        print(f"\nrow {row}: {used} positions used, {length - used} padding")
        print(f"  {'input token':>24}  {'target token':>24}  segment  position  weight  task")
        for at in range(used) if args.full else _shown(batch, row, used):
            if at is None:
                print(f"  {'...':>24}  {'...':>24}  (--full shows every position)")
                continue
            tokens = (
                f"{batch[name][row, at]} {vocabulary.id_to_text(int(batch[name][row, at]))!r}"
                for name in ("decoder_input_tokens", "decoder_target_tokens")
            )
            segment, position, weight, task = (batch[name][row, at] for name in columns)
            cells = "  ".join(f"{token:>24}" for token in tokens)
            print(f"  {cells}  {segment:7}  {position:8}  {weight:6g}  {task:4}")


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hides what TensorFlow's C++ side logs while it loads, before it heeds any setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _print_seqio(args) -> None:
    with _quiet_stderr():
        bind = tasks.bind
    provider = bind(args.name, args.vocabulary, template=make_template(args.template))
    dataset = provider.get_dataset(None, args.split, shuffle=False, try_in_mem_cache=False)
    for index, example in enumerate(dataset.take(args.num).as_numpy_iterator()):
        print(f"\nseqio example {index}")
        for field, value in example.items():
            shown = value.decode() if isinstance(value, bytes) else " ".join(map(str, value))
            print(f"  {field:20} {shown}")


def main(args) -> None:
    """Prints what the arguments ask for."""
    set_data_dir(args.data_dir)
    if args.list:
        list_tasks()
        return
    vocabulary = make_vocabulary(args.vocabulary)
    specs.members(args.name)
    if args.seqio:
        _print_header(args, vocabulary)
        _print_seqio(args)
        return
    loaded = _load(args, vocabulary)
    _print_header(args, vocabulary)
    _print_examples(loaded)
    _print_batch(args, loaded, vocabulary)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # end quietly where the output is cut off, as by `head`
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = _parser()
    arguments = parser.parse_args()
    if not arguments.name and not arguments.list:
        parser.error("name a task or a mixture, or give --list")
    run_main(lambda _: main(arguments), argv=sys.argv[:1])
