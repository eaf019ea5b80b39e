"""Recipes through the compilers of absent hardware, and counts of FLOPs, bytes and memory."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from typer.testing import CliRunner

from r1s_jax.aot.compile_report import advice, as_text, compile_recipe
from r1s_jax.aot.costs import collective_bytes, traced_flops
from r1s_jax.aot.fit import as_text as fit_as_text
from r1s_jax.aot.targets import CannotCompile, target_devices
from r1s_jax.cli import app
from r1s_jax.models.architectures import KNOWN
from r1s_jax.recipes import load_recipe, titles

SMALL = ["rollout.slots=16", "rollout.max_length=2048"]


def test_flops_count_every_iteration_of_every_loop():
    w = jnp.ones((8, 8))

    def program(x):
        def layer(x, _):
            return x @ w, None

        with jax.named_scope("steps"):
            x = lax.while_loop(lambda x: x.sum() > 0, lambda x: lax.scan(layer, x, None, 3)[0], x)
        x = lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)
        return jax.checkpoint(lambda x: jnp.sum(x @ w))(x)

    jaxpr = jax.make_jaxpr(program)(jnp.ones((4, 8))).jaxpr
    product = 2 * 4 * 8 * 8
    assert traced_flops(jaxpr, {"steps": 10}) == (10 * 3 + 2 + 1) * product
    gradient = jax.make_jaxpr(
        jax.grad(lambda x: lax.scan(lambda x, _: (x @ w, None), x, None, 5)[0].sum())
    )
    assert traced_flops(gradient(jnp.ones((4, 8))).jaxpr, {}) == 2 * 5 * product


HLO = """\
HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%inner (p: f32[8]) -> f32[8] {
  %ag = bf16[16,4]{1,0:T(8,128)(2,1)} all-gather(%p), metadata={op_name="jit(f)/step/while/body/x"}
}

%body (p: (f32[8])) -> (f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), to_apply=%add, metadata={op_name="jit(f)/step/while/body/psum"}
  %w2 = (f32[8]) while(%t), condition=%cond, body=%inner
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), metadata={op_name="jit(f)/step/gather"}
  %w = (f32[8]) while(%s), condition=%cond, body=%body
}
"""


def test_collectives_count_per_run_of_their_scope():
    """The collective before the loop has the loop's name but runs once."""
    assert collective_bytes(HLO, {"step": 7}) == {
        "all-gather": 32 + 7 * 16 * 4 * 2,
        "all-reduce": 7 * 8 * 4,
    }


def test_every_published_recipe_names_a_known_architecture():
    others = ("tiny_world", "wiki_smollm2", "hotpot_smollm2", "search_r1_3b", "tinker_search")
    others += ("worlds/", "links_smollm2")
    names = [name for name in titles() if not name.startswith(others)]
    assert len(names) == 7
    for name in names:
        config = load_recipe(name)
        assert config.name == name
        assert config.policy.model in KNOWN
        assert (config.stage1.steps, config.stage2.steps) in {(5, 0), (0, 127), (5, 127)}
        assert config.algorithm.samples_per_question == 16


def test_an_unknown_target_is_named():
    config = load_recipe("smollm2_135m")
    with pytest.raises(CannotCompile, match="v99:2x2"):
        compile_recipe(config, "v99:2x2")


@pytest.fixture(scope="module")
def small():
    try:
        target_devices("v5e:2x2")
    except CannotCompile as why:
        pytest.skip(str(why).splitlines()[0])
    return compile_recipe(load_recipe("smollm2_135m", SMALL), "v5e:2x2")


@pytest.mark.aot
def test_a_recipe_fits_its_chips(small):
    assert small["fits"] and (small["chips"], small["mesh"]["fsdp"]) == (4, 4)
    parameters = 134_515_008
    assert small["state_gib"] * 2**30 == pytest.approx(3 * 4 * parameters / 4, rel=0.01)
    update = small["phases"]["update"]
    # Forward, recomputed forward and backward of 128 trajectories of 2,100 tokens on 4 chips.
    tokens = 256 * 2100 / 4
    assert update["flops"] == pytest.approx(8 * parameters * tokens, rel=0.35)
    assert update["collective_gib"]["all-gather"] > 0
    for phase in small["phases"].values():
        assert 0 < phase["peak_gib"] < phase["hbm_gib"]
    assert "fits" in as_text(small) and not advice(small)


@pytest.mark.aot
def test_the_rollout_keeps_one_cache_on_a_tpu(small):
    """Besides the weights, the rollout holds the cache and little more."""
    rollout = small["phases"]["rollout"]
    weights = 2 * 134_515_008 / 2**30
    assert rollout["cache_gib"] > 1
    assert rollout["temp_gib"] - weights < 1.25 * rollout["cache_gib"]


@pytest.mark.aot
def test_a_recipe_that_does_not_fit_is_refused_with_advice(small):
    command = [
        "compile",
        "smollm2_135m",
        "rollout.slots=256",
        "--topology",
        "v5e:2x2",
        "--phase",
        "rollout",
    ]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout.splitlines()[-1])
    assert not report["fits"]
    assert report["phases"]["rollout"]["peak_gib"] > report["phases"]["rollout"]["hbm_gib"]
    assert "lower rollout.slots" in result.stderr


@pytest.mark.slow
@pytest.mark.aot
def test_fit_finds_the_cheapest_that_fits(small):
    command = ["compile", "smollm2_135m", "--topology", "v5e:2x2", "--phase", "update", "--fit"]
    few = ["stage1.questions_per_step=1", "stage2.questions_per_step=1", "rollout.max_length=1024"]
    result = CliRunner().invoke(app, [*command, *few, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    fitting = [row for row in report["tried"] if row["fits"]]
    assert {row["settings"][1] for row in report["tried"]} == {
        f"policy.remat={remat}" for remat in ("none", "attention", "full")
    }
    cheapest = min(fitting, key=lambda row: row["roofline_s"])
    assert report["best"] == cheapest["settings"]
    assert "<- best" in fit_as_text(report) and " ".join(report["best"]) in fit_as_text(report)


@pytest.mark.parametrize("more", [[], ["--fit"]])
def test_an_unknown_phase_is_refused(more):
    result = CliRunner().invoke(app, ["compile", "smollm2_135m", "--phase", "nonsense", *more])
    assert result.exit_code == 1 and "take rollout, update or all" in str(result.exception)


def test_advice_names_what_to_lower():
    phase = {"peak_gib": 20.0, "resident_gib": 1.0, "hbm_gib": 16, "fits": False}
    text = advice({"phases": {"rollout": phase, "update": dict(phase, resident_gib=0.0)}})
    assert "the rollout needs 21.0 GiB a chip, 16 are there: lower rollout.slots" in text
    assert "the update needs 20.0" in text and "optimizer.pack_length" in text
