"""What was written to a project, what the pathologist did with it, and where to look next."""

from darefine_qupath.review.ours import Reviewed, Survey, survey
from darefine_qupath.review.runs import Run, RunObject, list_runs
from darefine_qupath.review.writeback import (
    RunResult,
    WriteOptions,
    WritePlan,
    apply_plan,
    plan_write,
    undo,
    write_back,
)

__all__ = [
    "Reviewed",
    "Run",
    "RunObject",
    "RunResult",
    "Survey",
    "WriteOptions",
    "WritePlan",
    "apply_plan",
    "list_runs",
    "plan_write",
    "survey",
    "undo",
    "write_back",
]
