"""Scalars for TensorBoard.

The writer of tensorboardX is not used: its thread waits by the wall clock, and a clock that is set
back by weeks ends it; then its full queue holds up the run.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

# protobuf makes the classes of messages when they are imported.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from r1s_jax.io.text import is_whole_number


class Board:
    """One file of events in `folder`; a resumed run begins another.

    `first` is the first step to come: what files before this one hold of it and of later steps,
    which an interrupted run wrote and did not save, TensorBoard leaves out.
    """

    def __init__(self, folder: Path, first: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        stamps = [p.name.split(".")[3] for p in folder.glob("events.out.tfevents.*")]
        used = [int(stamp) + 1 for stamp in stamps if is_whole_number(stamp)]
        begun = max([int(time.time()), *used])
        name = f"events.out.tfevents.{begun:010d}.{socket.gethostname()}"
        self._records = RecordWriter(str(folder / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers of a step, which are on the disk when this returns."""
        told = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=told)))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
