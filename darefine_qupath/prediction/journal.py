"""Keep what a prediction has finished, so that a killed one goes on where it stopped and gives the same bytes."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from darefine_qupath.errors import PredictionError
from darefine_qupath.filesystem import atomic_write, open_lock, try_lock
from darefine_qupath.limits import NOTES, naming, open_file, parse_json, read_file
from darefine_qupath.prediction.blend import MapRows
from darefine_qupath.prediction.engine import EngineSettings
from darefine_qupath.prediction.scoremap import write_json
from darefine_qupath.prediction.slide_warnings import SlideWarning

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["JournalState", "PredictionJournal"]

_log = logging.getLogger(__name__)

_FORMAT = "darefine-prediction-journal/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalState:
    """What stands in the journal.

    Attributes
    ----------
    fingerprint : str
        Of the prediction; another one starts over.
    settings : EngineSettings
        With which the finished rows were computed, and the others must be.
    rows_done : int
        Rows of contexts.
    slices_done : int
        Slices in them.
    class_pixels : tuple of int
        Map pixels per class in the finished bands.
    unpredicted_pixels : int
        Map pixels in them that were asked for and have no class.
    warnings : tuple of SlideWarning
        Found so far.
    """

    fingerprint: str
    settings: EngineSettings
    rows_done: int = 0
    slices_done: int = 0
    class_pixels: tuple[int, ...] = ()
    unpredicted_pixels: int = 0
    warnings: tuple[SlideWarning, ...] = ()
    format: str = field(default=_FORMAT, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "warnings": [warning.to_json() for warning in self.warnings]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JournalState:
        """State of what `to_json` gave."""
        warnings = [SlideWarning.from_json(warning) for warning in data["warnings"]]
        return msgspec.convert({**data, "warnings": warnings}, cls)


class PredictionJournal:
    """The folder of an unfinished prediction.

    A row counts once the journal says so, and the journal says so last: what a killed run left beyond that is written
    again.

    Parameters
    ----------
    folder : Path
        Made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; the lock of one that died is gone with it.

        Raises
        ------
        PredictionError
            If another process is predicting into the same folder, or nothing can be written there.
        """
        try:
            descriptor = open_lock(self.folder.with_name(".lock"))
        except OSError as error:
            raise PredictionError(f"Cannot write to {self.folder.parent}: {error.strerror}") from error
        try:
            if not try_lock(descriptor):
                raise PredictionError(
                    f"Another process is predicting into {self.folder.parent}; wait for it or stop it"
                )
            yield
        finally:
            os.close(descriptor)

    def load(self, fingerprint: str, *, bottoms: Sequence[int], width: int) -> JournalState | None:
        """Find out how far a run came; everything it stored is read, so that damage is not found hours later.

        Parameters
        ----------
        fingerprint : str
            Of the prediction.
        bottoms : sequence of int
            Per row of contexts, the map row above which everything is finished after it.
        width : int
            Map columns.

        Returns
        -------
        JournalState or None
            None when there is nothing to go on with: nothing was begun, it was another prediction, or it is damaged.
        """
        path = self.folder / "journal.json"
        if not path.exists():
            return None
        try:
            with naming(path, PredictionError):
                state = JournalState.from_json(parse_json(read_file(path, NOTES), NOTES))
            if state.fingerprint != fingerprint or state.format != _FORMAT:
                _log.info("%s belongs to another model, image or options: starting over", path)
                return None
            self._check(state, bottoms, width)
        except (PredictionError, ValueError) as error:
            _log.warning("%s cannot be resumed (%s): starting over", path, error)
            return None
        return state

    def _check(self, state: JournalState, bottoms: Sequence[int], width: int) -> None:
        if not 0 <= state.rows_done <= len(bottoms):
            raise ValueError(f"it has {state.rows_done} rows of {len(bottoms)}")
        shapes = [(4, int(height), width) for height in np.diff(bottoms[: state.rows_done], prepend=0)]
        for row, (shape, found) in enumerate(zip(shapes, self._bands(state.rows_done), strict=True)):
            if found.shape != shape:
                raise ValueError(f"{self._band(row)} has the shape {found.shape}, not {shape}")
        if state.rows_done:
            planes, _, columns = self.unfinished(state.rows_done - 1).shape
            if (planes, columns) != (len(state.class_pixels) + 1, width):
                raise ValueError(
                    f"{self._unfinished_path(state.rows_done - 1)} has {planes} planes of {columns} columns"
                )

    def start(self, state: JournalState) -> None:
        """Begin with nothing done."""
        self.clear()
        try:
            self.folder.mkdir(parents=True)
            write_json(self.folder / "journal.json", state.to_json())
        except OSError as error:
            raise PredictionError(f"Cannot write to {self.folder}: {error}") from error

    def commit(self, state: JournalState, band: MapRows, unfinished: NDArray[np.float32]) -> None:
        """Note one more row: its finished band, the sums of what is unfinished, and then that both are there."""
        row = state.rows_done - 1
        try:
            _write_array(self._band(row), np.stack([band.label, band.confidence, band.margin, band.runner_up]))
            _write_array(self._unfinished_path(row), unfinished)
            write_json(self.folder / "journal.json", state.to_json())
        except OSError as error:
            raise PredictionError(f"Cannot write to {self.folder}: {error}; finished rows are kept") from error
        self._unfinished_path(row - 1).unlink(missing_ok=True)

    def unfinished(self, row: int) -> NDArray[np.float32]:
        """Read the sums of the map rows that are unfinished after a row of contexts."""
        return _read_array(self._unfinished_path(row))

    def bands(self, rows: int) -> Iterator[MapRows]:
        """Finished bands of the first rows of contexts, from top to bottom."""
        for values in self._bands(rows):
            yield MapRows(*values)

    def _bands(self, rows: int) -> Iterator[NDArray[np.uint8]]:
        return (_read_array(self._band(row)) for row in range(rows))

    def clear(self) -> None:
        """Forget everything."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _band(self, row: int) -> Path:
        return self.folder / f"band-{row:05d}.npz"

    def _unfinished_path(self, row: int) -> Path:
        return self.folder / f"unfinished-{row:05d}.npz"


def _write_array(path: Path, values: NDArray[Any]) -> None:
    with atomic_write(path, PredictionError) as temporary:
        np.savez_compressed(temporary, values=values)


def _read_array(path: Path) -> NDArray[Any]:
    # Opened here: numpy leaves a file open whose zip it cannot read, and Windows would not remove it.
    with (
        naming(f"{path} is damaged; predict again, it starts over", PredictionError),
        open_file(path) as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        values: NDArray[Any] = stored["values"]
    return values
