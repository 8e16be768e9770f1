"""Generate slides that need context, and the QuPath project around them."""

from darefine_qupath.demo.slides import CLASSES, MPP, DemoSlide, draw_slide, write_slide
from darefine_qupath.demo.workspace import DemoProject, make_project

__all__ = ["CLASSES", "MPP", "DemoProject", "DemoSlide", "draw_slide", "make_project", "write_slide"]
