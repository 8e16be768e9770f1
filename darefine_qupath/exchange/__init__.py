"""Read and write annotation files of other programs.

`read_annotations` recognizes Aperio ImageScope, HALO and ASAP XML, Hamamatsu's NDPA, QuPath's GeoJSON, COCO JSON and
label masks by their content, also in gzip and zip and in any encoding, and gives annotations in level-0 pixels together
with what was repaired and refused. `write_geojson` and `write_label_tiff` write what QuPath and other programs read.
"""

from darefine_qupath.exchange.formats import read_annotations
from darefine_qupath.exchange.geojson_writer import write_geojson
from darefine_qupath.exchange.imported import Imported, Note
from darefine_qupath.exchange.label_mask_writer import write_label_tiff

__all__ = [
    "Imported",
    "Note",
    "read_annotations",
    "write_geojson",
    "write_label_tiff",
]
