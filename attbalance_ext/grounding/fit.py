"""The loop around one or several trainers: turns, progress bars, Ctrl-C."""

from __future__ import annotations

import errno
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from rich.progress import Progress

from attbalance_ext.grounding.errors import NotWritten, TrainingFailed, UserError
from attbalance_ext.grounding.memory import ran_out
from attbalance_ext.grounding.progress import progress_bars
from attbalance_ext.grounding.train import Trainer

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
"""In this process, in all of them."""


class StopRequest(threading.Event):
    """Set by a signal."""

    number = signal.SIGTERM
    """Which signal; where another process of the run got one, SIGTERM."""

    @property
    def exit_code(self) -> int:
        """What a shell says of a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class Interrupted(Exception):
    """Training was stopped by Ctrl-C or SIGTERM after every trainer had saved its checkpoint."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"stopped by signal {exit_code - 128}")
        self.exit_code = exit_code


def fit(trainers: Mapping[str, Trainer], *, show: bool = True, after_step: Callable[[], object] | None = None) -> None:
    """Train until every trainer is finished; several take turns, one step each, first one then the other first.

    ``show``: a progress bar for each. ``after_step``: called after every turn.

    Taking turns makes their times comparable: whatever else the machine does meets all of them alike. Ctrl-C lets
    the current step end, saves a checkpoint for each trainer and raises :class:`Interrupted`; a second Ctrl-C stops
    at once, and the checkpoint before it stays whole.
    """
    try:
        main = all(trainer.ranks.main for trainer in trainers.values())
        with progress_bars(show=show and main) as progress, stop_requested() as stop:
            _take_turns(trainers, progress, stop, after_step or (lambda: None))
    except Exception as error:
        said = _told(error)
        if said is None:
            raise
        states = ". ".join(trainer.last_good() for trainer in trainers.values())
        raise TrainingFailed(f"{said}. {states}") from error
    finally:
        for trainer in trainers.values():
            trainer.log.close()
            trainer.held.close()


def _told(error: Exception) -> str | None:
    """What the machine lacked, and what to do about it; None: it is something else."""
    said = str(error)
    if isinstance(error, UserError | TrainingFailed | NotWritten):
        return None
    if "DataLoader worker (pid" in said:  # PyTorch raises it wherever this process happens to be
        return f"a process that reads images has died ({said}). Where memory ran out, fewer workers need less"
    if re.match(r"Caught \w+ in DataLoader worker process", said.strip("'\"")):  # with the traceback of that process
        return f"a process that reads images has failed: {said.strip().splitlines()[-1]}"
    if ran_out(error):
        first = said.strip().partition("\n")[0]
        return (
            f"memory ran out ({first or type(error).__name__}). A new run needs less with a larger --accumulate, which "
            "cuts the same batch into more parts, or with a smaller --batch-size"
        )
    if "Too many open files" in said or (isinstance(error, OSError) and error.errno in TOO_MANY_FILES):
        return f"too many open files ({said.splitlines()[0]}): fewer --workers need fewer, 'ulimit -n' allows more"
    return None


def _take_turns(
    trainers: Mapping[str, Trainer], progress: Progress, stop: StopRequest, after_step: Callable[[], object]
) -> None:
    bars = {
        name: progress.add_task(name, total=trainer.settings.steps, completed=trainer.step, note=_note(trainer))
        for name, trainer in trainers.items()
    }
    turn = list(trainers.items())
    while any(not trainer.finished for trainer in trainers.values()):
        for name, trainer in turn:
            if not trainer.finished:
                trainer.advance()
                progress.update(bars[name], completed=trainer.step, note=_note(trainer))
        turn.reverse()
        after_step()
        # All processes of a run stop after the same step, whoever was asked to.
        if any(trainer.ranks.any(stop.is_set()) for trainer in trainers.values()):
            for trainer in trainers.values():
                trainer.save()
            raise Interrupted(stop.exit_code)


def _note(trainer: Trainer) -> str:
    train, validation = trainer.log.history["train"], trainer.log.history["validation"]
    loss = f"loss {train[-1]['loss']:.3f}" if train else ""
    accuracy = f"  val acc {100 * validation[-1]['acc50']:.1f} %" if validation else ""
    return loss + accuracy


@contextmanager
def stop_requested() -> Iterator[StopRequest]:
    """An event set by SIGINT or SIGTERM. A second Ctrl-C acts as usual; a second SIGTERM asks for the same again, for
    a scheduler and torchrun each send one."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals can only be handled in the main thread
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, _: FrameType | None) -> None:
        if not stop.is_set():
            stop.number = signal.Signals(number)
        stop.set()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
