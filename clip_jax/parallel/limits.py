"""How long the processes of a run wait for each other, for flags too: nothing heavy is imported."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds until a process gives up; `clip_jax.main` has a flag for each.

    Attributes:
      init: waiting for all processes to join (`--init-seconds`).
      heartbeat: without a sign of life until a process counts as dead (`--heartbeat-seconds`).
      hang: in one step until a process prints its stacks and ends; 0 is never (`--hang-seconds`).
        A first step compiles, which takes minutes for a big model.
    """

    init: int = 300
    heartbeat: int = 60
    hang: int = 1800


LIMITS = Limits()
