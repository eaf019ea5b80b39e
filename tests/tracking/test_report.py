"""The page that compares runs: its content, and its behaviour in a real browser."""

import dataclasses
import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1s_jax import cli
from r1s_jax.config import override
from r1s_jax.configs import tiny_world
from r1s_jax.io.journal import DataError
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.system.files import write_json
from r1s_jax.tracking import charts, report
from r1s_jax.tracking.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium is installed")

# Text of a question or a policy that the page must not interpret.
HOSTILE = (
    '</script><script>evil=1</script><img src=x onerror="evil=2"> \x00 "quoted\' {{ 7 * 7 }} '
    "שלום \u202eturned\u202c \u2028 عربي 日本語 \ud800 &lt;"
)
SHOWN = (  # the same with replacements for characters that a page cannot hold
    HOSTILE.replace("\x00", "\u2400")
    .replace("\ud800", "\ufffd")
    .replace("\u202e", "[U+202E]")
    .replace("\u202c", "[U+202C]")
)


def metric_row(step: int, **columns) -> dict:
    row = {"step": step, "stage": "stage1" if step < 4 else "stage2", "reward": 0.1 * step}
    return row | {"answer_f1": 0.5, "entropy": 2.0 / step, "seconds_update": 1.5} | columns


def trace_row(step: int, *, searches: int = 1, text: str = " Let me search. ") -> dict:
    query = f"{protocol.BEGIN_QUERY} {text} {protocol.END_QUERY}"
    answer = f" So.{protocol.END_THINK} {protocol.BEGIN_ANSWER} {text} {protocol.END_ANSWER}"
    spans = [[text + query, True], [protocol.document_block([text]), False]] * searches
    spans.append([answer, True])
    written = "".join(text for text, by_policy in spans if by_policy)
    tokens = re.findall(r"\s*\w+|\s*\W", written)
    return {
        "step": step,
        "question": text,
        "answers": [text],
        "reward": 0.1 * step,
        "finish": "finished",
        "spans": spans,
        "token_advantages": [[token, 0.25 - i] for i, token in enumerate(tokens)],
        "searches": [{"query": text}] * searches,
    }


def make_run(path: Path, *changes: str, rows=(), traces=(), cold_start=(), summary=None) -> Path:
    path.mkdir(parents=True)
    config = override(tiny_world.config(), list(changes))
    write_json(path / "config.json", dataclasses.asdict(config))
    write_json(path / "versions.json", {"jax": "0.10.2", "devices": ["cpu:0"]})
    for name, values in (("metrics", rows), ("traces", traces), ("cold_start", cold_start)):
        if values:
            lines = "".join(json.dumps(row) + "\n" for row in values)
            (path / f"{name}.jsonl").write_text(lines)
    if summary:
        write_json(path / "summary.json", summary)
    return path


ALARM = {"signal": "low_entropy", "level": "warning", "value": 0.4, "advice": "Explore <more>."}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> list[Path]:
    """A finished run, and a running one: shorter, with gaps, alarms and other columns."""
    folder = tmp_path_factory.mktemp("runs")
    finished = make_run(
        folder / "finished",
        rows=[metric_row(step, kl=0.0) for step in range(1, 9)],
        cold_start=[{"step": step, "loss": 5.0 / step} for step in (1, 2, 3)],
        traces=[trace_row(step, searches=1 + step % 2) for step in range(1, 9)],
        summary={"f1_before": 0.015, "f1_after": 0.995, "seconds": 3725.0, "mean_reward": 0.4},
    )
    rows = [metric_row(step, mine=7.0 + step) for step in range(1, 7)]
    rows[2]["entropy"], rows[4]["entropy"] = math.nan, math.inf
    del rows[3]["answer_f1"]
    for row in (rows[1], rows[2], rows[5]):
        row["health"] = [ALARM | {"value": row["step"] / 10}]
    rows[5]["health"].append({**ALARM, "signal": "nan", "level": "fatal", "value": math.nan})
    traces = [trace_row(2, text=HOSTILE), trace_row(5, text=HOSTILE)]
    going_on = make_run(folder / "going <b>on", "seed=1", rows=rows, traces=traces)
    with (going_on / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')  # an unfinished line
    with (going_on / "traces.jsonl").open("a") as file:
        file.write('{"step": 7, "quest')
    return [finished, going_on]


@pytest.fixture(scope="module")
def page(two_runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    write_report(two_runs, path)
    return path


def words(path: Path) -> str:
    """The text of a page without tags."""
    body = path.read_text("utf-8").partition("<main>")[2].partition("<script")[0]
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", body.replace("<wbr>", ""))).split())


def browse(page: Path, width: int, script: str) -> dict:
    """The result of `script` in the page at `width` pixels; `errors` are the errors of the page."""
    catcher = "<script>errors = []; addEventListener('error', e => errors.push(e.message))</script>"
    watched = page.with_name("watched.html")
    watched.write_text(page.read_text("utf-8").replace("<head>", f"<head>{catcher}", 1), "utf-8")
    # A browser window has at least 500 pixels; a frame may be narrower.
    frame = f"""<iframe src="watched.html" width={width} height=900></iframe><pre></pre><script>
        addEventListener("load", () => {{
            const w = document.querySelector("iframe").contentWindow, d = w.document;
            const all = selector => [...d.querySelectorAll(selector)];
            const type = (e, value) => {{
                e.value = value; e.dispatchEvent(new w.Event("input", {{bubbles: true}})); }};
            const press = (e, key) => e.dispatchEvent(new w.KeyboardEvent("keydown", {{key}}));
            const result = (() => {{ {script} }})();
            const answer = JSON.stringify({{...result, errors: w.errors, evil: w.evil ?? null}});
            document.querySelector("pre").textContent = answer;
        }})</script>"""
    outer = page.with_name("frame.html")
    outer.write_text(f"<!doctype html><meta charset=utf-8>{frame}", "utf-8")
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update")
    profile = page.parent / f"profile-{width}"
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet)
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={profile}", "--allow-file-access-from-files",
         "--window-size=1400,1000", "--dump-dom", outer.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    (output,) = re.findall("<pre>(.*?)</pre>", done.stdout, re.S)
    return json.loads(html.unescape(output))


# ---- in a browser


@needs_browser
def test_curves_react_to_pointer_keys_and_controls(page):
    got = browse(
        page,
        1280,
        """
        const panels = Object.fromEntries(all(".panel").map(
            p => [p.dataset.axis + ": " + p.querySelector("figcaption").textContent, p]));
        const readout = p => p.querySelector(".readout").innerText.replace(/\\s+/g, " ").trim();
        const reward = panels["learning: Reward"], entropy = panels["learning: Entropy"];
        const out = {
            curves: Object.fromEntries(Object.entries(panels).map(
                ([name, p]) => [name, p.querySelectorAll(".curve").length])),
            smoothed_at_first: all(".smoothed").length,
            last: readout(reward),
        };
        const svg = reward.querySelector("svg");
        press(svg, "ArrowRight"); press(svg, "Home"); press(svg, "ArrowRight");
        out.second = readout(reward);
        out.second_elsewhere = readout(entropy);
        out.cold_start_unmoved = readout(panels["Cold start: Loss"]);
        press(svg, "ArrowRight");
        out.not_finite = readout(entropy);
        const box = entropy.querySelector("svg").getBoundingClientRect();
        entropy.querySelector("svg").dispatchEvent(new w.PointerEvent("pointermove",
            {clientX: box.left + box.width * 344 / 360, clientY: box.top + 20}));
        out.pointed_at_the_end = readout(reward);
        entropy.querySelector("svg").dispatchEvent(new w.PointerEvent("pointerleave"));
        out.left = readout(reward);
        const slider = d.querySelector("[name=smoothing]");
        type(slider, 0.9); out.smoothed = all(".smoothed").length;
        type(slider, 0); out.smoothed_no_more = all(".smoothed").length;
        const box_of_b = all("#curve-controls [type=checkbox]")[1];
        box_of_b.click();
        out.without_b = all(".curve").filter(c => c.getBoundingClientRect().width).length;
        out.without_b_read = readout(reward);
        return out;
        """,
    )
    assert got["errors"] == [] and got["evil"] is None
    assert got["curves"] == {
        "learning: Reward": 2,
        "learning: Answer F1": 2,
        "learning: KL to the reference": 1,
        "learning: Entropy": 2,
        "learning: Seconds: update": 2,
        "learning: Mine": 1,
        "Cold start: Loss": 1,
    }
    assert got["smoothed_at_first"] == got["smoothed_no_more"] == 0
    assert got["smoothed"] == sum(got["curves"].values())
    assert got["last"] == got["left"] == "A 0.8 B 0.6 last"
    assert got["second"].startswith("step 2 A 0.2 B 0.2")
    assert got["second_elsewhere"] == "step 2 A 1 B 1 B ▲ low_entropy (warning)"
    assert got["cold_start_unmoved"] == "A 1.667 last"
    assert got["not_finite"].startswith("step 3 A 0.6667 B –")
    assert got["pointed_at_the_end"] == "step 8 A 0.8 B –"
    # Only run B has "Mine", under a collapsed heading.
    assert got["without_b"] == 6
    assert got["without_b_read"].startswith("A 0.8")


@needs_browser
def test_trajectories_are_filtered_and_read_token_by_token(page):
    got = browse(
        page,
        1280,
        """
        const form = d.getElementById("trace-controls").elements;
        const shown = () => all("details.trace").filter(t => !t.hidden).map(
            t => [t.dataset.run, t.dataset.step, t.dataset.searches].join(" "));
        const out = {all: shown()};
        for (const [name, value] of [["run", "1"], ["step_from", "4"], ["step_to", "4"],
                                     ["reward_from", "0.65"], ["searches", "2"]]) {
            type(form[name], value); out[name] = shown();
            out[name + " count"] = form.count.value;
            type(form[name], "");
        }
        const trace = all("details.trace[data-run='1']")[0];
        trace.open = true;
        const text = trace.querySelector(".trace-text");
        out.labels = [...text.querySelectorAll(".label")].map(l => l.textContent);
        out.texts = [...text.querySelectorAll(".text")].map(t => t.textContent);
        const tip = d.getElementById("tip");
        press(text, "ArrowRight"); press(text, "ArrowRight");
        out.keys = tip.textContent;
        const token = text.querySelectorAll("i")[3];
        token.dispatchEvent(new w.PointerEvent("pointerover", {bubbles: true}));
        out.pointer = tip.textContent; out.visible = !tip.hidden;
        return out;
        """,
    )
    assert got["errors"] == [] and got["evil"] is None
    assert len(got["all"]) == 10
    assert got["run"] == ["1 2 1", "1 5 1"] and got["run count"] == "2 shown"
    assert got["step_from"] == ["0 4 1", "0 5 2", "0 6 1", "0 7 2", "0 8 1", "1 5 1"]
    assert got["step_to"] == ["0 1 2", "0 2 1", "0 3 2", "0 4 1", "1 2 1"]
    assert got["reward_from"] == ["0 7 2", "0 8 1"]
    assert got["searches"] == ["0 1 2", "0 3 2", "0 5 2", "0 7 2"]
    assert got["labels"] == ["wrote", "searched", "retrieved", "wrote", "answered"]
    row = trace_row(2, text=SHOWN)
    wrote = "".join(t for i, t in enumerate(got["texts"]) if i != 2)
    assert wrote == "".join(text for text, by_policy in row["spans"] if by_policy)
    assert got["texts"][2] == protocol.document_block([SHOWN]).strip("\n")
    assert (got["keys"], got["pointer"], got["visible"]) == (
        "advantage -0.75", "advantage -2.75", True,
    )  # fmt: skip


@needs_browser
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_is_never_wider_than_the_screen(page, width):
    got = browse(
        page,
        width,
        """
        all("details").forEach(x => x.open = true);
        const root = d.documentElement;
        return {over: root.scrollWidth - root.clientWidth, seen: root.clientWidth};
        """,
    )
    assert got["errors"] == [] and got["over"] == 0
    assert width - 20 <= got["seen"] <= width


# ---- content


def test_results_differences_and_health(page):
    text = words(page)
    assert "finished, step 8 of 34" in text
    assert "step 6 of 34; no summary: running or stopped" in text
    assert "Held-out F1, before → after 0.015 → 0.995 –" in text
    assert "Time 1 h 2 min –" in text
    differing = text.partition("Config differences")[2].partition("Whole config")[0]
    assert differing.split()[-3:] == ["seed", "0", "1"]
    assert "jax 0.10.2 0.10.2" in text
    health = text.partition("Health Run")[2].partition("Curves")[0]
    assert "B nan fatal 6 nan Explore <more>." in health
    assert "B low_entropy warning 2–3, 6 0.6 Explore <more>." in health
    marks = re.findall(r'class="alarm (\w+) r1"', page.read_text())
    assert marks.count("fatal") == 5 and marks.count("warning") == 5  # on each curve of B


def test_the_page_is_self_contained(page):
    text = page.read_text("utf-8")
    assert {link for link in re.findall(r"\bhref=\"([^\"]*)", text) if link[0] != "#"} == set()
    assert not re.search(
        r"<link|<script src|<img|@import|url\(", text.replace(html.escape(HOSTILE), "")
    )
    assert "<b>on" not in text and "<script>evil" not in text and "{{" in text
    assert not list(page.parent.glob("*.partial"))


def test_runs_with_almost_no_data(tmp_path):
    fresh = make_run(tmp_path / "made")
    cold = make_run(tmp_path / "cold", cold_start=[{"step": 1, "loss": math.nan}])
    once = make_run(tmp_path / "once", rows=[metric_row(1)])
    write_report([fresh], tmp_path / "a.html")
    text = words(tmp_path / "a.html")
    assert "not a step yet" in text and "No step has been written" in text
    assert "Nothing fired." in text and "No trajectory was written." in text
    write_report([cold, once], tmp_path / "b.html")
    text = words(tmp_path / "b.html")
    assert "cold start, step 1 of at most 1500" in text and "step 1 of 34" in text
    assert "None: these runs have one config." in text
    assert "No run has numbers of: Exact match" in text
    source = (tmp_path / "b.html").read_text()
    assert source.count('class="dot"') == 4 and source.count('class="broken"') == 1


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("metrics.jsonl", '{"step": 1', "metrics.jsonl, line 2: "),
        ("metrics.jsonl", "[1]", "line 2: expected a JSON object, found a list"),
        ("metrics.jsonl", '{"reward": 1}', "line 2: Object missing required field `step`"),
        ("metrics.jsonl", '{"step": 2, "health": ["x"]}', "line 2: health[0]: Expected `object`"),
        ("metrics.jsonl", '{"step": 2, "health": null}', "line 2: health: Expected `array`"),
        ("traces.jsonl", '{"step": 1}', "traces.jsonl, line 2: no trajectory"),
        ("traces.jsonl", json.dumps(trace_row(1) | {"token_advantages": [["x", 1]]}), "spell"),
    ],
)
def test_broken_files_are_named(tmp_path, name, line, message):
    run = make_run(tmp_path / "run", rows=[metric_row(1)], traces=[trace_row(1)])
    with (run / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=re.escape(message)):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_is_named(tmp_path, two_runs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is no run: it holds no config.json"):
        write_report([*two_runs, tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"must be a file named \.html"):
        write_report(two_runs, two_runs[0] / "config.json")
    with pytest.raises(DataError, match="given twice"):
        write_report([two_runs[0], two_runs[0]], tmp_path / "report.html")
    (two_runs[0].parent / "broken").mkdir()
    (two_runs[0].parent / "broken" / "versions.json").write_text("{}")
    for damaged in ("{", '{"stage1": {"steps": []}}', '{"cold_start": 3}'):
        (two_runs[0].parent / "broken" / "config.json").write_text(damaged)
        with pytest.raises(DataError, match=r"broken/config.json: "):
            write_report([two_runs[0].parent / "broken"], tmp_path / "report.html")
    (two_runs[0].parent / "broken" / "config.json").write_text("{}")
    huge = json.dumps({"step": 1, "answer_f1": 10**400})
    (two_runs[0].parent / "broken" / "metrics.jsonl").write_text(huge + "\n")
    with pytest.raises(DataError, match=r"broken/metrics.jsonl, step 1: answer_f1: "):
        write_report([two_runs[0].parent / "broken"], tmp_path / "report.html")


def test_the_command(two_runs, tmp_path):
    out = tmp_path / "page.html"
    done = CliRunner().invoke(cli.app, ["report", *map(str, two_runs), "--out", str(out)])
    assert done.exit_code == 0 and done.stdout.strip() == str(out)
    assert "2 runs compared" in words(out)


# ---- curves


def test_a_long_curve_keeps_its_extremes():
    rows = [{"step": i, "x": math.sin(i)} for i in range(20_000)]
    rows[7_777]["x"], rows[12_345]["x"] = 50.0, -50.0
    panel = charts.panel("x", "X", [rows], charts.x_scale([rows]))
    (curve,) = panel.curves
    assert len(curve.x) < 1_000 and (curve.x[0], curve.x[-1]) == (0, 19_999)
    assert dict(zip(curve.x, curve.y, strict=True))[7_777] == 50.0
    assert dict(zip(curve.x, curve.y, strict=True))[12_345] == -50.0


def test_a_missing_value_breaks_the_line():
    values = [1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0]
    rows = [{"step": i} | ({"x": v} if v is not None else {}) for i, v in enumerate(values)]
    panel = charts.panel("x", "X", [rows], charts.x_scale([rows]))
    (curve,) = panel.curves
    assert panel.path(curve).count("M") == 2 and panel.path(curve).count("L") == 2
    assert [x for x, _ in panel.dots(curve)] == [panel.x(3)]
    assert curve.not_finite == [4]
    assert charts.panel("absent", "", [rows], charts.x_scale([rows])) is None


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1e-9, 1e-9], [5e8, 5e8 + 1], [math.nan]])
def test_every_axis_has_a_height(values):
    rows = [{"step": i, "x": v} for i, v in enumerate(values)]
    panel = charts.panel("x", "X", [rows], charts.x_scale([rows]))
    assert panel.y.low < panel.y.high
    for value in filter(math.isfinite, values):
        assert charts.TOP <= panel.y(value) <= charts.BOTTOM


@pytest.mark.parametrize("value", [10**400, True, "x", None])
def test_nan_is_shown_as_missing(value):
    assert report._number(value) == report._duration(value) == "–"
    assert report._number(float("nan")) == "nan" and report._duration(float("nan")) == "–"
