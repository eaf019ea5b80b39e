"""Parameters from and to Hugging Face directories; parameters from GGUF files.

A Hugging Face `Linear` is stored outputs first; here inputs come first, heads have an axis of
their own and the layers are stacked (see `params.param_specs`). `_TOP` and `_LAYER` hold the whole
mapping.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from r1s_jax.config import ModelConfig
from r1s_jax.io.errors import ConfigError, reading, shorten
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.models.gguf import WeightsError, gguf_in, open_gguf
from r1s_jax.models.hf_config import hf_config, parse_config, read_model_json
from r1s_jax.models.params import Params, param_specs
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.dialects import FILE
from r1s_jax.system.console import warn

__all__ = ["WeightsError", "load_config", "load_params", "save_params"]


class _Stored(NamedTuple):
    """The names and layout of one parameter in files."""

    hf: str
    gguf: str
    inputs: int  # leading input axes, not counting the layer axis; 0: stored with the same axes


_TOP = {
    "embed": _Stored("model.embed_tokens.weight", "token_embd.weight", 0),
    "final_norm": _Stored("model.norm.weight", "output_norm.weight", 0),
    "lm_head": _Stored("lm_head.weight", "output.weight", 1),
}
_LAYER = {
    "attn_norm": _Stored("input_layernorm.weight", "attn_norm.weight", 0),
    "wq": _Stored("self_attn.q_proj.weight", "attn_q.weight", 1),
    "wk": _Stored("self_attn.k_proj.weight", "attn_k.weight", 1),
    "wv": _Stored("self_attn.v_proj.weight", "attn_v.weight", 1),
    "wo": _Stored("self_attn.o_proj.weight", "attn_output.weight", 2),
    "bq": _Stored("self_attn.q_proj.bias", "attn_q.bias", 0),
    "bk": _Stored("self_attn.k_proj.bias", "attn_k.bias", 0),
    "bv": _Stored("self_attn.v_proj.bias", "attn_v.bias", 0),
    "q_norm": _Stored("self_attn.q_norm.weight", "attn_q_norm.weight", 0),
    "k_norm": _Stored("self_attn.k_norm.weight", "attn_k_norm.weight", 0),
    "mlp_norm": _Stored("post_attention_layernorm.weight", "ffn_norm.weight", 0),
    "w_gate": _Stored("mlp.gate_proj.weight", "ffn_gate.weight", 1),
    "w_up": _Stored("mlp.up_proj.weight", "ffn_up.weight", 1),
    "w_down": _Stored("mlp.down_proj.weight", "ffn_down.weight", 1),
}


class _Tensor(NamedTuple):
    """One tensor of a file and its place among the parameters."""

    hf: str
    gguf: str
    param: str
    layer: int | None
    shape: tuple[int, ...]  # of the parameter, without the layer axis
    stored_shape: tuple[int, ...]
    transposed: bool


def _tensors(config: ModelConfig) -> Iterator[_Tensor]:
    """Every tensor of a model, in the order of the network."""
    specs = param_specs(config)

    def tensor(hf: str, gguf: str, param: str, layer: int | None, shape: tuple, inputs: int):
        stored = shape
        if inputs:
            stored = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        elif layer is not None:
            stored = (math.prod(shape),)  # norms and biases are flat
        return _Tensor(hf, gguf, param, layer, shape, stored, inputs > 0)

    def top(param: str) -> _Tensor:
        s = _TOP[param]
        return tensor(s.hf, s.gguf, param, None, specs[param].shape, s.inputs)

    yield top("embed")
    for layer in range(config.num_layers):
        for param, spec in specs["layers"].items():
            s = _LAYER[param]
            names = f"model.layers.{layer}.{s.hf}", f"blk.{layer}.{s.gguf}"
            yield tensor(*names, param, layer, spec.shape[1:], s.inputs)
    yield top("final_norm")
    if not config.tie_embeddings:
        yield top("lm_head")


def load_config(path: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face directory or a GGUF file.

    Raises WeightsError for a missing or damaged file and for an unsupported architecture.
    """
    if file := gguf_in(path):
        return open_gguf(file).config()
    if not (Path(path) / "config.json").exists() and (other := _other_form(Path(path))):
        raise WeightsError(other)
    return parse_config(read_model_json(Path(path) / "config.json"), Path(path) / "config.json")


class _ShardIndex(msgspec.Struct):
    """The field of a model.safetensors.index.json that is read."""

    weight_map: dict[str, Annotated[str, msgspec.Meta(pattern=r"^[\w.-]{1,100}$")]]


# Parts of tensor names that come from PyTorch's module wrappers.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_BARE = ("embed_tokens", "layers", "norm")  # a decoder without its head is saved without `model.`
# Folders that hold a model in another form: (patterns of file names, what to do).
_OTHER_FORMS = (
    (
        "model_world_size_*_rank_*.pt actor/model_world_size_*_rank_*.pt *.distcp */*.distcp "
        "*mp_rank_*_states.pt */*mp_rank_*_states.pt",
        "shards of a training run: merge them into a Hugging Face directory first, with the tool "
        "of the framework that wrote them (verl: python -m verl.model_merger merge)",
    ),
    (
        "adapter_model.*",
        "an adapter without its base model: merge the two first (peft: merge_and_unload)",
    ),
    (
        "pytorch_model*.bin model*.pt consolidated*.pth *.ckpt",
        "PyTorch's pickled weights, which are not read: save them as safetensors first "
        "(transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT))",
    ),
)


def _plain_name(stored: str) -> str:
    """A tensor's name as in `transformers`, without the parts that wrappers added."""
    parts = [part for part in stored.split(".") if part not in _WRAPPERS]
    return ".".join((["model"] if parts[:1] and parts[0] in _BARE else []) + parts)


def _other_form(folder: Path) -> str:
    """Names a file of another form of model in a folder, and what to do; "" if there is none."""
    folders = [
        folder,
        *([folder.parent] if folder.name == "huggingface" else []),
    ]  # as verl lays it out
    for patterns, advice in _OTHER_FORMS:
        files = (p for f in folders for pattern in patterns.split() for p in f.glob(pattern))
        if file := next(files, None):
            return f"{file.parent} holds {file.name}, {advice}"
    return ""


class _SafetensorsDir:
    """The safetensors of a directory, whole or in shards; one tensor is in memory at a time."""

    def __init__(self, path: Path):
        index, single = path / "model.safetensors.index.json", path / "model.safetensors"
        self._place: dict[str, str] = {}  # file of each tensor, from the index
        if single.exists() and index.exists() and any(path.glob("model-*-of-*.safetensors")):
            warn(
                f"{path} holds model.safetensors and shards: model.safetensors is read, as "
                "transformers does; remove whichever of the two is old"
            )
        if index.exists() and not single.exists():
            weight_map = check(read_model_json(index), _ShardIndex, index, WeightsError).weight_map
            self._place = {_plain_name(name): file for name, file in weight_map.items()}
        files = [path / name for name in sorted(set(self._place.values()))] or [single]
        self.path = path
        self._stored: dict[str, tuple[Any, str, Path]] = {}  # shard, name in the shard, file
        for file in files:
            self._open(file)

    def _open(self, file: Path) -> None:
        if not file.exists():
            missing = f"{file} is missing: weights are read from *.safetensors"
            raise WeightsError(_other_form(self.path) or missing)
        size = file.stat().st_size
        with reading(
            f"{file} ({size} bytes) is no safetensors file or is truncated: it", WeightsError
        ):
            shard = safe_open(file, framework="numpy")
        for stored in list(shard.keys()):
            name = _plain_name(stored)
            if self._place.get(name, file.name) != file.name:
                continue  # the index names another file for this tensor
            if name in self._stored:
                _, other, place = self._stored[name]
                raise WeightsError(
                    f"{file}: tensor {stored} is also in {place.name}, as {other}, and no index "
                    "says which of the two counts: remove one"
                )
            self._stored[name] = shard, stored, file

    def names(self) -> set[str]:
        # Old checkpoints also store the rotary frequencies, which follow from the configuration.
        return {name for name in self._stored if not name.endswith("rotary_emb.inv_freq")}

    def where(self, name: str) -> Path:
        if name in self._stored:
            return self._stored[name][2]
        return self.path / self._place[name] if name in self._place else self.path

    def shape(self, name: str) -> tuple[int, ...]:
        shard, stored, _ = self._stored[name]
        return tuple(shard.get_slice(stored).get_shape())

    def read(self, name: str) -> np.ndarray:
        shard, stored, file = self._stored[name]
        with reading(f"{file}: tensor {stored}", WeightsError):
            return shard.get_tensor(stored)


def load_params(
    path: str | Path, config: ModelConfig | None = None, dtype: Any = np.float32
) -> Params:
    """Parameters of a Hugging Face directory or GGUF file, as numpy arrays of `dtype`.

    The tree is that of `params.param_specs(config)`; `config` is read from the path when not given.
    Peak memory is the parameters and one tensor. Raises WeightsError for a file that is missing or
    truncated, and for a tensor that is missing, left over or of the wrong shape.
    """
    config = config or load_config(path)
    file = gguf_in(path)
    source = open_gguf(file) if file else _SafetensorsDir(Path(path))
    _check_tensors(path, source, config, gguf=file is not None)
    specs = param_specs(config)
    params: Params = {
        name: np.empty(spec.shape, dtype) for name, spec in specs.items() if name != "layers"
    }
    params["layers"] = {name: np.empty(s.shape, dtype) for name, s in specs["layers"].items()}
    for tensor in _tensors(config):
        name = tensor.gguf if file else tensor.hf
        values = source.read(name)
        # One NaN or infinity in the values makes their sum NaN or infinite.
        if not np.isfinite(values.sum(dtype=np.float64)):
            raise WeightsError(f"{source.where(name)}: tensor {name} holds NaN or infinity")
        values = (values.T if tensor.transposed else values).reshape(tensor.shape)
        if tensor.layer is None:
            params[tensor.param][...] = values
        else:
            params["layers"][tensor.param][tensor.layer] = values
    return params


def _check_tensors(path: str | Path, source: Any, config: ModelConfig, *, gguf: bool) -> None:
    """Raises WeightsError unless the tensors match the architecture, before any is read."""
    remaining = source.names()
    for tensor in _tensors(config):
        name = tensor.gguf if gguf else tensor.hf
        if name not in remaining:
            raise WeightsError(
                f"{source.where(name)}: tensor {name} of shape {tensor.stored_shape} is missing"
            )
        remaining.discard(name)
        if source.shape(name) != tensor.stored_shape:
            raise WeightsError(
                f"{source.where(name)}: tensor {name} has shape {source.shape(name)}, "
                f"expected {tensor.stored_shape}"
            )
    if config.tie_embeddings:
        remaining.discard(_TOP["lm_head"].hf)  # some checkpoints store the tied matrix twice
    if remaining:
        some = ", ".join(sorted(remaining)[:5])
        raise WeightsError(
            f"{path}: {len(remaining)} tensors have no place in the model: {shorten(some, 200)}"
        )


def save_params(
    params: Params,
    config: ModelConfig,
    out_dir: str | Path,
    tokenizer: Any = None,
    dtype: str = "bfloat16",
    max_shard_bytes: float = 5e9,
    eos_token_ids: Sequence[int] = (),
    card: str = "",
    dialect: Dialect | None = None,
) -> Path:
    """Writes a directory that `transformers` loads; returns its path.

    `params` may be numpy or (fully addressable) JAX arrays; `dtype` is "bfloat16" or "float32".
    `eos_token_ids` end a generation, by default the tokenizer's own; `card` becomes README.md;
    `protocol.dialects.read_dialect` reads the `dialect`. The directory appears complete or not at
    all. Raises FileExistsError for one that already holds files.
    """
    out_dir = Path(out_dir)
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype={dtype!r}: only 'bfloat16' and 'float32' can be written")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty directory")
    if not eos_token_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
        eos_token_ids = (tokenizer.eos_token_id,)
    special = {
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": [int(i) for i in eos_token_ids] or None,
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    tmp = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # left by a killed process: containers reuse process ids
    tmp.mkdir()
    try:
        numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        _write_safetensors(params, config, tmp, numpy_dtype, max_shard_bytes)
        _write_json(tmp / "config.json", hf_config(config, dtype) | special)
        _write_json(tmp / "generation_config.json", special)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)
            _name_tokenizer_for_all(tmp / "tokenizer_config.json")
        if dialect:
            _write_json(tmp / FILE, dialect.as_dict())
        if card:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        tmp.replace(out_dir)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    return out_dir


def _name_tokenizer_for_all(file: Path) -> None:
    """Names a tokenizer class that transformers 4 knows too, unlike the one that 5 writes.

    By default transformers 4 gives that class token types, which none of our models takes.
    """
    described = read_object(file, WeightsError)
    if described.get("tokenizer_class") == "TokenizersBackend":
        described["tokenizer_class"] = "PreTrainedTokenizerFast"
        described.setdefault("model_input_names", ["input_ids", "attention_mask"])
        _write_json(file, described)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_safetensors(
    params: Params, config: ModelConfig, folder: Path, dtype: np.dtype, max_shard_bytes: float
) -> None:
    """One file, or shards with an index; one shard is in memory at a time."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in _tensors(config):
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys((t.hf for t in shard), file)
        content = {t.hf: _stored(params, t, dtype) for t in shard}
        save_file(content, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # as readable as its neighbours
    if len(shards) > 1:
        total = sum(math.prod(t.shape) for shard in shards for t in shard) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _stored(params: Params, tensor: _Tensor, dtype: np.dtype) -> np.ndarray:
    """A parameter in the layout of a HF file, cast and contiguous."""
    if tensor.layer is None:
        values = params[tensor.param]
    else:
        values = params["layers"][tensor.param][tensor.layer]
    values = np.asarray(values).astype(dtype)
    if values.shape != tensor.shape:
        raise ValueError(
            f"{tensor.param}: the parameters have shape {values.shape}, "
            f"their configuration says {tensor.shape}"
        )
    if tensor.transposed:
        values = values.reshape(tensor.stored_shape[::-1]).T
    return np.ascontiguousarray(values.reshape(tensor.stored_shape))
