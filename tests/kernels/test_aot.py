"""Every kernel at the sizes of the recipes, through the compilers of absent hardware."""

import jax
import jax.numpy as jnp
import pytest

from r1s_jax.aot.targets import NO_SPILLS, CannotCompile, compile_for, target_devices
from r1s_jax.kernels.attention import api

pytestmark = pytest.mark.aot

CHIPS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "h100": "h100:1"}
# Query heads, key/value heads and head width per device.
SHAPES = {
    "smollm2_135m": (9, 3, 64),
    "qwen2_5_7b over 4": (7, 1, 128),
    "llama3_1_8b over 4": (8, 2, 128),
    "qwen2_5_0_5b": (14, 2, 64),
}
CHUNK, SLOTS = 128, 16


@pytest.fixture(scope="module", params=CHIPS)
def device(request):
    try:
        return target_devices(CHIPS[request.param])[0]
    except CannotCompile as why:
        pytest.skip(str(why).splitlines()[0])


def impl_and_options(device):
    return ("tpu", {}) if device.platform == "tpu" else ("gpu", NO_SPILLS)


def shape(*dims, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(dims, dtype)


def rows_of(name, length, dtype):
    heads, kv_heads, width = SHAPES[name]
    q = shape(2, length, heads, width, dtype=dtype)
    kv = shape(2, length, kv_heads, width, dtype=dtype)
    return q, kv, kv, shape(2, length, dtype="int32")


# Only small models use float32.
CASES = [*((name, "bfloat16") for name in SHAPES), ("smollm2_135m", "float32")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("length", [1000, 8192])
def test_forward_and_backward(device, name, dtype, length):
    impl, options = impl_and_options(device)

    def loss(q, k, v, last_query):
        out = api.attention(q, k, v, last_query=last_query, impl=impl)
        return out.astype(jnp.float32).sum()

    compiled = compile_for(
        device, jax.value_and_grad(loss, (0, 1, 2)), *rows_of(name, length, dtype), **options
    )
    scores = 4 * 2 * SHAPES[name][0] * length**2
    if length > 4096:  # no array of all scores exists
        assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("qwen2_5_7b over 4", "int8")])
@pytest.mark.parametrize("new", [1, CHUNK])
def test_decode(device, name, dtype, new):
    impl, options = impl_and_options(device)
    heads, kv_heads, width = SHAPES[name]
    capacity, width_stored = api.cache_dims(8192, width, impl)
    cache = shape(2, SLOTS, kv_heads, capacity, width_stored, dtype=dtype)
    arguments = (
        shape(SLOTS, new, heads, width, dtype="bfloat16" if dtype == "int8" else dtype),
        cache,
        cache,
        shape(dtype="int32"),
        shape(SLOTS, dtype="int32"),
        shape(SLOTS, dtype="int32"),
    )
    one_a_token = shape(*cache.shape[:-1], dtype="float32")
    scales = (one_a_token, one_a_token) if dtype == "int8" else None

    def attend(scales, *operands):
        return api.decode_attention(*operands, scales=scales, impl=impl)

    compiled = compile_for(device, attend, scales, *arguments, **options)
    cache_bytes = 2 * jnp.dtype(dtype).itemsize * jnp.prod(jnp.array(cache.shape))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * cache_bytes


def test_a_spill_is_refused():
    """Checks the check: blocks too large for an H100's registers must fail."""
    try:
        device = target_devices("h100:1")[0]
    except CannotCompile as why:
        pytest.skip(str(why).splitlines()[0])
    from r1s_jax.kernels.attention import gpu

    def loss(q, k, v):
        return api.attention(q, k, v, impl="gpu").astype(jnp.float32).sum()

    arguments = rows_of("qwen2_5_7b over 4", 1024, "bfloat16")[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu._BLOCKS, "dkv", (128, 128, 4, 1))
        with pytest.raises(Exception, match=r"(?i)spill"):
            compile_for(device, jax.grad(loss, (0, 1, 2)), *arguments, **NO_SPILLS)
