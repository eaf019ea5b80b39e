import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file, save_file

from r1s_jax.config import ModelConfig, RopeScaling
from r1s_jax.models import weights
from r1s_jax.models.decoder import rope_frequencies
from r1s_jax.models.params import init_params, param_specs
from r1s_jax.models.weights import WeightsError, load_config, load_params, save_params

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
TINY = ["llama", "qwen2", "qwen3"]
LLAMA = ModelConfig(
    vocab_size=32,
    d_model=32,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    max_position=131072,
)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny llama for tests that damage it."""
    return Path(shutil.copytree(PARITY / "llama", tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, **changes) -> None:
    """Replaces tensors; None removes. Dots are written as double underscores."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "model.safetensors")


# ---- Hugging Face directories


@pytest.mark.parametrize("name", TINY)
def test_shapes_and_values(name):
    config, params = load_config(PARITY / name), load_params(PARITY / name)
    shapes = jax.tree.map(
        lambda s: s.shape, param_specs(config), is_leaf=lambda s: hasattr(s, "std")
    )
    assert jax.tree.map(np.shape, params) == shapes
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    stored = load_file(PARITY / name / "model.safetensors")
    # Element by element, to check each transposition.
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    o = stored["model.layers.1.self_attn.o_proj.weight"]
    k = config.head_dim
    assert params["layers"]["wq"][1, 5, 3, 2] == q[3 * k + 2, 5]
    assert params["layers"]["wo"][1, 3, 2, 5] == o[5, 3 * k + 2]
    assert params["embed"][7, 5] == stored["model.embed_tokens.weight"][7, 5]
    if not config.tie_embeddings:
        assert params["lm_head"][5, 7] == stored["lm_head.weight"][7, 5]


def test_configs_of_the_three_families():
    llama, qwen2, qwen3 = (load_config(PARITY / name) for name in TINY)
    assert llama.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)
    assert (llama.qkv_bias, llama.qk_norm, llama.tie_embeddings) == (False, False, False)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.tie_embeddings) == (True, False, True)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.tie_embeddings) == (False, True, False)
    assert (qwen3.rope_theta, qwen3.head_dim, qwen2.head_dim) == (1e6, 16, 12)


def test_older_spelling_of_rope(copy):
    expected = load_config(copy)
    rope = json.loads((copy / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit_config(copy, rope_parameters=None, rope_theta=theta, rope_scaling=rope)
    assert load_config(copy) == expected


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("max_shard_bytes", [5e9, 3e4])
def test_round_trip(name, max_shard_bytes, tmp_path):
    """Load, save, load: equal configuration, and byte-equal tensors."""
    config, params = load_config(PARITY / name), load_params(PARITY / name)
    out = save_params(
        params, config, tmp_path / "out", dtype="float32", max_shard_bytes=max_shard_bytes
    )
    assert load_config(out) == config
    assert_same(load_params(out), params)
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes < 1e5)
    assert all(f.stat().st_size < max_shard_bytes + 5000 for f in files)
    written = {name: value for f in files for name, value in load_file(f).items()}
    original = load_file(PARITY / name / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(written[n].tobytes() == original[n].tobytes() for n in original)


def test_bfloat16(tmp_path):
    config, params = load_config(PARITY / "qwen2"), load_params(PARITY / "qwen2")
    out = save_params(params, config, tmp_path / "out")
    rounded = jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16), params)
    assert_same(load_params(out, dtype=ml_dtypes.bfloat16), rounded)
    assert_same(load_params(out), jax.tree.map(lambda p: p.astype(np.float32), rounded))


def test_saves_jax_arrays_and_eos_ids(tmp_path):
    params = init_params(LLAMA, seed=0)
    out = save_params(
        params, LLAMA, tmp_path / "new" / "out", dtype="float32", eos_token_ids=(2, 0)
    )
    assert_same(load_params(out), jax.tree.map(np.asarray, params))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    params = init_params(LLAMA, seed=0)

    def full_disk(file, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_params(params, LLAMA, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="lm_head: the parameters have shape"):
        save_params(params | {"lm_head": params["embed"][:5]}, LLAMA, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    save_params(params, LLAMA, tmp_path / "out")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        save_params(params, LLAMA, tmp_path / "out")


# ---- damaged files, named in the message


def test_missing_path_and_files(tmp_path, copy):
    with pytest.raises(WeightsError, match="no such file"):
        load_params(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty/config\.json is missing"):
        load_params(tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"copy/model\.safetensors is missing"):
        load_params(copy)


def test_missing_shard(tmp_path):
    out = save_params(init_params(LLAMA, 0), LLAMA, tmp_path / "out", max_shard_bytes=2e4)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeightsError, match=f"{shard.name} is missing"):
        load_params(out)


def in_shards(folder: Path) -> dict:
    """Splits a folder's weights into two shards; returns the tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for n in (0, 1):
        file = f"model-{n + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[n::2]}, folder / file)
        weight_map |= dict.fromkeys(names[n::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_the_index_selects_the_shard_of_a_tensor_in_two_shards(copy):
    expected = load_params(copy)
    tensors = in_shards(copy)
    files = sorted(copy.glob("model-*"))
    for file in files:  # each holds sevens for the other's tensors
        held = load_file(file)
        save_file({name: held.get(name, np.full_like(t, 7)) for name, t in tensors.items()}, file)
    assert_same(load_params(copy), expected)
    index = copy / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"]
    del named["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(named, "9" * 300)}))
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json: ") as error:
        load_params(copy, load_config(copy))
    assert len(str(error.value)) <= 400
    index.write_text(json.dumps({"weight_map": named}))
    with pytest.raises(
        WeightsError, match=r"00002.safetensors: tensor lm_head.weight is also in .*00001"
    ):
        load_params(copy)


def test_a_tensor_missing_from_its_shard_is_named(copy):
    in_shards(copy)
    first = copy / "model-00001-of-00002.safetensors"
    held = load_file(first)
    save_file({name: held[name] for name in sorted(held)[1:]}, first)
    with pytest.raises(WeightsError, match=rf"{first.name}: tensor {sorted(held)[0]} .*missing"):
        load_params(copy)


def test_an_unsharded_file_precedes_shards(copy, tmp_path, capsys):
    """As in transformers, with a message."""
    expected, old = load_params(copy), Path(shutil.copytree(copy, tmp_path / "old"))
    edit_tensors(old, model__norm__weight=np.full(32, 7, np.float32))
    in_shards(old)
    for file in old.glob("model*"):
        shutil.copy(file, copy)
    assert_same(load_params(copy), expected)
    assert "model.safetensors is read, as transformers does" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}",
        "module.{}",
        "module._orig_mod.{}",
        "_fsdp_wrapped_module.{}",
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: name.removeprefix("model."),
    ],
)
def test_names_of_wrapped_models(copy, wrapped):
    expected, tensors = load_params(copy), load_file(copy / "model.safetensors")
    renamed = wrapped if callable(wrapped) else wrapped.format
    save_file({renamed(name): t for name, t in tensors.items()}, copy / "model.safetensors")
    assert_same(load_params(copy), expected)
    save_file(
        tensors | {"module.lm_head.weight": tensors["lm_head.weight"]}, copy / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=r"is also in model\.safetensors, as"):
        load_params(copy)


@pytest.mark.parametrize(
    ("file", "config", "message"),
    [
        ("model_world_size_2_rank_0.pt", False, "shards of a training run: merge"),
        ("actor/model_world_size_2_rank_0.pt", False, "shards of a training run: merge"),
        ("__0_0.distcp", True, "shards of a training run: merge"),
        ("global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt", True, "training run: merge"),
        ("pytorch_model.bin", True, "save them as safetensors first"),
        ("pytorch_model-00001-of-00002.bin", True, "save them as safetensors first"),
        ("adapter_model.safetensors", True, "an adapter without its base model"),
        ("README.md", True, "model.safetensors is missing: weights are read from"),
    ],
)
def test_folders_in_other_formats_are_named(copy, file, config, message):
    (copy / "model.safetensors").unlink()
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).touch()
    if not config:
        (copy / "config.json").unlink()
    with pytest.raises(WeightsError, match=message):
        load_params(copy)
    if not config:  # verl saves config and tokenizer in a folder beside the shards
        inner = (copy / file).parent / "huggingface"
        shutil.copytree(PARITY / "llama", inner)
        (inner / "model.safetensors").unlink()
        with pytest.raises(WeightsError, match=message):
            load_params(inner)


def test_truncated(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"model\.safetensors \(\d+ bytes\) is no .* truncated"):
        load_params(copy)
    (copy / "config.json").write_text('{"model_type": ')
    with pytest.raises(WeightsError, match=r"config\.json: no JSON"):
        load_params(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model type 'gemma3'.*llama, qwen2, qwen3"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"num_attention_heads": None}, "num_attention_heads"),
    ],
)
def test_unsupported_config(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(WeightsError, match=rf"copy/config\.json: .*{message}"):
        load_config(copy)


def test_wrong_tensors(copy):
    file = r"copy/model\.safetensors"
    with pytest.raises(
        WeightsError, match=rf"{file}: tensor model\.embed.* \(128, 48\).*\(99, 48\)"
    ):
        load_params(copy, replace(load_config(copy), vocab_size=99))
    edit_tensors(copy, model__layers__1__mlp__up_proj__weight=np.zeros((48, 80), np.float32))
    with pytest.raises(
        WeightsError,
        match=r"layers\.1\.mlp\.up_proj\.weight has shape \(48, 80\), expected \(80, 48\)",
    ):
        load_params(copy)
    edit_tensors(copy, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(WeightsError, match=r"up_proj\.weight of shape \(80, 48\) is missing"):
        load_params(copy)


def test_left_over_tensors(copy):
    """An unused tensor is an error, unless it can be computed from the others."""
    edit_tensors(copy, model__layers__0__self_attn__rotary_emb__inv_freq=np.zeros(6, np.float32))
    load_params(copy)
    edit_tensors(copy, model__layers__0__self_attn__q_proj__bias=np.zeros(48, np.float32))
    with pytest.raises(WeightsError, match=r"1 tensors have no place .*0\.self_attn\.q_proj\.bias"):
        load_params(copy)


# ---- GGUF


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows of queries and keys in a llama GGUF: interleaved halves."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.transpose(0, 2, 1, 3).reshape(rows.shape)


def write_gguf(
    file: Path,
    params,
    config: ModelConfig,
    arch: str = "llama",
    block_type=GGMLQuantizationType.F32,
) -> Path:
    writer = GGUFWriter(file, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling:
        plain = rope_frequencies(replace(config, rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", plain / rope_frequencies(config))
    for tensor in weights._tensors(config):
        values = weights._stored(params, tensor, np.dtype(np.float32))
        if arch == "llama" and tensor.param in ("wq", "wk"):
            values = permute(
                values, config.num_heads if tensor.param == "wq" else config.num_kv_heads
            )
        if values.ndim == 2:
            writer.add_tensor(tensor.gguf, quantize(values, block_type), raw_dtype=block_type)
        else:
            writer.add_tensor(tensor.gguf, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("name", TINY)
def test_gguf_holds_the_same_model(name, tmp_path):
    """A file with the names, row order and metadata of llama.cpp."""
    config, params = load_config(PARITY / name), load_params(PARITY / name)
    if name == "llama":
        config = replace(config, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), rope_theta=5e5)
    write_gguf(tmp_path / "m.gguf", params, config, arch=name)
    for path in (tmp_path / "m.gguf", tmp_path):
        assert load_config(path) == config
        assert_same(load_params(path), params)


def test_gguf_quantised(tmp_path):
    params = jax.tree.map(np.asarray, init_params(LLAMA, seed=0))
    write_gguf(tmp_path / "m.gguf", params, LLAMA, block_type=GGMLQuantizationType.Q8_0)
    loaded = load_params(tmp_path / "m.gguf")
    # Q8_0 rounds to 1/127 of the largest of 32 values: an error of at most half a step.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=np.abs(b).max() / 200), loaded, params
    )


def test_gguf_errors(tmp_path):
    params = init_params(LLAMA, seed=0)
    file = write_gguf(tmp_path / "m.gguf", params, LLAMA)
    whole = file.read_bytes()
    for damaged in (whole[:-1000], whole[:100], b"", b"something else entirely"):
        file.write_bytes(damaged)
        with pytest.raises(WeightsError, match=rf"m\.gguf \({len(damaged)} bytes\) is no GGUF"):
            load_params(file)
    write_gguf(file, params, LLAMA, arch="gemma3")
    with pytest.raises(WeightsError, match=r"m\.gguf: architecture 'gemma3'.*llama, qwen2, qwen3"):
        load_config(file)
    write_gguf(file, params, replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)))
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight does not follow"):
        load_config(file)
    write_gguf(file, params, replace(LLAMA, num_layers=1))
    with pytest.raises(WeightsError, match=r"m\.gguf: tensor blk\.1\.attn_norm\.weight .* missing"):
        load_params(file, LLAMA)
    write_gguf(tmp_path / "n.gguf", params, LLAMA)
    with pytest.raises(WeightsError, match=r"several GGUF files: name one of m\.gguf, n\.gguf"):
        load_params(tmp_path)
