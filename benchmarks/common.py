"""Shared by the benchmarks: wall-clock time, memory, and the same weights in PyTorch."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from r1s_jax.config import ModelConfig
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.weights import save_params


def random_tokens(model: ModelConfig, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(100, model.vocab_size, shape, np.int32)


def seconds_of(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def peak_memory_gb() -> float:
    """Peak memory on the accelerator, or of this process without one; in GB (1e9 bytes)."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 1e9


def torch_model(p: Pretrained) -> Any:
    """The same weights in `transformers`, on JAX's device: the same number of CPU threads, or the
    same GPU with TF32 products. None without PyTorch.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    torch.set_num_threads(psutil.cpu_count(logical=True) or 1)
    with tempfile.TemporaryDirectory() as folder:
        path = save_params(p.params, p.model, Path(folder, "model"), dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if jax.default_backend() != "gpu":
        return model
    torch.set_float32_matmul_precision("high")  # TF32, JAX's default on GPUs
    return model.to("cuda")


def synchronized(action: Callable[[], Any]) -> Callable[[], None]:
    """A PyTorch `action` that returns only after its GPU has finished."""
    import torch

    def run() -> None:
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run
