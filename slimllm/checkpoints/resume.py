"""What is done of a run: the first rank keeps it in the journal, and all know it. With it goes the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from slimllm.checkpoints.journal import Journal, Step
from slimllm.errors import InputError
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import State, Stream


class Record:
    """The steps that are done, on every rank.

    Args:
        journal: Where the first rank keeps them; None on the others.
        ranks: The processes of the run.

    Attributes:
        steps: What was done before an interruption, oldest first.
    """

    def __init__(self, journal: Journal | None, ranks: Ranks) -> None:
        self._journal, self._ranks = journal, ranks
        self.steps: list[Step] = ranks.tell(journal.steps if journal else None)

    def done(self, stage: str) -> list[Step]:
        """Those steps of a stage."""
        return [step for step in self.steps if step["stage"] == stage]

    def adopt(self, stage: str, steps: list[Step], data: Step) -> None:
        """Steps that another run has done for this one, too."""
        if self._journal:
            self._journal.adopt(stage, steps, data)

    def add(self, stage: str, stream: Stream, final: torch.Tensor | None = None, **data: Any) -> None:
        """A step is done, and the residual stream has passed it.

        Args:
            stage: The stage it belongs to.
            stream: The residual stream of all ranks; gathered by the first one where the disk is ready for it.
            final: What else a resumed run needs, a tensor on the CPU; the first rank's is kept.
            data: Plain JSON data about the step.

        Raises:
            ValueError: (as OutputError) the disk did not take this step or one before.
        """
        ready = self._ranks.tell(self._journal.ready if self._journal else None)
        windows = gathered(stream) if ready else iter(())
        with self._ranks.together():  # they talk in it, and all of them until the last window
            try:
                if self._journal:
                    extra = {} if final is None else {"final": (tuple(final.shape), final.dtype)}
                    layout = {"hidden": (stream.whole_shape, stream[0].hidden.dtype)} | extra
                    pieces = _and_then(windows, final)
                    self._journal.record(stage, State(layout, pieces) if ready else None, **data)
            finally:
                for _ in windows:  # the others send theirs, whatever became of those before
                    pass

    def restore(self, stream: Stream) -> torch.Tensor | None:
        """Put the residual stream back to where it was after the last step, and give `final`, on the first rank.

        Raises:
            ValueError: (as InputError) the state is missing or damaged.
        """
        state: Any = None
        with self._ranks.together():
            if self._journal:
                state = self._journal.state()
        stored = state.get_slice("hidden") if state else None
        for rank, windows, batch in stream.of_all_ranks():
            if stored is not None:
                piece = stored[windows.start : windows.stop]
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
        """Whether the first layers' weights are those of which the dense pass has recorded the checksums.

        Args:
            checksum: A layer's, by its index; every rank looks at its share of them.

        Raises:
            ValueError: (as InputError) a layer has others.
        """
        done = self.done("dense")
        with self._ranks.together():
            for index in self._ranks.share(len(done)):
                if done[index]["weights"] != checksum(index):
                    raise InputError(
                        f"Layer {index} has other weights than when the run was begun; give the same model, or start over."
                    )


def gathered(stream: Stream) -> Iterator[torch.Tensor]:
    """The hidden states of all ranks, batch by batch in their order, on the first one's CPU; the others send theirs.

    It has to be gone through to the end on every rank.
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
