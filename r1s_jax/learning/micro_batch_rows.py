"""Chooses the packed rows of a micro-batch where a recipe leaves their number open."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1s_jax.config import Config
from r1s_jax.learning.learner import Learner, LearnerState
from r1s_jax.learning.packing import PackedBatch, row_length
from r1s_jax.models.sharding import BATCH_AXES, batch_shards
from r1s_jax.rollout.sampler import kept_width
from r1s_jax.system.console import console, warn
from r1s_jax.system.distributed import gather, together
from r1s_jax.system.memory import host_memory

_MARGIN = 0.9  # usable share of a device's memory
_CPU_TOKENS = 2048  # on a CPU, larger passes take more memory and are not faster


def micro_batch_rows(config: Config, learner: Learner, state: LearnerState, sequences: int) -> int:
    """Rows of one forward and backward pass on each data shard, for `sequences` an update.

    Returns `optimizer.micro_batch_rows`; if that is 0, the largest useful number with which the
    update fits in memory, as the compiler reports it. Logs the choice, and warns where even one row
    does not fit.
    """
    if config.optimizer.micro_batch_rows:
        return config.optimizer.micro_batch_rows
    rows = most_rows(config, sequences, batch_shards(learner.mesh))
    length = row_length(config)
    if learner.mesh.devices.flat[0].platform == "cpu":
        rows = min(rows, _power_of_two(_CPU_TOKENS // length))
    # The process with the least memory decides, because all must run the same program.
    limit = _MARGIN * min(gather(_memory(learner, state)))

    def most_needed(rows: int) -> float:
        return max(gather(together(lambda: _bytes(config, learner, state, sequences, rows))))

    while (needed := most_needed(rows)) > limit and rows > 1:
        rows //= 2
    size = f"{needed / 2**30:.1f} GiB"
    console.print(f"optimizer.micro_batch_rows: {rows} at a time (the update takes {size})")
    if needed > limit:
        warn(
            f"the update takes {size} of memory, and {limit / 2**30:.1f} GiB are free: it may be "
            f"slow or killed. Set policy.remat=full, or optimizer.pack_length below {length}"
        )
    return rows


def most_rows(config: Config, sequences: int, shards: int) -> int:
    """The largest useful number: a power of two, at most an eighth of the longest batch's rows.

    More rows a pass read the weights less often, but leave more of the last pass empty.
    """
    tokens = sequences * config.rollout.max_length
    return _power_of_two(tokens // row_length(config) // shards // 8)


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most `n`, at least 1."""
    return 1 << max(0, n.bit_length() - 1)


def packed_shapes(
    learner: Learner, sequences: int, rows: int, length: int, kept: int = 0
) -> PackedBatch[jax.ShapeDtypeStruct]:
    """Shapes of an update's batch: `rows` rows of `length` tokens a data shard and pass, with room
    for nuclei of `kept` tokens."""
    rows *= batch_shards(learner.mesh)
    shape = (-(-sequences // rows), rows, length)
    sharding = NamedSharding(learner.mesh, P(None, BATCH_AXES))
    integers = ("tokens", "segment_ids", "positions", "last_query", "kept")
    return PackedBatch(
        **{
            name: jax.ShapeDtypeStruct(
                (*shape, kept) if name == "kept" else shape,
                jnp.int32 if name in integers else jnp.float32,
                sharding=sharding,
            )
            for name in PackedBatch._fields
        }
    )


def _bytes(
    config: Config, learner: Learner, state: LearnerState, sequences: int, rows: int
) -> float:
    """Bytes of the update on a device, state included; infinite where its memory is exhausted."""
    kept = kept_width(config.rollout.temperature, config.rollout.top_p)
    batch = packed_shapes(learner, sequences, rows, row_length(config), kept)
    try:
        memory = learner.compile(state, batch).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return np.inf
    assert memory is not None  # every backend that trains reports it
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _memory(learner: Learner, state: LearnerState) -> float:
    """Bytes of memory of one device for an update and its state.

    What else this process holds there, such as a teacher, is not counted. A device without a limit
    has its share of what the host has.
    """
    devices = learner.mesh.local_devices
    stats = devices[0].memory_stats() or {}
    shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards]
    if limit := stats.get("bytes_limit"):
        own = sum(s.data.nbytes for s in shards if s.device == devices[0])
        return limit - max(0, stats.get("bytes_in_use", 0) - own)
    held = psutil.Process().memory_info().rss - sum(s.data.nbytes for s in shards)
    return (host_memory() - max(0, held)) / len(devices)
