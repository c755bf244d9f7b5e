"""Training: a run is set up, restored or begun, and stepped to its end by the host loop."""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from clip_jax.data.caption_packing import CaptionPacking
from clip_jax.data.dataset import TrainingData, contents_fingerprint
from clip_jax.data.sources import fingerprint as data_fingerprint
from clip_jax.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from clip_jax.evaluation.in_training import Evaluator
from clip_jax.models.lora import adapter_scale
from clip_jax.models.projection import without_projections
from clip_jax.parallel import distributed, watchdog
from clip_jax.parallel.mesh import batch_part
from clip_jax.parallel.program_cache import start_program_cache
from clip_jax.pretrained.work_folder import RunDescription, write_description
from clip_jax.sections import Config, EvalSection, TrainSection
from clip_jax.training.batch_feed import BatchFeed, PlacedBatch
from clip_jax.training.best_checkpoint import BestCheckpoint
from clip_jax.training.caption_shares import with_caption_packing
from clip_jax.training.checkpoint import (
    COOLED_DIRNAME,
    Checkpoints,
    merged_variables,
    replay_hint,
)
from clip_jax.training.compile_ahead import (
    compiles_ahead,
    prepare_encoders,
    prepare_step,
    trace_towers,
)
from clip_jax.training.exit_report import ExitReport
from clip_jax.training.fingerprint import (
    CONTENTS,
    SOURCE,
    Fingerprint,
    changed_settings,
    check_fingerprint,
    check_new_folder,
    complete_fingerprint,
    run_fingerprint,
    saved_value,
)
from clip_jax.training.history import Changes, note_start, read_history
from clip_jax.training.kept_task import KeptTask
from clip_jax.training.kernel_check import with_checked_kernels
from clip_jax.training.metrics_service import MetricsService
from clip_jax.training.optimizer import cooldown_start, make_schedule
from clip_jax.training.programs import ProgramCompiler, ShapedPrograms
from clip_jax.training.run_lock import only_run
from clip_jax.training.run_logger import RunLogger, print_summary
from clip_jax.training.setup import (
    RunComponents,
    build_run,
    init_of_run,
    make_evaluation,
    make_loader,
    make_step,
    open_data,
    open_distiller,
    steps_of_run,
    warm_start_of_run,
)
from clip_jax.training.signals import catch_signals
from clip_jax.training.skip_limit import SkipLimit
from clip_jax.training.state import TrainState
from clip_jax.training.step import make_encoders
from clip_jax.training.warm_start import source_digest


def train(
    config: Config,
    workdir: str,
    *,
    began: float | None = None,
    allow_change: Collection[str] = (),
    service: MetricsService | None = None,
) -> int:
    """Train, or resume the run in `workdir`; return the process's exit code.

    Args:
      config: the experiment.
      workdir: the folder of the run.
      began: when the start began that the first step ends, as `time.perf_counter` counts; None is
        now.
      allow_change: the fields ("config.optim.learning_rate") that a resumed run may have otherwise
        although they are part of what it is; the change is noted in `history.jsonl`.
      service: gets the metrics, and is closed by the caller; None makes one of this call.

    Raises:
      UserError: the data, the config or the work folder is not fit for the run.
    """
    if not config.data.train:
        raise UserError("config.data.train is empty; give tar shards, e.g. data/{00000..00009}.tar")
    began = time.perf_counter() if began is None else began
    # First of all: what is wrong with the data is listed there.
    folder = make_workdir(workdir)
    with only_run(folder), ExitReport(folder, config) as exit_report:
        exit_report.code, exit_report.reason = _train(
            config, workdir, folder, began, allow_change, exit_report, service
        )
    return exit_report.code


def _train(
    config: Config,
    workdir: str,
    folder: Path,
    began: float,
    allow_change: Collection[str],
    exit_report: ExitReport,
    service: MetricsService | None,
) -> tuple[int, str]:
    """Train; return the exit code and the reason for it."""
    cache_folder = start_program_cache(config.train.compile_cache, folder)
    data = open_data(config, workdir)
    pairs = sum(len(shard) for shard in data.shards)
    steps = steps_of_run(config, pairs)
    check_steps(steps, config.train, pairs)
    distiller = open_distiller(config, steps, data)
    run = build_run(config, steps, workdir, distiller=distiller)
    check_streams(config.data.streams, batch_part(run.mesh)[1])
    run = with_caption_packing(run, data, folder)
    config = run.config
    fingerprint = make_fingerprint(run, data, pairs)
    distributed.agree(fingerprint | {"its config": dataclasses.asdict(config)})
    run = run_with_checked_kernels(run)
    print_summary(run, data, pairs=pairs, steps=steps)
    with (
        # It is closed last: a state is never saved later for it.
        _open_service(config, folder, service) as service,
        closing(open_checkpoints(config, folder, steps)) as checkpoints,
        ProgramCompiler(cache_folder) as compiler,
    ):
        train_step = ShapedPrograms(make_step(run), compiler)
        if compiles_ahead(run):
            # Beside the restoring and the first batches.
            prepare_step(run, train_step)
        state, changes = restore_or_init(
            run, checkpoints, fingerprint, folder, compiler, allow_change, steps
        )
        exit_report.owns_folder = True
        if distributed.is_first():
            changes |= changed_settings(folder, run.config)
            note_start(folder, int(state.step), steps, changes)
            write_description(folder, describe_run(run))
        if int(state.step) < steps:
            checkpoints.require_room(state)
        logger = RunLogger(
            run,
            steps,
            int(state.step),
            folder,
            compiler=compiler,
            began=began,
            exit_report=exit_report,
            service=service,
        )
        with logger:
            end = train_loop(
                run, data, state, train_step, checkpoints, fingerprint, compiler, logger
            )
        service.code = end[0]
    watchdog.stand_by()
    return end


def run_with_checked_kernels(run: RunComponents) -> RunComponents:
    """Return the run, its model without the kernels that are wrong on these chips."""
    model = with_checked_kernels(run.model, functools.partial(trace_towers, run))
    return dataclasses.replace(run, model=model)


def _open_service(
    config: Config, folder: Path, service: MetricsService | None
) -> AbstractContextManager[MetricsService]:
    """Return the caller's service, which stays open, or one that is closed with the block."""
    if service is not None:
        return nullcontext(service)
    return closing(MetricsService(config.train, folder))


def open_checkpoints(config: Config, folder: Path, steps: int) -> Checkpoints:
    """Open the checkpoints of a run, of which the one before the cool-down stays."""
    start = cooldown_start(config.optim, steps)
    keep_steps = () if start is None else (start,)
    return Checkpoints(folder, keep=config.checkpoint.keep, keep_steps=keep_steps)


def make_fingerprint(run: RunComponents, data: TrainingData, pairs: int) -> Fingerprint:
    """Return what this run is. All processes have to call it."""
    path = run.config.model.init_from
    return run_fingerprint(
        run.config,
        run.model.config,
        run.tokenizer_spec,
        data=data_fingerprint(data.shards),
        pairs=pairs,
        contents=contents_fingerprint(data.shards),
        source=distributed.from_first(source_digest(path) if distributed.is_first() else None),
        teachers=[] if run.distiller is None else [x.identity for x in run.distiller.infos],
    )


def make_workdir(workdir: str) -> Path:
    """Make the folder of the run, on process 0, where it is not there; return it when all see it.

    Raises:
      UserError: it cannot be made, or not be written to, or not be seen.
    """
    folder = distributed.make_shared_folder(workdir, flag="--workdir")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--workdir {workdir} cannot be written to; give another")
    return folder


def check_steps(steps: int, section: TrainSection, pairs: int) -> None:
    """Raise UserError if the run has no step."""
    if steps < 1:
        raise UserError(
            f"config.train.epochs {section.epochs:g} over {pairs:,} pairs is not one step of "
            f"config.train.batch_size {section.batch_size}; raise the one or lower the other"
        )


def check_streams(streams: int, parts: int) -> None:
    """Raise UserError if the processes cannot share the streams evenly."""
    if streams % parts:
        raise UserError(
            f"config.data.streams {streams} is not a multiple of {parts}, the parts of a batch "
            f"that processes load; take {-(-streams // parts) * parts}, or other processes"
        )


def restore_or_init(
    run: RunComponents,
    checkpoints: Checkpoints,
    fingerprint: Fingerprint,
    folder: Path,
    compiler: ProgramCompiler,
    allow_change: Collection[str],
    steps: int,
) -> tuple[TrainState, Changes]:
    """Restore the newest whole checkpoint, or make a fresh state; return what changed, too.

    A fresh state has the weights of config.model.init_from where that is set.

    Raises:
      UserError: the folder belongs to another run, or the checkpoint to start from cannot be used.
    """
    changes: Changes = {}
    meta = checkpoints.latest_meta()
    if meta is None and distributed.from_first(checkpoints.steps()):
        checkpoints.restore(run.shapes)  # sets each aside with a line, and ends the run
    if meta is not None:
        saved = complete_fingerprint(meta["fingerprint"], folder)
        changes = check_fingerprint(saved, fingerprint, folder, allow_change)
        for key in (CONTENTS, SOURCE):
            if key in saved:  # what a run began from may be gone by now
                fingerprint.setdefault(key, saved[key])
        last = extend_run(run, checkpoints, folder, meta["step"], steps)
        restored = checkpoints.restore(run.shapes, last=last)
        if restored is not None:
            state, meta = restored
            changed = f"; changed: {', '.join(changes)}" if changes else ""
            distributed.print_on_main(f"going on from step {meta['step']} of {folder}{changed}")
            return state, changes
    else:
        changes = check_new_folder(fingerprint, folder, allow_change)
    if run.source is None:
        return compiler.compile(init_of_run(run)).call(), changes
    distributed.print_on_main(f"starting from {run.source.path}")
    return warm_start_of_run(run, run.source), changes


def extend_run(
    run: RunComponents, checkpoints: Checkpoints, folder: Path, step: int, steps: int
) -> int | None:
    """Prepare a run that is resumed with another length; return the last step to restore, or None.

    One that has begun to cool down and becomes longer goes on from the state before. Where the
    learning rates of the steps behind would have been others, a line says so.
    """
    starts = read_history(folder) if distributed.is_first() else []
    before = distributed.from_first(starts[-1]["steps"] if starts else steps)
    cooldown = saved_value(folder, "config.optim.cooldown_steps", 0)
    optim = run.config.optim
    if (before, cooldown) == (steps, optim.cooldown_steps):
        return None
    old = dataclasses.replace(optim, cooldown_steps=cooldown)
    start, last = cooldown_start(old, before), None
    if start is not None and start < step and steps > before:
        if start in distributed.from_first(checkpoints.steps()):
            checkpoints.set_aside(start, COOLED_DIRNAME)
            last = step = start
            distributed.print_on_main(
                f"the run becomes {steps} steps long: it goes on from step {start}, before its "
                f"cool-down, whose checkpoints are now in {COOLED_DIRNAME}/"
            )
        else:
            distributed.print_on_main(
                f"step {start}, before the cool-down, is not in {checkpoints.folder}: the run goes "
                f"on from step {step}, which has cooled down"
            )
    past = np.arange(step)
    rates, rates_before = make_schedule(optim, steps)(past), make_schedule(old, before)(past)
    if not np.array_equal(np.asarray(rates), np.asarray(rates_before)):
        distributed.print_on_main(
            f"the run was to be {before} steps long, {cooldown} of them cooling down, and now "
            f"{steps}, of them {optim.cooldown_steps}: with that from the beginning, the learning "
            f"rates up to step {step} would have been others"
        )
    return last


def describe_run(run: RunComponents) -> RunDescription:
    """Return the description of the run that its work folder keeps."""
    return RunDescription(
        run.config.model.name,
        run.model.config,
        run.tokenizer_spec,
        run.preprocess,
        config=dataclasses.asdict(run.config),
    )


def kept_task_of(run: RunComponents, compiler: ProgramCompiler, folder: Path) -> KeptTask | None:
    """Return what watches config.eval.keep; None where nothing is watched."""
    section = run.config.eval
    if not section.keep:
        return None
    names = section.keep_classnames or section.classnames
    kept = dataclasses.replace(section, data=section.keep, classnames=names)
    evaluate = evaluator_of(run, compiler, kept)
    assert evaluate is not None
    return KeptTask(evaluate, folder, section.best or "acc1", section.keep_loss)


def evaluator_of(
    run: RunComponents, compiler: ProgramCompiler, section: EvalSection
) -> Evaluator | None:
    """Return what evaluates states during the run; None where that is not asked for.

    Raises:
      UserError: the data of an evaluation cannot be read.
    """
    if not section.data or not section.every:
        return None
    encode_image, encode_text = (
        ShapedPrograms(encode, compiler) for encode in make_encoders(run.model, run.preprocess)
    )
    if compiles_ahead(run):
        prepare_encoders(run, encode_image, encode_text)
    return make_evaluation(run, encode_image, encode_text, section)


def train_loop(
    run: RunComponents,
    data: TrainingData,
    state: TrainState,
    train_step: ShapedPrograms,
    checkpoints: Checkpoints,
    fingerprint: Fingerprint,
    compiler: ProgramCompiler,
    logger: RunLogger,
) -> tuple[int, str]:
    """Step from `state` to the end, a signal, or a loss that is not finite.

    Returns:
      The exit code and the reason for it.

    Raises:
      UserError: too much was skipped, or the evaluations do not measure config.eval.best.
    """
    start, steps, folder = int(state.step), logger.steps, logger.folder
    evaluate = evaluator_of(run, compiler, run.config.eval)
    metric = run.config.eval.best
    with (
        make_loader(run, data, start) as loader,
        catch_signals(distributed.print_on_main) as stop_request,
        BestCheckpoint(folder, metric, describe_run(run)) if metric else nullcontext() as best,
    ):
        feed = BatchFeed(
            run,
            loader,
            count=steps - start,
            limit=SkipLimit(data.log, batch_part(run.mesh)[0], loader),
            stop_request=stop_request,
            device_wait=logger.device_wait,
        )
        trainer = Trainer(
            config=run.config,
            steps=steps,
            train_step=train_step,
            evaluate=evaluate,
            feed=feed,
            logger=logger,
            checkpoints=checkpoints,
            best=best,
            fingerprint=fingerprint,
            state=state,
            step=start,
            cooldown=cooldown_start(run.config.optim, steps),
            kept=kept_task_of(run, compiler, folder),
        )
        if trainer.kept is not None:
            trainer.kept.begin(evaluated_variables(state, run.config.train))
        trainer.run()
    return trainer.end()


def evaluated_variables(state: TrainState, section: TrainSection) -> dict[str, Any]:
    """Return what of a state is evaluated, adapters merged.

    It is the moving averages where the run keeps them: they are what it is trained for.
    """
    newest = {"params": without_projections(state.params), "batch_stats": state.batch_stats}
    scale = adapter_scale(section.lora_rank, section.lora_alpha)
    return merged_variables(state.ema or newest, scale)


class DispatchedStep(NamedTuple):
    """A step that was dispatched and whose metrics are not read yet."""

    step: int
    metrics: dict[str, jax.Array]
    keys: list[str]
    length: int | CaptionPacking


@dataclasses.dataclass
class Trainer:
    """The host loop.

    The metrics of a step are read only after the next one is dispatched and the batch after that
    is on its way, so the devices never wait for the host. Only a state whose own step was finite
    is saved: before that its metrics are read.

    Attributes:
      config: the experiment.
      steps: the number of the last step.
      train_step, evaluate: the jitted step, and what evaluates a state during the run, if any.
      feed: places the batches.
      logger: takes the metrics.
      checkpoints, best: where states are saved; `best` is None where no metric is watched.
      fingerprint: the fingerprint of the run, saved with each state.
      state: the state after `step` updates.
      step: the number of updates.
      pending: the newest step, while its metrics are not read.
      cooldown: the step from which the learning rate cools down, whose state is saved, or None.
      kept: the task that shall not be forgotten, if one is watched.
      forgot: whether too much of it is lost, which ends the run.
      finite: whether every step whose metrics were read was finite.
      stop_signal: the signal that ended the loop, or 0.
    """

    config: Config
    steps: int
    train_step: ShapedPrograms
    evaluate: Evaluator | None
    feed: BatchFeed
    logger: RunLogger
    checkpoints: Checkpoints
    best: BestCheckpoint | None
    fingerprint: Fingerprint
    state: TrainState
    step: int
    cooldown: int | None
    kept: KeptTask | None
    forgot: bool = False
    pending: DispatchedStep | None = None
    finite: bool = True
    stop_signal: int = 0

    def run(self) -> None:
        """Step to the end, a signal, or a loss that is not finite; save the last state."""
        upcoming = self.feed.place_next()
        while upcoming is not None and self.goes_on() and not self.asked_to_stop(upcoming):
            newest = self.dispatch(upcoming)
            try:
                # On its way to the devices while they are busy with the step.
                upcoming = self.feed.place_next()
            except Exception:
                self.save_after_data_error(newest)
                raise
            self.log_pending()
            self.pending = newest
            self.save_and_evaluate()
        self.log_pending()
        self.logger.print_skipped(self.feed.loader)
        if self.finite:
            self.save()
        else:
            self.logger.report_not_finite(self.checkpoints.steps(), self.checkpoints.folder)

    def goes_on(self) -> bool:
        """Return whether nothing that was read of the state ends the run."""
        return self.finite and not self.forgot

    def asked_to_stop(self, upcoming: PlacedBatch) -> bool:
        """Return whether a process got a signal before this batch, and name another process."""
        self.stop_signal = int(upcoming.stop_signals.max())
        others = [i for i, number in enumerate(upcoming.stop_signals) if number and i]
        if others:
            name = signal.Signals(self.stop_signal).name
            distributed.print_on_main(
                f"{name} on process {others[0]}: saving step {self.step}, then exiting"
            )
        return self.stop_signal != 0

    def dispatch(self, batch: PlacedBatch) -> DispatchedStep:
        """Hand the next step to the devices, and do not wait for it."""
        watchdog.rearm()
        called = time.perf_counter()
        self.state, metrics = self.train_step(self.state, batch.arrays)
        self.logger.device_wait.dispatched(called, batch.placed, metrics)
        distributed.settle(metrics)
        self.step += 1
        return DispatchedStep(self.step, metrics, batch.keys, batch.length)

    def log_pending(self) -> None:
        """Read the metrics of the pending step, waiting for them, and log them."""
        if self.pending is not None and self.finite:
            self.finite = self.logger.log_step(*self.pending, self.feed.loader)
            self.pending = None

    def save_and_evaluate(self) -> None:
        """Save and evaluate the state, if this step is one for it."""
        is_due = self.step % self.config.checkpoint.every == 0
        save = is_due or self.step == self.cooldown
        every = self.config.eval.every
        evaluate = self.evaluate if every and self.step % every == 0 else None
        if save or (evaluate is not None and self.best is not None):
            # Only a state whose own step was finite is worth keeping.
            self.log_pending()
        if save and self.finite:
            self.save()
        # The last state is evaluated after the run; here only if it may be the best.
        last = self.step >= self.steps
        if evaluate is not None and self.finite and (not last or self.best is not None):
            self.evaluate_state(evaluate)

    def evaluate_state(self, evaluate: Evaluator) -> None:
        """Evaluate the state, and keep it if it is the best so far.

        Raises:
          UserError: the evaluations do not measure config.eval.best.
        """
        self.logger.device_wait.pause()
        variables = evaluated_variables(self.state, self.config.train)
        metrics = evaluate(variables)
        if self.kept is not None:
            metrics |= self.kept.measure(variables)
            self.forgot = self.kept.is_lost(metrics)
        self.logger.log_evaluation(self.step, metrics)
        if self.best is None or self.forgot:
            return
        try:
            self.best.offer(self.state, self.step, metrics, self.fingerprint)
        except UserError:  # a metric that is not measured; no step shall be lost for it
            self.save()
            raise

    def save_after_data_error(self, newest: DispatchedStep) -> None:
        """Save the newest state, so that an error of the data costs no step.

        With several processes nothing is saved: the others would have to take part, and have their
        data.
        """
        self.log_pending()
        self.pending = newest
        self.log_pending()
        if self.finite and jax.process_count() == 1:
            self.save()

    def save(self) -> None:
        """Start saving the state."""
        self.checkpoints.save(self.state, self.step, self.fingerprint)

    def end(self) -> tuple[int, str]:
        """Return the exit code and the reason; say how a run that was stopped goes on."""
        if not self.finite:
            step = self.logger.not_finite_step
            hint = replay_hint(self.logger.folder, step)
            return EXIT_ERROR, f"step {step} is not finite; {hint}"
        if self.step >= self.steps:
            return 0, f"all {self.steps} steps are done"
        if self.kept is not None and self.forgot:
            verdict = self.kept.verdict(self.step)
            distributed.print_on_main(verdict)
            return 0, verdict
        saved = f"saved step {self.step} of {self.steps}; the same command goes on from there"
        distributed.print_on_main(saved)
        code = EXIT_INTERRUPTED if self.stop_signal == signal.SIGINT else EXIT_TERMINATED
        return code, f"{signal.Signals(self.stop_signal).name}: {saved}"
