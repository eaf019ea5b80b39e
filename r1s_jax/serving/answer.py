"""One growing answer of the server, as deltas and messages for OpenAI's clients."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from r1s_jax.protocol.dialect import Dialect
from r1s_jax.retrieval.api import split_line
from r1s_jax.rollout.broker import UNANSWERED, Search
from r1s_jax.rollout.trajectory import CUT_OFF, Finish
from r1s_jax.serving.jobs import Update
from r1s_jax.serving.pieces import Piece, Pieces

Delta = dict[str, Any]
_FAILED = {"timeout": "the search took too long", "error": "the search failed"}


class Failed(Exception):
    """The policy or the serving loop failed, so there is no answer."""


class Answer:
    """Turns the serving loop's updates of one job into deltas of the answer."""

    def __init__(
        self,
        dialect: Dialect,
        prompt: str,
        decode: Callable[[Sequence[int]], str],
        eos_ids: Sequence[int],
        stops: Sequence[str] = (),
        first: Sequence[Search] = (),
    ):
        """`prompt` is the whole text before the policy's first token, with the documents of the
        system's own searches `first`."""
        self._pieces = Pieces(dialect, prompt)
        self._decode, self._eos_ids = decode, eos_ids
        self._cut = _Cut(stops)
        self._turn: list[int] = []
        self._searches = list(first)
        self.content = self.reasoning = ""
        self.finish_reason: str | None = None
        self.written = self.documents = 0  # tokens

    @property
    def over(self) -> bool:
        return self.finish_reason is not None

    def feed(self, update: Update) -> list[Delta]:
        """The new deltas for the client; raises Failed.

        Text of the policy after a stop is neither sent nor counted.
        """
        if self.over:
            return []
        if update.finish == Finish.ABORTED:
            raise Failed(update.error or "the searches failed")
        deltas = self._note(update.searches)
        pairs = list(zip(update.tokens, update.mask, strict=True))
        ended = bool(update.finish and pairs and pairs[-1][1] and pairs[-1][0] in self._eos_ids)
        if ended:
            pairs.pop()
        for tokens, by_policy in _runs(pairs, singly=bool(self._cut.stops)):
            deltas += self._take(tokens, by_policy)
            if self.over:
                return deltas
        self.written += ended
        over = bool(update.finish)
        deltas += self._deltas(self._pieces.write(self._decode(self._turn), over=over))
        if over and not self.over:
            deltas += self._add_content(self._cut.rest())
            self.finish_reason = "length" if update.finish in CUT_OFF else "stop"
        return deltas

    def message(self) -> dict[str, Any]:
        """The whole message so far."""
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "searches": [search_json(search) for search in self._searches],
            "annotations": self.annotations(),
            "refusal": None,
        }

    def annotations(self) -> list[dict[str, Any]]:
        """The pages found, each once; every citation spans the whole answer."""
        titles: dict[str, str] = {}
        for search in self._searches:
            for document in search_json(search)["documents"]:
                if "url" in document:
                    titles.setdefault(document["url"], document["title"])
        span = {"start_index": 0, "end_index": len(self.content)}
        return [
            {"type": "url_citation", "url_citation": {"url": url, "title": title, **span}}
            for url, title in titles.items()
        ]

    def first_deltas(self) -> list[Delta]:
        """The results of the system's own searches before the policy's first token."""
        first, self._searches = self._searches, []
        return self._note(first)

    def _note(self, searches: Sequence[Search]) -> list[Delta]:
        deltas = []
        for search in searches:
            places = (i for i, noted in enumerate(self._searches) if noted is search)
            index = next(places, len(self._searches))
            if index == len(self._searches):
                self._searches.append(search)
            deltas.append({"searches": [{"index": index, **search_json(search)}]})
        return deltas

    def _take(self, tokens: list[int], by_policy: bool) -> list[Delta]:
        """Deltas of tokens from one writer."""
        if by_policy:
            self.written += len(tokens)
            self._turn += tokens
            return self._deltas(self._pieces.write(self._decode(self._turn)))
        self.documents += len(tokens)
        pieces = self._pieces.write(self._decode(self._turn), over=True)
        pieces += self._pieces.reply(self._decode(tokens))
        self._turn = []
        return self._deltas(pieces)

    def _deltas(self, pieces: Sequence[Piece]) -> list[Delta]:
        return [delta for kind, text in pieces for delta in self._add(kind, text)]

    def _add(self, kind: str, text: str) -> list[Delta]:
        if self.over:
            return []
        if kind == "reasoning":
            self.reasoning += text
            return [{"reasoning_content": text}]
        deltas = self._add_content(self._cut.feed(text))
        if self._cut.stopped:
            self.finish_reason = "stop"
        return deltas

    def _add_content(self, text: str) -> list[Delta]:
        self.content += text
        return [{"content": text}] if text else []


class _Cut:
    """Passes a text on, up to the first stop text."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self._held, self.stopped = stops, "", False

    def feed(self, text: str) -> str:
        """The text to pass on; an end that may become a stop is held back."""
        self._held += text
        places = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            passed, self._held = self._held[: min(places)], ""
            return passed
        held = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        end = len(self._held) - held
        passed, self._held = self._held[:end], self._held[end:]
        return passed

    def rest(self) -> str:
        """The text held back, once the answer is over."""
        rest, self._held = self._held, ""
        return rest


def _runs(pairs: Sequence[tuple[int, bool]], singly: bool) -> Iterator[tuple[list[int], bool]]:
    """Runs of tokens of one writer, and whether it is the policy; `singly` splits its runs."""
    for by_policy, run in groupby(pairs, key=lambda pair: pair[1]):
        tokens = [token for token, _ in run]
        size = 1 if singly and by_policy else len(tokens)
        for at in range(0, len(tokens), size):
            yield tokens[at : at + size], by_policy


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper prefix of `stop` that ends `text`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


def search_json(search: Search) -> dict[str, Any]:
    """A search for clients. The cause of a failure is left out, since it may name addresses."""
    if search.outcome in UNANSWERED:
        status, error = "invalid", search.detail or "no query"
    elif search.outcome in _FAILED:
        status, error = "failed", _FAILED[search.outcome]
    else:
        status, error = {"pending": "searching"}.get(search.outcome, search.outcome), None
    ids = search.ids or [""] * len(search.documents)
    value = {
        "query": search.query,
        "status": status,
        "documents": list(map(_document, ids, search.documents)),
    }
    return value | ({"error": error} if error else {})


def _document(id: str, line: str) -> dict[str, str]:
    title, text = split_line(line)
    url = {"url": id} if id.startswith(("https://", "http://")) else {}
    return {"id": id, "title": title, "text": text, **url}
