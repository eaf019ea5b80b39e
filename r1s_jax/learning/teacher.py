"""Teachers of on-policy distillation: the KL of the policy's own tokens is measured to them.

A teacher is another policy with the same tokens, or the policy itself when its prompt also shows
the gold answer or a right solution (self-distillation, SDPO, arXiv 2601.20802).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from r1s_jax.config import Config, ConfigError
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.learner import Learner, make_optimizer
from r1s_jax.learning.losses import likelihood_loss
from r1s_jax.learning.packing import Sizes
from r1s_jax.models.params import Params
from r1s_jax.models.pretrained import Pretrained, load_pretrained
from r1s_jax.models.sharding import shard_params

# Teachers that are the policy itself: its prompt shows the gold answer, or a right sample.
SHOWN_GOLD, SHOWN_SAMPLE = "gold", "sample"
_GOLD = "{question}\n\nThe correct answer is: {shown}"
_SAMPLE = "{question}\n\nA correct solution of this question:\n{shown}"

PromptTokens = Callable[[str], list[int]]


class Teacher(NamedTuple):
    """Another policy."""

    learner: Learner
    params: Params


def load_teacher(config: Config, mesh: Mesh, policy: Pretrained) -> Teacher | None:
    """The policy that `algorithm.teacher` names; None where it names none.

    Raises ConfigError for a teacher with other tokens than `policy`.
    """
    name = config.algorithm.teacher
    if name in ("", SHOWN_GOLD, SHOWN_SAMPLE):
        return None
    loaded = load_pretrained(name)
    mine, theirs = policy.tokenizer.get_vocab(), loaded.tokenizer.get_vocab()
    if mine != theirs:
        different = len(set(mine.items()) ^ set(theirs.items()))
        raise ConfigError(
            f"algorithm.teacher={name} has other tokens than the policy ({len(theirs)} and "
            f"{len(mine)}, {different} differ): a teacher scores the policy's own tokens, so take "
            "one of the same family"
        )
    nothing = make_optimizer(config.optimizer)  # it is never updated
    learner = Learner.of(config.policy, loaded.model, mesh, nothing, likelihood_loss)
    return Teacher(learner, shard_params(loaded.params, loaded.model, mesh))


def shown_logprobs(
    learner: Learner,
    params: Params,
    rewarded: Rewarded,
    shown: str,
    prompt_tokens: PromptTokens,
    sizes: Sizes,
) -> tuple[Float[np.ndarray, "N W"], Bool[np.ndarray, "N W"]]:
    """The log-probabilities of the policy's tokens when its prompt also shows what `shown` names.

    Returns them, and which tokens have one: none in a trajectory for which there is nothing to
    show, or that would no longer fit into a row.
    """
    t, mask = rewarded.rolled.trajectory, rewarded.mask
    hints = _hints(rewarded, shown)
    rows, texts, starts = [], [], []
    for row, hint in enumerate(hints):
        question = rewarded.rolled.questions[row].question
        if hint is None or not mask[row].any():
            continue
        plain = len(prompt_tokens(question))
        longer = prompt_tokens(hint.replace("{question}", question, 1))
        text = np.concatenate([longer, t.tokens[row, plain : t.lengths[row]]])
        if len(text) <= sizes.capacity:
            rows.append(row)
            texts.append(text)
            starts.append(len(longer) - plain)
    out, scored = np.zeros(mask.shape, np.float32), np.zeros(mask.shape, bool)
    if not rows:
        return out, scored
    # All rows, so that every step has the same shape; those without a text are one token.
    lengths, shape = np.ones(len(mask), np.int64), (len(mask), sizes.capacity)
    tokens, wanted = (
        np.zeros(shape, np.int32),
        np.zeros(shape, bool),
    )
    for row, text, shift in zip(rows, texts, starts, strict=True):
        lengths[row], tokens[row, : len(text)] = len(text), text
        places = np.flatnonzero(mask[row])
        wanted[row, places + shift] = True
    logprobs = learner.sequence_logprobs(params, tokens, lengths, wanted, sizes)
    for row in rows:
        scored[row] = mask[row]
        out[row, mask[row]] = logprobs[row, wanted[row]]
    return out, scored


def _hints(rewarded: Rewarded, shown: str) -> list[str | None]:
    """What each trajectory's question is replaced by, with {question} for its text."""
    questions = rewarded.rolled.questions
    if shown == SHOWN_GOLD:
        return [_GOLD.replace("{shown}", q.answers[0]) if q.answers else None for q in questions]
    right = [r.parts.get("exact_match", 0) == 1 for r in rewarded.rewards]
    hints: list[str | None] = []
    for row, group in enumerate(rewarded.groups):
        others = [i for i in np.flatnonzero(rewarded.groups == group) if right[i] and i != row]
        text = rewarded.rolled.solutions[others[0]].written.strip() if others else None
        hints.append(None if text is None else _SAMPLE.replace("{shown}", text))
    return hints
