"use strict";
// Shows the advantage of the token that is pointed at, or reached by the arrow keys.
(() => {
  const tip = document.getElementById("tip");
  let pointed = null;

  function point(token) {
    pointed?.classList.remove("at");
    pointed = token;
    tip.hidden = !token;
    if (!token) return;
    token.classList.add("at");
    const advantages = token.dataset.a.split(" ");
    const many = advantages.length > 1 ? ` (${advantages.length} tokens)` : "";
    const parts = advantages.map((part) => part.replace(/\/(.*)/, " (KL $1)"));
    tip.textContent = `advantage ${parts.join(", ")}${many}`;
    const box = token.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(4, Math.min(box.left, room))}px`;
    tip.style.top = `${box.top > 40 ? box.top - tip.offsetHeight - 4 : box.bottom + 4}px`;
  }

  for (const body of document.querySelectorAll(".trace-text")) {
    body.addEventListener("pointerover", (event) => point(event.target.closest("i[data-a]")));
    body.addEventListener("pointerleave", () => point(null));
    body.addEventListener("blur", () => point(null));
    body.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      const tokens = [...body.querySelectorAll("i[data-a]")];
      const next = tokens[body.contains(pointed) ? tokens.indexOf(pointed) + move : 0];
      if (!next) return;
      event.preventDefault();
      next.scrollIntoView({ block: "nearest", behavior: "instant" });
      point(next);
    });
  }
  addEventListener("scroll", () => { if (!document.activeElement?.matches(".trace-text")) point(null); }, { passive: true });
})();
