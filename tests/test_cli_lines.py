"""Names out of files at the terminal: nothing in them is obeyed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from darefine_qupath.cli import progress
from darefine_qupath.cli.group import main
from darefine_qupath.cli.lines import UNSEEN, LogFormatter, visible
from darefine_qupath.cli.output import echo_json, note, say, table
from tests.conftest import Run

TINY = Path(__file__).parents[1] / "projects" / "tiny"
NASTY = "a\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202egpj.exe\u2066\r\n[red]b[/nothing]"
SPELLED = r"a\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\u202egpj.exe\u2066\r\n[red]b[/nothing]"


@given(st.text() | st.text(st.characters(max_codepoint=0x9F)))
def test_what_is_visible_is_one_line_and_the_rest_stays(text: str) -> None:
    shown = visible(text)
    assert not UNSEEN.search(shown)
    assert len(shown.splitlines()) <= 1
    assert visible(shown) == shown
    plain = "".join(character for character in text if not UNSEEN.match(character))
    assert plain == text or len(shown) > len(plain)


def test_lines_tables_and_json_hold_the_name_as_it_is_spelled(capfd: pytest.CaptureFixture[str]) -> None:
    say(NASTY)
    note(NASTY)
    table(["class", NASTY], [(NASTY, "1")], title=NASTY)
    echo_json({NASTY: [NASTY, "\ud800"]})
    out, err = capfd.readouterr()
    assert not UNSEEN.search((out + err).replace("\n", ""))
    assert err == f"{SPELLED}\n"
    lines = out.splitlines()
    assert lines[:2] == [SPELLED, SPELLED]
    assert sum(SPELLED in line for line in lines[2:4]) == 2
    assert json.loads("\n".join(lines[4:])) == {NASTY: [NASTY, "\ud800"]}


def test_progress_shows_a_name_and_no_markup(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_stderr", Console(stderr=True, force_terminal=True, color_system=None, width=300))
    with progress.show_progress("Predicting") as listener:
        listener.on_items("Predicting", 1, 2, NASTY)
    shown = capfd.readouterr().err
    assert SPELLED in shown
    assert "owned\x07" not in shown


def test_a_warning_in_the_log_is_one_line() -> None:
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s: odd", (NASTY,), None)
    assert LogFormatter("%(message)s").format(record) == f"{SPELLED}: odd"


def test_an_error_names_a_file_without_obeying_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["info", f"{tmp_path}/{NASTY}"], ["restore", "--which", "1", NASTY], [NASTY]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        err = capfd.readouterr().err
        assert "Error: " in err
        assert not UNSEEN.search(err.replace("\n", ""))


@pytest.mark.parametrize("which", ["²", "1²", "٣", "①", "9" * 5000])
def test_a_backup_is_chosen_by_plain_digits(run: Run, tmp_path: Path, which: str) -> None:
    project = Path(shutil.copytree(TINY, tmp_path / "project"))
    code, _, err = run("restore", project, "train-1.tif", "--which", which)
    assert (code, err.count("\n"), err[:7]) == (2, 1, "Error: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--label", "1=X", "--label", "1=Y"), "label 1 is both X and Y"),
        (("--class-from", " "), "'' is no field"),
    ],
    ids=["two classes of a label", "no field"],
)
def test_odd_import_options_are_refused(run: Run, words: tuple[str, ...], said: str) -> None:
    code, _, err = run("import", TINY, "none.png", *words)
    assert (code, said in err) == (2, True)


@pytest.mark.parametrize(
    "label", ["²=Tumor", "٣=Tumor", "1e3=Tumor", "-1=Tumor", "1_0=Tumor", "9" * 300 + "=Tumor", "1="]
)
def test_a_label_is_a_number_of_plain_digits(run: Run, label: str) -> None:
    code, _, err = run("import", TINY, "none.png", "--label", label)
    assert code == 2
    assert "is not N=CLASS" in err


@pytest.mark.parametrize(
    "words",
    [
        ("tiles", TINY, "--slice-um", "nan"),
        ("tiles", TINY, "--slice-um", "1e300", "--context-um", "1e300", "--stride-um", "1e300"),
        ("tiles", TINY, "--input-px", "9" * 30),
        ("tiles", TINY, "--input-px", "9" * 5000),
        ("tiles", TINY, "--input-px", "10000000"),
        ("tiles", TINY, "--mpp", "1e300"),
        ("train", TINY, "-o", "run", "--set", "lr=nan"),
        ("train", TINY, "-o", "run", "--set", "lr=1e999"),
        ("train", TINY, "-o", "run", "--epochs", "9" * 30),
        ("train", TINY, "-o", "run", "--width", "10000000"),
        ("predict", TINY, "--model", "none", "--split", "²"),
        ("predict", TINY, "--model", "none", "--batch-size", "9" * 30),
        ("export", TINY, "--labels", "out", "--downsample", "9" * 30),
    ],
)
def test_numbers_beyond_all_sense_are_refused(
    run: Run, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("Error: ")
    assert not list(tmp_path.iterdir())
