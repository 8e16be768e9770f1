"""What was written to a project, what the pathologist did with it, and where to look next."""

from darefine_qupath.review.compare import ImageReview, ObjectReview, ReviewReport, compare
from darefine_qupath.review.labels import ReviewedLabels, manual_annotations, reviewed_annotations
from darefine_qupath.review.ours import Reviewed, Survey, for_images, survey
from darefine_qupath.review.page import write_page
from darefine_qupath.review.places import MapLayers, Place, clear_places, mark_places, next_places
from darefine_qupath.review.runs import OnError, Run, RunObject, list_runs
from darefine_qupath.review.scripts import install_scripts, script_names
from darefine_qupath.review.takeback import run_states, undo
from darefine_qupath.review.writeback import (
    RunResult,
    WriteOptions,
    WritePlan,
    apply_plan,
    plan_write,
    write_back,
)

__all__ = [
    "ImageReview",
    "MapLayers",
    "ObjectReview",
    "OnError",
    "Place",
    "ReviewReport",
    "Reviewed",
    "ReviewedLabels",
    "Run",
    "RunObject",
    "RunResult",
    "Survey",
    "WriteOptions",
    "WritePlan",
    "apply_plan",
    "clear_places",
    "compare",
    "for_images",
    "install_scripts",
    "list_runs",
    "manual_annotations",
    "mark_places",
    "next_places",
    "plan_write",
    "reviewed_annotations",
    "run_states",
    "script_names",
    "survey",
    "undo",
    "write_back",
    "write_page",
]
