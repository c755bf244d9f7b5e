"""A real browser, and a check of how a page is laid out in it."""

import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def probe(selector: str) -> str:
    """Return a JavaScript function: how many boxes the selector has, and what is `wrong`.

    Wrong is what runs out of the page, lies on a neighbor that it does not hold, or is an image
    that did not load.
    """
    return """() => {
  const wide = document.documentElement.scrollWidth > innerWidth ? ["page is too wide"] : [];
  const boxes = [...document.querySelectorAll("SELECTOR")];
  const hit = boxes.filter(a => boxes.some(b => {
    if (a === b || a.contains(b) || b.contains(a)) return false;
    const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
    return Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
      && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 1;
  })).map(a => a.className || a.tagName);
  const torn = [...document.images].filter(i => !i.naturalWidth).map(() => "broken image");
  return {boxes: boxes.length, wrong: [...wide, ...hit, ...torn]};
}""".replace("SELECTOR", selector)
