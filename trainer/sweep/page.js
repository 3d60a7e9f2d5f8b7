"use strict";
// Draws what page.py gathered. Plain functions over one object; nothing is loaded from anywhere.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const esc = text => String(text).replace(/[&<>"']/g, c => escapes[c]);
const COLOURS = ["#2f6fde", "#e8710a", "#1a936f", "#b5379a", "#8a6d00", "#00a3c7", "#d43d51", "#7a5af5"];
const view = {
  metric: 0, sort: { key: "rank", down: false }, filter: "", brushes: {}, open: new Set(), hot: null, every: false,
  colours: new Map(), curve: data.curves.length ? data.curves[0].name : "", axis: "epoch", band: "std", log: false, zoom: true,
};
data.arms.forEach((arm, i) => { arm.i = i; arm.runs = []; });
data.runs.forEach(run => data.arms[run.arm].runs.push(run));

// Numbers

const show = (metric, v, unit = true) => {
  if (v === null || v === undefined) return "–";
  if (metric.rate) return (100 * v).toFixed(2) + (unit ? " %" : "");
  const size = Math.abs(v);
  return Number.isInteger(v) && size < 1e6 ? String(v) : size >= 0.001 && size < 1e4 ? v.toFixed(4) : v.toExponential(3);
};
const signed = (metric, v) => v === null ? "–" : (v >= 0 ? "+" : "−") + (metric.rate ? (100 * Math.abs(v)).toFixed(2) + " pp" : Math.abs(v).toPrecision(3));
const chance = p => p === null || p === undefined ? "–" : p >= 0.001 ? p.toFixed(3) : p.toExponential(0);
const plain = v => typeof v === "number" ? String(+v.toPrecision(6)) : v === undefined ? "" : String(v);
const order = (a, b) => a !== "" && b !== "" && !Number.isNaN(+a) && !Number.isNaN(+b) ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
const short = key => key.split(".").pop();
const metric = () => data.metrics[view.metric];
const score = arm => arm.scores[view.metric];           // [n, mean, std, low, high]
const mean = arm => score(arm)[1];
const isBetter = (a, b) => metric().up ? a > b : a < b;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const duration = s => s === null ? "" : s < 90 ? s.toFixed(1) + " s" : s < 5400 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(1) + " h";

// Which arms

function fits(arm, word) {
  const parts = word.match(/^([\w./-]+)(<=|>=|=|<|>)(.+)$/);
  if (!parts) return (arm.label + " " + arm.gaps.join(" ") + (arm.best ? " best" : "") + (arm.reference ? " reference" : "")).toLowerCase().includes(word.toLowerCase());
  const [, key, sign, text] = parts;
  const place = data.metrics.findIndex(m => m.name === key || m.short === key);
  const name = data.keys.find(k => k === key) || data.keys.find(k => short(k) === key);
  let value = place >= 0 ? arm.scores[place][1] : name ? arm.settings[name] : undefined;
  if (value === undefined || value === null) return false;
  let wanted = Number(text);
  if (Number.isNaN(wanted) || typeof value !== "number") return sign === "=" && plain(value) === text;
  if (place >= 0 && data.metrics[place].rate && wanted > 1) wanted /= 100;
  return { "<": value < wanted, ">": value > wanted, "<=": value <= wanted, ">=": value >= wanted, "=": value === wanted }[sign];
}
const inBrushes = arm => Object.entries(view.brushes).every(([name, [low, high]]) => {
  const at = axes.find(a => a.name === name)?.place(arm);
  return at !== null && at !== undefined && at >= low && at <= high;
});
function chosen() {
  const words = view.filter.split(/\s+/).filter(Boolean);
  return data.arms.filter(arm => words.every(word => fits(arm, word)) && inBrushes(arm));
}
function byMean(arms) {
  return [...arms].sort((a, b) => (mean(a) === null) - (mean(b) === null) || (isBetter(mean(a), mean(b)) ? -1 : isBetter(mean(b), mean(a)) ? 1 : a.i - b.i));
}
function paint(count) {
  view.colours.clear();
  byMean(data.arms).filter(arm => mean(arm) !== null).slice(0, count).forEach((arm, i) => view.colours.set(arm.i, COLOURS[i]));
}
function toggle(arm) {
  if (view.colours.has(arm.i)) view.colours.delete(arm.i);
  else {
    const used = new Set(view.colours.values());
    view.colours.set(arm.i, COLOURS.find(c => !used.has(c)) || COLOURS[view.colours.size % COLOURS.length]);
  }
}

// The table

const columns = () => {
  const m = metric(), many = data.arms.length > 1;
  const settings = data.keys.length && data.keys.length <= 7
    ? data.keys.map(key => ({ key: "setting:" + key, head: short(key), title: key, left: true, value: a => a.settings[key], cell: a => esc(plain(a.settings[key])) }))
    : [{ key: "label", head: "arm", left: true, value: a => a.label, cell: a => esc(a.label) }];
  const last = settings[settings.length - 1], plainCell = last.cell;
  last.cell = a => plainCell(a) + (a.best && many && view.metric === 0 ? '<span class="badge top">best</span>' : a.ties && view.metric === 0 ? '<span class="badge" title="cannot be told from the best arm on the same seeds">≈ best</span>' : "")
    + (a.reference && many ? '<span class="badge">reference</span>' : "");
  const compared = a => a.against[view.metric];       // [pairs, difference, low, high, p, effect, p Holm]
  const list = [...settings,
    { key: "n", head: "n", title: "seeds", value: a => score(a)[0], cell: a => score(a)[0] },
    { key: "rank", head: m.short, title: m.name + " · mean ± standard deviation", value: a => mean(a) === null ? null : (m.up ? -1 : 1) * mean(a), cell: a => `<span class="mean">${show(m, mean(a), score(a)[2] === null)}</span>` + (score(a)[2] === null ? "" : ` <span class="plus">± ${show(m, score(a)[2])}</span>`) },
    { key: "interval", head: "95 % interval", left: true, value: a => score(a)[3] === null ? null : score(a)[4] - score(a)[3], cell: whisker },
  ];
  if (many) list.push(
    { key: "place", head: "rank", title: "mean rank over seeds", value: a => a.rank, cell: a => a.rank === null ? "–" : a.rank.toFixed(2) },
    { key: "difference", head: "difference", title: "from the reference, on the same seeds", value: a => compared(a) ? compared(a)[1] : null, cell: a => coloured(m, compared(a)) },
    { key: "p", head: "p", title: "paired t test, two-sided, after Holm's correction", value: a => compared(a) ? compared(a)[6] : null, cell: a => compared(a) ? chance(compared(a)[6]) : "–" },
    { key: "effect", head: "d", title: "mean difference in units of its standard deviation", value: a => compared(a) ? compared(a)[5] : null, cell: a => compared(a) && compared(a)[5] !== null ? compared(a)[5].toFixed(2) : "–" },
    { key: "gain", head: "improvement", title: "over the reference, relative", value: a => a.gain, cell: a => a.gain === null ? "–" : `<span class="${a.gain >= 0 ? "up" : "down"}">${(100 * a.gain).toFixed(2)} %</span>` });
  if (view.every) data.metrics.forEach((other, i) => { if (i !== view.metric) list.push({ key: "metric:" + i, head: other.short, title: other.name, value: a => a.scores[i][1], cell: a => show(other, a.scores[i][1], a.scores[i][2] === null) + (a.scores[i][2] === null ? "" : ` <span class="plus">± ${show(other, a.scores[i][2])}</span>`) }); });
  if (data.arms.some(a => a.gaps.length)) list.push({ key: "gaps", head: "seeds lacking", left: true, value: a => -a.gaps.length, cell: a => a.gaps.length ? `<span class="warn" title="${esc(a.gaps.join("\n"))}">⚠ ${esc(a.gaps.join("; "))}</span>` : "" });
  return list;
};
function coloured(m, c) {
  if (!c || c[1] === null) return "–";
  return `<span class="${c[1] === 0 ? "" : (c[1] > 0) === m.up ? "up" : "down"}">${signed(m, c[1])}</span>`;
}
let extent = [0, 1];
function whisker(arm) {
  const [n, centre, , low, high] = score(arm);
  if (!n) return "";
  const x = v => (4 + 162 * Math.min(1, Math.max(0, (v - extent[0]) / (extent[1] - extent[0] || 1)))).toFixed(1);
  const colour = view.colours.get(arm.i) || "var(--quiet)";
  const dots = Object.values(arm.values[view.metric]).map(v => `<circle cx="${x(v)}" cy="8" r="2" fill="${colour}" opacity=".35"/>`).join("");
  const line = low === null ? "" : `<line x1="${x(low)}" x2="${x(high)}" y1="8" y2="8" stroke="${colour}" stroke-width="1.5"/>`;
  const title = low === null ? "one seed: no interval" : `${show(metric(), low)} … ${show(metric(), high)}`;
  return `<svg class="whisker" viewBox="0 0 170 16"><title>${title}</title>${line}${dots}<circle cx="${x(centre)}" cy="8" r="3.5" fill="${colour}"/></svg>`;
}
function setExtent() {
  // Of the seeds' own values, with room: the interval of two seeds would leave no room for the rest.
  const values = data.arms.flatMap(a => Object.values(a.values[view.metric])).sort((a, b) => a - b);
  if (!values.length) { extent = [0, 1]; return; }
  const low = values[Math.floor(values.length * 0.03)], high = values[Math.min(values.length - 1, Math.ceil(values.length * 0.97))];
  const room = (high - low || Math.abs(high) || 1) * 0.25;
  extent = [low - room, high + room];
}
function drawTable() {
  const list = columns(), sorter = list.find(c => c.key === view.sort.key) || list.find(c => c.key === "rank");
  $("table").tHead.innerHTML = "<tr><th></th>" + list.map(c => `<th data-key="${esc(c.key)}" tabindex="0" class="${c.left ? "left" : ""}" title="${esc(c.title || "")}"${c === sorter ? ` aria-sort="${view.sort.down ? "descending" : "ascending"}"` : ""}>${esc(c.head)}</th>`).join("") + "</tr>";
  const arms = chosen(), sign = view.sort.down ? -1 : 1;
  arms.sort((a, b) => {
    const x = sorter.value(a), y = sorter.value(b), no = v => v === null || v === undefined;
    if (no(x) || no(y)) return no(x) - no(y) || a.i - b.i;
    return sign * order(x, y) || a.i - b.i;
  });
  $("table").tBodies[0].innerHTML = arms.map(a => `<tr class="arm${a.best && view.metric === 0 && data.arms.length > 1 ? " best" : ""}" data-arm="${a.i}"><td class="left"><button class="swatch" type="button" title="colour its curve" aria-label="colour the curve of ${esc(a.label)}" style="background:${view.colours.get(a.i) || "transparent"}"></button></td>`
    + list.map(c => `<td class="${c.left ? "left" : ""}">${c.cell(a)}</td>`).join("") + "</tr>" + (view.open.has(a.i) ? detail(a, list.length + 1) : "")).join("");
  $("count").textContent = arms.length === data.arms.length ? `${arms.length} arm${arms.length === 1 ? "" : "s"}` : `${arms.length} of ${data.arms.length} arms`;
}
function detail(arm, width) {
  const cards = arm.runs.map(run => {
    const value = arm.values[view.metric][run.seed];
    return `<div class="run"><b>seed ${esc(run.seed)}</b> <span class="chip ${esc(run.state)}">${esc(run.state)}</span> ${value === undefined ? "" : show(metric(), value)} <span class="quiet">${duration(run.seconds)}</span>`
      + (run.why ? `<div class="warn">${esc(run.why)}</div>` : "") + `<div><a href="${esc(run.link)}/">${esc(decodeURIComponent(run.link))}</a></div>`
      + `<div class="thumbs">${run.pictures.map(p => `<a href="${esc(p)}"><img loading="lazy" src="${esc(p)}" alt="${esc(p.split("/").pop())}"></a>`).join("")}</div></div>`;
  }).join("");
  return `<tr class="detail"><td colspan="${width}"><div class="runs">${cards}</div></td></tr>`;
}

// Canvas

function canvas(id) {
  const element = $(id), scale = window.devicePixelRatio || 1, width = element.clientWidth, height = element.clientHeight;
  element.width = width * scale; element.height = height * scale;
  const pen = element.getContext("2d");
  pen.scale(scale, scale); pen.clearRect(0, 0, width, height);
  pen.font = '11.5px system-ui, "DejaVu Sans", sans-serif'; pen.lineJoin = "round";
  return [pen, width, height];
}
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].map(f => f * power).find(s => s >= raw) || raw;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return found;
}
const tickText = (v, rate) => rate ? +(100 * v).toPrecision(5) + " %" : Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(1) : String(+v.toPrecision(4));

// Curves with a band over seeds

const series = new Map();
function seriesOf(arm) {
  const key = `${arm.i} ${view.curve} ${view.axis}`;
  if (!series.has(key)) {
    const at = new Map(), whole = arm.runs.filter(run => run.state === "completed");
    // A seed that broke off would pull the mean, up to where it ends; it is drawn by itself.
    (whole.length ? whole : arm.runs).forEach(run => (run.values[view.curve] || []).forEach((v, i) => {
      if (v !== null) { const x = run[view.axis][i]; at.has(x) ? at.get(x).push(v) : at.set(x, [v]); }
    }));
    series.set(key, [...at].sort((a, b) => a[0] - b[0]).map(([x, vs]) => {
      const m = vs.reduce((s, v) => s + v, 0) / vs.length;
      return { x, m, n: vs.length, std: vs.length > 1 ? Math.sqrt(vs.reduce((s, v) => s + (v - m) ** 2, 0) / (vs.length - 1)) : 0, low: Math.min(...vs), high: Math.max(...vs) };
    }));
  }
  return series.get(key);
}
const edges = p => view.band === "std" ? [p.m - p.std, p.m + p.std] : [p.low, p.high];
let frame = null;                                      // of the last drawing, for the pointer
function drawCurves() {
  const [pen, width, height] = canvas("curvecanvas"), all = chosen();
  const coloured = byMean(data.arms.filter(a => view.colours.has(a.i)));
  const shown = coloured.length ? coloured : all, rate = (data.curves.find(c => c.name === view.curve) || {}).rate;
  const points = shown.flatMap(seriesOf), box = { left: 62, right: width - 16, top: 10, bottom: height - 30 };
  frame = null;
  if (!points.length) { pen.fillStyle = css("--quiet"); pen.fillText("no run has logged this yet", 20, 30); drawLegend(coloured); return; }
  const xs = points.map(p => p.x), x0 = Math.min(...xs), x1 = Math.max(...xs);
  // The start of a curve is far off and says little: the scale is made for what comes after the first third.
  const late = view.zoom ? points.filter(p => p.x >= x0 + (x1 - x0) / 3) : points;
  const heights = (late.length ? late : points).flatMap(p => view.log ? [p.m] : [p.m, ...edges(p)]).filter(v => !view.log || v > 0).sort((a, b) => a - b);
  const low = heights[0], high = heights[heights.length - 1], f = view.log ? Math.log10 : v => v;
  const room = (f(high) - f(low) || Math.abs(f(high)) || 1) * 0.06, from = f(low) - room, to = f(high) + room;
  const X = x => box.left + (box.right - box.left) * (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5), Y = v => box.bottom - (box.bottom - box.top) * (Math.max(view.log && v <= 0 ? from - 1 : f(v), from - 3 * (to - from)) - from) / (to - from);
  pen.strokeStyle = css("--line"); pen.fillStyle = css("--quiet"); pen.lineWidth = 1; pen.textBaseline = "middle"; pen.textAlign = "right";
  const marks = view.log ? ticks(from, to, 5).map(v => 10 ** v) : ticks(from, to, 6);
  marks.forEach(v => { pen.beginPath(); pen.moveTo(box.left, Y(v)); pen.lineTo(box.right, Y(v)); pen.stroke(); pen.fillText(tickText(v, rate), box.left - 8, Y(v)); });
  pen.textAlign = "center"; pen.textBaseline = "top";
  ticks(x0, x1 > x0 ? x1 : x0 + 1, 9).filter(x => x <= x1).forEach(x => pen.fillText(tickText(x), X(x), box.bottom + 8));
  pen.save(); pen.beginPath(); pen.rect(box.left, box.top - 4, box.right - box.left + 6, box.bottom - box.top + 5); pen.clip();
  const path = list => { pen.beginPath(); list.forEach(([x, y], i) => i ? pen.lineTo(X(x), Y(y)) : pen.moveTo(X(x), Y(y))); };
  if (coloured.length < all.length) { pen.strokeStyle = css("--faint"); all.filter(a => !view.colours.has(a.i)).forEach(a => { path(seriesOf(a).map(p => [p.x, p.m])); pen.stroke(); }); }
  const order = [...coloured].reverse();
  order.forEach(arm => {
    const line = seriesOf(arm), colour = view.colours.get(arm.i), strong = view.hot === null || view.hot === arm.i;
    if (view.band === "runs") arm.runs.forEach(run => { const vs = run.values[view.curve] || []; path(vs.map((v, i) => [run[view.axis][i], v]).filter(p => p[1] !== null)); pen.strokeStyle = colour + "77"; pen.lineWidth = 1; pen.stroke(); });
    else { path([...line.map(p => [p.x, edges(p)[1]]), ...[...line].reverse().map(p => [p.x, edges(p)[0]])]); pen.closePath(); pen.fillStyle = colour + (strong ? "26" : "0d"); pen.fill(); }
    const broken = arm.runs.filter(run => run.state !== "completed");
    if (broken.length < arm.runs.length) broken.forEach(run => { pen.setLineDash([4, 4]); path((run.values[view.curve] || []).map((v, i) => [run[view.axis][i], v]).filter(p => p[1] !== null)); pen.strokeStyle = colour + "99"; pen.lineWidth = 1.2; pen.stroke(); pen.setLineDash([]); });
    path(line.map(p => [p.x, p.m])); pen.strokeStyle = colour + (strong ? "" : "55"); pen.lineWidth = view.hot === arm.i ? 3 : 2; pen.stroke();
    if (line.length === 1) { pen.beginPath(); pen.arc(X(line[0].x), Y(line[0].m), 4, 0, 7); pen.fillStyle = colour; pen.fill(); }
  });
  pen.restore();
  frame = { X, box, coloured, x0, x1, rate };
  drawLegend(coloured);
}
function drawLegend(arms) {
  $("legend").innerHTML = arms.map(a => `<span data-arm="${a.i}" title="click to take it out"><i style="background:${view.colours.get(a.i)}"></i>${esc(a.label)}</span>`).join("")
    || '<span class="quiet">every arm in grey; click the squares in the table to give some a colour</span>';
}
function pointAt(event) {
  const tip = $("tip");
  if (!frame || !frame.coloured.length) { tip.hidden = true; return; }
  const at = event.offsetX, xs = [...new Set(frame.coloured.flatMap(a => seriesOf(a).map(p => p.x)))];
  const x = xs.reduce((best, v) => Math.abs(frame.X(v) - at) < Math.abs(frame.X(best) - at) ? v : best, xs[0]);
  const lines = frame.coloured.map(a => [a, seriesOf(a).find(p => p.x === x)]).filter(p => p[1]);
  drawCurves();
  const pen = $("curvecanvas").getContext("2d");
  pen.strokeStyle = css("--quiet"); pen.lineWidth = 1; pen.setLineDash([3, 3]); pen.beginPath(); pen.moveTo(frame.X(x), frame.box.top); pen.lineTo(frame.X(x), frame.box.bottom); pen.stroke(); pen.setLineDash([]);
  tip.innerHTML = `<b>${view.axis} ${tickText(x)}</b>` + lines.map(([a, p]) => `<div><i style="background:${view.colours.get(a.i)}"></i>${show({ rate: frame.rate }, p.m, p.n < 2)}${p.n > 1 ? " ± " + show({ rate: frame.rate }, p.std) : ""} <span class="quiet">${esc(a.label)}</span></div>`).join("");
  tip.hidden = false;
  tip.style.left = Math.min(frame.X(x) + 14, Math.max(0, $("curvecanvas").clientWidth - tip.offsetWidth - 4)) + "px"; tip.style.top = "16px";
}

// Parallel coordinates

let axes = [];
function makeAxes() {
  const values = key => data.arms.map(a => a.settings[key]).filter(v => v !== undefined);
  axes = data.keys.slice(0, 9).map(key => {
    const all = [...new Set(values(key))];
    if (all.length > 1 && all.every(v => typeof v === "number")) {
      const low = Math.min(...all), high = Math.max(...all), log = low > 0 && high / low > 20, f = log ? Math.log10 : v => v;
      const shown = all.length <= 8 ? all : ticks(f(low), f(high), 5).map(v => log ? 10 ** v : v);
      return { name: key, head: short(key), marks: shown.map(v => [(f(v) - f(low)) / (f(high) - f(low)), plain(+v.toPrecision(4))]), place: a => a.settings[key] === undefined ? null : (f(a.settings[key]) - f(low)) / (f(high) - f(low)) };
    }
    all.sort(order);
    const at = v => all.length > 1 ? all.indexOf(v) / (all.length - 1) : 0.5;
    return { name: key, head: short(key), marks: all.length <= 24 ? all.map(v => [at(v), plain(v)]) : [], place: a => a.settings[key] === undefined ? null : at(a.settings[key]) };
  });
  data.metrics.slice(0, 4).forEach((m, i) => {
    const all = data.arms.map(a => a.scores[i][1]).filter(v => v !== null);
    if (!all.length) return;
    const low = Math.min(...all), high = Math.max(...all), span = high - low || 1;
    axes.push({ name: m.name, head: m.short, metric: i, marks: ticks(low, low + span, 5).map(v => [(v - low) / span, tickText(v, m.rate)]), place: a => a.scores[i][1] === null ? null : (a.scores[i][1] - low) / span });
  });
}
const RAMP = [[110, 64, 170],  // viridis, but for a first colour that can be seen on black
   [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 200, 37]];
function ramp(t) {
  const at = Math.min(0.9999, Math.max(0, t)) * 4, i = Math.floor(at), mix = at - i;
  return `rgb(${RAMP[i].map((c, k) => Math.round(c + (RAMP[i + 1][k] - c) * mix)).join(",")})`;
}
const place = { X: i => i, Y: t => t, top: 0, bottom: 1 };
function drawParallel() {
  const [pen, width, height] = canvas("parallelcanvas");
  if (!axes.length) return;
  const left = 70, right = width - 80;
  place.top = 34; place.bottom = height - 14;
  place.X = i => axes.length > 1 ? left + (right - left) * i / (axes.length - 1) : width / 2;
  place.Y = t => place.bottom - (place.bottom - place.top) * t;
  const judge = axes.find(a => a.metric === view.metric), kept = new Set(chosen().map(a => a.i));
  const line = arm => {
    pen.beginPath(); let pending = false;
    axes.forEach((axis, i) => {
      const t = axis.place(arm);
      if (t === null) { pending = false; return; }
      const x = place.X(i), y = place.Y(t), before = place.X(i - 1);
      if (!pending) pen.moveTo(x, y); else pen.bezierCurveTo((before + x) / 2, pending, (before + x) / 2, y, x, y);
      pending = y;
    });
    pen.stroke();
  };
  pen.lineWidth = 1; pen.strokeStyle = css("--faint");
  data.arms.filter(a => !kept.has(a.i)).forEach(line);
  const good = arm => { const t = judge ? judge.place(arm) : null; return t === null ? null : metric().up ? t : 1 - t; };
  byMean(data.arms.filter(a => kept.has(a.i))).reverse().forEach(arm => {
    const t = good(arm), few = kept.size <= 40;
    pen.globalAlpha = t === null ? 0.25 : few ? 0.85 : 0.3 + 0.6 * t; pen.lineWidth = view.hot === arm.i ? 3.5 : few ? 1.8 : 1.2;
    pen.strokeStyle = view.hot === arm.i ? css("--ink") : t === null ? css("--quiet") : ramp(t); line(arm);
  });
  pen.globalAlpha = 1;
  axes.forEach((axis, i) => {
    const x = place.X(i);
    pen.strokeStyle = css("--quiet"); pen.lineWidth = 1; pen.beginPath(); pen.moveTo(x, place.top); pen.lineTo(x, place.bottom); pen.stroke();
    pen.fillStyle = css("--ink"); pen.textAlign = "center"; pen.textBaseline = "alphabetic"; pen.font = '600 12px system-ui, "DejaVu Sans", sans-serif'; pen.fillText(axis.head, x, 16);
    const side = i ? 1 : -1;
    pen.font = '11px system-ui, "DejaVu Sans", sans-serif'; pen.textAlign = i ? "left" : "right"; pen.textBaseline = "middle";
    axis.marks.forEach(([t, text]) => { pen.lineWidth = 3; pen.strokeStyle = css("--card"); pen.strokeText(text, x + 7 * side, place.Y(t)); pen.fillStyle = css("--quiet"); pen.fillText(text, x + 7 * side, place.Y(t)); });
    const brush = view.brushes[axis.name];
    if (brush) { pen.fillStyle = css("--accent") + "44"; pen.strokeStyle = css("--accent"); pen.lineWidth = 1; pen.beginPath(); pen.rect(x - 7, place.Y(brush[1]), 14, Math.max(3, place.Y(brush[0]) - place.Y(brush[1]))); pen.fill(); pen.stroke(); }
  });
}
function brushing() {
  const element = $("parallelcanvas");
  let axis = null, start = 0;
  const height = event => Math.min(1, Math.max(0, (place.bottom - event.offsetY) / (place.bottom - place.top)));
  element.addEventListener("pointerdown", event => {
    axis = axes.find((_, i) => Math.abs(place.X(i) - event.offsetX) < 22) || null;
    if (axis) { start = height(event); delete view.brushes[axis.name]; element.setPointerCapture(event.pointerId); refresh(); }
  });
  element.addEventListener("pointermove", event => {
    element.style.cursor = axes.some((_, i) => Math.abs(place.X(i) - event.offsetX) < 22) ? "row-resize" : "default";
    if (!axis) return;
    const now = height(event), pad = 0.012;
    if (Math.abs(now - start) > 0.01) { view.brushes[axis.name] = [Math.min(start, now) - pad, Math.max(start, now) + pad]; refresh(); }
  });
  element.addEventListener("pointerup", () => { axis = null; });
}

// Settings: what each value does, and the coloured arms side by side

function drawSettings() {
  const kept = chosen().filter(a => mean(a) !== null), m = metric(), all = kept.map(mean);
  const low = Math.min(...all), high = Math.max(...all), x = v => (92 + 190 * (high > low ? (v - low) / (high - low) : 0.5)).toFixed(1);
  const groups = data.keys.map(key => {
    const by = new Map();
    kept.forEach(a => { const v = plain(a.settings[key]); by.has(v) ? by.get(v).push(a) : by.set(v, [a]); });
    return [key, [...by].sort((a, b) => order(a[0], b[0]))];
  }).filter(([, by]) => by.length > 1 && by.length <= 24);
  $("effects").innerHTML = groups.map(([key, by]) => `<div><h3>${esc(key)}</h3><svg viewBox="0 0 345 ${by.length * 19 + 4}">` + by.map(([value, arms], i) => {
    const y = i * 19 + 11, average = arms.reduce((s, a) => s + mean(a), 0) / arms.length;
    return `<text x="84" y="${y + 4}" text-anchor="end"><title>${esc(value)}</title>${esc(value.length > 14 ? value.slice(0, 13) + "…" : value || "–")}</text><line x1="92" x2="282" y1="${y}" y2="${y}" stroke="var(--line)"/>`
      + arms.map(a => `<circle cx="${x(mean(a))}" cy="${y}" r="3" fill="${view.colours.get(a.i) || "var(--quiet)"}" opacity="${view.colours.has(a.i) ? 0.95 : 0.3}"/>`).join("")
      + `<line x1="${x(average)}" x2="${x(average)}" y1="${y - 7}" y2="${y + 7}" stroke="var(--ink)" stroke-width="2"/><text x="292" y="${y + 4}">${show(m, average)}</text>`;
  }).join("") + "</svg></div>").join("");
  const arms = byMean(data.arms.filter(a => view.colours.has(a.i)));
  const keys = data.keys.filter(key => new Set(arms.map(a => plain(a.settings[key]))).size > 1);
  $("sidebyside").innerHTML = arms.length < 2 ? "" : `<thead><tr><th>differences of the coloured arms</th>${arms.map(a => `<th><i class="swatch" style="background:${view.colours.get(a.i)}"></i></th>`).join("")}</tr></thead><tbody>`
    + keys.map(key => `<tr><th>${esc(key)}</th>${arms.map(a => `<td class="${plain(a.settings[key]) === plain(arms[0].settings[key]) ? "" : "off"}">${esc(plain(a.settings[key]))}</td>`).join("")}</tr>`).join("")
    + `<tr><th>${esc(m.name)}</th>${arms.map(a => `<td>${show(m, mean(a))}</td>`).join("")}</tr></tbody>`;
  $("settings").hidden = !data.keys.length;
}
function drawPairs() {
  const ok = data.pairs.length && data.arms.length > 2 && view.metric === 0;
  $("pairs").hidden = !ok;
  if (!ok) return;
  const m = data.metrics[0], at = new Map(data.pairs.map(p => [p[0] + " " + p[1], p.slice(2)])), order = byMean(data.arms).filter(a => mean(a) !== null);
  const cell = (a, b) => {
    const forth = at.get(a.i + " " + b.i), back = at.get(b.i + " " + a.i), c = forth || back;
    if (!c || c[1] === null) return "<td>–</td>";
    const d = forth ? c[1] : -c[1], p = c[4], better = (d > 0) === m.up, strength = p === null ? 0 : p < 0.001 ? 42 : p < 0.01 ? 30 : p < 0.05 ? 18 : 0;
    return `<td title="${esc(a.label)} less ${esc(b.label)}: p ${chance(p)}, d ${c[5] === null ? "–" : ((forth ? 1 : -1) * c[5]).toFixed(2)}, ${c[0]} seeds" style="background:color-mix(in srgb, var(${better ? "--good" : "--bad"}) ${strength}%, transparent)">${signed(m, d)}</td>`;
  };
  $("matrix").innerHTML = `<thead><tr><th></th>${order.map((_, i) => `<th>${i + 1}</th>`).join("")}</tr></thead><tbody>` + order.map((a, i) => `<tr><th class="left">${i + 1} · ${esc(a.label)}</th>${order.map(b => a === b ? "<td></td>" : cell(a, b)).join("")}</tr>`).join("") + "</tbody>";
}

// All together

function refresh() { drawTable(); drawCurves(); drawParallel(); drawSettings(); drawPairs(); }
function heat(i) {
  if (i === view.hot) return;
  view.hot = i; drawCurves(); drawParallel();
}
function start() {
  document.title = $("title").textContent = data.title;
  const states = {};
  data.runs.forEach(run => { states[run.state] = (states[run.state] || 0) + 1; });
  $("chips").innerHTML = Object.entries(states).map(([state, n]) => `<span class="chip ${esc(state)}">${n} ${esc(state)}</span>`).join("") + `<span class="chip">${data.arms.length} arm${data.arms.length === 1 ? "" : "s"}</span><span class="chip">at the ${esc(data.at)} validation</span>`;
  $("about").firstElementChild.textContent = "How these numbers come about";
  $("about").lastElementChild.innerHTML = data.text.map(t => `<p>${esc(t)}</p>`).join("");
  if (data.remarks.length) { $("remarks").hidden = false; $("remarks").open = data.remarks.length <= 4; $("remarks").firstElementChild.textContent = `${data.remarks.length} remark${data.remarks.length === 1 ? "" : "s"}: seeds that are missing or failed, and more`; $("remarks").lastElementChild.innerHTML = data.remarks.map(r => `<li>${esc(r)}</li>`).join(""); }
  $("metric").innerHTML = data.metrics.map((m, i) => `<option value="${i}">${esc(m.name)} ${m.up ? "↑" : "↓"}</option>`).join("");
  $("curve").innerHTML = data.curves.map(c => `<option>${esc(c.name)}</option>`).join("");
  $("foot").textContent = `made ${data.made}`;
  setExtent(); makeAxes(); paint(data.arms.length <= 8 ? 8 : 5); refresh();
  $("metric").addEventListener("change", e => { view.metric = +e.target.value; view.curve = metric().name; $("curve").value = view.curve; setExtent(); refresh(); });
  $("curve").addEventListener("change", e => { view.curve = e.target.value; drawCurves(); });
  $("axis").addEventListener("change", e => { view.axis = e.target.value; drawCurves(); });
  $("band").addEventListener("change", e => { view.band = e.target.value; drawCurves(); });
  $("zoom").addEventListener("change", e => { view.zoom = e.target.checked; drawCurves(); });
  $("log").addEventListener("change", e => { view.log = e.target.checked; drawCurves(); });
  $("filter").addEventListener("input", e => { view.filter = e.target.value; refresh(); });
  $("clear").addEventListener("click", () => { view.colours.clear(); refresh(); });
  $("columns").addEventListener("click", e => { view.every = !view.every; e.target.setAttribute("aria-pressed", view.every); drawTable(); });
  const sort = th => { view.sort = { key: th.dataset.key, down: view.sort.key === th.dataset.key && !view.sort.down }; drawTable(); };
  $("table").tHead.addEventListener("click", e => { const th = e.target.closest("th[data-key]"); if (th) sort(th); });
  $("table").tHead.addEventListener("keydown", e => { const th = e.target.closest("th[data-key]"); if (th && e.key === "Enter") sort(th); });
  const armOf = e => { const row = e.target.closest("[data-arm]"); return row ? data.arms[+row.dataset.arm] : null; };
  $("table").tBodies[0].addEventListener("click", e => {
    const arm = armOf(e);
    if (!arm) return;
    if (e.target.closest(".swatch")) { toggle(arm); refresh(); return; }
    view.open.has(arm.i) ? view.open.delete(arm.i) : view.open.add(arm.i); drawTable();
  });
  $("table").tBodies[0].addEventListener("pointerover", e => heat(armOf(e) ? armOf(e).i : null));
  $("table").addEventListener("pointerleave", () => heat(null));
  $("legend").addEventListener("click", e => { const arm = armOf(e); if (arm) { toggle(arm); refresh(); } });
  $("legend").addEventListener("pointerover", e => heat(armOf(e) ? armOf(e).i : null));
  $("legend").addEventListener("pointerleave", () => heat(null));
  $("curvecanvas").addEventListener("pointermove", pointAt);
  $("curvecanvas").addEventListener("pointerleave", () => { $("tip").hidden = true; drawCurves(); });
  brushing();
  window.addEventListener("resize", () => { drawCurves(); drawParallel(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
  document.documentElement.dataset.ready = Math.round(performance.now());
}
start();
