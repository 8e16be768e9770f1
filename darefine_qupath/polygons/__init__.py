"""Turn a label map into class polygons that share their borders exactly.

The map is sieved, traced with 4-connectivity, rounded by less than half a map pixel, and simplified as a coverage
(Visvalingam-Whyatt on the shared borders, `shapely.coverage_simplify`), so neighbors have the same border to the
last bit: no gap, no overlap. Three facts make that hold from the first pixel to QuPath's file:

* Every border point is a corner of the pixel lattice moved by less than half a pixel, the same for both neighbors.
  Lattice edges that share no end lie a whole pixel apart on one axis, so borders moved that little cannot cross.
* Points are rounded to quarters of a level-0 pixel *before* they are simplified, and simplification only leaves
  points out. A quarter is a multiple of QuPath's precision (0.01 px) and exact in the float32 that QuPath stores
  plain polygons in, so what is valid here is valid there.
* The map is worked on in blocks whose outline stays as it is. Pieces are joined across the cuts, and a region that
  would get more vertices than QuPath handles well stays cut, its pieces sharing straight borders exactly.
"""

from darefine_qupath.polygons.class_polygon import ClassPolygon
from darefine_qupath.polygons.map_reader import MapSource, RasterDataset
from darefine_qupath.polygons.settings import FEWEST_VERTICES, GRID, snap
from darefine_qupath.polygons.vectorize import vectorize

__all__ = ["FEWEST_VERTICES", "GRID", "ClassPolygon", "MapSource", "RasterDataset", "snap", "vectorize"]
