"""What has to hold of a page, asked of a real browser at every width, in light and dark.

Nothing is complained of on the console, every control has a name, text has a contrast of 4.5 with what it stands on
(3 where it is large, as WCAG 2.2 has it in 1.4.3), nothing is wider than the window, and no two elements have one id.
Contrast is that of the colours of CSS: of the nearest background that is opaque, with those before it laid over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tools.pages.browser import Browser

WIDTHS = (390, 768, 1280)
SCHEMES = ("light", "dark")

CONTROLS = """
[...document.querySelectorAll('button, input, select, textarea, a[href], summary, [role=img], [role=button]')]
  .filter(e => e.checkVisibility() && e.type !== 'hidden')
  .filter(e => !(e.getAttribute('aria-label') || '').trim()
    && ![...(e.labels || [])].some(l => l.textContent.trim())
    && !(e.getAttribute('aria-labelledby') || '').split(/\\s+/)
        .some(id => (document.getElementById(id) || {}).textContent)
    && !(['BUTTON', 'A', 'SUMMARY'].includes(e.tagName) && e.textContent.trim()))
  .map(e => e.outerHTML.slice(0, 120))
"""
"""Controls that are seen and have no name."""

IDS = """
(ids => [...new Set(ids.filter((id, n) => ids.indexOf(id) !== n))])(
  [...document.querySelectorAll('[id]')].map(e => e.id))
"""
"""Ids that more than one element has."""

TOO_WIDE = """
((page, width) => page.scrollWidth <= width ? [] : [...document.body.querySelectorAll('*')]
  .filter(e => e.getBoundingClientRect().right > width + 1).slice(0, 5).map(e => e.outerHTML.slice(0, 120))
    .concat(`${page.scrollWidth} of ${width} CSS pixels`))(
  document.documentElement, document.documentElement.clientWidth)
"""
"""What makes the page wider than its window. (A phone's `innerWidth` grows with what is too wide; this does not.)"""

FAINT = """
(() => {
  const parse = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return { rgb: found.slice(0, 3), alpha: found.length > 3 ? found[3] : 1 };
  };
  const over = (top, below) => top.rgb.map((v, n) => v * top.alpha + below[n] * (1 - top.alpha));
  const ground = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const found = parse(getComputedStyle(e).backgroundColor);
      if (found.alpha > 0) layers.push(found);
      if (found.alpha === 1) break;
    }
    const scheme = matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
    return layers.reverse().reduce((below, layer) => over(layer, below), scheme);
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(element.tagName) || element.closest(':disabled, [disabled]')) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    if (!size) continue;
    const below = ground(element);
    const colour = parse(element.closest('svg') ? style.fill : style.color);
    const [a, b] = [luminance(over(colour, below)), luminance(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5) - 0.005)
      found.set(`${element.tagName.toLowerCase()}.${element.getAttribute('class') || ''} ${ratio.toFixed(2)}`,
                walker.currentNode.data.trim().slice(0, 40));
  }
  return [...found].map(([where, text]) => `${where}: ${text}`);
})()
"""
"""Texts that stand out too little from what they stand on."""

QUESTIONS = {
    "a control without a name": CONTROLS,
    "an id that is there twice": IDS,
    "wider than the window": TOO_WIDE,
    "too little contrast": FAINT,
}


def faults(browser: Browser, widths: Sequence[int] = WIDTHS, schemes: Sequence[str] = SCHEMES) -> Iterator[str]:
    """Yield what is wrong with the page that is open; empty where all holds. What is folded is opened first."""
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    for width in widths:
        for scheme in schemes:
            browser.show(width, scheme=scheme)
            browser.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            for fault, question in QUESTIONS.items():
                for told in browser.value(question):
                    yield f"{width} px, {scheme}: {fault}: {told}"
    yield from (f"the console: {told}" for told in browser.errors)
