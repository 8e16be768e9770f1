"""Install the scripts that a pathologist runs inside QuPath."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from darefine_qupath.errors import ReviewError

__all__ = ["install_scripts", "script_names"]


def script_names() -> tuple[str, ...]:
    """File names of the scripts, sorted."""
    folder = resources.files("darefine_qupath") / "qupath_scripts"
    return tuple(sorted(item.name for item in folder.iterdir() if item.name.endswith(".groovy")))


def install_scripts(folder: Path, *, overwrite: bool = False) -> tuple[Path, ...]:
    """Copy the scripts to where QuPath finds them: its user directory's ``scripts``, or a project's ``scripts``.

    Parameters
    ----------
    folder : Path
        Made where it is not there.
    overwrite : bool, optional
        Also replace scripts that somebody changed.

    Returns
    -------
    tuple of Path
        The copies.

    Raises
    ------
    ReviewError
        If a script is there already and differs, or the folder cannot be written.
    """
    source = resources.files("darefine_qupath") / "qupath_scripts"
    wanted = {folder / name: (source / name).read_bytes() for name in script_names()}
    try:
        changed = [path.name for path, text in wanted.items() if path.exists() and path.read_bytes() != text]
        if changed and not overwrite:
            raise ReviewError(f"{folder} has other versions of {', '.join(changed)}; use --force to replace them")
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in wanted.items():
            path.write_bytes(text)
    except OSError as error:
        raise ReviewError(f"Cannot put the scripts into {folder}: {error.strerror or error}") from error
    return tuple(wanted)
