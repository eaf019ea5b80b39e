"""Reading GGUF files: metadata, configuration and dequantised tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from r1s_jax.config import ModelConfig, RopeScaling
from r1s_jax.io.errors import ConfigError, UserError, reading
from r1s_jax.models.decoder import rope_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_REQUIRED = object()


class WeightsError(UserError, ValueError):
    """A model file that is missing, damaged, or inconsistent with its configuration."""


def gguf_in(path: str | Path) -> Path | None:
    """The GGUF file that `path` refers to; None when it is a Hugging Face directory.

    A directory with one .gguf file and no config.json refers to that file. Raises WeightsError
    for a path that does not exist and for a directory with several GGUF files.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: there is no such file or directory")
    if path.is_file():
        return path
    if (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(f.name for f in files)
        raise WeightsError(f"{path} holds several GGUF files: name one of {names}")
    return files[0] if files else None


def open_gguf(path: str | Path) -> "GGUFFile":
    """The file at `path`. Its header, slow to parse, is kept until the file changes."""
    path = Path(path)
    status = path.stat()
    return _open_gguf(path.resolve(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _open_gguf(path: Path, modified_ns: int, size: int) -> "GGUFFile":
    return GGUFFile(path)


class GGUFFile:
    """One GGUF file, memory-mapped; tensors are read one by one, in HF layout."""

    def __init__(self, path: Path):
        """Raises WeightsError for a file that is no GGUF, truncated, or of an unknown model."""
        self.path = path
        size = path.stat().st_size
        with reading(f"{path} ({size} bytes) is no GGUF file or is truncated: it", WeightsError):
            self._reader = GGUFReader(path)
        parts = self.metadata("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise WeightsError(
                f"{path} is one of {parts} parts; merge them first: llama-gguf-split --merge"
            )
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = self.metadata("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise WeightsError(
                f"{path}: architecture {self.architecture!r} is not supported; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )

    def metadata(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`, lists as Python lists. Raises WeightsError where one is required."""
        field = self._reader.get_field(key)
        if field is not None:
            with reading(f"{self.path}: metadata {key!r}", WeightsError):
                return field.contents()
        if default is _REQUIRED:
            raise WeightsError(f"{self.path}: the metadata has no {key!r}")
        return default

    def names(self) -> set[str]:
        """Names of the model's tensors."""
        return self._tensors.keys() - {"rope_freqs.weight"}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, outputs first as in a HF checkpoint (GGUF lists it backwards)."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def where(self, name: str) -> Path:
        return self.path

    def read(self, name: str) -> np.ndarray:
        """float32 values of a tensor, rows in the order of a HF checkpoint."""
        tensor = self._tensors[name]
        with reading(f"{self.path}: tensor {name}", WeightsError):
            values = dequantize(tensor.data, tensor.tensor_type)
            return self._unpermute(name, values.reshape(self.shape(name)))

    def _unpermute(self, name: str, values: np.ndarray) -> np.ndarray:
        """Undoes the row order of queries and keys in llama files.

        Their rotary embedding pairs neighbours (2i, 2i+1), HF's pairs halves (i, i + K/2), so the
        writer permuted the rows of each head. Qwen files keep the order of HF.
        """
        heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            return values
        count = self._attention(heads)
        pairs = values.reshape(count, -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _attention(self, key: str) -> int:
        value = self.metadata(f"{self.architecture}.attention.{key}", None)
        if value is None and key == "head_count_kv":
            return self._attention("head_count")
        if not isinstance(value, int):
            raise WeightsError(
                f"{self.path}: {key} is {value}; only one number for all layers is supported"
            )
        return value

    def config(self) -> ModelConfig:
        """The architecture, from the metadata and the names of the tensors.

        Raises WeightsError for metadata of the wrong kind.
        """
        with reading(f"{self.path}: the metadata", WeightsError):
            try:
                return self._config()
            except ConfigError as error:
                raise WeightsError(f"{self.path}: the metadata: {error}") from error

    def _config(self) -> ModelConfig:
        arch, names = self.architecture, self._tensors
        d_model = self.metadata(f"{arch}.embedding_length")
        num_heads = self._attention("head_count")
        head_dim = self.metadata(f"{arch}.attention.key_length", d_model // num_heads)
        if "token_embd.weight" not in names:
            raise WeightsError(f"{self.path}: tensor token_embd.weight is missing")
        config = ModelConfig(
            vocab_size=self.shape("token_embd.weight")[0],
            d_model=d_model,
            d_ff=self.metadata(f"{arch}.feed_forward_length"),
            num_layers=self.metadata(f"{arch}.block_count"),
            num_heads=num_heads,
            num_kv_heads=self._attention("head_count_kv"),
            head_dim=head_dim,
            rope_theta=self.metadata(f"{arch}.rope.freq_base", 10000.0),
            norm_eps=self.metadata(f"{arch}.attention.layer_norm_rms_epsilon"),
            tie_embeddings="output.weight" not in names,
            qkv_bias="blk.0.attn_q.bias" in names,
            qk_norm="blk.0.attn_q_norm.weight" in names,
            max_position=self.metadata(f"{arch}.context_length"),
        )
        # The file holds float32: rounding gives 1e-05 back as it was written.
        config = replace(config, norm_eps=float(f"{config.norm_eps:.6g}"))
        self._check_rope(config)
        return replace(config, rope_scaling=self._rope_scaling(config))

    def _check_rope(self, config: ModelConfig) -> None:
        arch = self.architecture
        scaling = self.metadata(f"{arch}.rope.scaling.type", "none")
        rotated = self.metadata(f"{arch}.rope.dimension_count", config.head_dim)
        if scaling != "none" or rotated != config.head_dim:
            raise WeightsError(
                f"{self.path}: rotary embedding with scaling {scaling!r} over {rotated} of "
                f"{config.head_dim} dimensions is not supported (only whole heads, and Llama 3's "
                "own scaling)"
            )

    def _rope_scaling(self, config: ModelConfig) -> RopeScaling | None:
        """Llama 3's rule, recovered from the divisors of the frequencies that the file stores.

        The file does not hold the rule's constants: `factor` is the largest divisor, the others are
        the same in every Llama 3.x. Raises WeightsError when they do not reproduce the divisors.
        """
        if "rope_freqs.weight" not in self._tensors:
            return None
        divisors = self.read("rope_freqs.weight")
        scaling = RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
        scaled = rope_frequencies(replace(config, rope_scaling=scaling))
        expected = rope_frequencies(config) / scaled
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise WeightsError(
                f"{self.path}: tensor rope_freqs.weight does not follow the rule of Llama 3.x "
                "(low 1, high 4, original length 8192)"
            )
        return scaling
