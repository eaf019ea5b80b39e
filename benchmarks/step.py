"""One whole RL step, beside TRL's GRPOTrainer where it is installed.

Both sample the same number of answers to one question, of the same length and without a search,
compute the same rewards and make one update of all parameters. Their steps and ours alternate.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import psutil

from benchmarks.common import peak_memory_gb
from benchmarks.endless import Endless, NothingToFind
from benchmarks.trl_steps import TrlSettings, TrlSteps, rewards
from r1s_jax.config import (
    AlgorithmConfig,
    Config,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    StageConfig,
    TinyWorldConfig,
)
from r1s_jax.data.questions import Question
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.learner import Learner, LearnerState, make_optimizer
from r1s_jax.learning.losses import clipped_loss
from r1s_jax.learning.policy_gradient import PolicyGradient
from r1s_jax.models.pretrained import Pretrained, load_pretrained
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.models.tokenizer import encode_start
from r1s_jax.models.weights import save_params
from r1s_jax.protocol.prompts import renderer
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Engine
from r1s_jax.system.dtype import AUTO, default_dtype

_QUESTION = "Which rivers flow through the capital of Austria?"
Dtype = Literal["auto", "float32", "bfloat16"]
_LEARNING_RATE, _CLIP = 1e-6, 0.2


def bench_step(
    reference: str, *, samples: int, new_tokens: int, dtype: Dtype, repeats: int = 3
) -> dict[str, Any]:
    """Seconds per step: rollout of `samples` answers, rewards, advantages, one update.

    Reports the best of `repeats`; `ratio` is TRL's seconds over ours, where TRL is installed. With
    `auto` we compute in the faster dtype of this machine, and TRL in the one that is faster for it.
    """
    policy = load_pretrained(reference)._replace(eos_ids=(-1,), dialect=Endless())
    peers = (dtype,) if dtype != AUTO else ("float32", "bfloat16")
    dtype = default_dtype().name if dtype == AUTO else dtype
    step = _our_step(policy, samples, new_tokens, dtype)
    step(0)  # compiles
    theirs: dict[str, list[float]] = {}
    ours: list[dict[str, float]] = []
    for peer in peers:
        with tempfile.TemporaryDirectory() as folder:
            trl = _trl(policy, Path(folder), samples, new_tokens, peer, repeats + 1)
            for _ in range(repeats + trl.available):  # TRL's first step includes its setup
                if trl.available:
                    theirs.setdefault(peer, []).append(trl.step())
                ours.append(step(len(ours) + 1))
            trl.close()
        if not trl.available:
            break
    best = min(ours, key=lambda row: row["seconds"])
    result = {
        **best,
        "tokens_per_s": samples * new_tokens / best["seconds"],
        "samples": samples,
        "new_tokens": new_tokens,
        "dtype": dtype,
        "peak_memory_gb": peak_memory_gb(),
    }
    if theirs:
        fastest, peer = min((min(seconds[1:]), name) for name, seconds in theirs.items())
        result |= {"trl_seconds": fastest, "trl_dtype": peer, "ratio": fastest / best["seconds"]}
    return result


def _our_step(
    policy: Pretrained, samples: int, new_tokens: int, dtype: Dtype
) -> Callable[[int], dict[str, float]]:
    config = _config(policy, samples, new_tokens, dtype)
    mesh = make_mesh(MeshConfig())
    engine = Engine(policy, config.rollout, mesh=mesh, compute_dtype=np.dtype(dtype))
    learner = Learner.of(
        config.policy,
        policy.model,
        mesh,
        make_optimizer(config.optimizer),
        partial(clipped_loss, _CLIP),
    )
    method = PolicyGradient(config, learner)
    state: LearnerState = learner.init(shard_params(policy.params, policy.model, mesh))
    question = Question(0, _QUESTION, ("",))

    def step(number: int) -> dict[str, float]:
        nonlocal state
        begin = time.perf_counter()
        rolled = engine.run(
            state.params,
            [question],
            samples=samples,
            seed=0,
            step=number,
            retriever=NothingToFind(),
        )
        between = time.perf_counter()
        texts = ["".join(text for text, _ in s.spans) for s in rolled.solutions]
        state, _ = method.learn(
            state,
            Rewarded.of(rolled, [Reward(r, {}) for r in rewards(texts)], config.algorithm),
            step=number,
            kl_coefficient=0.0,
            learning_rate_scale=1.0,
        )
        jax.block_until_ready(state.params)
        end = time.perf_counter()
        parts = {"rollout_s": between - begin, "update_s": end - between}
        return {"seconds": end - begin, **parts}

    return step


def _prompt(policy: Pretrained) -> str:
    return renderer(policy.spoken, policy.tokenizer)(_QUESTION)


def _config(policy: Pretrained, samples: int, new_tokens: int, dtype: Dtype) -> Config:
    prompt = len(encode_start(policy.tokenizer, _prompt(policy)))
    length, stage = prompt + new_tokens, StageConfig(steps=0, reward="stage2")
    return Config(
        name="bench",
        policy=PolicyConfig(architecture=policy.model, compute_dtype=dtype),
        environment=TinyWorldConfig(),  # required by Config, unused here
        stage1=stage,
        stage2=stage,
        rollout=RolloutConfig(
            slots=samples,
            top_p=1.0,
            max_length=length,
            max_prompt_length=prompt,
            max_turn_length=new_tokens,
            prefill_rows=1,
            prefill_chunk=prompt,
        ),
        algorithm=AlgorithmConfig(
            estimator="grpo", samples_per_question=samples, updates_per_rollout=1
        ),
        optimizer=OptimizerConfig(
            learning_rate=_LEARNING_RATE, pack_length=length, micro_batch_rows=samples
        ),
    )


def _trl(
    policy: Pretrained, folder: Path, samples: int, new_tokens: int, dtype: Dtype, steps: int
) -> TrlSteps:
    save_params(policy.params, policy.model, folder, dtype="float32")
    policy.tokenizer.save_pretrained(folder)
    settings = TrlSettings(
        folder=folder,
        prompt=_prompt(policy),
        samples=samples,
        new_tokens=new_tokens,
        dtype=dtype,
        learning_rate=_LEARNING_RATE,
        clip=_CLIP,
        threads=psutil.cpu_count(logical=True) or 1,
        steps=steps,
        on_cpu=jax.default_backend() == "cpu",
    )
    return TrlSteps(settings)
