"""Damages valid examples of all input formats and classifies the outcomes.

`python -m tests.fuzz [--reader NAME] [--seed S] [--inputs N]` prints a table and exits with 1 if a
reader raised an error that users cannot mend, hung, crashed, gave a message that does not name its
file or is longer than 400 characters, or used damaged parameters, vectors or indexes.
"""

import argparse
import sys
from collections import Counter

from tests.fuzz.engine import READERS, run
from tests.fuzz.reader import BAD, OUTCOMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", choices=READERS, help="run only this reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=2000)
    args = parser.parse_args()
    readers = [args.reader] if args.reader else list(READERS)
    counts = run(readers, args.seed, args.inputs, tell=True)
    print(f"{'reader':16}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for name, outcomes in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{name:16}" + "".join(f"{outcomes[outcome]:>10}" for outcome in OUTCOMES))
    sys.exit(any(outcomes[outcome] for outcomes in counts.values() for outcome in BAD))


if __name__ == "__main__":
    main()
