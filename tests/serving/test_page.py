"""The chat page in a real browser."""

import json
import time
from pathlib import Path

import pytest

from r1s_jax.data.tiny_world import TRADES
from r1s_jax.retrieval.api import Hit
from tests.chromium import BROWSER, opened
from tests.serving.test_server import serving

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")
MARKUP = "<img src=x onerror='document.title=1'><b>bold</b>"


class Slow:
    """Returns passages full of markup, after a delay."""

    def search(self, queries, k):
        time.sleep(0.3)
        return [
            [Hit(f"https://pages/{i}", 0.5, f"{query}   A {query}. {MARKUP}") for i in range(k)]
            for query in queries
        ]


def test_an_answer_streams_thoughts_queries_and_passages_as_plain_text(tmp_path):
    question = f"What is the trade of Bakori? {MARKUP}"
    with serving(Slow()) as (url, serving_loop), opened(url) as page:
        page.value(f"box.value = {json.dumps(question)}; form.requestSubmit()")
        page.until("document.querySelector('.query')?.textContent.includes('searching')")
        assert not page.value("document.querySelector('[data-done]')")
        page.until("document.querySelector('[data-done]') !== null")

        assert page.value("document.querySelector('.question').textContent") == question
        assert page.value("document.querySelector('.answer').textContent") in TRADES
        assert page.value("document.querySelectorAll('.passage').length") == 2
        assert "2 passages" in page.value("document.querySelector('.query').textContent")
        assert MARKUP in page.value("document.querySelector('.passage').textContent")
        assert page.value("document.querySelectorAll('main img, main .passage b b').length") == 0
        assert page.value("document.title") == "Ask the searcher"
        assert page.value("document.querySelector('details').open") is False

        page.value("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        print(f"screenshot: {tmp_path / 'page.png'}")

        page.value("box.value = 'again'; form.requestSubmit()")
        page.until("document.querySelector('.query')?.textContent.includes('searching')")
        page.value("form.requestSubmit()")  # the button is Stop now
        page.until("document.querySelector('main').textContent.includes('Stopped.')")
        for _ in range(3000):
            if not serving_loop.slots_busy:
                return
            time.sleep(0.02)
        raise AssertionError("a stopped answer keeps its slot")


def test_failures_are_shown():
    with serving(Slow(), key="secret") as (url, _), opened(f"{url}/?q=Who%3F") as page:
        page.until("box.value === 'Who?'")
        assert not page.value("document.querySelector('.turn')")  # opening a link sends no question
        page.value("form.requestSubmit()")
        page.until("document.querySelector('[data-done]') !== null")
        assert "Incorrect API key" in page.value("document.querySelector('.error').textContent")


def test_the_page_fetches_nothing_from_other_hosts():
    for name in ("page.html", "page.js"):
        text = (Path(__file__).parents[2] / "r1s_jax/serving" / name).read_text()
        assert "http://" not in text and "https://" not in text and "innerHTML" not in text
