// What a page lacks for those who cannot see it well, or at all, as a list of sentences (WCAG 2.2, AA, as far as a script sees).
() => {
  const problems = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const seen = (e) => e.getClientRects().length > 0 && getComputedStyle(e).visibility === "visible";
  const say = (what, e) => problems.push(`${what}: ${e.outerHTML.slice(0, 120)}`);

  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parsed = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return { rgb: [r, g, b], alpha: a / 255 };
  };
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const found = parsed(getComputedStyle(at).backgroundColor);
      if (found.alpha === 1) return found.rgb;
    }
    return [255, 255, 255];
  };
  const ratio = (a, b) => {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  for (const e of all("body *")) {
    const speaks = [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
    if (!speaks || !seen(e) || e.closest("script, noscript, .hidden, .skip, .hoverlayer")) continue;
    const style = getComputedStyle(e);
    const own = parsed(e instanceof SVGElement ? style.fill : style.color).rgb;
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const found = ratio(own, behind(e));
    if (found < (large ? 3 : 4.5)) say(`contrast of ${found.toFixed(2)}`, e);
  }
  for (const which of ["header", "main", "footer", "nav[aria-label]", "h1"]) if (all(which).length !== 1) problems.push(`not one ${which}`);
  if (!document.documentElement.lang || !document.title) problems.push("no language or title");
  let level = 0;
  for (const heading of all("h1, h2, h3, h4")) {
    const own = Number(heading.tagName[1]);
    if (own > level + 1) say(`heading skips from ${level}`, heading);
    level = own;
  }
  const ids = all("[id]").map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) problems.push(`id ${id} twice`);
  for (const e of all("[aria-labelledby], [aria-controls], [aria-describedby]"))
    for (const name of ["aria-labelledby", "aria-controls", "aria-describedby"])
      for (const id of (e.getAttribute(name) || "").split(" ").filter(Boolean)) if (!document.getElementById(id)) say(`${name} of nothing`, e);
  for (const link of all("a[href^='#']")) if (!document.getElementById(link.hash.slice(1))) say("a link to nowhere", link);
  for (const input of all("input, select, textarea")) if (!input.labels.length && !input.ariaLabel) say("no label", input);
  for (const button of all("button")) if (seen(button) && !button.textContent.trim() && !button.ariaLabel) say("no name", button);
  for (const table of all("table")) if (!table.caption?.textContent.trim()) say("no caption", table);
  for (const cell of all("th")) if (!cell.scope) say("no scope", cell);
  for (const image of all("[role=img], img")) if (!image.getAttribute("aria-label") && !image.alt) say("no words for", image);
  for (const area of all("section, article, [role=region], form[role=search]"))
    if (!area.getAttribute("aria-labelledby") && !area.getAttribute("aria-label")) say("an area without a name", area);
  for (const e of all(".scroll")) if (e.tabIndex !== 0) say("cannot be scrolled by keyboard", e);
  if (!all("[aria-live]").length) problems.push("nothing is announced");
  return problems;
};
