"""A results folder: `manifest.json`, append-only `part-*.jsonl`, and `results.jsonl` once every selected input is there.

Any number of processes write one folder without talking to each other: input i belongs to shard `i % shards`, each process appends whole lines to a
file of its own, the manifest is created by whoever is first. A line without a newline is what a killed process left; it is passed over, and the input is
done again. Settings that would change a number are the folder's identity: a run with others is refused, unless there are no rows yet and nobody is at work;
then there is nothing to lose, and the folder becomes that run's. Every row names its run, so that rows of two runs that were put together are noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any, TextIO

from certify.errors import CertifyError

try:
    import fcntl
except ImportError:  # there are no such locks on Windows, and no folder is taken over there
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
IDENTITY = ("schema", "model", "data", "method", "norm", "guarantee", "selection", "seed", "smoothing", "device")  # what must not change within a folder
_CLOSE = 1e-9  # relative
_TRIES, _WAIT = 40, 0.05  # for a lock that is held for some milliseconds; seconds
_TIMES = ("seconds",)  # what a row may differ in when it is made again

Row = Mapping[str, Any]
Manifest = Mapping[str, Any]


class OtherRun(CertifyError):
    """A folder that holds the results of another run."""


class Folder:
    """A results folder, opened for a run. Use as a context manager; `add` appends a row and flushes it."""

    def __init__(self, path: pathlib.Path, manifest: Manifest, shard: tuple[int, int] = (0, 1)) -> None:
        self.path, self.shard = path, shard
        if path.is_file():
            raise CertifyError(f"{path}: a results folder is a folder, and this is a file; choose another -o")
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        self.manifest, self._held = _claim(path, manifest)
        self.run, rows = run_of(self.manifest), read_rows(path)
        if any(row.get("run", self.run) != self.run for row in rows):
            self._held.close()
            raise CertifyError(f"{path}: {foreign(path, self.manifest)[0]}")
        self.done = {row["index"] for row in rows}
        self._file: TextIO | None = None

    def pending(self) -> list[int]:
        """The selected inputs of this shard that have no row yet."""
        index, count = self.shard
        return [i for i in self.manifest["selection"] if i % count == index and i not in self.done]

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows; each is one line, and handed to the operating system before the call returns."""
        with writing(self.path):
            if self._file is None:
                name = f"part-{self.shard[0]}-of-{self.shard[1]}-{uuid.uuid4().hex[:8]}.jsonl"
                self._file = (self.path / name).open("a", encoding="utf-8")
            self._file.write("".join(json.dumps({**row, "run": self.run}, allow_nan=False) + "\n" for row in rows))
            self._file.flush()
        self.done.update(row["index"] for row in rows)

    def finish(self) -> bool:
        """Write `results.jsonl` when every selected input has a row; says whether it has."""
        rows = read_rows(self.path)
        if {row["index"] for row in rows} != set(self.manifest["selection"]):
            return False
        write_atomically(self.path / "results.jsonl", "".join(_timeless(row) + "\n" for row in rows))
        return True

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # every row was flushed; what could not be was said then
                self._file.close()
        self._held.close()


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of a folder. Raises CertifyError with one sentence."""
    file = path / "manifest.json"
    if path.is_file():
        raise CertifyError(f"{path}: this is a file, and what is asked for is a results folder, such as certify run MODEL DATA -o DIR makes")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if inside := sorted(folder.parent.name for folder in path.glob("*/manifest.json")):
            raise CertifyError(f"{path}: this is not a results folder, it has some in it ({', '.join(inside)}); name one, such as {path / inside[0]}") from None
        raise CertifyError(f"{path}: this is not a results folder, it has no manifest.json; make one with certify run MODEL DATA -o {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CertifyError(f"{file}: cannot be read ({error}); choose another folder, or delete this one and make it again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise CertifyError(f"{file}: this version reads results of schema {SCHEMA} only; choose another folder, or make this one again with certify run")
    return manifest


def identity(manifest: Manifest) -> dict[str, Any]:
    """What must not change within a folder. Where files lie may: they are known by their sha256."""
    kept = {key: manifest.get(key) for key in IDENTITY}
    if isinstance(kept["data"], Mapping):
        kept["data"] = {key: value for key, value in kept["data"].items() if key != "spec"}
    return {**kept, "model": model_identity(kept["model"])}


def model_identity(model: Any) -> Any:
    """What a manifest says of a model, without the paths by which it was named. Of code the name of the function stays, of which a file has several."""
    if not isinstance(model, Mapping):
        return model
    spec = str(model.get("spec"))
    code = {name: function for name, text in (("spec", spec), ("arch", str(model.get("arch")))) if (function := _function_in(text))}
    return {key: value for key, value in model.items() if key != "spec"} | code


def run_of(manifest: Manifest) -> str:
    """What a row has as `run`: a digest of all that its numbers follow from, which is the identity of its folder but for the other inputs."""
    kept = {key: value for key, value in identity(manifest).items() if key != "selection"}
    return hashlib.sha256(json.dumps(_rounded(kept), sort_keys=True).encode()).hexdigest()[:12]


def foreign(path: pathlib.Path, manifest: Manifest) -> list[str]:
    """The rows of a folder that are of another run than its manifest, one sentence for each file. (Those of earlier versions do not say of which they are.)"""
    run, found = run_of(manifest), []
    for file in sorted(path.glob("part-*.jsonl")):
        others = [(number, row) for number, row in _lines(file) if row is not None and row.get("run", run) != run]
        if others:
            number, row = others[0]
            more = f" ({len(others) - 1} more in this file)" if others[1:] else ""
            which = f"is a row of the run {str(row['run'])[:40]!r}, and the manifest is of {run}"
            found.append(f"input {row['index']}: {file.name}, line {number}, {which}{more}; a folder has the rows of one run, take the others out")
    return found


def done_before(path: pathlib.Path, known: Manifest) -> bool:
    """Whether a folder has all rows of a run already, by what is known of it before anything is computed. Raises OtherRun where it has those of another run."""
    if not (path / "manifest.json").is_file():
        return False
    found = read_manifest(path)
    difference = _difference_of(found, {**found, **known})
    if difference is not None and not _without_rows(path):
        raise OtherRun(_refusal(path, difference))
    whole = difference is None and known.keys() >= set(IDENTITY) and (path / "results.jsonl").exists() and not foreign(path, found)
    return whole and {row["index"] for row in read_rows(path)} == set(found["selection"])


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Every whole row of a folder, one for each input, in the order of the inputs. Torn lines are passed over."""
    rows: dict[int, dict[str, Any]] = {}
    for file in sorted(path.glob("part-*.jsonl")):
        rows |= {row["index"]: row for _, row in _lines(file) if row is not None}
    return [rows[index] for index in sorted(rows)]


def passed_over(path: pathlib.Path) -> list[str]:
    """What `read_rows` says nothing of: whole lines that are no rows, and rows beside another one of the same input that differ from it."""
    kept, found = {row["index"]: row for row in read_rows(path)}, []
    for file in sorted(path.glob("part-*.jsonl")):
        for number, row in _lines(file):
            if row is None:
                found.append(f"{file.name}, line {number}: this is no row; delete the line and repeat the run")
            elif _timeless(row) != _timeless(kept.get(row["index"], row)):  # written just now, if it is not there
                found.append(f"input {row['index']}: {file.name}, line {number}, is another row of it than the one that counts; delete the wrong one")
    return found


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """The file is there whole, or as it was before."""
    with writing(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


@contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """While this file or folder is written. Raises CertifyError, in place of what the system says of the temporary files in between."""
    try:
        yield
    except OSError as error:
        lacking = f"there is no folder {path.parent}; make it first, or" if not path.parent.is_dir() else f"{error.strerror or error}; see to that, or"
        raise CertifyError(f"{path}: this cannot be written, {lacking} choose another place") from error


def _lines(file: pathlib.Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The number of every whole line, and its row; None where it has none."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        yield from ((number, _row(line)) for number, line in enumerate(stream, 1) if line.endswith("\n"))


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("index")) is int else None


def _timeless(row: Row) -> str:
    """A row without what another one of the same input may differ in."""
    return json.dumps({key: value for key, value in row.items() if key not in _TIMES})


def _claim(path: pathlib.Path, manifest: Manifest) -> tuple[dict[str, Any], ExitStack]:
    """The manifest in force, and its file, with a lock that says that a run of these settings is at work. Raises OtherRun for a folder of other settings."""
    file, difference = path / "manifest.json", None
    for _ in range(_TRIES):
        _create(file, manifest)
        with ExitStack() as held, suppress(FileNotFoundError):  # somebody deleted it
            open_file, found = held.enter_context(file.open("rb")), read_manifest(path)
            difference = _difference_of(found, manifest)
            if difference is None and _lock(open_file, exclusive=False) and _is_at(file, open_file):
                return found, held.pop_all()
            open_file.close()
            if difference is not None and not ("argv" in found and _taken_over(path, manifest)):
                raise OtherRun(_refusal(path, difference))
        time.sleep(_WAIT)
    started = f"was started with {difference}, and" if difference else "is about to be that of other settings:"
    raise OtherRun(f"{path}: the folder {started} another process is at work in it; wait for its end, or choose another -o")


def _refusal(path: pathlib.Path, difference: str) -> str:
    return f"{path}: the folder was started with {difference}; choose another -o, or repeat the command that made it"


def _create(file: pathlib.Path, manifest: Manifest, replace: bool = False) -> None:
    """Write the manifest whole or not at all; one that is there already stays, unless it is to be replaced."""
    if file.exists() and not replace:
        return
    temporary = file.with_name(f".manifest.{uuid.uuid4().hex}")
    with writing(file):
        try:
            temporary.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
            if replace:
                os.replace(temporary, file)
            else:
                os.link(temporary, file)
        except FileExistsError:
            pass  # another process was first
        finally:
            temporary.unlink(missing_ok=True)


def _taken_over(path: pathlib.Path, manifest: Manifest) -> bool:
    """Put the manifest in the place of another run's that has no rows; False where it has, or may not. Leaves it while another process does that or is at work.

    Who writes rows holds a shared lock on the manifest that they are of, from before the first of them; this needs the only one.
    """
    file = path / "manifest.json"
    if not _without_rows(path):
        return False
    try:
        with file.open("r+b") as held:
            if _lock(held, exclusive=True) and _is_at(file, held):
                if not _without_rows(path):
                    return False
                _create(file, manifest, replace=True)
    except PermissionError:
        return False
    return True


def _without_rows(path: pathlib.Path) -> bool:
    """Whether there is nothing of a run but its manifest, and perhaps a line that a killed process left."""
    return not (path / "results.jsonl").exists() and not any(True for file in path.glob("part-*.jsonl") for _ in _lines(file))


def _lock(file: IO[bytes], exclusive: bool) -> bool:
    """Whether the file is locked now, until it is closed or its process ends. Where there are no locks nobody can have one alone, and all others go without."""
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return not exclusive
    return True


def _is_at(path: pathlib.Path, file: IO[bytes]) -> bool:
    """Whether what is open is still what the path names."""
    return os.path.samestat(os.stat(path), os.fstat(file.fileno()))


def _difference_of(found: Manifest, manifest: Manifest) -> str | None:
    """What makes two manifests those of two runs, in words; None: nothing."""
    was, now = identity(found), identity(json.loads(json.dumps(manifest)))
    for key in IDENTITY:
        if not _alike(was[key], now[key]):
            before, here = _difference(was[key], now[key])
            return f"{key} {before}, now it is {here}"
    return None


def _function_in(text: str) -> str | None:
    """`make` of `./file.py:make`; nothing of a path."""
    place, _, name = text.rpartition(":")
    return name if place and name.isidentifier() else None


def _alike(was: Any, now: Any) -> bool:
    """Whether two settings are one. A constant that is proved again on another machine may differ in its last digits."""
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() == now.keys() and all(_alike(was[key], now[key]) for key in was)
    return bool(was == now) or (isinstance(was, float) and isinstance(now, float) and math.isclose(was, now, rel_tol=_CLOSE))


def _rounded(value: Any) -> Any:
    """Plain data with the floats as far as two machines agree on them."""
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return float(f"{value:.8g}") if isinstance(value, float) else [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def _difference(was: Any, now: Any) -> tuple[str, str]:
    """The parts of two values that differ, short enough for a sentence."""
    if isinstance(was, dict) and isinstance(now, Mapping):
        keys = [key for key in {**was, **now} if not _alike(was.get(key), now.get(key))][:1]
        was, now = {key: was.get(key) for key in keys}, {key: now.get(key) for key in keys}
    return _short(was), _short(now)


def _short(value: Any) -> str:
    """Of a list its length too: two selections may differ far from where they begin."""
    text = f"{len(value)} of them, {', '.join(map(str, value[:4]))}{', ...' if len(value) > 4 else ''}" if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
