"""Read and write annotation files of other programs.

`read_annotations` tells Aperio ImageScope, HALO and ASAP XML, Hamamatsu's NDPA, QuPath's GeoJSON, COCO JSON and label
masks apart by what they hold, whatever they are packed and encoded in, and gives annotation records in level-0 pixels
together with what was repaired and refused. `write_geojson` and `write_label_tiff` write what QuPath and other programs
read.
"""

from darefine_qupath.exchange.formats import read_annotations
from darefine_qupath.exchange.geojson_writer import write_geojson
from darefine_qupath.exchange.imported import Imported, Note
from darefine_qupath.exchange.label_mask_writer import write_label_tiff
from darefine_qupath.exchange.label_masks import read_label_mask

__all__ = [
    "Imported",
    "Note",
    "read_annotations",
    "read_label_mask",
    "write_geojson",
    "write_label_tiff",
]
