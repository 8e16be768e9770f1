from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.errors import ProjectLockedError, ProjectWriteError, ReviewError
from darefine_qupath.project import Project
from darefine_qupath.project.staging import StagedFiles, write_lock
from darefine_qupath.review import WriteOptions, list_runs, sort_objects, undo, write_back
from darefine_qupath.review.run import Run
from darefine_qupath.review.run_names import runs_folder
from darefine_qupath.review.run_records import save_run
from tests.fake_project import CLASSES, SLIDE, FakeProject, grid, ours, overlaps, polygon, square, write


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path)


def test_objects_say_what_they_are(project: FakeProject) -> None:
    result = write(project, [polygon(2, square(0, 0))])
    record = project.objects(SLIDE)[0]
    assert (record.kind, record.path_class, record.name) == ("annotation", "Invasive", "Invasive 75%")
    assert record.measurements == {
        "DA-RefineNet: confidence": 0.75,
        "DA-RefineNet: margin": 0.5,
        "DA-RefineNet: runner-up share": 0.25,
        "DA-RefineNet: area µm^2": 40_000,
    }
    assert record.metadata["darefine.run"] == result.run
    assert record.metadata["darefine.model"] == "m1"
    assert record.metadata["darefine.runner_up"] == "Normal"
    assert [(c.name, c.color) for c in project.classes] == [("Invasive", CLASSES.colors[2])]
    assert result.classes == {"Invasive": 1}


def test_a_record_is_staged_under_the_lock_so_that_the_next_write_cleans_up(
    project: FakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, grid(2))
    commit = StagedFiles.commit

    def locked(batch: StagedFiles) -> None:
        with (
            pytest.raises(ProjectLockedError, match="Another darefine process"),
            write_lock(project.folder, patience_s=0),
        ):
            pass
        commit(batch)

    monkeypatch.setattr(StagedFiles, "commit", locked)
    assert save_run(project, list_runs(project)[0]).is_file()


def test_the_same_prediction_three_times_is_the_same_objects(project: FakeProject) -> None:
    first = write(project, grid())
    before = project.objects(SLIDE)
    results = [write(project, grid()) for _ in range(2)]
    assert (first.added, first.kept) == (6, 0)
    assert [(result.added, result.kept, result.removed) for result in results] == [(0, 6, 0)] * 2
    assert project.objects(SLIDE) == before


def test_another_model_replaces_what_nobody_touched(project: FakeProject) -> None:
    mine = project.draw(square(0, 5000), "Benign")
    write(project, grid())
    result = write(project, grid(4, shift=50), model="m2")
    assert (result.added, result.removed) == (4, 6)
    assert project.objects(SLIDE)[0] == mine
    assert len(ours(project)) == 4


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"locked": True}, id="locked"),
        pytest.param({"geometry": square(20, 1000)}, id="moved"),
        pytest.param({"path_class": "Normal"}, id="reclassified"),
        pytest.param({"path_class": None}, id="class removed"),
        pytest.param({"path_class": "Ignore*"}, id="ignored"),
        pytest.param({"name": "look here"}, id="named"),
        pytest.param({"color": -1}, id="coloured"),
        pytest.param({"metadata+": {"ANNOTATION_DESCRIPTION": "odd"}}, id="described"),
        pytest.param({"metadata+": {"darefine.review": "accepted"}}, id="accepted"),
        pytest.param({"measurements": {"darefine.review": 1.0}}, id="accepted by measurement"),
    ],
)
def test_what_the_pathologist_touched_stays(project: FakeProject, change: dict[str, object]) -> None:
    write(project, grid())
    first = ours(project)[0]
    more = change.pop("metadata+", None)
    if more is not None:
        change["metadata"] = {**first.metadata, **more}  # type: ignore[dict-item]
    project.edit(first.id, **change)
    touched = project.objects(SLIDE)[0]
    for _ in range(2):
        write(project, grid(shift=50), model="m2")
    assert project.objects(SLIDE)[0] == touched
    assert overlaps(project.objects(SLIDE)) == 0
    assert len(ours(project)) in (6, 7)


def test_measurements_that_qupath_adds_do_not_count(project: FakeProject) -> None:
    write(project, grid(1))
    first = ours(project)[0]
    project.edit(first.id, measurements={**first.measurements, "Num Detections": 3.0})
    assert write(project, [], model="m2").removed == 1


def test_an_object_with_cells_in_it_is_in_use(project: FakeProject) -> None:
    write(project, grid(1))
    first = ours(project)[0]
    project.draw(square(10, 1010, 5), None, kind="detection", parent=first.id)
    write(project, [], model="m2")
    assert first in project.objects(SLIDE)


@pytest.mark.parametrize(
    ("path_class", "blocks"),
    [("Benign", True), ("Necrosis", True), ("Ignore*", True), ("Region*", False), ("Tissue", False), (None, False)],
)
def test_predictions_give_way_to_classified_annotations(
    project: FakeProject, path_class: str | None, blocks: bool
) -> None:
    drawn = project.draw(square(200, 1000), path_class)
    result = write(project, [polygon(2, square(0, 1000))], options=WriteOptions(over=("Tissue",)))
    assert result.clipped == blocks
    assert (overlaps([drawn, *ours(project)]) == 0) == blocks
    assert project.objects(SLIDE)[0] == drawn


def test_what_is_wholly_covered_is_hidden_and_slivers_are_dropped(project: FakeProject) -> None:
    project.draw(square(0, 0, 1000), "Benign")
    project.draw(square(2000, 0, 397), "Benign")
    result = write(project, [polygon(2, square(100, 100)), polygon(2, square(2000, 0)), polygon(2, square(5000, 0))])
    assert (result.clipped, result.hidden, result.added) == (2, 2, 1)


def test_a_class_that_hides_most_of_a_prediction_is_named(project: FakeProject) -> None:
    project.draw(square(0, 0, 8000), "Tissue")
    result = write(project, grid())
    assert result.added == 0
    assert "'Tissue' hide 100%" in result.warnings[0]


def test_a_deleted_object_does_not_come_back(project: FakeProject) -> None:
    write(project, grid())
    gone = ours(project)[0]
    project.delete(gone.id)
    for model in ("m1", "m2", "m1"):
        result = write(project, grid(shift=30), model=model)
        assert (result.rejected, result.suppressed) == (1, 1)
        assert all(not record.geometry.intersects(gone.geometry) for record in ours(project) if record.geometry)
    other = polygon(2, square(0, 1000))
    assert write(project, [other]).added == 1  # another class may stand there
    assert write(project, grid(), options=WriteOptions(remember_rejections=False)).suppressed == 0


def test_a_large_region_loses_only_what_was_rejected(project: FakeProject) -> None:
    write(project, grid(1))
    project.delete(ours(project)[0].id)
    write(project, [polygon(1, square(-1000, 0, 3000))], model="m2")
    assert sum(record.area for record in ours(project)) == 3000**2 - 400**2


def test_a_marked_rejection_is_taken_out(project: FakeProject) -> None:
    write(project, grid(2))
    first = ours(project)[0]
    project.edit(first.id, metadata={**first.metadata, "darefine.review": "rejected"})
    result = write(project, grid(2), model="m2")
    assert (result.rejected, len(ours(project))) == (1, 1)


def test_what_was_cut_off_an_object_is_not_predicted_again(project: FakeProject) -> None:
    write(project, [polygon(1, square(0, 0, 1000))])
    project.edit(ours(project)[0].id, geometry=square(0, 0, 600))
    write(project, [polygon(1, square(0, 0, 1000))], model="m2")
    assert [record.area for record in ours(project)] == [600**2]


def test_a_moved_object_and_its_former_place_have_two_identities(project: FakeProject) -> None:
    write(project, [polygon(1, square(0, 0))])
    project.edit(ours(project)[0].id, path_class="Normal", geometry=square(3000, 0))
    for _ in range(2):
        write(project, [polygon(1, square(0, 0))])
    assert sorted(record.geometry.bounds[0] for record in ours(project) if record.geometry) == [0, 3000]


def test_detections_containers_and_suffixes(project: FakeProject) -> None:
    options = WriteOptions(kind="detection", container=True, class_suffix=" (predicted)")
    for _ in range(2):
        write(project, grid(2), options=options)
    container, *regions = project.objects(SLIDE)
    assert (container.name, container.path_class, container.geometry) == (
        "DA-RefineNet m1", None, shapely.box(0, 0, 10_000, 8_000),
    )  # fmt: skip
    assert {(r.kind, r.path_class, r.parent) for r in regions} == {
        ("detection", "Benign (predicted)", container.id),
        ("detection", "Invasive (predicted)", container.id),
    }
    write(project, grid(2))
    assert all(record.parent is None and record.kind == "annotation" for record in project.objects(SLIDE))
    assert len(project.objects(SLIDE)) == 2


def test_a_suffix_that_qupath_cannot_hold() -> None:
    with pytest.raises(ReviewError, match="QuPath allows no ':'"):
        WriteOptions(class_suffix=": predicted")


def test_a_dry_run_changes_nothing(project: FakeProject) -> None:
    write(project, grid(2))
    before, runs = project.objects(SLIDE), list_runs(project)
    result = write(project, grid(4, shift=9), model="m2", dry_run=True)
    assert (result.is_dry, result.added, result.removed) == (True, 4, 2)
    assert (project.objects(SLIDE), list_runs(project)) == (before, runs)
    assert json.loads(json.dumps(result.to_json()))["classes"] == {"Benign": 2, "Invasive": 2}


def test_an_unknown_label_is_refused(project: FakeProject) -> None:
    with pytest.raises(ReviewError, match=r"labels \[3\], the model knows 0 to 2"):
        write(project, [polygon(3, square(0, 0))])


def test_undo_takes_runs_back_one_by_one(project: FakeProject) -> None:
    mine = project.draw(square(0, 5000), "Benign")
    states = [project.objects(SLIDE)]
    for shift in (0.0, 30.0, 30.0, 60.0):
        write(project, grid(shift=shift), model=f"m{shift}")
        states.append(project.objects(SLIDE))
    for state in reversed(states[:-1]):
        undo(project)
        assert set(map(repr, project.objects(SLIDE))) == set(map(repr, state))
    assert project.objects(SLIDE) == (mine,)
    with pytest.raises(ReviewError, match="no run to undo"):
        undo(project)


def test_undo_leaves_what_the_pathologist_touched(project: FakeProject) -> None:
    write(project, grid(3))
    first = ours(project)[0]
    project.edit(first.id, locked=True)
    assert undo(project, dry_run=True)[0].removed == 2
    assert len(project.objects(SLIDE)) == 3
    assert undo(project)[0].removed == 2
    assert [record.id for record in project.objects(SLIDE)] == [first.id]


def test_what_returns_gives_way_to_what_was_taken_over_or_rejected_since(project: FakeProject) -> None:
    for _ in range(2):
        write(project, [polygon(1, square(0, 0, 1000)), polygon(2, square(2000, 0)), polygon(2, square(4000, 0))])
    write(
        project, [polygon(2, square(100, 100)), polygon(2, square(2010, 10)), polygon(2, square(4010, 0))], model="m2"
    )
    locked, gone, _ = sorted(ours(project), key=lambda record: record.geometry.bounds)  # type: ignore[union-attr]
    project.edit(locked.id, locked=True)
    project.delete(gone.id)
    (result,) = undo(project)
    assert (result.added, result.removed, result.adopted, result.rejected) == (2, 1, 1, 1)
    records = [record for record in ours(project) if record.id != locked.id]
    assert overlaps([locked, *records]) == 0
    large, right = sorted(records, key=lambda record: record.geometry.bounds)  # type: ignore[union-attr]
    assert (large.path_class, right.geometry.bounds[0]) == ("Benign", 4000)  # type: ignore[union-attr]
    assert large.area == 1000**2 - 401**2
    assert large.measurements["DA-RefineNet: area µm^2"] == large.area * 0.25
    assert {item.written.id: item.status for item in sort_objects(project, SLIDE).predictions} == {
        locked.id: "accepted", gone.id: "rejected", large.id: "untouched", right.id: "untouched",
    }  # fmt: skip
    after = {item.written.id: item.status for item in sort_objects(project, SLIDE).predictions}
    assert [(result.added, result.removed) for result in undo(project)] == [(0, 0)]
    assert {item.written.id: item.status for item in sort_objects(project, SLIDE).predictions} == after
    assert [(result.added, result.removed) for result in undo(project)] == [(0, 2)]
    assert [record.id for record in ours(project)] == [locked.id]


def test_undo_of_a_batch_and_of_a_run_that_others_stand_on(project: FakeProject) -> None:
    first = write(project, grid(2), batch="b1")
    write_back(project, project.images[1], grid(2), model="m1", classes=CLASSES, batch="b1")
    second = write(project, grid(3, shift=20), model="m2", batch="b2")
    with pytest.raises(ReviewError, match=f"{second.run} of 'slide.svs' came after {first.run}"):
        undo(project, "b1")
    undo(project, second.run)
    assert {result.image for result in undo(project, "b1")} == {"7", "8"}
    assert project.objects(SLIDE) == ()
    with pytest.raises(ReviewError, match="undone already"):
        undo(project, "b1")
    with pytest.raises(ReviewError, match="No run 'b3'"):
        undo(project, "b3")


def test_a_rejection_outlives_undo(project: FakeProject) -> None:
    write(project, grid(3))
    project.delete(ours(project)[0].id)
    undo(project)
    assert write(project, grid(3)).added == 2


def test_a_write_that_failed_leaves_no_trace(project: FakeProject) -> None:
    write(project, grid(2))
    project.fails = True
    with pytest.raises(ProjectWriteError, match="disk is full"):
        write(project, grid(2, shift=30), model="m2")
    with pytest.raises(ProjectWriteError, match="disk is full"):
        undo(project)
    project.fails = False
    result = write(project, grid(2, shift=30), model="m2")
    assert (result.added, result.removed, result.rejected) == (2, 2, 0)
    undo(project)
    assert {record.geometry.bounds[0] for record in project.objects(SLIDE) if record.geometry} == {0, 1000}


@pytest.mark.parametrize("state", ["pending", "undoing"])
def test_a_run_cut_off_after_the_project_was_written(
    project: FakeProject, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    # By import: the package gives the function `undo` the name of its module.
    module = importlib.import_module(f"darefine_qupath.review.{'writeback' if state == 'pending' else 'undo'}")

    def stop(project: Project, run: Run) -> Path:
        if run.state in ("done", "undone"):
            raise KeyboardInterrupt
        return save_run(project, run)

    if state == "undoing":
        write(project, grid(2))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(module, "save_run", stop)
        write(project, grid(2)) if state == "pending" else undo(project)
    assert list_runs(project)[-1].state == state
    found = sort_objects(project, SLIDE)
    assert (found.run is None) == (state == "undoing")
    assert not found.rejected
    result = write(project, grid(2))
    assert (result.added, result.kept) == ((0, 2) if state == "pending" else (2, 0))
    assert {run.state for run in list_runs(project)} <= {"done", "undone"}


def test_objects_whose_run_has_no_file_are_still_ours(project: FakeProject) -> None:
    write(project, grid(3))
    project.edit(ours(project)[0].id, geometry=square(0, 1500))
    for path in runs_folder(project).iterdir():
        path.unlink()
    found = sort_objects(project, SLIDE)
    assert [item.status for item in found.predictions] == ["reshaped", "untouched", "untouched"]
    result = write(project, [], model="m2")
    assert (result.removed, result.adopted) == (2, 1)


def test_a_damaged_run_is_named(project: FakeProject) -> None:
    write(project, grid(1))
    path = next(runs_folder(project).iterdir())
    good = path.read_text()
    data = json.loads(good)
    data["objects"][0]["class"] = "Normal"
    cases = [
        (good[:-40], "is damaged"),
        (json.dumps(data), "is damaged .*does not have the digest"),
        (json.dumps({**data, "format": "darefine-run/9"}), "format 'darefine-run/9', expected 'darefine-run/2'"),
        ("[]", "format None"),
        (json.dumps({**json.loads(good), "id": 3}), "is damaged .*id is 3"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(ReviewError, match=message) as caught:
            list_runs(project)
        assert str(path) in str(caught.value)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(choice=st.data())
def test_nothing_a_pathologist_did_is_ever_changed(
    choice: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = FakeProject(tmp_path_factory.mktemp("project"))
    shifts = st.sampled_from([0.0, 13.25, 400.0])
    for number in range(3):
        write(project, grid(choice.draw(st.integers(0, 5)), shift=choice.draw(shifts)), model=f"m{number % 2}")
        for record in ours(project):
            x, y, *_ = record.geometry.bounds  # type: ignore[union-attr]
            change = choice.draw(
                st.sampled_from([None, {}, {"locked": True}, {"geometry": square(x + 7.3, y - 3.1)}, {"name": "x"}])
            )
            project.delete(record.id) if change is None else project.edit(record.id, **change)
        if choice.draw(st.booleans()):
            project.draw(square(choice.draw(st.integers(0, 5000)) + 0.37, 900.11), "Benign")
    found = sort_objects(project, SLIDE)
    standing = {repr(record) for record in (*found.user_objects, *(item.current for item in found.adopted))}
    refused = [(item.written.training_class, item.written.record.geometry) for item in found.rejected]
    write(project, grid(5, shift=choice.draw(shifts)), model="m3")
    now = project.objects(SLIDE)
    assert standing <= set(map(repr, now))
    theirs = [record for record in now if repr(record) in standing]
    new = [record for record in now if repr(record) not in standing]
    assert sum(overlaps([a, b]) for a in new for b in theirs) == 0
    again = [(a, b) for a in new for name, b in refused if a.path_class == name]
    assert all(shapely.intersection(a.geometry, b).area == 0 for a, b in again)
