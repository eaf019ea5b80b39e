"""Small models, engines, learners and batches for the tests of several rooms."""

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from r1s_jax import cli
from r1s_jax.config import MeshConfig, ModelConfig, RolloutConfig, SearchConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.questions import Question
from r1s_jax.data.tiny_world import PROMPT, TRADES, TinyWorld, build_tokenizer
from r1s_jax.kernels.tuning import ACCELERATOR
from r1s_jax.learning.learner import Learner, LearnerState
from r1s_jax.learning.losses import clipped_loss
from r1s_jax.learning.packing import PackedBatch, pack
from r1s_jax.models.checkpoint import Checkpoints
from r1s_jax.models.params import init_params
from r1s_jax.models.pretrained import Pretrained, make_policy, save_policy
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.models.weights import save_params
from r1s_jax.presets import Settings
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.loop import Until
from r1s_jax.rollout.session import Session
from r1s_jax.rollout.trajectory import Trajectory
from r1s_jax.system.files import write_json, write_rows
from r1s_jax.tracking.progress import Progress
from r1s_jax.tracking.run_dir import open_run_dir, write_held_out
from tests.fakes import EchoRetriever

# Runs.

# The tiny world with few steps: every part of a run, in seconds.
SHORT = [
    "cold_start.steps=30",
    "cold_start.checkpoint_every=10",
    "stage1.steps=2",
    "stage2.steps=4",
    "stage1.questions_per_step=4",
    "stage2.questions_per_step=4",
    "algorithm.samples_per_question=4",
    "algorithm.updates_per_rollout=2",
    "rollout.slots=16",
    "eval.questions=8",
    "environment.eval_people=40",
]


def run_cli(*args: str, stdin: str | None = None):
    """Runs an `r1s` command in this process."""
    return CliRunner().invoke(cli.app, list(args), input=stdin)


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process that has `count` CPU devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def save_small_run(run: Path) -> Path:
    """The directory of a run that ended after two steps of each phase."""
    small = ["d_model=16", "d_ff=32", "num_layers=1", "num_heads=2", "num_kv_heads=1", "head_dim=8"]
    config = override(tiny_world.config(), [f"policy.architecture.{change}" for change in small])
    open_run_dir(run, config, resume=False)
    policy = make_policy(config.policy, 0, R1Searcher(prompt=PROMPT), tokenizer=build_tokenizer())
    save_policy(run, policy)
    checkpoints = Checkpoints(run / "checkpoints", keep=2, run=run)
    progress = Progress(phase="learning", step=2, before={"f1": 0.0})
    checkpoints.save(124, LearnerState(policy.params, np.int32(0)), progress.as_dict(), 0.5)
    checkpoints.close()
    numbers = {"reward": 0.1, "answer_f1": 0.5, "searches": 3, "searches_per_question": 0.25}
    numbers |= {"sampled_tokens": 9, "seconds_rollout": 0.5, "entropy": 3.0, "ratio_drift": 0.1}
    learned = {"stage": "stage1", **numbers, "rewards_answers": False, "health": []}
    spans = [(" Bakori <|end_of_query|>", True), ("<|begin_of_documents|> none", False)]
    trace = {"question_id": 3, "question": "Who is Bakori?", "answers": ["a smith"], "reward": 0.5}
    trace |= {"parts": {"format": 0.0}, "advantage": 0.25, "finish": "length", "spans": spans}
    trace |= {"token_advantages": [(" Bakori", 0.5), (" <|end_of_query|>", 0.25)]}
    search = {"query": "Bakori", "outcome": "empty", "documents": [], "seconds": 0.1}
    trace |= {"searches": [search], "prompt_tokens": 12, "sampled_tokens": 2, "tokens": 18}
    files = {"metrics": learned, "cold_start": {"loss": 5.0, "accuracy": 0.5}, "traces": trace}
    for name, row in files.items():
        write_rows(run / f"{name}.jsonl", ({"step": step, **row} for step in (1, 2)))
    write_held_out(run, [Question(7, "Who is Bakori?", ("a smith",))])
    write_json(run / "summary.json", {"steps": 2, "f1_before": 0.0, "f1_after": 0.5})
    return run


# Files.


def names(folder: Path) -> list[str]:
    """The names of the files in a folder, except locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


SMALL = ModelConfig(156, 32, 64, 2, 4, 2, 8, tie_embeddings=True)


def save_small_model(folder: Path) -> Path:
    """A random model with the tokenizer of the tiny world, as a Hugging Face directory."""
    params = jax.tree.map(np.asarray, init_params(SMALL, 0))
    tokenizer = build_tokenizer()
    eos = (tokenizer.eos_token_id,)
    return save_params(params, SMALL, folder, tokenizer, "float32", eos_token_ids=eos)


def save_other_weights(folder: Path) -> None:
    """Overwrites a model's weights with other numbers, under the same names."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor[..., ::-1].copy() for name, tensor in tensors.items()}, file)


CONTROL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


# A chat template with Hermes' tools, calls and responses, and optional reasoning.
HERMES_CHAT = (
    "{% if tools %}<|im_start|>system\nTools{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{% set tool = m.role == 'tool' %}"
    "{% set before = loop.index0 > 0 and messages[loop.index0 - 1].role == 'tool' %}"
    "{% set after = not loop.last and messages[loop.index0 + 1].role == 'tool' %}"
    "{% if not (tool and before) %}{{ '<|im_start|>' + ('user' if tool else m.role) }}{% endif %}"
    "{% if tool %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% elif m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for c in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + c.function.name }}'
    "{{ '\", \"arguments\": ' + c.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}"
    "{% if not (tool and after) %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def letters(template: str, bos: bool, end: str = "</s>") -> PreTrainedTokenizerFast:
    """One token per byte, and control tokens; with `bos`, texts begin with <s>, as Llama's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    if bos:
        at = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", at), ("</s>", at + 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token=end
    )


def save_letters_model(folder: Path, template: str = CHAT, end: str = "</s>") -> Path:
    """A random model of bytes, for arbitrary text, as a Hugging Face directory."""
    tokenizer = letters(template, bos=False, end=end)
    model = dataclasses.replace(SMALL, vocab_size=len(tokenizer), max_position=16384)
    params = jax.tree.map(np.asarray, init_params(model, 0))
    ends = (tokenizer.eos_token_id,)
    return save_params(params, model, folder, tokenizer, "float32", eos_token_ids=ends)


def save_small_index(folder: Path) -> Path:
    """Builds an index of the passages of a tiny world."""
    world = TinyWorld((0, 0, 0), 30)
    lines = "".join(f"{p.id}\t{p.line}\n" for p in world.passages)
    (folder / "passages.tsv").write_text(lines)
    done = run_cli("index", "build", str(folder / "passages.tsv"), "--out", str(folder / "index"))
    assert done.exit_code == 0, done.output
    return folder / "index"


# Rollouts.

ROLLOUT = RolloutConfig(
    slots=5,
    top_p=0.9,
    max_length=96,
    max_prompt_length=24,
    max_turn_length=16,
    max_searches=3,
    documents_per_query=2,
    max_query_length=12,
    max_documents_length=32,
    prefill_rows=2,
    prefill_chunk=8,
)
MODEL = ModelConfig(156, 32, 64, 2, 4, 2, 8, rope_theta=1000.0)
QUESTIONS = [
    Question(7, "What is the trade of Bakori?", ("smith",)),
    Question(3, "What is the birthplace of the teacher of Tamizo?", ("Bakori",)),
    Question(9, "What is the teacher of Ropado?", ("Tamizo",)),
    Question(4, "What is the trade of the teacher of Nilasa?", ("baker",)),
]


def searching_params(seed: int = 0, model: ModelConfig = MODEL):
    """Random parameters that favour the tags, so that every kind of ending occurs in rollouts."""
    params = init_params(model, seed)
    # A constant feature in every hidden state raises the logits of the tags.
    embed = params["embed"].at[:, 0].set(3.0)
    tokenizer = build_tokenizer()
    head = params["lm_head"].at[0].set(0.0)
    tags = {protocol.BEGIN_QUERY: 1.2, protocol.END_QUERY: 0.55, protocol.END_ANSWER: 0.1}
    for tag, preference in tags.items():
        head = head.at[0, tokenizer.encode(tag)[0]].set(preference)
    return params | {"embed": embed, "lm_head": head}


# Each token on the left is followed by one of the tokens on the right.
_SCRIPT = {
    "<think>": ("teacher", "birthplace", "trade"),
    "teacher birthplace trade": (protocol.BEGIN_QUERY,),
    protocol.BEGIN_QUERY: TRADES[:3],
    " ".join(TRADES[:3]): (protocol.END_QUERY,),
    protocol.END_DOCUMENTS: ("</think>",),
    "</think>": ("<answer>",),
    "<answer>": TRADES[3:9],
    " ".join(TRADES[3:9]): ("</answer>",),
}


def scripted_policy() -> Pretrained:
    """A policy that thinks a word, searches for a second and answers a third, each drawn evenly."""
    tokenizer, params = build_tokenizer(), jax.tree.map(np.array, init_params(MODEL, 0))
    for name in ("wo", "w_down"):
        params["layers"][name][:] = 0  # the next token depends on the last token alone
    params["embed"][:], params["lm_head"][:] = 0, 0
    params["embed"][:, -1] = 1
    for feature, (left, right) in enumerate(_SCRIPT.items()):
        for token in tokenizer.encode(left):
            params["embed"][token] = np.eye(MODEL.d_model)[feature]
        for word in right:
            (token,) = tokenizer.encode(word)
            params["lm_head"][feature, token] = 5
    return Pretrained(
        MODEL, params, tokenizer, (tokenizer.eos_token_id,), R1Searcher(prompt=PROMPT)
    )


def make_engine(
    config: RolloutConfig = ROLLOUT,
    search: SearchConfig | None = None,
    model: ModelConfig = MODEL,
    attention: str = "auto",
    mesh: Mesh | None = None,
) -> Engine:
    tokenizer = build_tokenizer()
    return Engine(
        Pretrained(model, {}, tokenizer, (tokenizer.eos_token_id,), R1Searcher(prompt=PROMPT)),
        config,
        search=search or SearchConfig(timeout_s=5.0),
        mesh=mesh,
        compute_dtype=np.dtype("float32"),
        attention=attention,
    )


def roll(
    engine: Engine,
    retriever=None,
    questions=QUESTIONS,
    samples: int = 6,
    params=None,
) -> Rolled:
    params = params or searching_params(model=engine.model)
    params = shard_params(params, engine.model, engine.mesh)
    return engine.run(
        params, questions, samples=samples, seed=1, step=2, retriever=retriever or EchoRetriever()
    )


def open_session(engine: Engine, retriever=None, *, steady: bool = False) -> Session:
    """The rollout of `roll` as a session that a test enters and leaves."""
    params = shard_params(searching_params(model=engine.model), engine.model, engine.mesh)
    engine.broker.begin(retriever or EchoRetriever(), steady=steady)
    flights = engine.begin(QUESTIONS, samples=6, step=2)
    prompts = engine.prompts(flights, 1, engine.config.max_prompt_length)
    return Session(engine.programs, params, prompts, engine.tag_table)


def roll_in_pieces(engine: Engine, seed: int = 0) -> Trajectory:
    """The same as `roll`, but leaves the loop after random numbers of decode steps."""
    session, rng = open_session(engine), np.random.default_rng(seed)
    while not session.over:
        session.run(Until(steps=int(rng.integers(1, 30))))
    return session.results()[0]


# Updates.

LEARNED = ModelConfig(31, 16, 32, 2, 4, 2, 4, rope_theta=1000.0)
LENGTHS = np.array([9, 4, 12, 7, 3, 10])
WIDTH = 12


@contextmanager
def tuned_as_accelerator() -> Iterator[None]:
    """Programs traced in this context use the settings of accelerators, on this CPU."""
    with mock.patch("r1s_jax.models.sharding.default_tuning", return_value=ACCELERATOR):
        yield


def with_rollout(settings: Settings, *changes: str, **fields) -> Settings:
    """A config with these fields of `rollout` and other `section.field=value` changes."""
    rollout = [f"rollout.{name}={value}" for name, value in fields.items()]
    return settings._replace(changes=[*settings.changes, *rollout, *changes])


def make_learner(optimizer=None, **changes) -> Learner:
    options = dict(
        model=LEARNED,
        mesh=make_mesh(MeshConfig()),
        compute_dtype=jnp.float32,
        remat="none",
        optimizer=optimizer or optax.sgd(1.0),
        loss=partial(clipped_loss, 0.2),
    )
    return Learner(**(options | changes))


def make_sequences(seed: int = 0) -> dict[str, np.ndarray]:
    """Ragged sequences; the first two tokens and some in the middle are not trained on."""
    rng = np.random.default_rng(seed)
    shape = (len(LENGTHS), WIDTH)
    mask = (np.arange(WIDTH) >= 2) & (np.arange(WIDTH) < LENGTHS[:, None])
    mask &= rng.random(shape) < 0.7
    return dict(
        tokens=rng.integers(0, LEARNED.vocab_size, shape).astype(np.int32),
        weights=(mask * rng.uniform(0.02, 0.1, shape)).astype(np.float32),
        advantages=rng.normal(size=shape).astype(np.float32),
        old_logprobs=rng.normal(-3.4, 0.4, shape).astype(np.float32),
    )


def packed(sequences, capacity: int = 16, micro_batch_rows: int = 1) -> tuple[PackedBatch, int]:
    batch, _, micro = pack(
        **sequences, lengths=LENGTHS, capacity=capacity, micro_batch_rows=micro_batch_rows
    )
    return batch, micro


@cache
def make_params(model: ModelConfig = LEARNED):
    return jax.jit(lambda: init_params(model, 0))()


def step(learner: Learner, batch: PackedBatch, micro: int):
    """Parameters and metrics after one update."""
    params = make_params(learner.model)
    state, metrics = learner.update(learner.init(params, keep_reference=True), batch, micro)
    return jax.device_get(state.params), metrics


METRICS_PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented_columns() -> set[str]:
    """The columns of metrics.jsonl that have a row of a table in docs/metrics.md."""
    tables = METRICS_PAGE.read_text("utf-8").partition("## Health signals")[0]
    cells = re.findall(r"^\| (`[^|]+`[^|]*) \|", tables, re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def undocumented(row: dict[str, Any]) -> set[str]:
    """The columns of a row of metrics.jsonl that docs/metrics.md does not name."""
    names = {re.sub(r"^token_age_\d+$", "token_age_0", name) for name in row}
    names = {re.sub(r"^search_worth_\d+$", "search_worth_1", name) for name in names}
    return names - documented_columns()
