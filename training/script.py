"""The course of a training script: options, data, training, judging, publishing; and what each failure looks like to a user."""

import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxlora.adapters import AdapterName, CatalogueReader, catalogue_path
from jaxlora.errors import AdapterNotFound, ServingError, SetupError
from jaxlora.files import replace
from jaxlora.lora import Adapter
from training import stored
from training.answers import TaskScores, find_metrics
from training.gates import Condition, refusal_unless_better
from training.lora_init import to_peft
from training.method import Method
from training.options import Options
from training.publishing import RUN, publish_and_verify, write_adapter
from training.run_folder import RunFolder
from training.task import Task, check_name, load_task, run_config, say
from training.trainer import Interrupted, Outcome, Trainer, TrainingStopped

REFUSED, FAILED = 3, 1
Build = Callable[[Task], Method]


def run_script(
    script: str, options_class: type[Options], description: str, build: Build, argv: Sequence[str] | None = None
) -> int:
    """Runs a training script; returns its exit code.

    0: trained, and published where asked for. 1: failed, with the reason on standard error. 2: the command line is wrong. 3:
        trained, but a gate kept it from being published. 128 + n: stopped by signal n, to be continued by the same command.
    """
    try:
        options = options_class.parse(argv, description)
        return _run(script, options, build)
    except Interrupted as error:
        say(str(error))
        return 128 + error.signal
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last checkpoint, if there is one")
        return 128 + signal.SIGINT
    except (SetupError, TrainingStopped, ServingError) as error:
        say(f"error: {error}")
    except OSError as error:
        say(f"error: {error.filename or 'a file'}: {error.strerror}")
    return FAILED


def _run(script: str, options: Options, build: Build) -> int:
    name = check_name(options.name)
    if not options.no_publish and not os.access(options.store, os.W_OK):
        raise SetupError(f"--store: {options.store} is no folder that can be written (--no-publish trains without one)")
    conditions = [Condition.parse(text) for text in options.publish_if]
    task = load_task(options, script)
    method = build(task)
    if (conditions or options.publish_if_better or options.early_stop) and method.held_out is None:
        raise SetupError(
            "--publish-if, --publish-if-better and --early-stop compare scores on held-out data: give --eval-data or --eval-share"
        )
    metrics = find_metrics(options.metric)
    if metrics and not method.questions:
        raise SetupError(
            "--metric judges answers to held-out prompts: give --eval-data or --eval-share, with data that has prompts"
        )
    folder = task.folder
    with folder.held(run_config(task, method, script), options.restart):
        task_scores = TaskScores(task, method.questions, metrics) if metrics else None
        more_scores = task_scores or method.scores or (lambda adapter: {})
        base = task.base
        trainer = Trainer(options, base.config, task.weights, method, task.start, folder, say, more_scores, base.machine)
        say(f"{trainer.total_steps} steps of {options.batch_size} examples, in {folder.path}")
        outcome = trainer.run()
        mark = _mark(folder)
        write_adapter(
            folder.adapter, to_peft(outcome.adapter, task.lora_config), _provenance(script, task, method, folder, outcome, mark)
        )
        say(f"the adapter is in {folder.adapter}, beside it metrics.jsonl and loss.png")
        if options.no_publish:
            return 0
        refusals = _refusals(task, trainer, method, outcome, name, conditions)
        if refusals:
            say("not published: " + "; ".join(refusals))
            return REFUSED
        catalogue = CatalogueReader(catalogue_path(base.settings.cache_dir, options.store)).current()
        publish_and_verify(folder.adapter, name, options.store, options.url, mark, say, catalogue)
    return 0


def _refusals(
    task: Task, trainer: Trainer, method: Method, outcome: Outcome, name: AdapterName, conditions: Sequence[Condition]
) -> list[str]:
    found = [condition.refusal(outcome.scores) for condition in conditions]
    score = task.options.publish_if_better
    if score is not None:
        try:
            served = stored.find(task.options.store, name)
        except AdapterNotFound:
            say(f"there is no version of {name} yet to compare with")
        else:
            other = stored.read(task.options.store, served, task.base.config, task.base.settings)
            scores = trainer.evaluate(Adapter.from_pairs(other.modules), method.held_out)
            found.append(refusal_unless_better(score, outcome.scores, scores, str(served)))
    return [refusal for refusal in found if refusal]


def _mark(folder: RunFolder) -> str:
    """What tells this run from every other."""
    path = folder.path / "mark"
    if not path.exists():
        replace(path, secrets.token_hex(16).encode())
    return path.read_text()


def _provenance(script: str, task: Task, method: Method, folder: RunFolder, outcome: Outcome, mark: str) -> Mapping[str, Any]:
    return {
        RUN: mark,
        "method": script,
        "trained_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": outcome.step,
        "scores": dict(outcome.scores),
        "config_sha256": folder.hash,
        "config": run_config(task, method, script),
        "init": task.init and str(task.init),
        "jax": jax.__version__,
    }
