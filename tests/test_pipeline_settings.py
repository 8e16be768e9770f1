"""darefine.toml: what it says, what is refused, and what goes over what."""

from __future__ import annotations

import math
import os
import typing
from pathlib import Path

import pytest

from darefine_qupath.classes import Color, PathClass
from darefine_qupath.errors import ClassMapError, ConfigError, DarefineError, ModelError, TileError
from darefine_qupath.models import ModelConfig, Normalization
from darefine_qupath.pipeline.settings import Settings, read_settings
from darefine_qupath.pipeline.splitting import SamplingSpec, SplitSpec
from darefine_qupath.prediction import PredictOptions
from darefine_qupath.review.write_options import WriteOptions
from darefine_qupath.tiles.scan import TileFilter
from darefine_qupath.tiles.spec import TileSpec
from darefine_qupath.training import TrainConfig

LIST = (
    PathClass("Normal", Color(1, 2, 3)),
    PathClass("Tumor", Color(4, 5, 6)),
    PathClass("Ignore*", Color(7, 8, 9)),
    PathClass("Unused", Color(0, 0, 0)),
)


def _read(tmp_path: Path, text: str) -> Settings:
    (tmp_path / "darefine.toml").write_text(text, encoding="utf-8")
    return read_settings(tmp_path)


def test_no_file_is_no_settings(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == Settings()


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No settings file .*other\.toml"):
        read_settings(tmp_path, tmp_path / "other.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[classes", "not valid TOML"),
        ("[clases]", "unknown table 'clases'; did you mean 'classes'"),
        ("tiles = 3", r"tiles must be a table, \[tiles\]"),
    ],
    ids=["syntax", "table", "kind"],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, text)


@pytest.mark.parametrize("kind", ["pipe", "device", "dangling link", "folder", "deep", "digits", "too large"])
def test_what_is_no_settings_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "darefine.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in ("device", "dangling link"):
        path.symlink_to("/dev/zero" if kind == "device" else "nothing")
    else:
        path.write_text({"deep": f"a = {'[' * 9000}", "digits": f"a = {'9' * 5000}"}.get(kind, ""))
        if kind == "too large":
            os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match=r"darefine\.toml: (it is|it cannot|it holds a number of thousands)"):
        read_settings(tmp_path)


def test_without_a_table_the_classes_are_those_in_use_in_the_order_of_the_project() -> None:
    found = Settings().class_map(LIST, {"Tumor": 2, "Normal": 1, "Ignore*": 4})
    assert found.names == ("Normal", "Tumor")
    assert found.colors == (Color(1, 2, 3), Color(4, 5, 6))
    assert found.unlabelled == "ignore"


def test_a_class_that_only_the_unlabelled_have_is_a_class() -> None:
    found = Settings(classes={"unlabelled": "Normal"}).class_map(LIST, {"Tumor": 2})
    assert found.names == ("Normal", "Tumor")


def test_the_table_orders_maps_and_colours(tmp_path: Path) -> None:
    settings = _read(
        tmp_path,
        """
        [classes]
        names = ["Cancer", "Normal"]
        [classes.map]
        Tumor = "Cancer"
        [classes.colors]
        Cancer = "#0a0b0c"
        """,
    )
    found = settings.class_map(LIST, {"Tumor": 2, "Normal": 1})
    assert found.names == ("Cancer", "Normal")
    assert found.colors == (Color(10, 11, 12), Color(1, 2, 3))
    assert found.label("Tumor") == 0


def test_a_project_without_a_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="no annotation of any class to learn"):
        Settings().class_map(LIST, {"Ignore*": 3})


def test_a_map_to_nowhere_is_refused(tmp_path: Path) -> None:
    settings = _read(tmp_path, '[classes]\nnames = ["A"]\n[classes.map]\nB = "C"\n')
    with pytest.raises(ClassMapError, match="'B' is mapped to 'C'"):
        settings.class_map(LIST, {"A": 1})


@pytest.mark.parametrize(
    ("section", "key", "near"),
    [("classes", "name", "names"), ("tiles", "slice", "slice_um"), ("model", "encoder", "slice_encoder"),
     ("images", "mp", "mpp")],
)  # fmt: skip
def test_an_unknown_key_is_refused(tmp_path: Path, section: str, key: str, near: str) -> None:
    settings = _read(tmp_path, f"[{section}]\n{key} = 1\n")
    ask = {
        "classes": lambda: settings.class_map(LIST, {"Normal": 1}),
        "tiles": lambda: settings.tile_spec(TileSpec.paper()),
        "model": lambda: settings.model_config(ModelConfig()),
        "images": lambda: settings.mpp,
    }[section]
    with pytest.raises(ConfigError, match=rf"unknown \[{section}\] key '{key}'; (did you mean '|known are ){near}"):
        ask()


def test_micrometres_take_the_place_of_pixels() -> None:
    settings = Settings(tiles={"slice_um": 100, "context_um": 500, "stride_um": 50})
    assert settings.tile_spec(TileSpec.paper()) == TileSpec(input_px=500, slice_um=100, context_um=500, stride_um=50)


def test_settings_that_an_earlier_version_recorded_are_read(tmp_path: Path) -> None:
    text = """
    [classes.colours]
    Tumor = "#0a0b0c"
    [tiles]
    size_px = 64
    [sampling]
    hard = "runs/first"
    [train]
    clip_norm = 2.0
    """
    recorded = tmp_path / "settings.toml"
    recorded.write_text(text)
    found = read_settings(tmp_path, recorded)
    assert found.class_map(LIST, {"Tumor": 1}).colors == (Color(10, 11, 12),)
    assert found.tile_spec(TileSpec.paper()).input_px == 64
    assert found.sampling_spec().hard_examples == "runs/first"
    assert found.train == {"grad_clip_norm": 2.0}
    named = _read(tmp_path, text)
    with pytest.raises(ConfigError, match=r"unknown .sampling. key 'hard'; did you mean 'hard_examples'"):
        named.sampling_spec()


def test_options_go_over_the_file_and_the_file_over_the_default() -> None:
    settings = Settings(tiles={"input_px": 256, "slice_um": 100, "context_um": 500, "stride_um": 50})
    found = settings.tile_spec(TileSpec.paper(), slice_px=1000, context_px=5000, stride_px=250, input_px=None)
    assert found == TileSpec(input_px=256, slice_px=1000, context_px=5000, stride_px=250)
    assert settings.tile_spec(TileSpec.paper(), stride_um=25).stride_um == 25


def test_half_a_triple_is_refused() -> None:
    with pytest.raises(TileError, match="all three"):
        Settings().tile_spec(TileSpec.paper(), slice_um=100)


def test_network_settings() -> None:
    settings = Settings(model={"width": 64, "slice_encoder": "resnet18"})
    found = settings.model_config(ModelConfig(), slice_encoder="resnet34", fusion=None)
    assert (found.width, found.slice_encoder, found.fusion) == (64, "resnet34", "attention")


@pytest.mark.parametrize("value", [0, -1, "a"])
def test_a_pixel_size_must_be_positive(value: object) -> None:
    with pytest.raises(ConfigError, match="must be a positive number"):
        _ = Settings(images={"mpp": value}).mpp


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names = 3", r"names = 3 must be a list of names"),
        ('names = "Normal"', r"names = 'Normal' must be a list of names"),
        ('names = ["Normal", 3]', "must be a list of names"),
        ('map = "x"', r"map = 'x' must be a table \[classes.map\]"),
        ("[classes.map]\nTumor = 3", r"map = \{'Tumor': 3\} must be a table"),
        ("[classes.colors]\nTumor = 3", r"colors = \{'Tumor': 3\} must be a table"),
        ("unlabelled = 3", "unlabelled = 3 must be the name of a class"),
        ('region_unlabelled = ["Normal"]', r"region_unlabelled = \['Normal'\] must be the name of a class"),
    ],
)
def test_a_class_setting_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, f"[classes]\n{text}").class_map(LIST, {"Tumor": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('slice_um = "big"', "slice_um = 'big' must be a number of micrometres"),
        ("input_px = 64.5", "input_px = 64.5 must be a whole number of pixels"),
        ("stride_um = true", "stride_um = True must be a number"),
    ],
)
def test_a_tile_setting_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, f"[tiles]\n{text}").tile_spec(TileSpec.paper())


KINDS = {
    TrainConfig: {},
    ModelConfig: {},
    TileSpec: {"slice_um": 100.0, "context_um": 500.0, "stride_um": 50.0},
    TileFilter: {},
    SplitSpec: {},
    SamplingSpec: {},
    PredictOptions: {},
    WriteOptions: {},
    Normalization: {},
}
FLOATS = [
    (kind, name)
    for kind in KINDS
    for name, hint in typing.get_type_hints(kind, localns={"BaseGeometry": object}).items()
    if "float" in str(hint)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=lambda given: getattr(given, "__name__", given))
def test_no_setting_is_infinite_or_no_number(kind: type, name: str, value: float) -> None:
    default = getattr(kind(**KINDS[kind]), name)
    given = (value, *default[1:]) if isinstance(default, tuple) else value
    with pytest.raises(DarefineError, match=rf"\b{name}\b.*{value}"):
        kind(**{**KINDS[kind], name: given})


@pytest.mark.parametrize(
    "text", ["[train]\nencoder_lr = inf", "[tiles]\nslice_um = nan", "[train]\nscale = [0.5, 1e999]"]
)
def test_a_file_with_an_infinite_setting_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"darefine.toml: (inf|nan) where a finite number should be"):
        _read(tmp_path, text)


@pytest.mark.parametrize("value", ["nan", "inf", "true", "0", "1e300", "'x'"])
def test_a_pixel_size_that_is_no_size_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"must be a positive number|where a finite number should be"):
        _ = _read(tmp_path, f"[images]\nmpp = {value}").mpp


def test_a_dropout_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dropout = 'x' must be at least 0"):
        _read(tmp_path, "[model]\ndropout = 'x'").model_config(ModelConfig())
