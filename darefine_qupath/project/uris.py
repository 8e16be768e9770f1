"""Read and write file URIs as Java does, and find the images of a project that was moved.

QuPath stores absolute URIs only. Both ``file:/a/b`` (Java) and ``file:///a/b`` occur, a Windows drive as
``file:/C:/a``, a network share as ``file://server/share/a`` or ``file:////server/share/a``.
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from urllib.parse import unquote_to_bytes

__all__ = ["file_uri", "local_path", "relocated", "uri_path"]

# What Java's File.toURI leaves as it is, beside letters outside ASCII.
_LEGAL = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.!~*'()/:@&=+$,;")


def uri_path(uri: str) -> str | None:
    """Path inside a ``file:`` URI, decoded, with forward slashes.

    Parameters
    ----------
    uri : str
        As stored.

    Returns
    -------
    str or None
        ``"/a/b"``, ``"C:/a/b"`` or ``"//server/share/a"``; None for another scheme and for a relative URI.

    Examples
    --------
    >>> uri_path("file:/C:/my%20slides/a.svs")
    'C:/my slides/a.svs'
    >>> uri_path("file://server/share/a.svs")
    '//server/share/a.svs'
    """
    found = re.match(r"file:(?://([^/]*)(?=/))?(/.*)", uri, re.IGNORECASE | re.DOTALL)
    if found is None:
        return None
    host, path = found[1] or "", re.split("[?#]", found[2])[0]
    # As Java: UTF-8 whatever the system; os.fsdecode fails on Windows where the bytes are not.
    path = unquote_to_bytes(path).decode(errors="surrogateescape") if "%" in path else path
    if host.lower() not in ("", "localhost"):
        return f"//{host}{path}"
    if path.startswith("//"):
        return f"//{path.lstrip('/')}"
    drive = re.match(r"/([A-Za-z]:(?:/|$).*)", path, re.DOTALL)
    return drive[1] if drive else path


def local_path(uri: str, *, windows: bool = os.name == "nt") -> PurePath | None:
    """File of a URI on this machine.

    Parameters
    ----------
    uri : str
        As stored.
    windows : bool, optional
        Whether this is Windows.

    Returns
    -------
    PurePath or None
        Of the flavour asked for; None for what is not a file. A Windows drive elsewhere becomes ``/C:/...``, which is
        not there, as in Java.
    """
    path = uri_path(uri)
    if path is None or "\0" in path:
        return None
    if windows:
        return PureWindowsPath(path)
    return PurePosixPath(path if path.startswith("/") else f"/{path}")


def file_uri(path: PurePath) -> str:
    """URI of an absolute path, spelled as Java's ``File.toURI`` spells it.

    Examples
    --------
    >>> file_uri(PurePosixPath("/my slides/Größe #1.svs"))
    'file:/my%20slides/Größe%20%231.svs'
    """
    text = path.as_posix()
    if text.startswith("//"):
        text = f"//{text}"
    elif not text.startswith("/"):
        text = f"/{text}"
    return "file:" + "".join(char if _is_legal(char) else _escaped(char) for char in text)


def _is_legal(char: str) -> bool:
    return char in _LEGAL if char < "\x80" else unicodedata.category(char) not in ("Zs", "Zl", "Zp", "Cc", "Cs")


def _escaped(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogateescape"))


def relocated(uri: str, *, project_uri: str, folder: Path) -> Path | None:
    """Where an image of a moved project should be: at the same place relative to the project.

    Parameters
    ----------
    uri : str
        Stored URI of the image.
    project_uri : str
        URI of ``project.qpproj`` when it was last saved.
    folder : Path
        Where the project is now.

    Returns
    -------
    Path or None
        The file may or may not be there. None where the two never shared a drive or share.
    """
    image, project = uri_path(uri), uri_path(project_uri)
    if image is None or project is None or "\0" in image + project:
        return None
    image_parts, project_parts = _parts(image), _parts(posixpath.dirname(project))
    windows = re.match("[A-Za-z]:|//", project) is not None
    shared = 0
    for ours, theirs in zip(image_parts, project_parts, strict=False):
        if ours != theirs and not (windows and ours.casefold() == theirs.casefold()):
            break
        shared += 1
    if shared == 0:
        return None
    steps = [".."] * (len(project_parts) - shared) + image_parts[shared:]
    return Path(os.path.normpath(folder.joinpath(*steps)))


def _parts(path: str) -> list[str]:
    """Parts of a path; the first tells root, drive or share."""
    parts = [part for part in posixpath.normpath(path).split("/") if part]
    if path.startswith("//"):
        return ["//" + "/".join(parts[:2]), *parts[2:]]
    return ["/", *parts] if path.startswith("/") else parts
