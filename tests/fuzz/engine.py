"""Runs readers on damaged examples in a process that may hang or crash."""

import multiprocessing
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz import data, eval, models, protocol, retrieval, runs, settings
from tests.fuzz.damage import damage
from tests.fuzz.reader import BAD, MOST_CHARACTERS, Reader, digest

PATIENCE_S = 60.0
READERS = {
    **data.READERS,
    **eval.READERS,
    **runs.READERS,
    **retrieval.READERS,
    **models.READERS,
    **protocol.READERS,
    **settings.READERS,
}


def judge(reader: Reader, folder: Path, damaged: str, good: str) -> tuple[str, str]:
    """(outcome, message) of one damaged example."""
    from r1s_jax.io.errors import UserError

    try:
        result = digest(reader.call(folder))
    except (UserError, OSError) as error:
        message = str(error)
        if len(message) > MOST_CHARACTERS:
            return "long", message[:300]
        names = {path.name for path in folder.rglob("*")} | {str(folder)}
        return ("clear" if any(name in message for name in names) else "unnamed"), message
    except Exception:
        return "traceback", traceback.format_exc()[-1500:]
    if result == good:
        return "same", ""
    sealed = any(Path(damaged).match(pattern) for pattern in reader.sealed)
    return ("used" if sealed else "other"), ""


def _work(tasks: Any, answers: Any) -> None:
    """The loop of a process that judges inputs until it receives None."""
    import logging
    import os
    import warnings

    os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    goods: dict[str, tuple[Path, str]] = {}
    with tempfile.TemporaryDirectory() as base:
        while (task := tasks.get()) is not None:
            name, seed = task
            reader = READERS[name]
            if name not in goods:
                example = Path(base, name.replace(" ", "_"), "good")
                example.mkdir(parents=True)
                reader.make(example)
                goods[name] = example, digest(reader.call(example))
            example, good = goods[name]
            folder = example.parent / "bad"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(example, folder)
            damaged = damage(folder, random.Random(f"{name} {seed}"))
            answers.put((name, seed, damaged, *judge(reader, folder, damaged, good)))


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.tasks, self.answers = context.Queue(), context.Queue()
        self.process = context.Process(target=_work, args=(self.tasks, self.answers), daemon=True)
        self.process.start()
        self.fresh: set[str] = set()

    def ask(self, name: str, seed: int) -> tuple[str, int, str, str, str]:
        self.tasks.put((name, seed))
        patience = PATIENCE_S if name in self.fresh else 4 * PATIENCE_S
        self.fresh.add(name)
        waited = 0.0
        while waited < patience:
            try:
                return self.answers.get(timeout=0.5)
            except Exception:
                waited += 0.5
                if not self.process.is_alive():
                    return name, seed, "", "crash", f"exit code {self.process.exitcode}"
        self.process.kill()
        return name, seed, "", "hang", f"{patience:g} s"


def run(readers: list[str], seed: int, inputs: int, tell: bool = False) -> dict[str, Counter]:
    """Counts of outcomes by reader over `inputs` inputs in all; prints bad ones."""
    total = sum(READERS[name].weight for name in readers)
    counts: dict[str, Counter] = {name: Counter() for name in readers}
    worker, shown = _Worker(), Counter()
    for name in readers:
        for i in range(max(1, inputs * READERS[name].weight // total)):
            _, _, damaged, outcome, message = worker.ask(name, seed * 1_000_003 + i)
            counts[name][outcome] += 1
            if outcome in BAD and shown[name, outcome] < 3:
                shown[name, outcome] += 1
                print(
                    f"{name}: {outcome}: {damaged} (seed {seed}, input {i})\n{message}\n",
                    flush=True,
                )
            if outcome in ("hang", "crash"):
                worker = _Worker()
        if tell:
            print(f"{name:16}", dict(counts[name]), file=sys.stderr, flush=True)
    worker.tasks.put(None)
    return counts
