"""Scalars for TensorBoard.

The writer of tensorboardX is not used. Its thread waits by the wall clock and ends if the clock is
set back by weeks; then its full queue blocks the run.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

# protobuf creates the classes of messages at import.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from r1s_jax.io.text import is_whole_number


class Board:
    """One file of events in `folder`; a resumed run begins another.

    `first` is the next step. TensorBoard leaves out this step and later ones of older files, which
    an interrupted run wrote and did not save.
    """

    def __init__(self, folder: Path, first: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        stamps = [p.name.split(".")[3] for p in folder.glob("events.out.tfevents.*")]
        used = [int(stamp) + 1 for stamp in stamps if is_whole_number(stamp)]
        stamp = max([int(time.time()), *used])
        name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}"
        self._records = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes numbers of a step, and flushes them."""
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
