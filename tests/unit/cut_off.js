// What of a page cannot be read: parts that are wider than the window, and not within a box that scrolls.
(() => {
  const found = [];
  const root = document.documentElement;
  const width = root.clientWidth;
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const name = (element) => element.outerHTML.slice(0, 120);
  if (root.scrollWidth > width) found.push(`the page is ${root.scrollWidth} px wide`);
  for (const element of document.querySelectorAll(".content *")) {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    if (getComputedStyle(element).overflowX === "hidden" && element.scrollWidth > element.clientWidth + 1) {
      found.push(`hides a part: ${name(element)}`);
    }
    if (box.left >= -1 && box.right <= width + 1) continue;
    let around = element.parentElement;
    while (around !== document.body && !scrolls(around)) around = around.parentElement;
    const place = around.getBoundingClientRect();
    if (around === document.body || place.left < -1 || place.right > width + 1) {
      found.push(`${Math.round(box.left)} to ${Math.round(box.right)} px: ${name(element)}`);
    }
  }
  return found.slice(0, 5);
})();
