"""Chooses the packed rows of a micro-batch where a recipe leaves their number open."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1s_jax.config import Config
from r1s_jax.learning.learner import Learner, LearnerState
from r1s_jax.learning.packing import PackedBatch
from r1s_jax.models.sharding import BATCH_AXES, batch_shards, replicated
from r1s_jax.system.console import console
from r1s_jax.system.distributed import gather, together

_MARGIN = 0.9  # usable share of a device's memory


def micro_batch_rows(config: Config, learner: Learner, state: LearnerState, sequences: int) -> int:
    """Rows of one forward and backward pass on each data shard, for `sequences` an update.

    Returns `optimizer.micro_batch_rows`; if that is 0, the largest useful number with which the
    update fits in memory, as the compiler reports it, and logs the choice.
    """
    if config.optimizer.micro_batch_rows:
        return config.optimizer.micro_batch_rows
    rows = most_rows(config, sequences, batch_shards(learner.mesh))
    # The process with the least memory decides, because all must run the same program.
    limit, needed = _MARGIN * min(gather(_memory(learner))), 0.0

    def most_needed(rows: int) -> float:
        return max(gather(together(lambda: _bytes(config, learner, state, sequences, rows))))

    while rows > 1 and (needed := most_needed(rows)) > limit:
        rows //= 2
    size = f" (the update takes {needed / 2**30:.1f} GiB)" if needed else ""
    console.print(f"optimizer.micro_batch_rows: {rows} rows at a time{size}")
    return rows


def most_rows(config: Config, sequences: int, shards: int) -> int:
    """The largest useful number: a power of two, at most an eighth of the longest batch's rows.

    More rows a pass read the weights less often, but leave more of the last pass empty.
    """
    tokens = sequences * config.rollout.max_length
    rows = tokens // (config.optimizer.pack_length or config.rollout.max_length) // shards
    return 1 << max(0, (rows // 8).bit_length() - 1)


def packed_shapes(
    learner: Learner, sequences: int, rows: int, length: int
) -> PackedBatch[jax.ShapeDtypeStruct]:
    """Shapes of an update's batch: `rows` rows of `length` tokens a data shard and pass."""
    rows *= batch_shards(learner.mesh)
    shape = (-(-sequences // rows), rows, length)
    sharding = NamedSharding(learner.mesh, P(None, BATCH_AXES))
    integers = ("tokens", "segment_ids", "positions", "last_query")
    return PackedBatch(
        **{
            name: jax.ShapeDtypeStruct(
                shape, jnp.int32 if name in integers else jnp.float32, sharding=sharding
            )
            for name in PackedBatch._fields
        }
    )


def _bytes(
    config: Config, learner: Learner, state: LearnerState, sequences: int, rows: int
) -> float:
    """Bytes of the update on a device, state included; infinite where its memory is exhausted."""
    length = config.optimizer.pack_length or config.rollout.max_length
    batch = packed_shapes(learner, sequences, rows, length)
    scalar = [
        jax.ShapeDtypeStruct((), dtype, sharding=replicated(learner.mesh))
        for dtype in (jnp.int32, jnp.float32)
    ]
    try:
        memory = learner.lower(state, batch, *scalar).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return np.inf
    assert memory is not None  # every backend that trains reports it
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _memory(learner: Learner) -> float:
    """Bytes of memory of one device; a device without a limit has its share of the host's."""
    device = learner.mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    return psutil.virtual_memory().total / len(learner.mesh.local_devices)
