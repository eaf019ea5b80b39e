"""TRL's GRPOTrainer in a process of its own, one step at a time.

Two runtimes in one process hold on to each other's cores; here one waits while the other works. It
runs as its users have it, without what our commands ask of malloc for themselves.
"""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from r1s_jax.io.errors import ConfigError
from r1s_jax.system.memory import malloc_as_it_comes


class TrlSettings(NamedTuple):
    """What both sides do: `folder` holds the model and tokenizer in Hugging Face form."""

    folder: Path
    prompt: str
    samples: int
    new_tokens: int
    dtype: str
    learning_rate: float
    clip: float
    threads: int
    steps: int
    on_cpu: bool


class TrlSteps:
    """Takes a step when asked to; `available` says whether TRL is installed."""

    def __init__(self, settings: TrlSettings):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(settings, theirs), daemon=True)
        with malloc_as_it_comes():
            self._process.start()
        theirs.close()
        self.available: bool = self._receive()

    def step(self) -> float:
        """Seconds that the next step took."""
        self._pipe.send("go")
        return self._receive()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise ConfigError("TRL's process ended: what it said is above") from None


def rewards(texts: Sequence[str]) -> list[float]:
    """Any that differ from answer to answer will do: here, how many different letters it uses."""
    return [float(len(set(text))) for text in texts]


def _train(settings: TrlSettings, pipe: Connection) -> None:
    try:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        pipe.send(False)
        return

    class OneAtATime(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            pipe.recv()
            self.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not settings.on_cpu:
                torch.cuda.synchronize()
            pipe.send(time.perf_counter() - self.begin)

    s = settings
    torch.set_num_threads(s.threads)
    if not s.on_cpu:
        torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies there
    config = GRPOConfig(
        output_dir=str(s.folder / "trl"),
        use_cpu=s.on_cpu,
        bf16=s.dtype == "bfloat16",
        max_steps=s.steps,
        per_device_train_batch_size=s.samples,
        num_generations=s.samples,
        max_completion_length=s.new_tokens,
        generation_kwargs={"min_new_tokens": s.new_tokens},
        learning_rate=s.learning_rate,
        epsilon=s.clip,
        beta=0.0,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(s.folder, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(s.folder),
        reward_funcs=lambda completions, **_: rewards(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": s.prompt}] * s.samples),
        callbacks=[OneAtATime()],
    )
    pipe.send(True)
    trainer.train()
