// Live events, and small conveniences. Every page can be read without it.
"use strict";

const MOST = 200; // events on the page

function watch(list) {
  const status = document.getElementById("tail-status");
  const count = document.getElementById("tail-count");
  const pause = document.getElementById("tail-pause");
  const clear = document.getElementById("tail-clear");
  let shown = 0, skipped = 0, overrun = false, paused = false;
  const source = new EventSource(list.dataset.url);

  function tell(state) {
    const lost = skipped ? `, ${skipped.toLocaleString("en")} skipped: they arrived faster than a page shows them` : "";
    const missing = overrun ? " More may be missing: they arrived faster than the server read them." : "";
    if (status.textContent !== state) status.textContent = state; // announced by screen readers
    count.textContent = `${shown.toLocaleString("en")} shown${lost}.${missing}`;
  }

  function item(one) {
    const entry = document.createElement("li");
    const head = document.createElement("p");
    const time = document.createElement("time");
    const at = new Date(one.at * 1000);
    time.dateTime = at.toISOString();
    time.textContent = at.toTimeString().slice(0, 8);
    const name = document.createElement("strong");
    name.textContent = one.event || "(no name)";
    const kind = document.createElement("span");
    kind.className = "soft";
    kind.textContent = one.kind;
    head.append(time, name, ` of ${one.source || "?"} `, kind);
    const body = document.createElement("pre");
    body.tabIndex = 0;
    body.textContent = one.body;
    entry.append(head, body);
    return entry;
  }

  source.addEventListener("open", () => tell("Listening."));
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) tell("The server refused the connection: open the page again.");
    else tell("The connection was lost; connecting again.");
  });
  source.addEventListener("problem", (event) => {
    source.close();
    status.textContent = JSON.parse(event.data).text;
  });
  source.addEventListener("events", (event) => {
    const batch = JSON.parse(event.data);
    skipped += batch.skipped;
    overrun ||= batch.overrun;
    if (paused) skipped += batch.events.length;
    else {
      shown += batch.events.length;
      list.prepend(...batch.events.map(item).reverse());
      while (list.children.length > MOST) list.lastElementChild.remove();
    }
    tell(paused ? "Paused." : "Listening.");
  });
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? "Continue" : "Pause";
    tell(paused ? "Paused." : "Listening.");
  });
  clear.addEventListener("click", () => list.replaceChildren());
  document.getElementById("tail-actions").hidden = false;
  window.addEventListener("pagehide", () => source.close());
}

const list = document.getElementById("tail");
if (list) watch(list);

const all = document.querySelector("[data-select-all]");
if (all) {
  all.hidden = false;
  all.addEventListener("click", () => {
    const boxes = [...document.querySelectorAll('input[name="letter"]')];
    const checked = boxes.some((box) => !box.checked);
    for (const box of boxes) box.checked = checked;
  });
}

// On a map, the lines of the box that is pointed at. (The listeners are not the SVG's: Chromium would then focus it.)
for (const map of document.querySelectorAll(".wide:has(> svg.map)")) {
  const light = (event) => {
    const path = event.target.closest?.("a.node")?.getAttribute("href");
    for (const edge of map.querySelectorAll(".edge"))
      edge.classList.toggle("lit", path !== undefined && (edge.dataset.from === path || edge.dataset.to === path));
  };
  for (const kind of ["pointerover", "pointerleave", "focusin", "focusout"]) map.addEventListener(kind, light);
}
