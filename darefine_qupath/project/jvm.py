"""Start the Java of a QuPath that is installed, and reach its classes. The only module that imports paquo or jpype.

Importing this module starts no Java. It starts with the first write (`start_qupath`), with a bounded heap, and stays
until the process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darefine_qupath.errors import EngineError, ProjectWriteError
from darefine_qupath.project.servers import is_since

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DEFAULT_HEAP",
    "call_hidden",
    "find_qupath",
    "java_array",
    "java_class",
    "java_errors",
    "paquo_java",
    "set_hidden",
    "start_qupath",
]

_log = logging.getLogger(__name__)

DEFAULT_HEAP = "-Xmx2g"
"""Java heap unless ``PAQUO_JAVA_OPTS`` (or ``java_opts`` in ``.paquo.toml``) says otherwise."""

_HEAP_OPTIONS = ("-Xmx", "-XX:MaxRAMPercentage", "-XX:MaxRAMFraction", "-XX:MaxHeapSize", "-mx")
_PAQUO_DEFAULTS = ["-XX:MaxRAMPercentage=50"]
_OLDEST = (0, 4)
GET_QUPATH = "run `paquo get_qupath --install-path FOLDER` and set PAQUO_QUPATH_DIR to what it prints"

_pid = os.getpid()
_starting = threading.Lock()
_version: str | None = None


def _settings() -> dict[str, Any]:
    import paquo._config  # noqa: PLC0415 - it takes longer to load than most projects to read

    return dict(paquo._config.to_kwargs(paquo._config.settings))


def _find(settings: Mapping[str, Any]) -> Any:  # noqa: ANN401 - paquo's record of the places
    """Where QuPath and its Java are, or None."""
    from paquo import jpype_backend  # noqa: PLC0415

    try:
        # paquo appends to the options that it is given.
        return jpype_backend.find_qupath(**{**settings, "java_opts": []})
    except (ValueError, OSError) as error:
        if settings.get("qupath_dir"):
            _log.warning("There is no QuPath that paquo can use in PAQUO_QUPATH_DIR=%s", settings["qupath_dir"])
        else:
            _log.debug("paquo finds no QuPath: %s", error)
        return None


def find_qupath() -> Path | None:
    """Folder of the QuPath that paquo would use; starts no Java.

    Returns
    -------
    Path or None
        What ``PAQUO_QUPATH_DIR`` names, or one of paquo's search folders has; None when there is none.
    """
    found = _find(_settings())
    if found is None:
        return None
    app = Path(found.app_dir).absolute()
    return app.parent if sys.platform == "win32" else app.parent.parent


def _java_options(settings: Mapping[str, Any], runtime: Path) -> list[str]:
    """Options for the JVM: the user's, with a bounded heap, nothing of Java's own on standard output, no window."""
    given = settings.get("java_opts") or []
    options = shlex.split(given) if isinstance(given, str) else [str(option) for option in given]
    if "PAQUO_JAVA_OPTS" not in os.environ and options == _PAQUO_DEFAULTS:
        options = []  # half of the machine
    if not any(option.startswith(_HEAP_OPTIONS) for option in options):
        options.append(DEFAULT_HEAP)
    # -Xrs leaves Ctrl-C to Python.
    options += ["-XX:+DisplayVMOutputToStderr", "-Djava.awt.headless=true", "-Xrs"]
    if _java_release(runtime) >= 24:
        options.append("--enable-native-access=ALL-UNNAMED")
    return options


def _java_release(runtime: Path) -> int:
    try:
        found = re.search(r'JAVA_VERSION="(\d+)', (runtime / "release").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(found[1]) if found else 0


def start_qupath() -> str:
    """Start QuPath's Java in this process, unless it runs already.

    Returns
    -------
    str
        QuPath's version.

    Raises
    ------
    EngineError
        If there is no QuPath, it does not start, it is too old, or this process was forked from one that had loaded
        this module: a JVM does not survive a fork.
    """
    global _version
    if os.getpid() != _pid:
        raise EngineError(
            "QuPath cannot run in a forked process; write projects in the main process, or start the worker with the "
            "multiprocessing method 'spawn'"
        )
    with _starting:
        if _version is None:
            _version = _start()
    return _version


def _start() -> str:
    try:
        import jpype  # noqa: PLC0415
        from paquo import jpype_backend  # noqa: PLC0415
    except ImportError as error:
        raise EngineError(f"paquo cannot be loaded ({error}); `pip install paquo`, then {GET_QUPATH}") from None
    settings = _settings()
    found = _find(settings)
    if found is None:
        raise EngineError(f"paquo finds no QuPath; {GET_QUPATH}")
    if not jpype.isJVMStarted():
        options = _java_options(settings, Path(found.runtime_dir))
        _log.info("Starting QuPath with %s", " ".join(options))
        with _own_interrupts():
            try:
                jpype_backend.start_jvm(finder_kwargs={**settings, "java_opts": options})
            except (RuntimeError, OSError, TypeError, ValueError, jpype.JException) as error:
                raise EngineError(f"QuPath's Java does not start ({_first_line(error)}); {GET_QUPATH}") from error
    return _prepare()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Keep Python's handling of Ctrl-C over the start of the JVM."""
    former = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if former is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, former)


def _prepare() -> str:
    """Keep what Java prints off standard output, load what paquo needs of QuPath, and check the version."""
    import jpype  # noqa: PLC0415

    system = jpype.JClass("java.lang.System")
    system.setOut(system.err)
    try:
        import paquo.java  # noqa: PLC0415
        import paquo.projects  # noqa: PLC0415 - sets up logging
    except (ImportError, TypeError, jpype.JException) as error:
        raise EngineError(f"paquo cannot use this QuPath ({_first_line(error)}); {GET_QUPATH}") from error
    if paquo.java.LogManager is not None:
        paquo.java.LogManager.setError()
    version = str(paquo.java.qupath_version or "unknown")
    if not is_since(version, *_OLDEST):
        raise EngineError(f"QuPath {version} gives objects no identity; the paquo engine needs 0.4 or later")
    with contextlib.suppress(TypeError, AttributeError):
        # In QuPath itself an extension does this; until then 0.5 passes over OpenSlide when it chooses a reader.
        jpype.JClass("qupath.lib.images.servers.openslide.jna.OpenSlideLoader").tryToLoadQuietly()
    return version


def java_class(name: str) -> Any:  # noqa: ANN401 - a Java class
    """Give a class by its full name."""
    import jpype  # noqa: PLC0415

    return jpype.JClass(name)


def paquo_java() -> Any:  # noqa: ANN401 - a module without types
    """Give the classes of QuPath and Java that paquo names."""
    import paquo.java  # noqa: PLC0415

    return paquo.java


def java_array(kind: str, values: NDArray[Any]) -> Any:  # noqa: ANN401 - a Java array
    """Copy numbers to a Java array of ``"byte"`` or ``"double"``."""
    import jpype  # noqa: PLC0415

    return jpype.JArray({"byte": jpype.JByte, "double": jpype.JDouble}[kind])(values)


@contextlib.contextmanager
def java_errors(what: str) -> Iterator[None]:
    """Turn an exception of Java into a `ProjectWriteError`."""
    import jpype  # noqa: PLC0415

    try:
        yield
    except jpype.JException as error:
        raise ProjectWriteError(f"QuPath cannot {what}: {_first_line(error)}; nothing was changed") from error
    except TypeError as error:
        # jpype's word for a method or class that this QuPath does not have
        raise EngineError(f"QuPath {_version} cannot {what} through paquo: {_first_line(error)}") from error


def _hidden(item: Any, find: str, name: str, *types: Any) -> Any:  # noqa: ANN401
    """Find a member of an object that is not public."""
    import jpype  # noqa: PLC0415

    java_class = item.getClass()
    while java_class is not None:
        with contextlib.suppress(jpype.JException):
            member = getattr(java_class, find)(name, *types)
            member.setAccessible(True)
            return member
        java_class = java_class.getSuperclass()
    raise EngineError(f"QuPath {_version} has no {name}; use another version or engine='embedded'")


def call_hidden(item: Any, name: str, *arguments: Any) -> None:  # noqa: ANN401
    """Call a method of an object that takes texts and is not public."""
    string = java_class("java.lang.String")
    _hidden(item, "getDeclaredMethod", name, *[string for _ in arguments]).invoke(item, *arguments)


def set_hidden(item: Any, name: str, value: Any) -> None:  # noqa: ANN401
    """Set a field of an object that is not public."""
    _hidden(item, "getDeclaredField", name).set(item, value)
