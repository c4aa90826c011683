"""Pipeline schedules: plans as data, their lowering, simulation and execution.

Importing this package does not import torch. `ee_llm.pipeline.runtime`, which executes plans, does.
"""

from ee_llm.errors import PlanError
from ee_llm.pipeline.lower import LoweredPlan, lower, verify
from ee_llm.pipeline.plan import Action, Op, Plan, Visit, forward_only, one_f_one_b
from ee_llm.pipeline.simulate import Costs, PieceCost, Simulation, StageCost, grid, simulate

__all__ = [
    "Action",
    "Costs",
    "LoweredPlan",
    "Op",
    "PieceCost",
    "Plan",
    "PlanError",
    "Simulation",
    "StageCost",
    "Visit",
    "forward_only",
    "grid",
    "lower",
    "one_f_one_b",
    "simulate",
    "verify",
]
