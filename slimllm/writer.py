"""Writing a checkpoint shard by shard, beside its final place, and renaming it into place when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file

from slimllm.errors import InputError


def check_destination(out: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuse a destination that would cost the user data, or could not be moved into place at the end.

    Args:
        out: The folder to make, resolved.
        inputs: What the run reads: the model, the calibration text.
        overwrite: Whether a model in `out` may be replaced.

    Raises:
        ValueError: (as InputError) `out` is or holds an input, is a file, a mount point or the current directory, is not
            empty without `overwrite`, or is a folder that does not look like a model's with it.
    """
    for source in (path.resolve() for path in inputs):
        if out == source or out in source.parents or source in out.parents:
            raise InputError(
                f"The output folder {out} is, contains or lies in {source}, which is read; give another folder."
            )
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"The output folder {out} cannot be made: {parent} is no folder that can be written to.")
    if out.exists() and not out.is_dir():
        raise InputError(f"The output {out} is a file; give a folder that does not exist yet.")
    if os.path.ismount(out) or out == Path.cwd():
        raise InputError(f"The output folder {out} is a mount point or the current directory; give a folder inside it.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise InputError(f"The output folder {out} is not empty; give another one, or --overwrite to replace it.")
        if not (out / "config.json").is_file() or not any(out.glob("*.safetensors")):
            raise InputError(
                f"The output folder {out} holds no model (config.json and safetensors), so it will not be overwritten."
            )


def check_space(out: Path, num_bytes: int) -> None:
    """Refuse to start when the disk cannot take what will be written.

    Raises:
        ValueError: (as InputError) less space is free than `num_bytes`.
    """
    parent = next(folder for folder in [out, *out.parents] if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise InputError(
            f"The pruned model needs up to {num_bytes / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free at {parent}."
        )


class CheckpointWriter:
    """A context manager: the folder `out` appears, complete, when the block ends without an error, and not before.

    Args:
        out: The folder to make, resolved.
        num_shards: How many shards will be written.
        overwrite: Whether a model in `out` may be replaced.
    """

    def __init__(self, out: Path, num_shards: int, overwrite: bool) -> None:
        self.out, self._num_shards, self._overwrite = out, num_shards, overwrite
        self._weight_map: dict[str, str] = {}
        self._total_size = 0
        self.num_parameters = 0

    def __enter__(self) -> CheckpointWriter:
        parent = self.out.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.partial-", dir=parent))
        except OSError as error:
            raise InputError(f"The output folder {self.out} cannot be made: {error.strerror}.") from None
        self.folder.chmod(0o777 & ~_umask())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"Writing to {self.out.parent} failed: {error}.") from error

    def write_shard(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write the shard `number` (from 1) with these tensors, under their full names."""
        name = f"model-{number:05d}-of-{self._num_shards:05d}.safetensors"
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            save_file(contiguous, self.folder / name, metadata={"format": "pt"})
        except Exception as error:
            # safetensors raises its own type for a full disk.
            raise InputError(f"Writing {name} to {self.folder.parent} failed: {error}.") from error
        (self.folder / name).chmod(0o666 & ~_umask())
        for key, tensor in contiguous.items():
            self._weight_map[key] = name
            self._total_size += tensor.numel() * tensor.element_size()
            self.num_parameters += tensor.numel()

    def finish(self) -> None:
        """Write the index and move the folder to its final place."""
        index = {
            "metadata": {"total_size": self._total_size, "total_parameters": self.num_parameters},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        # Once more: the run took a while, and somebody else may have put something there.
        check_destination(self.out, [], self._overwrite)
        if not self.out.exists() or not any(self.out.iterdir()):
            if self.out.exists():
                self.out.rmdir()
            os.rename(self.folder, self.out)
            return
        replaced = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.replaced-", dir=self.out.parent))
        os.rename(self.out, replaced / "old")
        try:
            os.rename(self.folder, self.out)
        except OSError:
            os.rename(replaced / "old", self.out)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
