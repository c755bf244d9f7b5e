"""A plan as JSON values; `docs/planning.md` says what each key holds."""

import dataclasses
from typing import Any

from clip_jax.planning.plan import Plan, RefusedPlan

ESTIMATES = {"tpu": "cycles", "cuda": "roofline", "cpu": "rates"}
"""How a step's time is estimated, by the compiler's platform."""


def plan_record(plan: Plan | RefusedPlan) -> dict[str, Any]:
    """Return a plan's figures by their documented keys, which are those of a refused one too."""
    of = plan if isinstance(plan, RefusedPlan) else plan.costs
    return {
        "model": plan.config.model.name,
        "device": plan.device_name,
        "devices": plan.devices,
        "batch_size": plan.config.train.batch_size,
        "mesh": of.mesh,
        "steps": plan.steps,
        "compiler": dataclasses.asdict(of.compiler),
        **(_refused(plan) if isinstance(plan, RefusedPlan) else _figures(plan)),
    }


def _refused(plan: RefusedPlan) -> dict[str, Any]:
    return {
        "fits": False,
        "memory_bytes": plan.refusal.used,
        "temp_bytes": plan.refusal.temporaries,
        "memory_by_kind": None,
        "estimated_seconds": None,
        "estimated_by": None,
        "counted_share": None,
        "utilization": None,
        "needed_flops": None,
        "breakdown": [],
        "exposed_collective_seconds": None,
        "exposed_collective_share": None,
        "collectives": [],
        "largest_buffers": [buffer._asdict() for buffer in plan.refusal.buffers],
    }


def _figures(plan: Plan) -> dict[str, Any]:
    costs, timing = plan.costs, plan.costs.timing
    return {
        "fits": plan.fits,
        "memory_bytes": costs.memory.total,
        "temp_bytes": costs.temp_bytes,
        "memory_by_kind": costs.memory.kinds,
        "estimated_seconds": plan.step_seconds,
        "estimated_by": ESTIMATES[costs.compiler.platform],
        "counted_share": timing.counted_share if timing and plan.is_counted else None,
        "utilization": plan.model_flop_utilization(plan.step_seconds),
        "needed_flops": costs.needed_flops,
        "breakdown": _breakdown(plan),
        "exposed_collective_seconds": plan.exposed_seconds,
        "exposed_collective_share": plan.exposed_share,
        "collectives": [
            {
                "kind": c.kind,
                "bytes": c.bytes,
                "times": c.times,
                "group": len(c.group),
                "beside_computation": bool(c.beside),
            }
            for c in costs.collectives
        ],
        "largest_buffers": [],
    }


def _breakdown(plan: Plan) -> list[dict[str, Any]]:
    if plan.costs.timing:
        return [
            {"tower": part.tower, "pass": part.direction, "part": part.name, "seconds": seconds}
            for part, seconds in plan.costs.timing.by_part().items()
        ]
    parts = {"products": plan.time.compute, "update": plan.time.update}
    return [
        {"tower": "", "pass": "", "part": name, "seconds": seconds}
        for name, seconds in parts.items()
    ]
