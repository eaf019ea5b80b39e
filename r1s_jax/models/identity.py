"""What a policy is by its content: the same name may hold another one tomorrow."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from r1s_jax.models.pretrained import Pretrained


def policy_digest(policy: Pretrained) -> str:
    """A SHA-256 of all that decides what a policy says: its architecture, vocabulary, ends of a
    text, and every parameter as it was loaded.

    A checkpoint and its export have one digest where both are loaded in one dtype. Arrays are
    hashed beside each other: for a 7B model in bfloat16 that takes seconds, less than loading it.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(policy.params)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_array_digest, (leaf for _, leaf in named)))
    names = [jax.tree_util.keystr(path) for path, _ in named]
    # How wide adapters were that are merged by now changes nothing.
    model = dataclasses.asdict(policy.model.with_lora(0, 0.0))
    vocabulary = sorted(policy.tokenizer.get_vocab().items())
    described = [model, list(policy.eos_ids), vocabulary, list(zip(names, digests, strict=True))]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _array_digest(array: Any) -> str:
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
