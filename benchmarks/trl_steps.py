"""TRL's GRPOTrainer in its own process, one step at a time.

In one process, PyTorch and JAX compete for the same cores; in two, one waits while the other works.
The TRL process uses default malloc settings, as for its users, not those of our commands.
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
    """Settings shared by both sides; `folder` holds the model and tokenizer in HF format."""

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
    """A TRL process that trains one step per call; `available` is False without TRL."""

    def __init__(self, settings: TrlSettings):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(settings, theirs), daemon=True)
        with malloc_as_it_comes():
            self._process.start()
        theirs.close()
        self.available: bool = self._receive()

    def step(self) -> float:
        """Runs the next step and returns its seconds."""
        self._pipe.send("go")
        return self._receive()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise ConfigError("the TRL process ended; see its output above") from None


def rewards(texts: Sequence[str]) -> list[float]:
    """The number of distinct characters of each text: any reward that varies would do."""
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
        torch.set_float32_matmul_precision("high")  # TF32, JAX's default on GPUs
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
