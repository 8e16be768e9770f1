from __future__ import annotations

import json
from pathlib import Path

import pytest

from darefine_qupath.errors import ConfigError
from darefine_qupath.experiments.cells import ExperimentRequest, run_experiment
from darefine_qupath.experiments.tables import read_cells, write_tables
from tests.listeners import KeepingListener

SMALL = {"encoders": ("resnet18",), "steps": 2, "batch_size": 2, "width": 8, "input_px": 32}


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> ExperimentRequest:
    out = tmp_path_factory.mktemp("experiment")
    slides = {"num_slides": 1, "num_held_out": 1, "side_px": 1600}
    return ExperimentRequest(out=out, networks=("single", "attention"), seeds=(0, 1), **SMALL, **slides)  # type: ignore[arg-type]


def test_every_cell_is_trained_once_and_laid_out_as_in_the_paper(request_: ExperimentRequest) -> None:
    listener = KeepingListener()
    settings = run_experiment(request_, listener=listener)
    cells = read_cells(request_.out)
    assert [(cell["network"], cell["seed"]) for cell in cells] == [
        ("attention", 0),
        ("attention", 1),
        ("single", 0),
        ("single", 1),
    ]
    assert [set(cell["scores"]) for cell in cells[1:3]] == [{"normal", "blank", "shuffled"}, {"normal"}]
    assert [line for line in listener.notices if line.startswith("[")] == [
        f"[{n}/4] {name}"
        for n, name in enumerate(
            ("single-resnet18-seed0", "attention-resnet18-seed0", "single-resnet18-seed1", "attention-resnet18-seed1"),
            1,
        )
    ]
    text = write_tables(request_.out, settings, cells)
    assert "Table I." in text
    assert "| Attention " in text
    difference = json.loads((request_.out / "tables.json").read_text())["differences"][0]
    seeds = [
        {cell["seed"]: cell["scores"]["normal"]["miou"] for cell in cells if cell["network"] == name}
        for name in ("attention", "single")
    ]
    assert difference["by_seed"]["1"] == pytest.approx(100 * (seeds[0][1] - seeds[1][1]))


def test_finished_cells_stay_and_other_settings_are_refused(request_: ExperimentRequest) -> None:
    run_experiment(request_)
    listener = KeepingListener()
    run_experiment(request_, listener=listener)
    assert listener.notices == []
    with pytest.raises(ConfigError, match=r"holds cells of other settings \(steps 2 -> 3\)"):
        run_experiment(ExperimentRequest(**{**vars(request_), "steps": 3}))


def test_tables_without_a_finished_cell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished cell"):
        write_tables(tmp_path, {"data": "generated slides"}, read_cells(tmp_path))
