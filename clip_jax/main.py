"""Train: `python -m clip_jax.main --config EXPERIMENT --workdir DIR [--config.a.b=value]`.

EXPERIMENT is a name that `python -m clip_jax` lists, such as emoji, or a file of your own. Started
once on each machine of a cluster, it is one run over all of their devices.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from absl import flags

from clip_jax.config import known_keys, resolve, unknown_key_message
from clip_jax.errors import UserError, run_command
from clip_jax.gpu_memory import take_gpu_memory
from clip_jax.host_memory import keep_freed_memory
from clip_jax.parallel.limits import LIMITS, Limits
from clip_jax.sections import Config
from clip_jax.tools.config_flags import help_text, parse

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder for checkpoints, metrics and results; also in a bucket: s3://bucket/run, gs://...",
)
_SCRATCH = flags.DEFINE_string(
    "scratch",
    "",
    "Folder of this machine for the copies of work folders in buckets; ~/.cache/clip_jax/runs.",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry-run", False, "Print the config, parameters, mesh and bytes per device, and exit."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0; SLURM, Open MPI and TPU pods need no such flags."
)
_NUM_PROCESSES = flags.DEFINE_integer("num-processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process-id", None, "This process among them, from 0.")
_DEVICE_IDS = flags.DEFINE_list(
    "local-device-ids", None, "The machine's GPUs that this process drives; all by default."
)
_INIT = flags.DEFINE_integer("init-seconds", LIMITS.init, "Wait for all processes to join.", 1)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat-seconds",
    LIMITS.heartbeat,
    "A process without a sign of life for so long counts as dead.",
    1,
)
_HANG = flags.DEFINE_integer(
    "hang-seconds",
    LIMITS.hang,
    "Longest step of several processes, compiling included; 0: any.",
    0,
)

# The spellings of earlier versions.
for _name in (
    *("dry-run", "num-processes", "process-id", "local-device-ids"),
    *("init-seconds", "heartbeat-seconds", "hang-seconds"),
):
    flags.DEFINE_alias(_name.replace("-", "_"), _name)
_ALLOW_CHANGE = flags.DEFINE_list(
    "allow-change",
    [],
    "Fields of the config that a resumed run may have otherwise, such as optim.learning_rate, or "
    "data.tokenizer for another file; written into history.jsonl.",
)

OWN_FLAGS: tuple[flags.FlagHolder, ...] = (
    *(_WORKDIR, _SCRATCH, _DRY_RUN, _ALLOW_CHANGE, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID),
    *(_DEVICE_IDS, _INIT, _HEARTBEAT, _HANG),
)
"""The flags of this command, as `--help` shows them."""


def join() -> None:
    """Join the other processes of the run, where there are any.

    Raises:
      UserError: a flag is wrong, or the others cannot be reached.
    """
    from clip_jax.parallel import cluster

    ids = _DEVICE_IDS.value
    if ids is not None and not all(i.isdigit() for i in ids):
        raise UserError(f"--local-device-ids {','.join(ids)}: numbers with commas, such as 0,1")
    cluster.join(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        None if ids is None else [int(i) for i in ids],
        Limits(init=_INIT.value, heartbeat=_HEARTBEAT.value, hang=_HANG.value),
    )


def process_age() -> float:
    """Return for how many seconds this process exists; 0 where Linux does not say it."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            # The name of the program, in brackets, may hold spaces.
            fields = file.read().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):
        return 0.0


def main() -> int:
    """Parse the flags, resolve the config and train; return the process's exit code."""
    if {"-h", "-help", "--help"} & set(sys.argv[1:]):
        print(help_text(__doc__ or "", OWN_FLAGS))
        return 0
    # First of all: resolving imports JAX, which may start threads.
    keep_freed_memory()
    take_gpu_memory()
    config = resolve(parse(sys.argv))
    workdir = _WORKDIR.value
    if workdir is None and not _DRY_RUN.value:
        raise UserError("--workdir is missing; for example --workdir runs/emoji")
    join()
    from clip_jax.parallel.watchdog import ending_together

    with ending_together():
        if workdir is None or _DRY_RUN.value:
            print_dry_run(config)
            return 0
        began = time.perf_counter() - process_age()
        from clip_jax.training.bucket_workdir import local_workdir

        changes = allowed_changes()
        with local_workdir(workdir, _SCRATCH.value) as local:
            code = run(config, local.path, began=began, allow_change=changes)
        return local.exit_code(code)


def allowed_changes() -> list[str]:
    """Return the whole names of the fields of --allow-change.

    Raises:
      UserError: there is no such field.
    """
    names = [name.strip().removeprefix("config.") for name in _ALLOW_CHANGE.value]
    unknown = next((name for name in names if name not in known_keys()), None)
    if unknown is not None:
        raise UserError(f"--allow-change: {unknown_key_message(unknown)}")
    return [f"config.{name}" for name in names]


def print_dry_run(config: Config) -> None:
    """Print the config, the parameters, the mesh and the bytes on a device."""
    from clip_jax.parallel.distributed import print_on_main
    from clip_jax.parallel.mesh import mesh_text
    from clip_jax.pretrained.by_name import parse_name
    from clip_jax.training.dry_run import dry_run
    from clip_jax.training.rates import rate_lines

    found = dry_run(config)
    parameters, mib = found.parameters, 1 / 2**20
    lines = [
        json.dumps(dataclasses.asdict(config), indent=2),
        f"model       {config.model.name}: image tower {parameters['image']:,} parameters, "
        f"text tower {parameters['text']:,}, in all {parameters['total']:,}",
        *rate_lines(found.rates, config.optim.learning_rate),
        f"forward     {found.image_flops / 1e9:.2f} GFLOP an image, "
        f"{found.text_flops / 1e9:.2f} GFLOP a caption of {found.context_length} tokens",
        f"mesh        {mesh_text(found.mesh)} over {found.devices} {found.device_kind} devices",
        f"per device  {found.rows} pairs of the global batch of {config.train.batch_size:,}",
        f"            parameters {found.parameter_bytes * mib:,.1f} MiB, "
        f"optimizer {found.optimizer_bytes * mib:,.1f} MiB, "
        f"images {found.image_bytes * mib:,.1f} MiB (activations come on top)",
    ]
    if config.model.init_from:
        named = not found.source_found and parse_name(config.model.init_from) is not None
        missing = ", fetched when the run begins" if named else ", which is not there"
        missing = "" if found.source_found else missing
        lines.insert(2, f"start       {config.model.init_from}{missing}")
    print_on_main("\n".join(lines))


def run(
    config: Config,
    workdir: str,
    *,
    began: float | None = None,
    allow_change: Collection[str] = (),
) -> int:
    """Train, or resume the run in `workdir`, then evaluate; return the process's exit code.

    `began` and `allow_change` are as `trainer.train` takes them.

    Raises:
      UserError: the data, the config or the work folder is not fit for the run.
    """
    from clip_jax.errors import EXIT_ERROR
    from clip_jax.parallel import distributed
    from clip_jax.tools.evaluate import evaluate_workdir, evaluation_text
    from clip_jax.tools.report import report, report_text
    from clip_jax.training.metrics_service import MetricsService
    from clip_jax.training.trainer import train

    with closing(MetricsService(config.train, Path(workdir))) as service:
        code = train(config, workdir, began=began, allow_change=allow_change, service=service)
        if code == 0 and config.eval.data:
            service.code = EXIT_ERROR
            # On the devices of all processes, so all of them take part.
            distributed.print_on_main(evaluation_text(evaluate_workdir(workdir)))
            if distributed.is_first():
                distributed.print_on_main(report_text(report([workdir])))
            service.code = code
    return code


if __name__ == "__main__":
    run_command(main)
