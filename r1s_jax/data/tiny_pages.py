"""The people of a generated world, their names, and the pages of its corpus."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from r1s_jax.config import TinyWorldConfig
from r1s_jax.io.errors import ConfigError
from r1s_jax.retrieval.api import join_line

# The last syllables of names are a separate set: with few syllables in common, the policy seldom
# confuses neighbouring names.
SYLLABLES = tuple(map("".join, product("bdgklmnprstz", "aio")))
LAST_SYLLABLES = tuple(map("".join, product("bdgklmnprstz", "euy")))
_STEM = 4  # letters of a name before its last syllable


@dataclass(frozen=True)
class Person:
    """A person of the world, who has one page."""

    name: str
    facts: dict[str, str]  # relation -> value, in the order of the page

    @property
    def passage(self) -> str:
        """The person's line of the corpus. It has the name twice, so that a search for the name
        ranks this page above the page of the person's student, which has it once."""
        return self.page()

    def page(self, before: str = "", after: str = "") -> str:
        """The line with texts before and after the facts."""
        facts = ", ".join(f"{relation} {value}" for relation, value in self.facts.items())
        return join_line(self.name, f"{before}{self.name} has {facts}.{after}")


class _About(NamedTuple):
    """The pages that a search for a person may find."""

    page: str
    exists: bool
    others: list[str]  # outdated ones, and those of people with names alike


class Pages:
    """The pages of a world, drawn from `rng` as `config` says.

    `people` have the true pages. `values` holds the possible values of each relation, for the facts
    that are not true; names in `taken` are nobody else's.
    """

    def __init__(
        self,
        people: Sequence[Person],
        values: Mapping[str, Sequence[str]],
        taken: Collection[str],
        config: TinyWorldConfig,
        rng: np.random.Generator,
    ):
        self._rng, self._values, self._people = rng, values, people
        self._padding = config.padding
        stale = self._some(config.stale)
        absent = self._some(1 - config.coverage)
        taken = set(taken)
        self._about = {}
        for i, person in enumerate(people):
            # The name once more, so that a search finds the outdated page first.
            outdated = f"{person.name}, I guess "
            others = [self._untrue(person, person.name, outdated)] if i in stale else []
            for name in self._alike(person.name, config.distractors, taken):
                others.append(self._untrue(person, name))
                taken.add(name)
            page = person.page(*self._facts_of_others())
            self._about[person.name] = _About(page, i not in absent, others)

    def __iter__(self) -> Iterator[str]:
        """The lines of the corpus."""
        yield from (about.page for about in self._about.values() if about.exists)
        for about in self._about.values():
            yield from about.others

    def about(self, name: str) -> list[str]:
        """A person's page, even if it is absent, and the pages that may be found in its stead."""
        about = self._about[name]
        return [about.page, *about.others]

    def _some(self, share: float) -> set[int]:
        """The numbers of a share of the people."""
        return set(self._rng.permutation(len(self._people))[: round(share * len(self._people))])

    def _untrue(self, person: Person, name: str, before: str = "") -> str:
        """A page of that name with other facts than the person's."""
        facts = {
            relation: str(self._rng.choice([v for v in self._values[relation] if v != value]))
            for relation, value in person.facts.items()
        }
        ahead, after = self._facts_of_others()
        return Person(name, facts).page(ahead + before, after)

    def _facts_of_others(self) -> tuple[str, str]:
        """True sentences about other people, before and after those of a page's own."""
        chosen = self._rng.choice(len(self._people), self._padding)
        sentences = []
        for person in (self._people[i] for i in chosen):
            relation = str(self._rng.choice(list(person.facts)))
            sentences.append(f"{person.name} has {relation} {person.facts[relation]}. ")
        ahead = int(self._rng.integers(self._padding + 1))
        return "".join(sentences[:ahead]), " " + "".join(sentences[ahead:])

    def _alike(self, name: str, distractors: int, taken: Collection[str]) -> list[str]:
        """Names that differ in the last syllable; for a name of two words, one that differs in the
        whole second word comes first."""
        first, _, second = name.rpartition(" ")
        stem = name[: -len(second) + _STEM]
        alike = [n for end in LAST_SYLLABLES if (n := stem + end) not in taken]
        if distractors > len(alike):
            raise ConfigError(f"environment.distractors={distractors}: {name} has {len(alike)}")
        namesakes = []
        if first:
            namesakes = [f"{first} {draw_names(self._rng, 1, taken)[0]}"]
        return namesakes + [alike[i] for i in self._rng.permutation(len(alike))[:distractors]]


def draw_names(rng: np.random.Generator, n: int, excluded: Collection[str]) -> list[str]:
    """`n` different names, e.g. Bakory, none of them in `excluded`."""
    total = len(SYLLABLES) ** 2 * len(LAST_SYLLABLES)
    if n > total - len(excluded):
        raise ConfigError(f"a world has {total:,} names; {n:,} people and places are too many")
    drawn: dict[str, None] = {}  # an ordered set
    while len(drawn) < n:
        first, second = rng.choice(SYLLABLES, 2)
        name = f"{first}{second}{rng.choice(LAST_SYLLABLES)}".capitalize()
        if name not in excluded:
            drawn[name] = None
    return list(drawn)
