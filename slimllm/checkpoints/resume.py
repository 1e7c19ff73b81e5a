"""Completed steps of a run, which the first rank keeps in the journal and all ranks know, and the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from slimllm.checkpoints.journal import Journal, Step
from slimllm.errors import InputError
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import State, Stream


class Record:
    """Completed steps of a run, on every rank.

    Args:
        journal: The journal on the first rank; None on the others.
        ranks: The processes of the run.

    Attributes:
        steps: Steps completed before an interruption, oldest first.
    """

    def __init__(self, journal: Journal | None, ranks: Ranks) -> None:
        self._journal, self._ranks = journal, ranks
        self.steps: list[Step] = ranks.tell(journal.steps if journal else None)

    def done(self, stage: str) -> list[Step]:
        """Return the completed steps of a stage."""
        return [step for step in self.steps if step["stage"] == stage]

    def adopt(self, stage: str, steps: list[Step], data: Step) -> None:
        """Add steps that another run has done for this one as well."""
        if self._journal:
            self._journal.adopt(stage, steps, data)

    def add(self, stage: str, stream: Stream, final: torch.Tensor | None = None, **data: Any) -> None:
        """Record a step that is done, and which the residual stream has passed.

        Args:
            stage: The step's stage.
            stream: The residual stream; the first rank gathers that of all ranks if the disk is ready for it.
            final: Another tensor that a resumed run needs, on the CPU; the first rank's is kept.
            data: Plain JSON data about the step.

        Raises:
            ValueError: (as OutputError) this step or an earlier one could not be written.
        """
        ready = self._ranks.tell(self._journal.ready if self._journal else None)
        windows = gathered(stream) if ready else iter(())
        with self._ranks.together():  # all ranks communicate in it, until the last window
            try:
                if self._journal:
                    extra = {} if final is None else {"final": (tuple(final.shape), final.dtype)}
                    layout = {"hidden": (stream.whole_shape, stream[0].hidden.dtype)} | extra
                    pieces = _and_then(windows, final)
                    self._journal.record(stage, State(layout, pieces) if ready else None, **data)
            finally:
                for _ in windows:  # the other ranks send theirs even if writing has failed
                    pass

    def restore(self, stream: Stream, any_windows: bool = False) -> torch.Tensor | None:
        """Restore the residual stream after the last step, and return `final` on the first rank.

        Args:
            stream: The residual stream; it is overwritten.
            any_windows: Whether it may have been recorded with another number of windows, because other ranks had some to
                themselves. The first windows and those held out are then the same, and further ones do not matter.

        Raises:
            ValueError: (as InputError) the state is missing or damaged, or has another number of windows.
        """
        state: Any = None
        with self._ranks.together():
            if self._journal:
                state = self._journal.state()
        stored = state.get_slice("hidden") if state else None
        samples = stream.samples
        with self._ranks.together():
            if stored is not None:
                samples = stored.get_shape()[0] - stream.num_held_out
                if samples != stream.samples and not any_windows:
                    raise InputError(
                        f"The interrupted run passed {samples} windows through the model, this one would pass "
                        f"{stream.samples}; give as many processes as before."
                    )
        for rank, windows, batch in stream.of_all_ranks():
            if stored is not None:
                held_out = windows.start >= stream.samples
                places = [one - stream.samples + samples if held_out else min(one, samples - 1) for one in windows]
                piece = torch.cat([stored[place : place + 1] for place in places])
                if batch is None:
                    self._ranks.send(rank, piece)
                else:
                    batch.hidden.save(piece)
            elif batch is not None:
                batch.hidden.save(self._ranks.receive(0, batch.hidden.shape, batch.hidden.dtype))
        if state and "final" in state.keys():
            return state.get_tensor("final").clone()
        return None

    def compare_weights(self, checksum: Callable[[int], int]) -> None:
        """Raise if the first layers' weights differ from those whose checksums the dense pass has recorded.

        Args:
            checksum: Returns the checksum of a layer, by its index; every rank checks its share of the layers.

        Raises:
            ValueError: (as InputError) a layer has other weights.
        """
        done = self.done("dense")
        with self._ranks.together():
            for index in self._ranks.share(len(done)):
                if done[index]["weights"] != checksum(index):
                    raise InputError(
                        f"Layer {index} has other weights than when the run started; give the same model, or start over."
                    )


def gathered(stream: Stream) -> Iterator[torch.Tensor]:
    """Yield the hidden states of all ranks, batch by batch in order, on the first rank's CPU; the other ranks send theirs.

    Every rank has to exhaust the iterator.
    """
    for rank, windows, batch in stream.of_all_ranks():
        if batch is None and stream.ranks.first:
            first = stream[0].hidden
            yield stream.ranks.receive(rank, (len(windows), *first.shape[1:]), first.dtype)
        elif batch is not None and stream.ranks.first:
            yield batch.hidden.stored().cpu()
            batch.hidden.release()
        elif batch is not None:
            stream.ranks.send(0, batch.hidden.stored())
            batch.hidden.release()


def _and_then(pieces: Iterable[torch.Tensor], last: torch.Tensor | None) -> Iterator[torch.Tensor]:
    yield from pieces
    if last is not None:
        yield last
