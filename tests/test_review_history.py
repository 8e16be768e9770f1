"""Vanished is not rejected: what a run wrote is judged by the state that the image's data was saved from."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import multiprocessing
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from darefine_qupath.annotations import Annotation
from darefine_qupath.errors import DarefineError, ProjectChangedError, ReviewError
from darefine_qupath.project import Project, jvm, open_project
from darefine_qupath.review import (
    WriteOptions,
    apply_plan,
    compare,
    list_runs,
    manual_annotations,
    plan_write,
    reviewed_annotations,
    run_records,
    run_states,
    sort_objects,
    undo,
    write_back,
)
from darefine_qupath.review import run as runs_module
from darefine_qupath.review import writeback as writing
from darefine_qupath.review.ownership import _statuses
from darefine_qupath.review.run import Run, RunObject, digest_of
from darefine_qupath.review.run_names import next_number, run_files, runs_folder, take_number
from darefine_qupath.review.run_records import read_run, save_run
from tests.fake_project import CLASSES, SLIDE, FakeProject, grid, ours, polygon, square, write


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path)


def states(project: FakeProject) -> list[str]:
    return [state for _, state in run_states(project)]


def statuses(project: FakeProject) -> dict[str, int]:
    found = [item.status for item in sort_objects(project, SLIDE).predictions]
    return {status: found.count(status) for status in found}


# -- what vanished


@pytest.mark.parametrize("drawn", [0, 1])
def test_what_a_save_over_it_took_away_is_overwritten_and_written_again(
    project: FakeProject, drawn: int, caplog: pytest.LogCaptureFixture
) -> None:
    mine = project.draw(square(0, 5000), "Benign")
    former = project.state(SLIDE)
    first = write(project, grid(3))
    project.save_from(former, **{"new": replace(mine, id=uuid4(), geometry=square(0, 7000))} if drawn else {})
    report = compare(project)
    assert {name: count for name, count in report.counts.items() if count} == ({"drawn": 1} if drawn else {})
    assert [line.split(":")[0] for line in report.notes()] == ["slide.svs"]
    assert f"overwritten, not rejected: run {first.run} (3 objects)" in next(report.notes())
    assert reviewed_annotations(project, SLIDE).rejected == ()
    assert states(project) == ["overwritten"]
    with pytest.raises(ReviewError, match="There is no run to undo"):
        undo(project)
    assert f"slide.svs: run {first.run} is left out, it is not in the image any more" in caplog.text
    with pytest.raises(ReviewError, match=f"Run '{first.run}' is not in the image any more"):
        undo(project, first.run)
    again = write(project, grid(3))
    assert (again.added, again.rejected, again.suppressed) == (3, 0, 0)
    assert states(project) == ["overwritten", "done"]
    assert compare(project).counts["drawn"] == drawn


def test_what_somebody_deleted_who_saw_it_is_rejected_even_all_of_it(project: FakeProject) -> None:
    write(project, grid(3))
    for record in ours(project):
        project.delete(record.id)
    assert statuses(project) == {"rejected": 3}
    assert (write(project, grid(3)).added, len(ours(project))) == (0, 0)
    assert states(project) == ["done", "done"]
    undo(project)
    undo(project)
    assert write(project, grid(3)).added == 0


def test_a_state_between_two_runs_is_that_of_the_first(project: FakeProject) -> None:
    before = project.state(SLIDE)
    first = write(project, grid(3))
    project.delete(ours(project)[0].id)
    seen = project.state(SLIDE)
    second = write(project, grid(4, shift=30), model="m2")
    for state in (seen, project.state(SLIDE)):
        project.save_from(state)
        assert statuses(project)["rejected"] == 1
    project.save_from(seen)
    found = sort_objects(project, SLIDE)
    assert (found.run and found.run.id, [run.id for run in found.history.overwritten]) == (first.run, [second.run])
    assert statuses(project) == {"untouched": 2, "rejected": 1}
    assert [result.removed for result in undo(project, dry_run=True)] == [2]
    assert write(project, grid(4, shift=30), model="m2").suppressed == 1
    project.save_from(before)
    assert states(project) == ["overwritten"] * 3
    assert write(project, grid(3)).added == 3


@pytest.mark.parametrize("edited", [False, True])
def test_a_run_that_was_undone_and_restored_is_the_current_one_again(project: FakeProject, edited: bool) -> None:
    write(project, grid(3))
    if edited:
        project.delete(ours(project)[0].id)
    seen = project.state(SLIDE)
    undo(project)
    assert (states(project), ours(project)) == (["undone"], [])
    project.save_from(seen)
    assert states(project) == ["done"]
    assert statuses(project) == ({"untouched": 2, "rejected": 1} if edited else {"untouched": 3})
    assert sum(compare(project).counts.values()) == 3
    assert [result.removed for result in undo(project)] == [2 if edited else 3]
    assert (states(project), ours(project)) == (["undone"], [])


def test_objects_are_known_though_every_run_was_undone_and_no_witness_is_there(project: FakeProject) -> None:
    write(project, grid(3))
    seen = project.state(SLIDE)
    undo(project)
    # Brought back through another file, of which one object was left out.
    project.save_from(replace(seen, objects=seen.objects[1:], properties={}))
    assert statuses(project) == {"untouched": 2}
    assert compare(project).counts["untouched"] == 2
    assert [result.removed for result in undo(project)] == [2]
    assert ours(project) == []


def test_undo_puts_the_witness_back(project: FakeProject) -> None:
    witnesses = [project.properties.get(SLIDE.id, {}).get("darefine.run")]
    for shift in (0.0, 0.0, 30.0):
        witnesses.append(write(project, grid(2, shift=shift)).run)
        assert project.properties[SLIDE.id]["darefine.run"] == witnesses[-1]
    for witness in reversed(witnesses[:-1]):
        undo(project)
        assert project.properties[SLIDE.id].get("darefine.run") == witness


def test_an_image_that_was_duplicated_with_its_data_lost_nothing(project: FakeProject) -> None:
    write(project, grid(3))
    copy = project.images[1]
    project.stored[copy.id] = project.stored[SLIDE.id][1:]
    project.properties[copy.id] = dict(project.properties[SLIDE.id])
    found = sort_objects(project, copy)
    assert [item.status for item in found.predictions] == ["untouched"] * 2
    assert (found.history.overwritten, found.user_objects) == ((), ())


@settings(deadline=None, derandomize=True, max_examples=15)
@given(choice=st.data())
def test_whatever_state_comes_back_nothing_that_vanished_is_rejected(
    choice: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    project = FakeProject(tmp_path_factory.mktemp("project"))
    kept = [project.state(SLIDE)]
    deleted: dict[str, set[object]] = {kept[0].version: set()}
    for _ in range(choice.draw(st.integers(1, 6))):
        step = choice.draw(st.sampled_from(["predict", "delete", "undo", "restore"]))
        gone = set(deleted[project.state(SLIDE).version])
        if step == "predict":
            write(project, grid(3, shift=choice.draw(st.sampled_from([0.0, 450.0]))))
        elif step == "delete" and ours(project):
            record = choice.draw(st.sampled_from(ours(project)))
            project.delete(record.id)
            gone.add(record.id)
        elif step == "undo" and "done" in states(project):
            undo(project)
        elif step == "restore":
            state = choice.draw(st.sampled_from(kept))
            project.save_from(state)
            gone = set(deleted[state.version])
        kept.append(project.state(SLIDE))
        deleted[kept[-1].version] = deleted.get(kept[-1].version, set()) | gone
        rejected = {item.written.id for item in sort_objects(project, SLIDE).rejected}
        assert rejected <= set().union(*deleted.values())


# -- runs of before there were witnesses


def first_form(run: Run, names: dict[str, str]) -> dict[str, Any]:
    """As the first version wrote it."""

    def item(found: RunObject) -> dict[str, Any]:
        record = found.record
        metadata = {**record.metadata, "darefine.run": names[record.metadata["darefine.run"]]}
        return {
            "id": str(record.id), "class": record.path_class, "training_class": found.training_class,
            "role": found.role, "kept": found.kept, "kind": record.kind, "name": record.name,
            "digest": digest_of(record), "parent": None, "measurements": dict(record.measurements),
            "metadata": metadata, "roi": None, "plane": [-1, 0, 0], "class_probability": None,
            "wkb": base64.b64encode(zlib.compress(shapely.to_wkb(record.geometry))).decode(),
        }  # fmt: skip

    lists = {
        name: [item(each) for each in getattr(run, name)] for name in ("objects", "adopted", "rejected", "replaced")
    }
    texts = {name: getattr(run, name) for name in ("image", "image_name", "model", "date", "state", "mpp")}
    return {
        "format": "darefine-run/1", "id": names[run.id], "batch": names[run.id], **texts, "parameters": {},
        "known": [str(key) for key in run.known], "undoing": [], "digest": None, "backup": None, **lists,
    }  # fmt: skip


def as_before(project: FakeProject) -> None:
    """Make runs and data those of before there were numbers and witnesses."""
    runs = list_runs(project)
    names = {run.id: f"20250101T0000{number:02d}.000000Z-{run.image}" for number, run in enumerate(runs)}
    for file in run_files(project):
        file.path.unlink()
    (project.folder / "darefine" / "last-run").unlink()
    for run in runs:
        text = json.dumps(first_form(run, names))
        (runs_folder(project) / f"{names[run.id]}.json").write_text(text)
    project.properties.clear()
    for image, records in project.stored.items():
        project.stored[image] = tuple(
            replace(r, metadata={**r.metadata, "darefine.run": names[r.metadata["darefine.run"]]})
            if "darefine.run" in r.metadata else r
            for r in records
        )  # fmt: skip


def test_a_run_of_the_first_version_is_read(project: FakeProject, data: Path) -> None:
    (path,) = (data / "runs").iterdir()
    run = read_run(path)
    assert (run.number, run.state, run.mpp, len(run.added)) == (0, "done", 0.5, 3)
    assert [item.role for item in run.objects] == ["container", "region", "region"]
    assert [item.record.geometry for item in run.objects[1:]] == [square(0, 1000), square(1000, 1000)]
    runs_folder(project).mkdir(parents=True)
    shutil.copy(path, runs_folder(project))
    project.stored[SLIDE.id] = tuple(item.record for item in run.objects)
    assert statuses(project) == {"untouched": 2}
    assert [(result.run, result.removed) for result in undo(project)] == [(run.id, 3)]


def test_runs_with_a_number_come_after_those_without(project: FakeProject) -> None:
    for shift in (0.0, 20.0):
        write(project, grid(2, shift=shift))
    as_before(project)
    former = [run.id for run in list_runs(project)]
    result = write(project, grid(2, shift=40))
    assert [run.id for run in list_runs(project)] == [*former, result.run]
    assert [undo(project)[0].run for _ in range(3)] == [result.run, *reversed(former)]
    assert ours(project) == []


@pytest.mark.parametrize("deleted", [1, 3])
def test_without_a_witness_only_all_of_a_run_at_once_is_overwritten(project: FakeProject, deleted: int) -> None:
    write(project, grid(3))
    as_before(project)
    for record in ours(project)[:deleted]:
        project.delete(record.id)
    lost = deleted == 3
    assert statuses(project) == ({} if lost else {"untouched": 2, "rejected": 1})
    words = [line.partition(". ")[2] for line in compare(project).notes()]
    assert [text[:36] for text in words] == (["All of its objects are gone at once,"] if lost else [])
    assert write(project, grid(3)).added == (3 if lost else 0)


def test_what_the_first_version_called_rejected_though_a_whole_run_was_gone_comes_back(project: FakeProject) -> None:
    write(project, grid(3))
    for record in ours(project):
        project.delete(record.id)
    second = write(project, grid(3))
    assert (second.added, second.rejected) == (0, 3)
    as_before(project)
    assert statuses(project) == {}
    assert len(list(compare(project).notes())) == 1
    assert write(project, grid(3)).added == 3


def test_an_undone_run_of_the_first_version_that_is_there_again_is_current(project: FakeProject) -> None:
    write(project, grid(3))
    seen = project.stored[SLIDE.id]
    undo(project)
    project.stored[SLIDE.id] = seen
    as_before(project)
    assert statuses(project) == {"untouched": 3}
    assert [result.removed for result in undo(project)] == [3]


@pytest.mark.parametrize("same_call", [True, False])
def test_a_damaged_run_of_the_first_version_blocks_only_when_it_may_be_of_a_later_call(
    project: FakeProject, same_call: bool
) -> None:
    first = write(project, grid(2))
    other = project.images[1]
    write_back(project, other, grid(2), model="m", classes=CLASSES, batch=first.run if same_call else None)
    as_before(project)
    path = run_files(project)[1].path
    data = json.loads(path.read_text())
    if same_call:
        data["batch"] = run_files(project)[0].id
    path.write_text(json.dumps({**data, "mpp": "half"}))
    errors: dict[str, DarefineError] = {}
    with contextlib.nullcontext() if same_call else pytest.raises(ReviewError, match="The last run cannot be undone"):
        assert [result.image for result in undo(project, on_error=errors.__setitem__)] == [SLIDE.id]
        assert list(errors) == [path.name]


# -- versions and numbers


def test_a_plan_for_another_state_is_refused(project: FakeProject) -> None:
    write(project, grid(2))
    plan = plan_write(project, SLIDE, grid(3, shift=30), model="m2", classes=CLASSES)
    mine = project.draw(square(0, 5000), "Benign")
    sort_objects(project, SLIDE)
    before = project.stored[SLIDE.id]
    with pytest.raises(ProjectChangedError, match=r"'slide.svs' changed since the prediction was laid out"):
        apply_plan(project, SLIDE, plan)
    assert project.stored[SLIDE.id] == before
    assert mine in before
    assert [run.state for run in list_runs(project)] == ["done"]


def test_an_edit_between_the_look_and_the_write_is_kept(project: FakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_write(project, SLIDE, grid(3), model="m1", classes=CLASSES)
    taken = writing.take_number

    def meanwhile(of: FakeProject, *, after: str | None) -> int:
        project.draw(square(0, 5000), "Benign")
        return taken(of, after=after)

    monkeypatch.setattr(writing, "take_number", meanwhile)
    with pytest.raises(ProjectChangedError, match="changed since it was read"):
        apply_plan(project, SLIDE, plan)
    assert len(project.stored[SLIDE.id]) == 1
    assert statuses(project) == {}
    assert states(project) == ["undone"]


def test_runs_are_ordered_by_their_number_whatever_the_clock_says(
    project: FakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for year in (2030, 2020, 2025):
        monkeypatch.setattr(writing, "now_utc", lambda year=year: f"{year}-01-01T00:00:00+00:00")
        found.append(write(project, grid(2, shift=year), model=f"m{year}").run)
    assert [run.id for run in list_runs(project)] == found
    assert [run[:9] for run in found] == ["000001-7-", "000002-7-", "000003-7-"]
    assert [undo(project)[0].run for _ in found] == found[::-1]
    assert ours(project) == []


def test_a_number_is_given_once(project: FakeProject) -> None:
    write(project, grid(1))
    run_files(project)[0].path.unlink()
    assert next_number(project) == 2
    plans = [plan_write(project, image, grid(1), model="m", classes=CLASSES) for image in project.images]
    results = [apply_plan(project, *pair) for pair in zip(project.images, plans, strict=True)]
    names = [result.run for result in results]
    assert [name[:9] for name in names] == ["000002-7-", "000003-8-"]
    assert [run.batch for run in list_runs(project)] == names
    for image, result in zip(project.images, results, strict=True):
        assert project.properties[image.id]["darefine.run"] == result.run
        assert {record.metadata["darefine.run"] for record in project.stored[image.id]} == {result.run}


def _take(folder: str, count: int) -> list[int]:
    project = FakeProject(Path(folder))
    return [take_number(project) for _ in range(count)]


def test_two_processes_take_different_numbers(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.starmap(_take, [(str(tmp_path), 10)] * 2)
    assert sorted([*first, *second]) == list(range(1, 21))


# -- damaged files


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_file_of_a_run_that_does_not_stand_is_passed_over(
    project: FakeProject, which: int, caplog: pytest.LogCaptureFixture
) -> None:
    write(project, grid(2))
    write(project, grid(2, shift=30))
    if which:
        undo(project)
    path = run_files(project)[which].path
    path.write_text('{"format": "darefine-run/2", "id"')
    errors: dict[str, DarefineError] = {}
    assert len(undo(project, on_error=errors.__setitem__)) == 1
    assert list(errors) == [path.name]
    assert (path.name in caplog.text) == bool(which)


def wrong_values(value: object) -> list[Any]:
    wrong: list[Any] = [None, 3, 0.5, True, "x", [], [3], {}, {"a": 3}, [[[]]], -1, 10**400, "\ud800", math.inf]
    return [each for each in wrong if type(each) is not type(value)]


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.parametrize("first", [False, True], ids=["this form", "first form"])
def test_wrong_types_in_a_run_are_one_line_or_harmless(project: FakeProject, data: Path, first: bool) -> None:
    write(project, [polygon(1, square(0, 0)), polygon(2, square(900, 0))])
    write(project, [polygon(1, square(0, 0))])
    path = next((data / "runs").iterdir()) if first else run_files(project)[1].path
    good = json.loads(path.read_text())
    target = path if not first else runs_folder(project) / path.name
    for place in list(places(good)):
        holder = json.loads(json.dumps(good))
        inner = holder
        for key in place[:-1]:
            inner = inner[key]
        for wrong in wrong_values(inner[place[-1]]):
            inner[place[-1]] = wrong
            target.write_text(json.dumps(holder))
            with contextlib.suppress(ReviewError):
                run = read_run(target)
                save_run(project, run)
                json.dumps(compare(project).to_json())


def test_runs_below_one_whose_file_was_moved_away_are_not_overwritten(project: FakeProject) -> None:
    first = write(project, grid(3))
    second = write(project, grid(3, shift=30))
    run_files(project)[1].path.unlink()
    assert states(project) == ["done", "unrecorded"]
    assert statuses(project) == {"untouched": 3}
    with pytest.raises(ReviewError, match=f"'slide.svs' was written last by run {second.run}, whose record is not in"):
        undo(project)
    with pytest.raises(ReviewError, match=f"'slide.svs' was not written by run {first.run} last"):
        undo(project, first.run)
    again = write(project, grid(3, shift=60))
    assert (again.added, again.removed) == (3, 3)
    assert states(project) == ["done", "done"]


@pytest.mark.parametrize("touched", [False, True])
def test_a_run_without_its_record_is_undone_by_its_id(project: FakeProject, touched: bool) -> None:
    write(project, grid(3))
    second = write(project, grid(3, shift=30))
    shutil.rmtree(runs_folder(project))
    assert [(run.id, run.model, len(run.objects), state) for run, state in run_states(project)] == [
        (second.run, "m1", 3, "unrecorded")
    ]
    if touched:
        project.edit(ours(project)[0].id, locked=True)
    (result,) = undo(project, second.run)
    assert (result.removed, result.adopted, len(ours(project))) == ((2, 1, 1) if touched else (3, 0, 0))
    assert states(project) == ["undone"]
    if touched:
        project.delete(ours(project)[0].id)
        assert write(project, grid(3, shift=30)).suppressed == 1


@pytest.mark.parametrize("which", [0, 1])
def test_undo_names_an_image_whose_record_is_missing(project: FakeProject, which: int) -> None:
    call = None
    for image in project.images:
        result = write_back(project, image, grid(2), model="m", classes=CLASSES, batch=call)
        call = call or result.run
    missing = project.images[which]
    run_files(project, missing)[-1].path.unlink()
    errors: dict[str, DarefineError] = {}
    if which:
        # It may be of a later call.
        with pytest.raises(ReviewError, match=f"The last run cannot be undone: '{missing.name}' was written last by"):
            undo(project, on_error=errors.__setitem__)
        assert [state for _, state in run_states(project)] == ["done", "unrecorded"]
    else:
        (other,) = undo(project, on_error=errors.__setitem__)
        assert (other.image, list(errors)) == (project.images[1].id, [missing.name])
        assert "000001-7" in str(errors[missing.name])


# -- copies of a project, and records that are lost


@pytest.mark.parametrize("left", ["nothing", "the number"])
def test_numbers_that_begin_anew_are_those_of_other_runs(project: FakeProject, left: str) -> None:
    write(project, grid(3))
    opened = project.state(SLIDE)
    shutil.rmtree(project.folder / "darefine")
    if left == "nothing":
        # As it was before a new run was numbered after what the image says.
        project.properties[SLIDE.id].clear()
    again = write(project, grid(4, shift=30))
    assert again.run[:6] == ("000001" if left == "nothing" else "000002")
    project.save_from(opened)
    assert statuses(project) == {"untouched": 3}
    assert {run.id: state for run, state in run_states(project)}[again.run] == "overwritten"
    result = write(project, grid(4, shift=30))
    assert (result.added, result.rejected, result.suppressed) == (4, 0, 0)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("records", [False, True])
def test_data_of_another_copy_rejects_nothing(tmp_path: Path, more: int, records: bool) -> None:
    first = FakeProject(tmp_path / "first")
    first.folder.mkdir()
    write(first, grid(2))
    second = copy.deepcopy(first)
    second.path = tmp_path / "second" / "project.qpproj"
    shutil.copytree(first.folder, second.folder)
    mine = write(first, grid(3, shift=30))
    for number in range(1 + more):
        write(second, grid(3, shift=60 + 100 * number))
    if records:
        shutil.copytree(runs_folder(second), runs_folder(first), dirs_exist_ok=True)
    first.save_from(second.state(SLIDE))
    assert statuses(first) == {"untouched": 3}
    assert reviewed_annotations(first, SLIDE).rejected == ()
    if records or not more:
        assert {run.id: state for run, state in run_states(first)}[mine.run] == "overwritten"
        assert more or f"overwritten, not rejected: run {mine.run} (3 objects)" in " ".join(compare(first).notes())
    again = write(first, grid(3, shift=30))
    assert (again.added, again.rejected, again.suppressed) == (3, 0, 0)


def test_a_record_without_a_random_part_is_read(project: FakeProject) -> None:
    run = write(project, grid(3)).run
    (file,) = run_files(project)
    text = file.path.read_text().replace(run, run[:8])
    found = json.loads(text)
    del found["survivors"], found["min_area_px2"]
    file.path.unlink()
    (runs_folder(project) / f"{run[:8]}.json").write_text(json.dumps(found))
    project.properties[SLIDE.id]["darefine.run"] = run[:8]
    assert (states(project), statuses(project)) == (["done"], {"untouched": 3})
    project.delete(ours(project)[0].id)
    assert statuses(project) == {"untouched": 2, "rejected": 1}
    assert [result.removed for result in undo(project, "000001-7")] == [2]


def test_a_run_is_named_without_its_random_part(project: FakeProject) -> None:
    runs = [write(project, grid(2, shift=shift)).run for shift in (0.0, 30.0)]
    assert [result.run for result in undo(project, "000002-7")] == runs[1:]
    assert [result.run for result in undo(project, "000001-7")] == runs[:1]


# -- what undo leaves


@pytest.mark.parametrize("undone", [1, 2])
def test_what_undo_left_and_was_deleted_then_does_not_come_back(project: FakeProject, undone: int) -> None:
    before = project.state(SLIDE)
    write(project, grid(3))
    if undone == 2:
        write(project, grid(3), model="m2")
    mine = ours(project)[0]
    project.edit(mine.id, locked=True)
    for _ in range(undone):
        undo(project)
    left = project.state(SLIDE)
    assert states(project) == ["undone"] * undone
    assert statuses(project) == {"accepted": 1}
    project.delete(mine.id)
    assert statuses(project) == {"rejected": 1}
    assert reviewed_annotations(project, SLIDE).rejected == (mine.id,)
    again = write(project, grid(3), model="m2" if undone == 2 else "m1")
    assert (again.added, again.suppressed) == (2, 1)
    undo(project)
    assert statuses(project) == {"rejected": 1}
    # Data of before it was written, or while it was there, tells of no deletion.
    for state, found in ((before, {"rejected": 1}), (left, {"accepted": 1})):
        project.save_from(state)
        assert statuses(project) == found


def test_data_of_before_an_object_that_undo_left_rejects_nothing(project: FakeProject) -> None:
    before = project.state(SLIDE)
    write(project, grid(3))
    project.edit(ours(project)[0].id, locked=True)
    undo(project)
    project.save_from(before)
    assert statuses(project) == {}
    assert write(project, grid(3)).added == 3


def test_undo_clips_by_the_smallest_area_of_its_run(project: FakeProject) -> None:
    options = WriteOptions(min_area_um2=10)
    write(project, [polygon(1, square(0, 1000))], options=options)
    write(project, [polygon(1, square(0, 990))], model="m2", options=options)
    project.edit(ours(project)[0].id, locked=True)
    assert [(result.added, result.removed) for result in undo(project)] == [(1, 0)]
    assert {record.metadata["darefine.model"] for record in ours(project)} == {"m1", "m2"}


# -- growth


def test_a_run_of_one_polygon_lists_no_cells(project: FakeProject) -> None:
    cell = Annotation(geometry=square(5000, 5000, 10), kind="detection")
    project.stored[SLIDE.id] = tuple(replace(cell, id=UUID(int=number)) for number in range(20_000))
    write(project, grid(1))
    write(project, grid(1, shift=30))
    assert max(file.path.stat().st_size for file in run_files(project)) < 4000


def test_a_write_packs_and_seals_each_object_once(project: FakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    work: Counter[str] = Counter()

    def counted(module: ModuleType, name: str, size: Callable[..., int]) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (work.update({name: size(*given)}), function(*given))[1])

    counted(run_records, "_object_to_json", lambda _: 1)
    counted(runs_module, "_outlines", len)
    polygons = [polygon(1, square(500 * (number % 50), 500 * (number // 50))) for number in range(300)]
    write(project, polygons)
    assert work == {"_object_to_json": 300, "_outlines": 300}
    work.clear()
    assert write(project, polygons).kept == 300
    # The record of the former run is looked through once, to see that it is whole.
    assert work == {"_object_to_json": 300, "_outlines": 600}


# -- objects


@pytest.mark.parametrize("recorded", [True, False], ids=["with its run", "without"])
@pytest.mark.parametrize("moved", [0.0, 500.0])
def test_an_object_that_was_duplicated_counts_as_drawn(project: FakeProject, recorded: bool, moved: float) -> None:
    write(project, grid(2))
    first = ours(project)[0]
    copy = project.draw(square(moved, 1000), first.path_class, metadata=dict(first.metadata), name=first.name)
    if not recorded:
        run_files(project)[0].path.unlink()
    found = sort_objects(project, SLIDE)
    assert found.user_objects == (copy,)
    assert statuses(project) == {"untouched": 2}
    if recorded:
        assert compare(project).counts["drawn"] == 1
    write(project, grid(3, shift=30), model="m2")
    assert copy in project.objects(SLIDE)
    assert sort_objects(project, SLIDE).user_objects == (copy,)


def test_an_object_that_was_pasted_into_another_image_counts_as_drawn_there(project: FakeProject) -> None:
    write(project, grid(1))
    (first,) = ours(project)
    other = project.images[1]
    pasted = replace(first, id=uuid4())
    project.stored[other.id] = (pasted,)
    assert sort_objects(project, other).user_objects == (pasted,)
    assert manual_annotations(project, other, taken_over=False) == (pasted,)


@settings(deadline=None, max_examples=60)
@given(length=st.floats(0.011, 0.6) | st.floats(0, 0.004), angle=st.floats(0, 6.3), whole=st.booleans())
def test_an_outline_that_moved_by_more_than_rounding_is_reshaped(length: float, angle: float, whole: bool) -> None:
    shape = shapely.Polygon([(0, 0), (400, 30), (430, 410), (20, 380)])
    written = RunObject(record=Annotation(geometry=shape, path_class="Benign"), training_class="Benign")
    points = shapely.get_coordinates(shape)[:-1]
    points[slice(None) if whole else 0] += length * np.array([math.cos(angle), math.sin(angle)])
    moved = replace(written.record, geometry=shapely.Polygon(np.roll(points, 2, axis=0)))
    assert _statuses([(written, moved)], set()) == ["reshaped" if length > 0.01 else "untouched"]


# -- a real QuPath opens and saves


needs_qupath = pytest.mark.skipif(
    not os.environ.get("PAQUO_QUPATH_DIR"), reason="PAQUO_QUPATH_DIR is not set: there is no QuPath to save with"
)


class InQuPath:
    """An image as QuPath's window holds it: read once, and saved as a whole."""

    def __init__(self, project: Path) -> None:
        jvm.start_qupath()
        import jpype  # noqa: PLC0415

        java = jpype.JClass
        reader = java("qupath.lib.projects.ProjectIO")
        opened = reader.loadProject(java("java.io.File")(str(project)), java("java.awt.image.BufferedImage").class_)
        # QuPath's window asks for the new places of the images; here they are given.
        images = project.parent.parent.parent / "images"
        self.entry = opened.getImageList().get(0)
        moved = java("java.util.HashMap")()
        for uri in self.entry.getURIs():
            name = str(uri.toString()).rpartition("/")[2]
            moved.put(uri, java("java.net.URI")((images / name).as_uri()))
        self.entry.updateURIs(moved)
        self.data = self.entry.readImageData()

    def delete(self, *gone: UUID) -> None:
        hierarchy = self.data.getHierarchy()
        for item in list(hierarchy.getAnnotationObjects()):
            if UUID(str(item.getID().toString())) in gone:
                hierarchy.removeObject(item, True)

    def save(self) -> None:
        self.data.setChanged(True)
        self.entry.saveImageData(self.data)


def in_project(project: Project, count: int = 3) -> list[Annotation]:
    image = project.images[0]
    polygons = [polygon(1, square(100 + 500 * number, 1000, 300)) for number in range(count)]
    write_back(project, image, polygons, model="m", classes=CLASSES)
    return [item.current for item in sort_objects(project, image).predictions if item.current is not None]


@pytest.fixture(params=["0.4.4", "0.5.1", "0.6.0", "0.7.0"])
def annotated(request: pytest.FixtureRequest, place: Callable[[str], Path]) -> Path:
    return place(f"qupath-{request.param}/annotated") / "project.qpproj"


@pytest.mark.qupath
@needs_qupath
@pytest.mark.parametrize("engine", ["embedded", "paquo"])
@pytest.mark.parametrize("deleted", [0, 1, 3])
def test_qupath_keeps_the_witness_through_open_and_save(annotated: Path, engine: str, deleted: int) -> None:
    with open_project(annotated, engine=engine) as project:
        written = in_project(project)
        window = InQuPath(annotated)
        window.delete(*(record.id for record in written[:deleted]))
        window.save()
        found = sort_objects(project, project.images[0])
        assert found.history.is_seen
        assert [item.status for item in found.predictions].count("rejected") == deleted
        assert [item.status for item in found.predictions].count("untouched") == 3 - deleted
        assert len(in_project(project)) == 3 - deleted


@pytest.mark.qupath
@needs_qupath
@pytest.mark.parametrize("engine", ["embedded", "paquo"])
def test_qupaths_save_over_an_image_that_was_open_overwrites_the_run(annotated: Path, engine: str) -> None:
    with open_project(annotated, engine=engine) as project:
        image = project.images[0]
        window = InQuPath(annotated)
        in_project(project)
        window.save()
        found = sort_objects(project, image)
        assert (found.predictions, len(found.history.overwritten)) == ((), 1)
        assert len(in_project(project)) == 3
        assert not sort_objects(project, image).rejected
