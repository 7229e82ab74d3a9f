// Parts of a page that cannot be read: wider than the window or than their box, and not within a box that scrolls.
(() => {
  const found = [];
  const root = document.documentElement;
  const width = root.clientWidth;
  const content = document.querySelector(".content");
  const name = (element) => element.outerHTML.slice(0, 120);
  // On a phone, the theme lets the whole content scroll: that is for the reader the same as the page.
  const scrolls = (element) => element !== content && ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const has_text = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  for (const element of [root, content]) {
    if (element.scrollWidth > element.clientWidth + 1) found.push(`${element.scrollWidth} px: ${name(element)}`);
  }
  for (const element of content.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    let around = element;
    while (around !== root && !scrolls(around)) around = around.parentElement;
    // Inline elements have no clientWidth.
    if (around === root && has_text(element) && element.clientWidth && element.scrollWidth > element.clientWidth + 1) {
      found.push(`${element.scrollWidth} px in a box of ${element.clientWidth} px: ${name(element)}`);
    }
    const outer = around === root ? box : around.getBoundingClientRect();
    if (outer.left < -1 || outer.right > width + 1) {
      found.push(`${Math.round(outer.left)} to ${Math.round(outer.right)} px: ${name(element)}`);
    }
  }
  return found.slice(0, 5);
})();
