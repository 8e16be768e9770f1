"""Name QuPath's classes and lay out those that are written, as QuPath 0.4 to 0.7 do."""

from __future__ import annotations

from darefine_qupath.annotations import Kind, RoiKind
from darefine_qupath.javaserial.protocol import Flag

OBJECT_ID = "Object ID"
"""Key of an object's identity in its metadata."""
EOF = "EOF"
"""Text at the end of a whole file."""

_OBJECTS = "qupath.lib.objects."
_MEASUREMENTS = "qupath.lib.measurements."
_ROI = "qupath.lib.roi."
_PROXY = "$SerializationProxy"

ROOT = f"{_OBJECTS}PathRootObject"
KIND_CLASSES: dict[Kind, str] = {
    "annotation": f"{_OBJECTS}PathAnnotationObject",
    "detection": f"{_OBJECTS}PathDetectionObject",
    "cell": f"{_OBJECTS}PathCellObject",
    "tile": f"{_OBJECTS}PathTileObject",
    "tma core": f"{_OBJECTS}TMACoreObject",
}
METADATA = f"{_OBJECTS}MetadataMap"
PATH_CLASS = f"{_OBJECTS}classes.PathClass"
HIERARCHY = f"{_OBJECTS}hierarchy.PathObjectHierarchy"
_NUMERIC_LIST = f"{_MEASUREMENTS}NumericMeasurementList$"
FLOAT_LIST = f"{_NUMERIC_LIST}FloatList"
DOUBLE_LIST = f"{_NUMERIC_LIST}DoubleList"
DEFAULT_LIST = f"{_MEASUREMENTS}DefaultMeasurementList"
MEASUREMENT = f"{_MEASUREMENTS}DoubleMeasurement"
STAINS = "qupath.lib.color.ColorDeconvolutionStains"
WORKFLOW = "qupath.lib.plugins.workflow.Workflow"
IMAGE_TYPE = "qupath.lib.images.ImageData$ImageType"
BOOLEAN = "java.lang.Boolean"
INTEGER = "java.lang.Integer"
OBJECT_ARRAY = "[Ljava.lang.Object;"

RECTANGLE = f"{_ROI}RectangleROI{_PROXY}"
ELLIPSE = f"{_ROI}EllipseROI{_PROXY}"
LINE = f"{_ROI}LineROI{_PROXY}"
POLYLINE = f"{_ROI}PolylineROI{_PROXY}"
POLYGON = f"{_ROI}PolygonROI{_PROXY}"
POINTS = f"{_ROI}PointsROI{_PROXY}"
GEOMETRY = f"{_ROI}GeometryROI$WKBSerializationProxy"
AREA = f"{_ROI}AreaROI{_PROXY}"
LEGACY_GEOMETRY = f"{_ROI}GeometryROI{_PROXY}"
ROI_KINDS: dict[str, RoiKind] = {
    RECTANGLE: "Rectangle",
    ELLIPSE: "Ellipse",
    LINE: "Line",
    POLYLINE: "Polyline",
    POLYGON: "Polygon",
    POINTS: "Points",
    GEOMETRY: "Geometry",
    AREA: "Geometry",
}

_E = Flag.EXTERNALIZABLE | Flag.BLOCK_DATA
_S = Flag.SERIALIZABLE
_SW = Flag.SERIALIZABLE | Flag.WRITE_METHOD
_EN = Flag.SERIALIZABLE | Flag.ENUM
_PLANE = "I c, I t, "
_NAME = "I z, Ljava/lang/String; name"
_BOX = f"{_PLANE}D x, D x2, D y, D y2, {_NAME}"
_STATS = "Lqupath/lib/roi/"
_XY = ", [F x, [F y"
_LOCALE = "I hashcode" + "".join(
    f", Ljava/lang/String; {name}" for name in ("country", "extensions", "language", "script", "variant")
)

SCHEMA: dict[str, tuple[int, int, str | None, str]] = {
    f"{_OBJECTS}PathObject": (_E, 1, None, ""),
    ROOT: (_E, 1, f"{_OBJECTS}PathObject", ""),
    f"{_OBJECTS}PathROIObject": (_E, 1, f"{_OBJECTS}PathObject", ""),
    KIND_CLASSES["annotation"]: (_E, 1, f"{_OBJECTS}PathROIObject", ""),
    KIND_CLASSES["detection"]: (_E, 1, f"{_OBJECTS}PathROIObject", ""),
    KIND_CLASSES["tma core"]: (_E, 1, f"{_OBJECTS}PathROIObject", ""),
    KIND_CLASSES["cell"]: (_E, 1, KIND_CLASSES["detection"], ""),
    KIND_CLASSES["tile"]: (_E, 1, KIND_CLASSES["detection"], ""),
    METADATA: (_E, 1, None, ""),
    PATH_CLASS: (
        _S,
        1,
        None,
        "Ljava/lang/Integer; colorRGB, Ljava/lang/String; name, Lqupath/lib/objects/classes/PathClass; parentClass",
    ),
    HIERARCHY: (
        _S,
        1,
        None,
        "Lqupath/lib/objects/PathObject; rootObject, Lqupath/lib/objects/hierarchy/TMAGrid; tmaGrid",
    ),
    DEFAULT_LIST: (_S, 1, None, "Ljava/util/ArrayList; list"),
    MEASUREMENT: (_S, 1, None, "D value, Ljava/lang/String; name"),
    f"{_NUMERIC_LIST}AbstractNumericMeasurementList": (
        _S,
        1,
        None,
        "Z isClosed, Ljava/util/Map; map, Ljava/util/List; names",
    ),
    FLOAT_LIST: (_S, 1, f"{_NUMERIC_LIST}AbstractNumericMeasurementList", "[F values"),
    RECTANGLE: (_S, 1, None, _BOX),
    ELLIPSE: (_S, 1, None, _BOX),
    LINE: (_S, 1, None, _BOX),
    POLYGON: (_S, 1, None, f"{_PLANE}{_NAME}, {_STATS}ClosedShapeStatistics; stats{_XY}"),
    POLYLINE: (_S, 1, None, f"{_PLANE}I z{_XY}"),
    POINTS: (_S, 1, None, f"{_PLANE}{_NAME}{_XY}"),
    GEOMETRY: (_S, 1, None, f"{_PLANE}I z, {_STATS}GeometryROI$GeometryStats; stats, [B wkb"),
    STAINS: (_E, 1, None, ""),
    WORKFLOW: (_E, 1, None, ""),
    IMAGE_TYPE: (_EN, 0, "java.lang.Enum", ""),
    "java.lang.Enum": (_EN, 0, None, ""),
    "java.lang.Number": (_S, -8742448824652078965, None, ""),
    INTEGER: (_S, 1360826667806852920, "java.lang.Number", "I value"),
    BOOLEAN: (_S, -3665804199014368530, None, "Z value"),
    "java.util.ArrayList": (_SW, 8683452581122892189, None, "I size"),
    "java.util.HashMap": (_SW, 362498820763181265, None, "F loadFactor, I threshold"),
    "java.util.Collections$UnmodifiableCollection": (_S, 1820017752578914078, None, "Ljava/util/Collection; c"),
    "java.util.Collections$UnmodifiableList": (
        _S,
        -283967356065247728,
        "java.util.Collections$UnmodifiableCollection",
        "Ljava/util/List; list",
    ),
    "java.util.CollSer": (_SW, 6309168927139932177, None, "I tag"),
    "java.util.Locale": (_SW, 9149081749638150636, None, _LOCALE),
    OBJECT_ARRAY: (_S, -8012369246846506644, None, ""),
    "[F": (_S, 836686056779680834, None, ""),
    "[B": (_S, -5984413125824719648, None, ""),
}
"""Flags, serialVersionUID, superclass and fields (type and name) of the classes that are written."""
