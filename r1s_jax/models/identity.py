"""The identity of a policy by its content: a name may refer to another policy later."""

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from r1s_jax.models.pretrained import Pretrained

_PIECE = 1 << 26  # bytes


def policy_digest(policy: Pretrained) -> str:
    """SHA-256 of all that determines a policy's output: its architecture, vocabulary, end-of-text
    ids, and every parameter as it was loaded.

    A checkpoint and its export have one digest where both are loaded in one dtype. All cores hash
    pieces of the arrays in parallel, in less time than loading them takes.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(policy.params)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = [_digest_of(array, pool) for _, array in named]
    names = [jax.tree_util.keystr(path) for path, _ in named]
    # The adapters are merged: their rank no longer matters.
    model = dataclasses.asdict(policy.model.with_lora(0, 0.0))
    vocabulary = sorted(policy.tokenizer.get_vocab().items())
    described = [model, list(policy.eos_ids), vocabulary, list(zip(names, arrays, strict=True))]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _digest_of(array: Any, pool: ThreadPoolExecutor) -> list[str]:
    """The dtype and shape of an array, and the digest of each of its pieces."""
    array = np.ascontiguousarray(array)
    data = array.reshape(-1).view(np.uint8)
    pieces = (data[start : start + _PIECE] for start in range(0, data.size, _PIECE))
    digests = pool.map(lambda piece: hashlib.sha256(piece).hexdigest(), pieces)
    return [f"{array.dtype} {array.shape}", *digests]
