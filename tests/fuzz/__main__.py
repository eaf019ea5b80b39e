"""Damages valid examples of everything that is read, and looks at what comes of it.

`python -m tests.fuzz [--reader NAME] [--seed S] [--inputs N]` prints a table and ends with status 1
where a reader showed a traceback, hung, died, gave an error that does not name its file or is
longer than 400 characters, or used damaged parameters, vectors or indexes.
"""

import argparse
import sys
from collections import Counter

from tests.fuzz.engine import READERS, run
from tests.fuzz.reader import BAD, OUTCOMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000)
    given = parser.parse_args()
    readers = [given.reader] if given.reader else list(READERS)
    counts = run(readers, given.seed, given.inputs, tell=True)
    print(f"{'reader':16}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{name:16}" + "".join(f"{found[outcome]:>10}" for outcome in OUTCOMES))
    sys.exit(any(found[outcome] for found in counts.values() for outcome in BAD))


if __name__ == "__main__":
    main()
