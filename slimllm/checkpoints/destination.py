"""The place where a result will go: what may be made there, and what may be replaced."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from slimllm.checkpoints.companions import companions
from slimllm.checkpoints.folder import INDEX
from slimllm.checkpoints.foreign_json import find_object
from slimllm.errors import InputError

# The index lists the files of a result; earlier versions wrote these, beside the companions of the model.
OURS = "slimllm_files"
_EARLIER = re.compile(
    r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json|config\.json|README\.md|report\.json|finetune\.json"
    r"|(modeling|configuration)_slim_\w+\.py|slim_layers\.py"
)
# What `write_page` adds.
_PAGE = re.compile(r"report\.html|report/(shares|heads|importance|errors|seconds|memory|training)\.png")
_UNFINISHED_PAGE = re.compile(r"\.report-[a-z0-9_]{8}")  # as tempfile names it
_LONGEST_NAME = 200  # bytes; what grows beside it has a longer one, and file systems take 255


def destination(out: str | Path) -> Path:
    """Resolve the name of what is to be made.

    Raises:
        ValueError: (as InputError) nothing can be made of that name.
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
        f"The name of the output, {path.name[:40]}…, has {len(name)} bytes; give one of {_LONGEST_NAME} at most."
    )


def check_new_file(path: Path | None) -> None:
    """Raise ValueError (as InputError) where a file of results would replace another or has no folder; None: no file."""
    if path is not None and path.exists():
        raise InputError(f"{path} is there already; give the name of a new file.")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent} for {path.name}; make it, or give another.")


def check_destination(out: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuse a destination that would cost the user data, or could not be moved into place at the end.

    Args:
        out: The folder to make, resolved.
        inputs: What the run reads: the model, the calibration text.
        overwrite: Whether a model in `out` may be replaced.

    Raises:
        ValueError: (as InputError) `out` is or holds an input, is a file, a mount point or the current directory, is not
            empty without `overwrite`, or with it is a folder that slimllm has not written, or holds more than that.
    """
    for source in (path.resolve() for path in inputs):
        if out == source or out in source.parents or source in out.parents:
            raise InputError(
                f"The output folder {out} is, contains or lies in {source}, which is read; give another folder."
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
                "move that away, or give another folder."
            )


def _files_of(out: Path) -> set[str] | None:
    """The files of the model in a folder as slimllm has written it; None: it has not."""
    metadata = find_object(out / INDEX).get("metadata")
    listed = metadata.get(OURS) if isinstance(metadata, dict) else None
    if isinstance(listed, list):
        return {name for name in listed if isinstance(name, str)}
    if "achieved_ratio" not in find_object(out / "report.json"):
        return None
    own = {path.name for path in out.iterdir() if _EARLIER.fullmatch(path.name)}
    return own | {path.as_posix() for path in companions(out)}


def _is_ours(out: Path, name: str, ours: set[str]) -> bool:
    """Tell whether an entry of `_contents` may be deleted; a folder may not, whatever the index lists."""
    return (out / name).is_file() and (name in ours or _PAGE.fullmatch(name) is not None)


def _contents(out: Path) -> set[str]:
    """All files of a folder by their names in it, and links and folders that are empty or hidden as one each."""
    found = set()
    for path in out.iterdir():
        if _UNFINISHED_PAGE.fullmatch(path.name):
            continue
        inner = [] if path.is_symlink() or not path.is_dir() or path.name.startswith(".") else list(path.iterdir())
        found |= {f"{path.name}/{one.name}" for one in inner} or {path.name}
    return found


def check_space(out: Path, num_bytes: int) -> None:
    """Refuse to start when the disk cannot take what will be written.

    Raises:
        ValueError: (as InputError) less space is free than `num_bytes`.
    """
    parent = next(folder for folder in [out, *out.parents] if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise InputError(
            f"The result needs up to {num_bytes / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free at {parent}."
        )
