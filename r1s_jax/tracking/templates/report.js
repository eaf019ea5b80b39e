"use strict";
(() => {
  const { letters, plot: [LEFT, RIGHT, TOP, BOTTOM], alarms } = JSON.parse(
    document.getElementById("data").textContent
  );
  const SVG = "http://www.w3.org/2000/svg";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const hiddenRuns = new Set();
  const text = (value) =>
    value === null ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));

  // ---- curves

  const panels = all(".panel").map((figure) => {
    const { x, y, curves } = JSON.parse(figure.dataset.panel);
    const readout = figure.querySelector(".readout");
    return {
      figure, curves, readout, axis: figure.dataset.axis,
      svg: figure.querySelector("svg"),
      cross: figure.querySelector(".cross"),
      last: [...readout.childNodes],
      steps: [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b),
      px: (step) => LEFT + ((step - x[0]) / (x[1] - x[0])) * (RIGHT - LEFT),
      py: (value) => BOTTOM + ((value - y[0]) / (y[1] - y[0])) * (TOP - BOTTOM),
      step: (pixel) => x[0] + ((pixel - LEFT) / (RIGHT - LEFT)) * (x[1] - x[0]),
    };
  });

  const nearest = (steps, to) =>
    steps.reduce((best, step) => (Math.abs(step - to) < Math.abs(best - to) ? step : best), steps[0]);

  // A thinned curve lacks some steps: its nearest step is taken, within the ends of the curve.
  const indexAt = (curve, step) =>
    step < curve.x[0] || step > curve.x[curve.x.length - 1] ? -1 : curve.x.indexOf(nearest(curve.x, step));

  function entry(className, run, words) {
    const span = document.createElement("span");
    if (run !== null) {
      const key = document.createElement("span");
      key.className = `key r${run % 8}`;
      key.textContent = letters[run];
      span.append(key, " ");
    }
    span.append(words);
    span.className = className;
    return span;
  }

  function read(panel, step) {
    all(".point", panel.svg).forEach((point) => point.remove());
    panel.cross.toggleAttribute("hidden", step === null);
    panel.at = step;
    if (step === null) {
      panel.readout.replaceChildren(...panel.last);
      return;
    }
    panel.cross.setAttribute("d", `M${panel.px(step)} ${TOP}V${BOTTOM}`);
    const entries = [entry("dim", null, `step ${step}`)];
    for (const curve of panel.curves.filter((c) => !hiddenRuns.has(c.run))) {
      const index = indexAt(curve, step);
      const value = index < 0 ? null : curve.y[index];
      entries.push(entry("", curve.run, text(value)));
      if (value === null) continue;
      const point = document.createElementNS(SVG, "circle");
      point.setAttribute("class", `point r${curve.run % 8}`);
      point.setAttribute("cx", panel.px(curve.x[index]));
      point.setAttribute("cy", panel.py(value));
      point.setAttribute("r", 4);
      panel.svg.append(point);
    }
    if (panel.axis === "learning")
      for (const [run, signal, stretches] of alarms)
        if (!hiddenRuns.has(run) && stretches.some(([a, b]) => a <= step && step <= b))
          entries.push(entry("fired", run, `▲ ${signal}`));
    panel.readout.replaceChildren(...entries);
  }

  // All panels of an axis show the same step, to compare them.
  const readAll = (axis, step) => panels.filter((p) => p.axis === axis).forEach((p) => read(p, step));

  for (const panel of panels) {
    panel.svg.addEventListener("pointermove", (event) => {
      const box = panel.svg.getBoundingClientRect();
      const pixel = ((event.clientX - box.left) / box.width) * panel.svg.viewBox.baseVal.width;
      const step = nearest(panel.steps, panel.step(pixel));
      if (step !== panel.at) readAll(panel.axis, step);
    });
    panel.svg.addEventListener("pointerleave", () => readAll(panel.axis, null));
    panel.svg.addEventListener("blur", () => readAll(panel.axis, null));
    panel.svg.addEventListener("keydown", (event) => {
      const ends = { Home: 0, End: panel.steps.length - 1 };
      const moves = { ArrowLeft: -1, ArrowRight: 1 };
      const now = panel.steps.indexOf(panel.at ?? null);
      let to = ends[event.key];
      if (event.key in moves) to = now < 0 ? ends.End : now + moves[event.key];
      if (to === undefined) return;
      event.preventDefault();
      readAll(panel.axis, panel.steps[Math.max(0, Math.min(to, ends.End))]);
    });
  }

  // Exponential mean with bias correction; a gap stays a gap.
  function smoothedPath(panel, curve, weight) {
    let sum = 0, due = 0, pen = "M";
    return curve.y.map((value, i) => {
      if (value === null) { pen = "M"; return ""; }
      sum = weight * sum + (1 - weight) * value;
      due = weight * due + (1 - weight);
      const piece = `${pen}${panel.px(curve.x[i]).toFixed(1)} ${panel.py(sum / due).toFixed(1)}`;
      pen = "L";
      return piece;
    }).join("");
  }

  function smooth(weight) {
    document.getElementById("curves").classList.toggle("smoothing", weight > 0);
    for (const panel of panels) {
      all(".smoothed", panel.svg).forEach((path) => path.remove());
      if (weight > 0)
        for (const curve of panel.curves) {
          const path = document.createElementNS(SVG, "path");
          path.setAttribute("class", "smoothed");
          path.setAttribute("d", smoothedPath(panel, curve, weight));
          panel.svg.querySelector(`g[data-run="${curve.run}"] > .curve`).after(path);
        }
    }
  }

  const controls = document.getElementById("curve-controls");
  controls?.addEventListener("submit", (event) => event.preventDefault());
  controls?.addEventListener("input", (event) => {
    if (event.target.type === "checkbox") {
      const run = Number(event.target.value);
      event.target.checked ? hiddenRuns.delete(run) : hiddenRuns.add(run);
      for (const panel of panels) read(panel, null);
      all(`.panel [data-run="${run}"]`).forEach((e) => e.toggleAttribute("hidden", hiddenRuns.has(run)));
      return;
    }
    const weight = Number(controls.elements.smoothing.value);
    controls.elements.weight.value = weight ? weight.toFixed(2) : "off";
    smooth(weight);
  });

  // ---- trajectories

  const filters = document.getElementById("trace-controls");
  const traces = all("details.trace");
  const within = (value, from, to) =>
    (from === "" || Number(value) >= Number(from)) && (to === "" || Number(value) <= Number(to));

  function filter() {
    const chosen = Object.fromEntries(new FormData(filters));
    for (const trace of traces) {
      const { run, step, reward, searches } = trace.dataset;
      trace.hidden = !(
        (chosen.run === "" || chosen.run === run) &&
        (chosen.searches === "" || chosen.searches === searches) &&
        within(step, chosen.step_from, chosen.step_to) &&
        within(reward, chosen.reward_from, chosen.reward_to)
      );
    }
    filters.elements.count.value = `${traces.filter((trace) => !trace.hidden).length} shown`;
  }

  filters?.addEventListener("input", filter);
  filters?.addEventListener("submit", (event) => event.preventDefault());
  if (filters) filter(); // a browser may restore the choices after a reload
})();
