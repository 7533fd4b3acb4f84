"""From a config to what runs it: the one place where tasks, checkpoints, models and training meet.

`Plan` holds what can be known without loading weights or data, so that a script finds mistakes first.
"""

import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import tasks
from scripts.base_models import find_model, load_base
from sira_jax import json_text
from sira_jax.checkpoints import BaseModel, fingerprint, read_base_model
from sira_jax.errors import CheckpointError, ConfigError, DataError, check
from sira_jax.files import read_bytes
from sira_jax.models import DecoderConfig, EncoderDecoderConfig, Model, make_model
from sira_jax.quantized import check_available
from sira_jax.training import loop, multihost, partitioning
from sira_jax.training.axis_rules import Rules
from sira_jax.training.config import ExperimentConfig, make_experiment
from sira_jax.training.decoding import generate
from sira_jax.training.evaluate import LossEvaluator
from sira_jax.training.logging import Progress
from sira_jax.training.resumable import check_adapter, check_base
from sira_jax.training.train_state import abstract_adapter
from tasks import specs


def read_experiment(config: ConfigDict | None, workdir: str | None) -> ExperimentConfig:
    """The experiment of --config, or else the one that a run directory was made with.

    Raises:
      ConfigError: neither is there, or the config is wrong.
    """
    if config is not None:
        return make_experiment(config.to_dict())
    if not workdir:
        raise ConfigError("--config=FILE or --workdir=DIR is needed")
    path = Path(workdir) / loop.CONFIG_FILE
    try:
        fields = json_text.parse(read_bytes(path))["config"]
    except FileNotFoundError:
        raise ConfigError(
            f"--workdir={workdir}: has no {loop.CONFIG_FILE}; give --config"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        return make_experiment(fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class Plan:
    """A checked experiment: names are known, sizes fit, but neither weights nor data are loaded.

    Args:
      experiment: the config.

    Raises:
      SiraError: what does not fit, naming the field.
    """

    def __init__(self, experiment: ExperimentConfig):
        self.experiment = experiment
        self.mesh = partitioning.make_mesh(experiment.mesh)
        self.rules = partitioning.make_rules(experiment.mesh)
        data, train = experiment.data, experiment.train
        partitioning.check_batch(self.mesh, data.batch_size, train.accumulation_steps, self.rules)
        self.layout = partitioning.BatchLayout(self.mesh, data.batch_size, self.rules)
        members = [task.name for name in data.tasks for task in specs.members(name)[0]]
        measured = [f"validation/{metric}" for metric in ("loss", "accuracy")]
        by_task = [f"{metric}/{task}" for metric in measured for task in members]
        check(
            train.keep_best in ("", *measured, *(by_task if len(members) > 1 else ())),
            "train.keep_best",
            train.keep_best,
            f"empty, or {' or '.join(measured)}, with /TASK for one of several tasks",
        )
        check_available(experiment.model.quantization)
        self.model_path = find_model(experiment.model.path)
        self.base = read_base_model(self.model_path, **experiment.model.options)
        self.vocabulary = _make_vocabulary(data.vocabulary, self.base)
        size = self.base.config.vocab_size
        check(
            self.vocabulary.vocab_size <= size,
            "data.vocabulary",
            data.vocabulary,
            f"at most the model's {size} ids, it has {self.vocabulary.vocab_size}",
        )
        limit = self.base.config.max_positions
        for name in ("sequence_length", "target_length"):
            length = getattr(data, name)
            check(length <= limit, f"data.{name}", length, f"at most the model's {limit} positions")
        new_tokens = experiment.decode.max_new_tokens
        check(
            new_tokens < limit,
            "decode.max_new_tokens",
            new_tokens,
            f"fewer than the model's {limit} positions",
        )
        special = self.base.special
        own = data.vocabulary == "model"
        check(
            own or data.template != "chat",
            "data.template",
            data.template,
            "plain, with a vocabulary that is not the model's",
        )
        # Ids of the model's special tokens mean something else in another vocabulary.
        self.eos_ids = tuple(special.eos_ids) if own else ()
        if self.vocabulary.eos_id is not None and self.vocabulary.eos_id not in self.eos_ids:
            self.eos_ids = (self.vocabulary.eos_id, *self.eos_ids)
        self.features = self._make_features()
        self.template = tasks.make_template(
            data.template,
            chat_template=self.base.chat_template,
            origin=self.base.source,
            bos_token=self._token_text(special.bos_id) if own else "",
            eos_token=self._token_text(self.vocabulary.eos_id),
        )
        if experiment.adapter is not None:
            projections = self.base.config.projections
            experiment.adapter.check_model(projections)
            rows = data.batch_size // train.accumulation_steps
            lengths = self.features.limits
            partitioning.check_groups(
                self.mesh, self.rules, experiment.adapter, projections, rows, lengths
            )

    def _make_features(self) -> tasks.converters.FeatureConverter:
        """What makes the batches of this kind of model."""
        data, config, vocabulary = self.experiment.data, self.base.config, self.vocabulary
        common = {"length": data.sequence_length, "pad_id": vocabulary.pad_id}
        # A chat template writes the beginning of the text itself.
        bos_id = vocabulary.bos_id if data.template == "plain" else None
        kinds = {
            DecoderConfig: lambda: tasks.DecoderFeatures(bos_id=bos_id, **common),
            EncoderDecoderConfig: lambda: tasks.EncoderDecoderFeatures(
                target_length=data.target_length or data.sequence_length,
                eos_id=vocabulary.eos_id,
                start_id=config.decoder_start_id,
                **common,
            ),
        }
        return kinds[type(config)]()

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.vocabulary.id_to_text(token_id)

    def model(self, num_tasks: int) -> Model:
        """The decoder with the experiment's adapter; `num_tasks` turns on per-task router metrics."""
        return make_model(self.base.config, self.experiment.adapter, num_tasks)

    def load_base(self) -> BaseModel:
        """The base with its parameters, placed on the mesh."""
        return load_base(self.model_path, self.experiment.model, self.mesh, self.rules)

    def load_tasks(
        self, split: str, limit: int = 0
    ) -> tuple[list[tasks.TokenizedTask], list[float]]:
        """All tasks of the experiment, tokenised, with their rates; `limit` examples each (0: all)."""
        data = self.experiment.data
        loaded: list[tasks.TokenizedTask] = []
        rates: list[float] = []
        for name in data.tasks:
            members, member_rates = tasks.load_mixture(
                name,
                split,
                self.vocabulary,
                limit=limit or None,
                template=self.template,
                eos_id=self.vocabulary.eos_id,
                mixing=data.rates,
                temperature=data.temperature,
            )
            for member, rate in zip(members, member_rates, strict=True):
                if member.name in [task.name for task in loaded]:
                    raise ConfigError(
                        f"data.tasks={data.tasks!r} is not allowed: {member.name} is in it twice"
                    )
                loaded.append(member)
                rates.append(rate)
        return loaded, rates

    def pipeline(
        self,
        loaded: Sequence[tasks.TokenizedTask],
        rates: Sequence[float],
        files: Mapping[str, str] | None = None,
        allow_changed_data: bool = False,
    ) -> tasks.InputPipeline:
        """The endless stream of training batches, this process's rows of each; `files` and the flag: see InputPipeline."""
        data = self.experiment.data
        return tasks.InputPipeline(
            loaded,
            rates,
            batch_size=data.batch_size,
            converter=self.features,
            seed=self.experiment.train.seed,
            pack=data.pack,
            too_long=data.too_long,
            rows=self.layout.rows,
            files=files,
            allow_changed_data=allow_changed_data,
        )

    def loss_evaluator(
        self, model: Model, frozen: Any, loaded: Sequence[tasks.TokenizedTask], prefix: str
    ) -> LossEvaluator:
        """Teacher-forced loss of `loaded`, whose order gives the task ids."""
        batches = list(self.eval_batches(loaded))
        names = [task.name for task in loaded]
        chunk = self.experiment.train.loss_chunk_size
        return LossEvaluator(
            model,
            frozen,
            batches,
            names,
            prefix=prefix,
            loss_chunk_size=chunk,
            layout=self.layout,
        )

    def eval_batches(self, loaded: Sequence[tasks.TokenizedTask]) -> Iterator[dict[str, Any]]:
        """One pass over the examples of `loaded`, whose order gives the task ids; this process's rows of each batch."""
        data = self.experiment.data
        return tasks.eval_batches(
            loaded,
            batch_size=data.batch_size,
            converter=self.features,
            pack=data.pack,
            too_long="error" if data.too_long == "error" else "truncate_inputs",
            rows=self.layout.rows,
        )

    def decode(
        self,
        model: Model,
        params: Any,
        prompts: Sequence[Sequence[int]],
        description: str = "",
        adapter_ids: Sequence[int] | None = None,
    ) -> list[str]:
        """Continues token prompts and returns the texts; shows a progress bar if there is a description."""
        bar = (
            Progress(
                len(prompts),
                description=description,
                unit="prompt",
                hidden=not multihost.is_main(),
            )
            if description
            else None
        )
        ids = generate(
            model,
            params,
            [self.features.prompt(prompt) for prompt in prompts],
            self.experiment.decode,
            eos_ids=self.eos_ids,
            pad_id=self.vocabulary.pad_id,
            adapter_ids=adapter_ids,
            on_batch=(lambda count: bar.update(count=count)) if bar else None,
        )
        if bar:
            bar.close()
        return [self.vocabulary.decode(row) for row in ids]

    def _fit(self, prompt: Sequence[int], task: str) -> Sequence[int]:
        data, decode = self.experiment.data, self.experiment.decode
        room = self.features.prompt_room(self.base.config.max_positions, decode.max_new_tokens)
        if len(prompt) <= room:
            return prompt
        if data.too_long == "error":
            raise DataError(
                f"task {task}: a prompt has {len(prompt)} tokens; data.sequence_length={data.sequence_length} and"
                f" decode.max_new_tokens={decode.max_new_tokens} leave {room}; data.too_long may be truncate_inputs"
            )
        # The end of the prompt says what to do.
        return prompt[-room:]

    def decode_tasks(
        self,
        model: Model,
        params: Any,
        loaded: Sequence[tasks.TokenizedTask],
        description: str,
        adapter_ids: Sequence[int] | None = None,
    ) -> tuple[dict[str, dict[str, float]], list[dict[str, str]]]:
        """Decodes every example. Returns (task -> metric -> score, one record an example).

        Prompts are cut to the room that data.sequence_length and the model's positions leave, as data.too_long says.
        `adapter_ids`, one for each example in their order: see `generate`.

        Raises:
          DataError: a prompt is longer and data.too_long is "error".
        """
        prompts = [self._fit(prompt, task.name) for task in loaded for prompt in task.inputs]
        texts = iter(self.decode(model, params, prompts, description, adapter_ids))
        scores, records = {}, []
        for task in loaded:
            predictions = [next(texts) for _ in task.inputs]
            scores[task.name] = tasks.evaluate(task.metrics, predictions, task.examples)
            for example, prediction in zip(task.examples, predictions, strict=True):
                record = {"input": example["inputs"], "target": example["targets"]}
                records.append({"task": task.name, **record, "prediction": prediction})
        return scores, records


def restore_adapter(
    experiment: ExperimentConfig,
    mesh: jax.sharding.Mesh,
    model: Model,
    frozen: Any,
    workdir: str,
    which: str,
    rules: Rules = partitioning.RULES,
) -> tuple[Any, int]:
    """The adapter of a run directory and its step.

    Args:
      experiment: whose adapter the run must have, and whose rule for the best checkpoint holds.
      mesh: where the adapter is placed.
      model: decoder with the adapter.
      frozen: parameters of the base, whose fingerprint must be the run's.
      workdir: run directory.
      which: "best" (the newest where no evaluation was made), "latest", or a step.
      rules: how it is placed, see `partitioning`.

    Raises:
      CheckpointError: there is none, it is damaged, or belongs to another base or another adapter.
    """
    if not workdir:
        raise ConfigError("--workdir=DIR is needed, a run with an adapter (or --checkpoint=none)")
    directory = Path(workdir) / loop.CHECKPOINTS
    if not os.path.isdir(directory):
        raise CheckpointError(f"--workdir={workdir}: has no checkpoints")
    checkpointer = loop.make_checkpointer(Path(workdir), experiment)
    try:
        steps = checkpointer.all_steps()
        if not steps:
            raise CheckpointError(f"{directory}: has no whole checkpoint")
        if which in ("best", "latest"):
            best = checkpointer.best_step() if which == "best" else None
            step = best if best is not None else steps[-1]
        else:
            check(
                which.isdecimal() and int(which) in steps,
                "--checkpoint",
                which,
                f"best, latest or one of the steps {', '.join(map(str, steps))}",
            )
            step = int(which)
        where = checkpointer.path(step)
        checkpointer.check(step, ("adapter", "meta"))
        meta = checkpointer.restore_meta(step)
        check_adapter(meta["config"], experiment, where)
        check_base(meta, fingerprint(frozen), where)
        return checkpointer.restore_adapter(step, abstract_adapter(model, mesh, rules)), step
    finally:
        checkpointer.close()


def peak_memory_bytes() -> int:
    """Largest memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mean_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over tasks of each metric, over those tasks that have it."""
    names = sorted({name for task in scores.values() for name in task})
    means = {}
    for name in names:
        values = [task[name] for task in scores.values() if name in task]
        means[name] = sum(values) / len(values)
    return means


def _make_vocabulary(spec: str, base: BaseModel) -> tasks.vocabularies.Vocabulary:
    if spec != "model":
        return tasks.make_vocabulary(spec)
    base.tokenizer()  # Raises where the model has none, with the reason.
    special = base.special
    eos_id = special.eos_ids[0] if special.eos_ids else None
    pad_id = special.pad_id if special.pad_id is not None else (eos_id or 0)
    return tasks.vocabularies.TokenizersVocabulary(
        base.tokenizer_json,
        eos_id=eos_id,
        bos_id=special.bos_id,
        pad_id=pad_id,
        origin=base.source,
    )
