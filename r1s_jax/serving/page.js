"use strict";
// Foreign text (model, documents, questions) is set as textContent only, never as markup.

const form = document.getElementById("ask");
const box = document.getElementById("question");
const send = document.getElementById("send");
let running = null;

function element(name, kind, text) {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  if (text) node.textContent = text;
  return node;
}

function fold(title, kind) {
  const details = element("details");
  const summary = element("summary", kind, title);
  details.append(summary);
  details.summary = summary;
  return details;
}

class Turn {
  constructor(question) {
    this.root = element("section", "turn");
    this.answer = element("div", "answer waiting");
    this.steps = element("div", "steps");
    this.searches = [];
    this.root.append(element("div", "question", question), this.steps, this.answer);
    document.getElementById("turns").prepend(this.root);
  }

  take(delta) {
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    if (delta.content) this.answer.append(delta.content);
    for (const search of delta.searches || []) this.search(search);
  }

  think(text) {
    if (!this.thoughts) {
      const folded = fold("Thoughts");
      this.thoughts = element("div", "thoughts");
      folded.append(this.thoughts);
      this.steps.append(folded);
    }
    this.thoughts.append(text);
  }

  search(search) {
    let folded = this.searches[search.index];
    if (!folded) {
      folded = fold("", "query");
      this.searches[search.index] = folded;
      this.steps.append(folded);
      this.thoughts = null; // later thoughts get a new fold below
    }
    const count = search.documents.length;
    const status = { searching: "searching…", empty: "nothing found" }[search.status];
    const state = search.error || status || `${count} passage${count === 1 ? "" : "s"}`;
    folded.summary.textContent = `Search: ${search.query} — ${state}`;
    folded.querySelectorAll(".passage").forEach((old) => old.remove());
    for (const document_ of search.documents) {
      const passage = element("div", "passage");
      passage.append(element("b", "", document_.title), document_.text);
      folded.append(passage);
    }
  }

  fail(message) {
    this.steps.append(element("div", "error", message));
  }

  end() {
    this.answer.classList.remove("waiting");
    if (!this.answer.textContent && !this.steps.querySelector(".error")) this.fail("No answer.");
    this.root.dataset.done = "true";
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(question, turn, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = document.getElementById("key").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  const body = { messages: [{ role: "user", content: question }], stream: true, temperature: 0 };
  const request = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await fetch("v1/chat/completions", request);
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) turn.take(choice.delta);
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const question = box.value.trim();
  if (!question) return;
  const turn = new Turn(question);
  running = new AbortController();
  send.textContent = "Stop";
  try {
    await ask(question, turn, running.signal);
  } catch (error) {
    turn.fail(error.name === "AbortError" ? "Stopped." : error.message);
  }
  turn.end();
  running = null;
  send.textContent = "Ask";
});

// A link may hold a question, /?q=..., which is sent only when the visitor submits the form.
box.value = new URLSearchParams(location.search).get("q") || "";
