"""Destination of a result: checks of what may be created there, and of what may be replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from slimllm.checkpoints.companions import companions
from slimllm.checkpoints.folder import INDEX
from slimllm.checkpoints.foreign_json import find_object
from slimllm.errors import InputError

# The index lists the files of a result under this key. Earlier versions, without it, wrote `_EARLIER` and the companions.
OURS = "slimllm_files"
_EARLIER = re.compile(
    r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json|config\.json|README\.md|report\.json|finetune\.json"
    r"|(modeling|configuration)_slim_\w+\.py|slim_layers\.py"
)
# Files that `write_page` adds.
_PAGE = re.compile(r"report\.html|report/(shares|heads|importance|errors|seconds|memory|training)\.png")
_UNFINISHED_PAGE = re.compile(r"\.report-[a-z0-9_]{8}")  # as tempfile names it
_LONGEST_NAME = 200  # bytes; the partial folder beside it has a longer name, and file systems allow 255


def destination(out: str | Path) -> Path:
    """Resolve the path of an output.

    Raises:
        ValueError: (as InputError) no file or folder of that name can be created.
    """
    try:
        path = Path(out).expanduser().resolve()
        name = os.fsencode(path.name)
        if name and len(name) <= _LONGEST_NAME:
            path.exists()
            return path
    except (ValueError, OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"The output {str(out)[:80]!r} cannot be made ({reason}); give another name.") from None
    if not name:
        raise InputError(f"The output folder {path} is the root of the file system; give a folder inside it.")
    raise InputError(
        f"The name of the output, {path.name[:40]}…, has {len(name)} bytes; give a name of at most {_LONGEST_NAME}."
    )


def check_new_file(path: Path | None) -> None:
    """Raise ValueError (as InputError) if a results file exists already, or its folder does not; None: no file."""
    if path is not None and path.exists():
        raise InputError(f"{path} exists already; give the name of a new file.")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent} for {path.name}; create it, or give another.")


def check_destination(out: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raise if writing to a destination would lose the user's data, or the result could not be moved there at the end.

    Args:
        out: The folder to create, resolved.
        inputs: Paths that the run reads: the model, the calibration text.
        overwrite: Whether a model in `out` may be replaced.

    Raises:
        ValueError: (as InputError) `out` is, contains or lies in an input; it cannot be created; it is a file, a mount
            point or the current directory; it is not empty and `overwrite` is not set; or, with `overwrite`, it has no
            model written by slimllm, or other files besides.
    """
    for source in (path.resolve() for path in inputs):
        if out == source or out in source.parents or source in out.parents:
            raise InputError(
                f"The output folder {out} is, contains or lies in {source}, which the run reads; give another folder."
            )
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"The output folder {out} cannot be made: {parent} is not a folder that can be written to.")
    if out.exists() and not out.is_dir():
        raise InputError(f"The output {out} is a file; give a folder that does not exist yet.")
    if os.path.ismount(out) or out == Path.cwd():
        raise InputError(f"The output folder {out} is a mount point or the current directory; give a folder inside it.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(
                f"The output folder {out} is not empty; give another one, or --overwrite (in Python, overwrite=True) to "
                "replace it."
            )
        ours = _files_of(out)
        if ours is None:
            raise InputError(
                f"The output folder {out} holds no model that slimllm has written, so it will not be overwritten."
            )
        if strangers := sorted(name for name in _contents(out) if not _is_ours(out, name, ours)):
            others = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            raise InputError(
                f"The output folder {out} holds {strangers[0]}{others}, which slimllm has not written and does not delete; "
                "move it elsewhere, or give another folder."
            )


def adopt(out: Path, name: str) -> None:
    """List a file that was added to a result later as one of the result's, so that it is replaced with it."""
    index = find_object(out / INDEX)
    index["metadata"][OURS] = sorted({*index["metadata"][OURS], name})
    beside = out / f".{INDEX}"
    beside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, out / INDEX)


def is_ours(out: Path, name: str) -> bool:
    """Return whether a file in a folder is one that slimllm has written there."""
    return name in (_files_of(out) or ())


def _files_of(out: Path) -> set[str] | None:
    """Return the files of the model that slimllm has written to a folder; None if there is no such model."""
    metadata = find_object(out / INDEX).get("metadata")
    listed = metadata.get(OURS) if isinstance(metadata, dict) else None
    if isinstance(listed, list):
        return {name for name in listed if isinstance(name, str)}
    if "achieved_ratio" not in find_object(out / "report.json"):
        return None
    own = {path.name for path in out.iterdir() if _EARLIER.fullmatch(path.name)}
    return own | {path.as_posix() for path in companions(out)}


def _is_ours(out: Path, name: str, ours: set[str]) -> bool:
    """Return whether an entry of `_contents` may be deleted; a folder may not, whatever the index lists."""
    return (out / name).is_file() and (name in ours or _PAGE.fullmatch(name) is not None)


def _contents(out: Path) -> set[str]:
    """Return the entries of a folder by relative name; a visible, non-empty sub-folder is replaced by its own entries."""
    found = set()
    for path in out.iterdir():
        if _UNFINISHED_PAGE.fullmatch(path.name):
            continue
        inner = [] if path.is_symlink() or not path.is_dir() or path.name.startswith(".") else list(path.iterdir())
        found |= {f"{path.name}/{one.name}" for one in inner} or {path.name}
    return found


def check_space(out: Path, num_bytes: int) -> None:
    """Raise if the output does not fit on the disk.

    Raises:
        ValueError: (as InputError) less than `num_bytes` is free.
    """
    parent = next(folder for folder in [out, *out.parents] if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise InputError(
            f"The result needs up to {num_bytes / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free at {parent}."
        )
