"""Generated slides that need context, and the QuPath project around them."""

from darefine_qupath.demo.slides import CLASSES, DemoSlide, draw_slide, write_slide

__all__ = ["CLASSES", "DemoSlide", "draw_slide", "write_slide"]
