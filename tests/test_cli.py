"""The command line: help, errors in one line, and the whole circle on projects/tiny."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from darefine_qupath.cli import main
from darefine_qupath.cli.group import COMMANDS, darefine
from darefine_qupath.errors import ProjectWriteError
from darefine_qupath.project import Changes, open_project
from tests.conftest import Run

TINY = Path(__file__).parents[1] / "projects" / "tiny"
QUPATH = Path(__file__).parent / "data" / "qupath"


def _copy(tmp_path: Path, source: Path = TINY) -> Path:
    return Path(shutil.copytree(source, tmp_path / "project"))


# -- help


def test_help_lists_every_command_with_its_own_words(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    context = click.Context(darefine)
    for name, (_, text) in COMMANDS.items():
        command = darefine.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(200) == text
        assert f"  {name}" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run: Run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: darefine {name}")


@pytest.mark.parametrize(
    ("name", "headings"),
    [
        ("train", ["Run", "What to learn from", "Network", "Recipe", "Validation and test", "Sampling", "Tiles"]),
        ("predict", ["What to predict", "Polygons", "Objects in QuPath", "Network"]),
        ("evaluate", ["What to predict", "What to compare with", "Network"]),
    ],
)
def test_options_stand_under_headings(run: Run, name: str, headings: list[str]) -> None:
    lines = run(name, "--help")[1].splitlines()
    found = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert found == [*headings, "Other options"]
    assert sum(line.lstrip().startswith("--json") for line in lines) == 1


def test_places_are_marked_or_cleared_not_both(run: Run) -> None:
    _assert_one_line(run("next", TINY, "--mark", "--clear"), "--mark or --clear, not both")


def test_version(run: Run) -> None:
    assert run("--version")[1].startswith("darefine, version ")


# -- errors: one line, exit code 2


def _assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert len([line for line in lines if line.startswith("Error")]) == 1
    assert "Traceback" not in err
    for word in words:
        assert word in lines[-1]


def test_no_such_project(run: Run, tmp_path: Path) -> None:
    _assert_one_line(run("info", tmp_path / "nowhere"), "no QuPath project", "nowhere")


def test_not_a_project(run: Run, tmp_path: Path) -> None:
    (tmp_path / "project.qpproj").write_text("{}")
    _assert_one_line(run("info", tmp_path), "project.qpproj", "not a QuPath project")


def test_unknown_image(run: Run) -> None:
    _assert_one_line(run("restore", TINY, "other.tif", "--list"), "No image 'other.tif'", "train-1.tif")


def test_image_file_missing(run: Run, tmp_path: Path) -> None:
    project = _copy(tmp_path)
    for slide in (project / "slides").iterdir():
        slide.unlink()
    _assert_one_line(run("train", project, "-o", tmp_path / "run"), "train-1.tif", "is missing")


def test_no_annotations(run: Run, tmp_path: Path) -> None:
    result = run("train", TINY, "-o", tmp_path / "run", "--image", "test-3.tif")
    _assert_one_line(result, "has an annotation with a class", "draw some in QuPath")


def test_unknown_class(run: Run, tmp_path: Path) -> None:
    project = _copy(tmp_path)
    settings = project / "darefine.toml"
    settings.write_text(settings.read_text().replace('"In situ", ', ""))
    _assert_one_line(run("tiles", project), "'In situ' (2)", "darefine.toml")


def test_unknown_setting(run: Run, tmp_path: Path) -> None:
    project = _copy(tmp_path)
    with (project / "darefine.toml").open("a") as settings:
        settings.write("epoch = 3\n")
    _assert_one_line(run("train", project, "-o", tmp_path / "run"), "'epoch'", "did you mean 'epochs'")


def test_model_file_of_another_kind(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "model.safetensors"
    wrong.write_bytes(b"PK\x03\x04 not a model at all")
    _assert_one_line(run("predict", TINY, "--model", wrong), "model.safetensors")
    _assert_one_line(run("show", tmp_path / "none.safetensors"), "none.safetensors")


def test_slide_without_mpp(run: Run, tmp_path: Path) -> None:
    project = Path(shutil.copytree(QUPATH, tmp_path / "qupath")) / "qupath-0.6.0" / "annotated"
    result = run(
        "tiles", project, "--image", "plain.png", "--slice-um", "50", "--context-um", "200", "--stride-um", "50"
    )
    _assert_one_line(result, "plain.png", "--mpp")


def test_resume_without_a_run(run: Run, tmp_path: Path) -> None:
    _assert_one_line(run("train", "--resume", tmp_path), "is not a run folder")


def test_disk_full_while_writing_leaves_the_project_as_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _copy(tmp_path)
    note = tmp_path / "train-1.geojson"
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[[1, 1], [90, 1], [90, 90], [1, 1]]]},
        "properties": {"objectType": "annotation", "classification": {"name": "Benign"}},
    }
    note.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    before = {file: file.read_bytes() for file in project.rglob("*") if file.is_file() and file.name != ".lock"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    _assert_one_line(run("import", project, note, "--engine", "embedded"), "No space left on device")
    monkeypatch.undo()
    after = {file: file.read_bytes() for file in project.rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == before


def test_a_read_only_project_is_refused_by_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object, **__: object) -> None:
        raise ProjectWriteError("data/1 cannot be written: Permission denied")

    monkeypatch.setattr("darefine_qupath.project.embedded.EmbeddedProject.apply", locked)
    note = tmp_path / "train-1.xml"
    note.write_text(
        '<ASAP_Annotations><Annotations><Annotation Name="a" Type="Polygon" PartOfGroup="Benign">'
        '<Coordinates><Coordinate Order="0" X="1" Y="1"/><Coordinate Order="1" X="9" Y="1"/>'
        '<Coordinate Order="2" X="9" Y="9"/></Coordinates></Annotation></Annotations></ASAP_Annotations>'
    )
    _assert_one_line(run("import", _copy(tmp_path), note, "--engine", "embedded"), "Permission denied")


# -- projects


def test_info_as_json(run: Run) -> None:
    code, out, _ = run("info", TINY, "--json", "--engine", "embedded")
    found = json.loads(out)
    assert code == 0
    assert [image["name"] for image in found["images"]] == ["train-1.tif", "train-2.tif", "test-3.tif"]
    assert found["images"][0]["annotations"] == {"Benign": 1, "In situ": 1, "Invasive": 1, "Normal": 1}
    assert found["images"][0]["mpp"] == pytest.approx(0.5)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("name", ["Łódź 腫瘍.tif", "not-utf8-\udcff.tif"], ids=["letters", "bytes"])
def test_a_terminal_that_lacks_the_letters_of_a_name_gets_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, name: str
) -> None:
    project = _copy(tmp_path)
    file = project / "project.qpproj"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["images"][0]["imageName"] = name
    file.write_text(json.dumps(data), encoding="utf-8")

    def printed(*words: str) -> str:
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
        with pytest.raises(SystemExit, match="0"):
            main(["info", str(project), *words])
        return out.getvalue().decode(encoding)

    # Half a character, which no encoding has, is read as the character for what cannot be read.
    name = name.replace("\udcff", "\ufffd")
    assert name.encode(encoding, "backslashreplace").decode(encoding) in printed()
    assert json.loads(printed("--json"))["images"][0]["name"] == name


def test_export_names_files_by_entry_id(run: Run, tmp_path: Path) -> None:
    code, _, _ = run("export", TINY, "--geojson", tmp_path / "out", "--engine", "embedded")
    assert code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["1.geojson", "2.geojson", "3.geojson"]
    features = json.loads((tmp_path / "out" / "1.geojson").read_text())["features"]
    with open_project(TINY, engine="embedded") as project:
        ids = [str(record.id) for record in project.annotations(project.image("1"))]
    assert [feature["id"] for feature in features] == ids


def test_import_twice_changes_nothing_the_second_time(run: Run, tmp_path: Path) -> None:
    project = _copy(tmp_path)
    run("export", project, "--geojson", tmp_path / "out", "--engine", "embedded")
    file = tmp_path / "out" / "1.geojson"
    words = ("import", project, file, "--image", "test-3.tif", "--json", "--engine", "embedded")
    first, second = (json.loads(run(*words)[1])["imports"][0] for _ in range(2))
    assert (first["added"], first["already"]) == (4, 0)
    assert (second["added"], second["already"]) == (0, 4)


def test_create_and_restore(run: Run, tmp_path: Path) -> None:
    project = _copy(tmp_path)
    slide = project / "slides" / "train-1.tif"
    run("export", project, "--geojson", tmp_path / "notes", "--engine", "embedded")
    (tmp_path / "notes" / "1.geojson").rename(tmp_path / "notes" / "train-1.geojson")
    made = tmp_path / "made"
    code, out, _ = run("create", made, slide, "--annotations", tmp_path / "notes", "--engine", "embedded", "--json")
    assert code == 0
    assert json.loads(out)["imports"][0]["added"] == 4
    with open_project(made, engine="embedded") as opened:
        image = opened.image("train-1.tif")
        opened.apply(image, Changes(remove=[record.id for record in opened.objects(image)]))
    code, out, _ = run("restore", made, "train-1.tif", "--json")
    assert json.loads(out)["objects"] == 4


def test_check_finds_what_is_wrong(run: Run, tmp_path: Path) -> None:
    project = _copy(tmp_path)
    (project / "slides" / "train-2.tif").unlink()
    code, out, _ = run("check", project, "--json")
    assert code == 1
    errors = [finding for finding in json.loads(out)["findings"] if finding["level"] == "error"]
    assert [(finding["image"], "missing" in finding["message"]) for finding in errors] == [("train-2.tif", True)]


# -- the circle


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of projects/tiny and a model trained on it for a few steps."""
    folder = tmp_path_factory.mktemp("circle")
    shutil.copytree(TINY, folder / "project")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(folder / "project"), "-o", str(folder / "run"), "--epochs", "1", "--stride-um", "128",
              "--set", "samples_per_epoch=16", "--device", "cpu", "--json"])  # fmt: skip
    assert not stopped.value.code
    return folder


def test_a_model_says_what_it_is(run: Run, trained: Path) -> None:
    code, out, _ = run("show", trained / "run" / "model.safetensors", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["classes"]["names"] == ["Normal", "Benign", "In situ", "Invasive"]
    assert found["provenance"]["images"] == {"1": "train-1.tif", "2": "train-2.tif"}
    assert set(found["provenance"]["split"]["images"].values()) == {"train", "validation"}


def _predict(run: Run, trained: Path, project: Path, *more: str) -> dict[str, object]:
    code, out, err = run(
        "predict", project, "--model", trained / "run" / "model.safetensors", "--engine", "embedded", "--json",
        "--device", "cpu", "--background", *more,
    )  # fmt: skip
    assert code == 0, err
    found: dict[str, object] = json.loads(out)
    return found


def _objects(project: Path) -> dict[str, dict[str, object]]:
    with open_project(project, engine="embedded") as opened:
        return {image.name: {str(r.id): r for r in opened.objects(image)} for image in opened.images}


def test_predict_three_times_leaves_the_same_objects(run: Run, trained: Path, tmp_path: Path) -> None:
    project = _copy(tmp_path, trained / "project")
    before = _objects(project)
    first = _predict(run, trained, project)
    once = _objects(project)
    assert [image["name"] for image in first["images"]] == ["train-1.tif", "train-2.tif", "test-3.tif"]
    assert len(once["test-3.tif"]) > 0
    for _ in range(2):
        _predict(run, trained, project)
        assert _objects(project) == once
    sure = [record.measurements["DA-RefineNet: confidence"] for record in once["test-3.tif"].values()]
    assert all(0.25 <= value <= 1 for value in sure)
    for name, records in before.items():
        assert {key: once[name][key] for key in records} == records
    out = run("runs", project, "--json")[1]
    assert len(json.loads(out)["runs"]) >= 3
    counts = json.loads(run("review", project, "--json")[1])["counts"]
    assert sum(counts.values()) == counts["untouched"] > 0


def test_undo_takes_the_last_call_back(run: Run, trained: Path, tmp_path: Path) -> None:
    project = _copy(tmp_path, trained / "project")
    before = _objects(project)
    _predict(run, trained, project)
    assert _objects(project) != before
    assert run("undo", project, "--engine", "embedded")[0] == 0
    assert _objects(project) == before


def test_a_dry_run_changes_nothing(run: Run, trained: Path, tmp_path: Path) -> None:
    project = _copy(tmp_path, trained / "project")
    before = _objects(project)
    found = _predict(run, trained, project, "--dry-run", "--image", "test-3.tif")
    assert found["images"][0]["written"]["is_dry"] is True
    assert found["images"][0]["written"]["added"] == found["images"][0]["polygons"]
    assert _objects(project) == before


def test_evaluate_compares_with_what_a_person_drew(run: Run, trained: Path, tmp_path: Path) -> None:
    project = _copy(tmp_path, trained / "project")
    model = trained / "run" / "model.safetensors"
    code, out, _ = run("evaluate", project, "--model", model, "--truth", project / "truth", "--json")
    found = json.loads(out)
    assert code == 0
    assert [slide["name"] for slide in found["slides"]] == ["test-3.tif"]
    assert found["seen"] == []
    assert 0 <= found["total"]["miou"] <= 1
    listed = (project / "project.qpproj").read_text(encoding="utf-8")
    renamed = listed.replace('"imageName": "test-3.tif"', '"imageName": "a: 20x?.tif"')
    (project / "project.qpproj").write_text(renamed, encoding="utf-8")
    assert run("overlay", project, "--truth", project / "truth", "-o", tmp_path / "pictures")[0] == 0
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["3-a_ 20x_.png"]


def test_within_a_class_that_no_image_has(run: Run, trained: Path, tmp_path: Path) -> None:
    project = _copy(tmp_path, trained / "project")
    result = run("predict", project, "--model", trained / "run" / "model.safetensors", "--within", "Region*")
    _assert_one_line(result, "no annotation of class 'Region*'")


def test_resume_of_a_finished_run_gives_the_same_model(run: Run, trained: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    model = (copied / "model.safetensors").read_bytes()
    code, _, err = run("train", "--resume", copied, "--json")
    assert code == 0, err
    assert (copied / "model.safetensors").read_bytes() == model


def test_a_second_run_in_the_same_folder_is_refused(run: Run, trained: Path) -> None:
    _assert_one_line(run("train", trained / "project", "-o", trained / "run"), "holds a training run already")


def test_commands_without_a_network_do_not_wait_for_torch() -> None:
    modules = ", ".join(f"darefine_qupath.cli.{name}" for name in ("project", "annotations", "runs", "tools"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
