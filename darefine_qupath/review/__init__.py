"""Write predictions to a project, follow what the pathologist does with them, and say where to look next."""

from darefine_qupath.review.compare import compare
from darefine_qupath.review.labels import ReviewedLabels, manual_annotations, reviewed_annotations
from darefine_qupath.review.ownership import ImageObjects, ReviewedObject, sort_objects
from darefine_qupath.review.page import write_page
from darefine_qupath.review.per_image import OnError, for_images
from darefine_qupath.review.review_marks import clear_places, mark_places
from darefine_qupath.review.review_queue import MapLayers, ReviewPlace, next_places
from darefine_qupath.review.review_report import ImageReview, ObjectReview, ReviewReport
from darefine_qupath.review.run import Run, RunObject
from darefine_qupath.review.run_records import list_runs
from darefine_qupath.review.run_result import RunResult
from darefine_qupath.review.run_states import run_states
from darefine_qupath.review.scripts import install_scripts, script_names
from darefine_qupath.review.undo import undo
from darefine_qupath.review.write_options import WriteOptions
from darefine_qupath.review.writeback import WritePlan, apply_plan, plan_write, write_back

__all__ = [
    "ImageObjects",
    "ImageReview",
    "MapLayers",
    "ObjectReview",
    "OnError",
    "ReviewPlace",
    "ReviewReport",
    "ReviewedLabels",
    "ReviewedObject",
    "Run",
    "RunObject",
    "RunResult",
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
    "sort_objects",
    "undo",
    "write_back",
    "write_page",
]
