"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const one = (selector) => document.querySelector(selector);
  data.stages = data.stages.rows.map((row) => Object.fromEntries(data.stages.fields.map((field, i) => [field, row[i]])));
  const several = data.runs.length > 1;
  const PAGE_ROWS = 25;
  const INK = "#333333", PAPER = "#ffffff"; // as nas/report/scored.py has them: replaced by the theme's own

  const element = (name, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  };
  const escape = (text) => text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`); // plotly reads markup in hovers
  const stagesOf = (point) => point.stages.map((index) => data.stages[index]);
  const id = (point) => `${point.run}:${point.trial}`;
  const byId = new Map(data.points.map((point) => [id(point), point]));
  const nameOf = (point) => (several ? `${data.runs[point.run]}@${point.key}` : point.key);
  for (const point of data.points) {
    point.lines = stagesOf(point).map((stage) => stage.line);
    point.words = [nameOf(point), ...stagesOf(point).map((s) => `${s.line} ${s.label} ${s.depth}x${s.width}`)].join(" ").toLowerCase();
  }

  // --- theme ---

  const probe = element("span", { hidden: true });
  document.body.append(probe);
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const remembered = (theme) => {
    try { // a file's page may have no storage
      if (theme) localStorage.setItem("mixnas-theme", theme);
      return localStorage.getItem("mixnas-theme");
    } catch { return null; }
  };
  const isDark = () => (document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const themeButton = one("#theme");
  const showTheme = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    themeButton.textContent = isDark() ? "Light theme" : "Dark theme";
    draw();
  };

  /** A copy of what plotly is given, in the colours of the page. */
  const themed = (value) => {
    if (value === INK) return colour("ink");
    if (value === PAPER) return colour("paper");
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map(themed) : value;
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    return value;
  };
  const axis = (own) => ({
    ...own, gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"), zeroline: false,
    automargin: true, title: { ...own.title, font: { size: 12.5, color: colour("quiet") }, standoff: 8 }, tickfont: { size: 11 },
  });
  const look = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", showlegend: false, autosize: true,
    font: { color: colour("ink"), family: getComputedStyle(document.body).fontFamily },
    margin: { l: 48, r: 12, t: 12, b: 48 },
    hoverlabel: { align: "left", bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink"), family: "ui-monospace, 'DejaVu Sans Mono', monospace", size: 11.5 } },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  });
  const CONFIG = { responsive: true, displayModeBar: false };

  // --- the front ---

  const plot = one("#plot");
  const filter = one("#filter");
  const state = { chosen: null, shown: data.points, rows: PAGE_ROWS, sort: null, down: false };
  const panels = data.objectives.length - 1;
  const suffix = (panel) => (panel ? String(panel + 1) : "");

  const hover = (point) => [
    `<b>${escape(nameOf(point))}</b>  trial ${point.trial}`,
    ...point.shown.map((text, i) => `${escape(data.objectives[i].name)}: ${escape(text)}`),
    ...point.lines.map(escape),
  ].join("<br>");

  /** A trace with those of its points that are shown. */
  const narrowed = (trace, shown) => {
    if (!trace.customdata) return trace;
    const kept = trace.customdata.flatMap(([run, trial], i) => (shown.has(`${run}:${trial}`) ? [i] : []));
    const pick = (values) => (Array.isArray(values) ? kept.map((i) => values[i]) : values);
    const error = (bars) => bars && { ...bars, array: pick(bars.array), arrayminus: pick(bars.arrayminus) };
    const customdata = pick(trace.customdata);
    return {
      ...trace, x: pick(trace.x), y: pick(trace.y), customdata, error_x: error(trace.error_x), error_y: error(trace.error_y),
      text: customdata.map(([run, trial]) => hover(byId.get(`${run}:${trial}`))), hovertemplate: "%{text}<extra></extra>",
    };
  };
  const rings = () => Array.from({ length: panels }, (_, panel) => ({
    type: "scatter", mode: "markers", hoverinfo: "skip", xaxis: `x${suffix(panel)}`, yaxis: `y${suffix(panel)}`,
    x: state.chosen ? [state.chosen.values[0]] : [], y: state.chosen ? [state.chosen.values[panel + 1]] : [],
    marker: { symbol: "circle-open", size: 22, color: colour("accent"), line: { width: 2.5, color: colour("accent") } },
  }));
  const isNarrow = () => plot.clientWidth < 560;
  const drawFront = () => {
    const shown = new Set(state.shown.map(id));
    const layout = { ...data.figure.layout, ...look() };
    const narrow = isNarrow();
    for (let panel = 0; panel < panels; panel++) {
      const [x, y] = [`xaxis${suffix(panel)}`, `yaxis${suffix(panel)}`];
      [layout[x], layout[y]] = [axis(data.figure.layout[x]), axis(data.figure.layout[y])];
      if (narrow) {
        for (const which of [layout[x], layout[y]]) which.title.text = which.title.text.replace(" (", "<br>(");
        layout[x].domain = [0, 1];
        layout[y].domain = [1 - (panel + (panels > 1 ? 0.8 : 1)) / panels, 1 - panel / panels];
      }
    }
    plot.style.height = narrow && panels > 1 ? `${20 * panels}rem` : "";
    Plotly.react(plot, [...themed(data.figure.data).map((trace) => narrowed(trace, shown)), ...rings()], layout, CONFIG);
  };

  const compare = (a, b) => {
    const [left, right] = [a, b].map((point) => (state.sort === "key" ? point.key : state.sort === "mixer" ? point.mixer : point.values[state.sort]));
    return (left < right ? -1 : left > right ? 1 : 0) * (state.down ? -1 : 1);
  };
  const heading = (name, sort, number) => {
    const button = element("button", { type: "button", className: "sort", textContent: name });
    const cell = element("th", { scope: "col", className: number ? "number" : "" }, button);
    if (state.sort === sort) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    button.addEventListener("click", () => {
      state.down = state.sort === sort && !state.down;
      state.sort = sort;
      drawTable();
      one(`#architectures thead th:nth-child(${cell.cellIndex + 1}) button`)?.focus();
    });
    return cell;
  };
  /** A stage as a short tag in its mixer's colour; the whole of it is the tag's title. */
  const chip = (stage) => {
    const made = element("span", { className: "chip", textContent: stage.short, title: stage.line });
    made.style.setProperty("--mixer", data.colours[stage.mixer]);
    return made;
  };
  const drawTable = () => {
    const head = element("tr", {}, heading("key", "key"), ...data.objectives.map((o, i) => heading(o.name, i, true)), heading(data.grouped, "mixer"),
      element("th", { scope: "col", textContent: "stages" }));
    one("#architectures thead").replaceChildren(head);
    const ordered = state.sort === null ? state.shown : [...state.shown].sort(compare);
    one("#architectures tbody").replaceChildren(...ordered.slice(0, state.rows).map((point) => {
      const button = element("button", { type: "button", className: "key", textContent: nameOf(point) });
      button.dataset.id = id(point);
      const row = element("tr", { className: point.front ? "on-front" : "" },
        element("th", { scope: "row" }, button, element("span", { className: "hidden", textContent: point.front ? " on the front" : " not on the front" })),
        ...point.shown.map((text) => element("td", { className: "number", textContent: text })),
        element("td", { textContent: point.mixer }),
        element("td", { className: "stages-of" }, ...stagesOf(point).map(chip)));
      row.dataset.id = id(point);
      return row;
    }));
    const left = ordered.length - state.rows;
    one("#more").hidden = left <= 0;
    one("#more").textContent = `Show ${Math.min(left, 10 * PAGE_ROWS)} more of ${left}`;
    markChosen();
  };
  const markChosen = () => {
    const chosen = state.chosen ? id(state.chosen) : "";
    for (const row of document.querySelectorAll("#architectures tbody tr")) {
      row.classList.toggle("chosen", row.dataset.id === chosen);
      row.querySelector("button").setAttribute("aria-pressed", String(row.dataset.id === chosen));
    }
  };

  const applyFilter = () => {
    const form = new FormData(filter);
    const mixers = new Set(form.getAll("mixer"));
    const words = form.get("text").toLowerCase().split(/\s+/).filter(Boolean);
    state.shown = data.points.filter((point) =>
      mixers.has(point.mixer) && (point.front || !form.has("front")) && words.every((word) => point.words.includes(word)));
    state.rows = PAGE_ROWS;
    one("#count").textContent = `${state.shown.length} of ${data.points.length} shown`;
    drawFront();
    drawTable();
  };

  // --- one architecture ---

  const shape = (name, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const wrapped = (parts, most = 36) => parts.filter(Boolean).reduce((lines, part) => {
    const last = lines[lines.length - 1];
    if (last !== undefined && last.length + part.length + 3 <= most) lines[lines.length - 1] = `${last} · ${part}`;
    else lines.push(part);
    return lines;
  }, []);

  /** A text in lines of at most so many letters, broken at spaces; a longer word stays whole. */
  const broken = (text, most = 34) => text.split(" ").reduce((lines, word) => {
    const last = lines[lines.length - 1];
    if (last !== undefined && last.length + word.length + 1 <= most) lines[lines.length - 1] = `${last} ${word}`;
    else lines.push(word);
    return lines;
  }, []);

  /** Stem, stages and head from top to bottom: as wide as their channels, a bar a block, with what each takes. */
  const diagram = (point) => {
    const stages = stagesOf(point);
    const parts = data.parts[point.run][point.key] || [];
    const took = Object.fromEntries(parts.map((part) => [part.part, part]));
    const total = parts.reduce((sum, part) => sum + part.ms, 0);
    const longest = Math.max(...parts.map((part) => part.high_ms), 0);
    const widest = Math.max(...stages.map((stage) => stage.width), 1);
    const [middle, left, width] = [54, 118, 376];
    const options = (label) => (label.includes("(") ? label.slice(label.indexOf("(") + 1, -1).split(",") : []);
    const rows = [
      { name: "stem", head: "Stem", lines: [], span: 2 + Math.sqrt(stages[0].width / widest) * 50 },
      ...stages.map((stage, i) => ({
        name: `stages.${i}`, head: stage.head, fill: data.colours[stage.mixer], bars: stage.depth,
        span: Math.sqrt((stage.width || widest) / widest) * 100,
        lines: stage.width === 0 ? [] : wrapped([`${stage.depth} block${stage.depth > 1 ? "s" : ""} × ${stage.width} channels`, `map ${stage.map}`,
          ...options(stage.label), stage.compression > 1 ? `compressed / ${stage.compression}` : "", stage.mlp, stage.block]),
      })),
      { name: "head", head: "Head", lines: [], span: 40 },
    ];
    const drawing = [];
    let y = 6;
    for (const [place, row] of rows.entries()) {
      const bars = Math.min(row.bars || 1, 8);
      const part = took[row.name];
      const heads = broken(row.head);
      const lines = row.lines.flatMap((line) => broken(line, 44));
      const under = 15 * (heads.length - 1 + lines.length);
      const text = 16 + under + (part ? 17 : 0);
      const height = Math.max(text, bars * 12 + 2);
      if (place) drawing.push(shape("path", { d: `M${middle} ${y - 12}v10m-3-4 3 4 3-4`, fill: "none", stroke: colour("quiet") }));
      for (let bar = 0; bar < bars; bar++) {
        drawing.push(shape("rect", { x: middle - row.span / 2, y: y + bar * 12 + 2, width: row.span, height: 9, rx: 2, fill: row.fill || colour("raised"), stroke: colour("ink"), "stroke-width": 0.8 }));
      }
      if (row.bars > bars) drawing.push(shape("text", { x: middle, y: y + bars * 12 + 12, "text-anchor": "middle", class: "soft" }, `× ${row.bars}`));
      heads.forEach((line, i) => drawing.push(shape("text", { x: left, y: y + 11 + 15 * i, class: "head" }, line)));
      lines.forEach((line, i) => drawing.push(shape("text", { x: left, y: y + 12 + 15 * (heads.length + i), class: "soft" }, line)));
      if (part) {
        const at = y + 18 + under;
        const scale = 120 / longest;
        drawing.push(
          shape("rect", { x: left, y: at + 2, width: Math.max(part.ms * scale, 1), height: 8, rx: 1.5, fill: colour("strong") }),
          shape("path", { d: `M${left + part.low_ms * scale} ${at + 6}H${left + part.high_ms * scale}`, stroke: colour("ink"), "stroke-width": 1.2 }),
          shape("text", { x: left + part.high_ms * scale + 6, y: at + 10, class: "soft" }, `${part.ms.toPrecision(2)} ms, ${Math.round((100 * part.ms) / total)} %`));
      }
      y += height + 16;
    }
    const told = rows.map((row) => [row.head, ...row.lines, took[row.name] ? `${took[row.name].ms.toPrecision(2)} milliseconds` : ""].filter(Boolean).join(", "));
    return shape("svg", { viewBox: `0 0 ${width} ${y - 4}`, role: "img", "aria-label": `From the image to the classes. ${told.join(". ")}` }, ...drawing);
  };

  const drawDetail = () => {
    const point = state.chosen;
    if (!point) return;
    one("#detail-title").textContent = nameOf(point);
    const values = point.shown.flatMap((text, i) => [element("dt", { textContent: data.objectives[i].name }), element("dd", { textContent: text })]);
    const place = point.front ? "on the front" : "dominated";
    one("#detail-values").replaceChildren(...values, element("dt", { textContent: "trial" }), element("dd", { textContent: `${point.trial}, ${place}` }));
    const note = (data.parts[point.run][point.key] || []).length
      ? "Bars: latency of each part on its own, with its 95 % interval."
      : "Where its time goes was not measured: mixnas measure RUN@KEY --per-stage does.";
    one("#diagram").replaceChildren(diagram(point));
    one("#detail-command").textContent = note;
  };
  const choose = (point, quiet = false) => {
    state.chosen = point;
    drawDetail();
    drawFront();
    markChosen();
    if (!quiet) one("#announce").textContent = `Chosen: ${nameOf(point)}. ${point.shown.map((text, i) => `${data.objectives[i].name} ${text}`).join(", ")}. ${point.lines.join("; ")}`;
  };

  // --- hypervolume ---

  const growth = one("#growth-plot");
  const RUN_COLOURS = ["strong", "accent", "weak", "ink"];
  const drawGrowth = () => {
    const over = new FormData(one("#over")).get("over");
    const traces = data.growth.map((run, i) => ({
      type: "scatter", mode: "lines", name: escape(run.name), y: run.volumes, x: over === "minutes" ? run.minutes : run.volumes.map((_, j) => j + 1),
      line: { shape: "hv", width: 2, dash: data.dashes[i], color: colour(several ? RUN_COLOURS[i % 4] : "strong") },
      hovertemplate: `${over === "minutes" ? "%{x:.1f} min" : "%{x} scored"}: %{y:.5g}<extra></extra>`,
    }));
    const title = over === "minutes" ? "minutes worked" : "architectures scored";
    const ends = data.growth.map((run) => `${run.name}: ${(run.volumes.at(-1) || 0).toPrecision(4)} after ${run.volumes.length} architectures`);
    growth.setAttribute("aria-label", `Hypervolume over ${title}. ${ends.join("; ")}`);
    Plotly.react(growth, traces, {
      ...look(), showlegend: several, legend: { orientation: "h", y: 1.12 },
      xaxis: axis({ title: { text: title }, rangemode: "tozero" }), yaxis: axis({ title: { text: "hypervolume" } }),
    }, CONFIG);
  };
  const draw = () => {
    drawFront();
    drawDetail();
    drawGrowth();
  };

  // --- what the user does ---

  filter.addEventListener("input", applyFilter);
  filter.addEventListener("submit", (event) => event.preventDefault());
  one("#over").addEventListener("input", drawGrowth);
  one("#more").addEventListener("click", () => {
    const before = state.rows;
    state.rows += 10 * PAGE_ROWS;
    drawTable();
    one(`#architectures tbody tr:nth-child(${before + 1}) button`)?.focus();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.key");
    if (!button) return;
    const found = button.dataset.id
      ? byId.get(button.dataset.id)
      : data.points.find((point) => point.key === button.dataset.key && String(point.run) === button.dataset.run);
    if (!found) return;
    choose(found);
    if (!button.dataset.id) one("#front").scrollIntoView();
  });
  one("#architectures").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const row = event.target.closest("tbody tr");
    if (!step || !row) return;
    event.preventDefault();
    (step > 0 ? row.nextElementSibling : row.previousElementSibling)?.querySelector("button").focus();
  });
  themeButton.addEventListener("click", () => showTheme(remembered(isDark() ? "light" : "dark") || (isDark() ? "light" : "dark")));
  prefersDark.addEventListener("change", () => showTheme());
  let wasNarrow = isNarrow();
  new ResizeObserver(() => {
    if (isNarrow() !== wasNarrow) {
      wasNarrow = isNarrow();
      drawFront();
    }
  }).observe(plot);

  // paper is white, and as wide as a page
  let before = null;
  const onPaper = (printing) => {
    if (printing === (before !== null)) return;
    if (printing) before = document.documentElement.dataset.theme || "";
    document.documentElement.dataset.theme = printing ? "light" : before;
    if (!printing && !before) delete document.documentElement.dataset.theme;
    if (!printing) before = null;
    draw();
    for (const each of [plot, growth]) Plotly.relayout(each, printing ? { width: 680, height: each === plot ? 420 : 280 } : { width: null, height: null, autosize: true });
  };
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));

  themeButton.hidden = false;
  const theme = remembered();
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  applyFilter();
  choose(data.points[data.opened], true);
  showTheme();
  plot.on("plotly_click", ({ points }) => {
    const [run, trial] = points[0].customdata || [];
    const point = byId.get(`${run}:${trial}`);
    if (point) choose(point);
  });
  document.documentElement.dataset.ready = "yes";
})();
