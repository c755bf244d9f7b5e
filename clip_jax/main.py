"""Train: `python -m clip_jax.main --config experiments/X.py --workdir DIR [--config.a.b=value]`.

Started once on each machine of a cluster, it is one run over all of their devices.
"""

import os
import sys
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from clip_jax.config import known_keys, resolve, unknown_key_message
from clip_jax.errors import UserError, run_command
from clip_jax.host_memory import keep_freed_memory

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "An experiment file; --config.a.b=value overrides a field."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and results.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the config, parameters, mesh and bytes per device, and exit."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0; SLURM, Open MPI and TPU pods need no such flags."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process among them, from 0.")
_DEVICE_IDS = flags.DEFINE_list(
    "local_device_ids", None, "The machine's GPUs that this process drives; all by default."
)
_INIT = flags.DEFINE_integer("init_seconds", 300, "Wait for all processes to join.", 1)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "A process without a sign of life for so long counts as dead.", 1
)
_HANG = flags.DEFINE_integer(
    "hang_seconds", 1800, "Longest step of several processes, compiling included; 0: any.", 0
)


def parse(argv: Sequence[str]) -> ml_collections.ConfigDict:
    """The experiment's config with its overrides.

    Raises:
      UserError: a flag, a config key or the experiment file is wrong.
    """
    known = known_keys()
    for arg in argv[1:]:
        key = arg.lstrip("-").removeprefix("config.").split("=")[0]
        if arg.lstrip("-").startswith("config.") and key not in known:
            raise UserError(unknown_key_message(key))
    try:
        rest = flags.FLAGS(list(argv))[1:]
        config = _CONFIG.value
        if config is not None:
            config.to_dict()  # a file that could not be read says so only when it is used
    except Exception as error:
        raise UserError(_reason(error, argv)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; fields are set as --config.a.b=value")
    if config is None:
        raise UserError("--config is missing; for example --config experiments/emoji.py")
    return config


def _reason(error: Exception, argv: Sequence[str]) -> str:
    """One line on why the flags could not be parsed."""
    text = str(error).strip()
    in_file = "Traceback" in text or not isinstance(error, flags.Error)
    if not in_file:
        return " ".join(text.split())
    # What the experiment file raises comes through ml_collections, at times as a whole traceback.
    flat = " ".join(argv[1:]).replace("--config=", "--config ")
    path = flat.partition("--config ")[2].split(" ")[0].partition(":")[0]
    if not os.path.isfile(path):
        return f"--config {path}: no such file (folder: {os.getcwd()})"
    last = text.splitlines()[-1] if text else ""
    kind = "" if "Traceback" in text else f"{type(error).__name__}: "
    return f"experiment file {path}: {kind}{last}"


def join() -> None:
    """Join the other processes of the run, where there are any.

    Raises:
      UserError: a flag is wrong, or the others cannot be reached.
    """
    from clip_jax.parallel import distributed

    ids = _DEVICE_IDS.value
    if ids is not None and not all(i.isdigit() for i in ids):
        raise UserError(f"--local_device_ids {','.join(ids)}: numbers with commas, such as 0,1")
    distributed.join(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        None if ids is None else [int(i) for i in ids],
        distributed.Limits(init=_INIT.value, heartbeat=_HEARTBEAT.value, hang=_HANG.value),
    )


def main() -> int:
    """Parse the flags, resolve the config and train; the process's exit code."""
    config = resolve(parse(sys.argv))
    workdir = _WORKDIR.value
    if workdir is None and not _DRY_RUN.value:
        raise UserError("--workdir is missing; for example --workdir runs/emoji")
    keep_freed_memory()
    # Only now the heavy imports: a misspelt key answers at once.
    join()
    from clip_jax.parallel import distributed
    from clip_jax.training import setup, trainer

    with distributed.ending_together():
        if workdir is None or _DRY_RUN.value:
            distributed.tell(setup.describe(config))
            return 0
        return trainer.run(config, workdir)


if __name__ == "__main__":
    run_command(main)
