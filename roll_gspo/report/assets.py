"""The page's frame, look and pointer readings. Nothing is loaded from anywhere: the policy forbids it."""

# ruff: noqa: E501 (a style sheet reads best with a rule a line)

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head>
<body><header><h1>{title}</h1><p>{subtitle}</p></header><main>{body}</main>
<div id="tip" hidden></div><script>{script}</script></body></html>
"""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #16191d; --soft: #626a75; --line: #e3e6ea; --sunk: #f1f3f5;
  --good: #0b7a3e; --good-bg: #e2f4e9; --bad: #b3261e; --bad-bg: #fbe7e5; --warn: #b26a00;
  --c0: #a3a9b2; --c1: #2a6fdb; --c2: #e8710a; --c3: #12956a; --c4: #8a4fd3; --c5: #d6a400; --c6: #d1447f; --c7: #1297b0; --c8: #7a5230; }
@media (prefers-color-scheme: dark) { :root {
  --page: #101317; --card: #191d23; --ink: #e8eaed; --soft: #9aa3ae; --line: #2b313a; --sunk: #12161b;
  --good: #6fd69a; --good-bg: #15301f; --bad: #ff8f86; --bad-bg: #3a1b19; --warn: #f0b14a;
  --c0: #6d7580; --c1: #5b9bff; --c2: #ff9d47; --c3: #3ecf9a; --c4: #b48cf2; --c5: #e9c33c; --c6: #f07bab; --c7: #45c7dd; --c8: #c29a72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1420px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header { display: flex; align-items: baseline; gap: 14px; }
h1 { margin: 0; font-size: 24px; letter-spacing: -.01em; } header p { margin: 0; color: var(--soft); }
h2 { margin: 34px 0 12px; font-size: 17px; } h3 { margin: 0; font-size: 14px; font-weight: 600; }
h5 { margin: 0 0 4px; font-size: 12px; font-weight: 600; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 20px; }
.tile, .card, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 16px; } .tile h3 { font-size: 12px; font-weight: 500; color: var(--soft); }
.tile p { margin: 2px 0; font-size: 24px; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile p small { color: var(--soft); font-weight: 400; } .tile > small { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px; }
.card { margin: 0; padding: 14px 14px 8px; display: flex; flex-direction: column; justify-content: space-between; }
.card.wide { grid-column: span 2; }
figcaption p { margin: 0; font-size: 12px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 6px; font-size: 12px; color: var(--soft); }
.key { white-space: nowrap; } .key b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px; vertical-align: middle; background: currentColor; }
.key i.bar { width: 10px; height: 10px; } .key i.faint { opacity: .5; height: 2px; }
.key i.dots { width: 8px; height: 8px; border-radius: 50%; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg path { fill: none; } .grid { stroke: var(--line); } .axis { stroke: var(--c0); }
.cursor { stroke: var(--soft); stroke-dasharray: 3 3; pointer-events: none; }
.line, .dots { stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.faint { stroke: currentColor; stroke-width: 1.2; opacity: .5; stroke-linejoin: round; }
svg path.band { fill: currentColor; opacity: .1; } svg path.bar { fill: currentColor; }
circle { fill: currentColor; stroke: var(--card); stroke-width: 1; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); } .c4 { color: var(--c4); }
.c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); } .c8 { color: var(--c8); }
details { margin-bottom: 10px; padding: 0 16px; } summary { cursor: pointer; padding: 11px 0; }
summary span { color: var(--soft); margin-left: 8px; } details > .cards, details > pre, .group:last-child { margin-bottom: 16px; }
pre { margin: 0; padding: 9px 12px; max-height: 340px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--sunk); border: 1px solid var(--line); border-radius: 7px; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.group { border-top: 1px solid var(--line); padding: 12px 0; }
.pair { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 18px; } .pair pre + h5 { margin-top: 10px; }
.response { margin-bottom: 10px; } .facts { margin: 0 0 4px; font-size: 12px; color: var(--soft); }
.score { font-weight: 600; padding: 1px 7px; border-radius: 9px; background: var(--sunk); color: var(--ink); }
.score.good { background: var(--good-bg); color: var(--good); } .score.bad { background: var(--bad-bg); color: var(--bad); }
.attention { margin: 0 0 10px; padding: 10px 16px 10px 34px; border: 1px solid var(--line); border-left: 4px solid var(--warn); border-radius: 8px; background: var(--card); }
#tip { position: fixed; z-index: 9; pointer-events: none; padding: 7px 10px; border-radius: 7px; font-size: 12px; background: var(--card); color: var(--soft);
  border: 1px solid var(--line); box-shadow: 0 4px 16px rgb(0 0 0 / .16); font-variant-numeric: tabular-nums; }
#tip b { color: var(--ink); } #tip div { display: flex; justify-content: space-between; gap: 14px; } #tip i { margin-right: 6px; font-style: normal; }
@media (max-width: 1000px) { .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 640px) { body { padding: 16px 12px; } .cards { grid-template-columns: minmax(0, 1fr); } .card.wide { grid-column: auto; } .pair { grid-template-columns: minmax(0, 1fr); } }
"""

SCRIPT = """
const tip = document.getElementById('tip'), plots = [...document.querySelectorAll('svg[data-readings]')];
const nearest = (points, at, column) => points.reduce((a, b) => Math.abs(b[column] - at) < Math.abs(a[column] - at) ? b : a);
for (const plot of plots) plot.readings = JSON.parse(plot.dataset.readings);
function mark(step) {
  for (const plot of plots) {
    const cursor = plot.querySelector('.cursor'), all = plot.readings.flatMap(s => s.p);
    if (step === null || !all.length) { cursor.setAttribute('visibility', 'hidden'); continue; }
    const x = nearest(all, step, 0)[1];
    cursor.setAttribute('transform', `translate(${x} 0)`); cursor.setAttribute('visibility', 'visible');
  }
}
function read(plot, event) {
  const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width;
  const step = nearest(plot.readings.flatMap(s => s.p), x, 1)[0];
  tip.replaceChildren(Object.assign(document.createElement('b'), {textContent: 'step ' + step}));
  for (const series of [...plot.readings].reverse()) {
    const point = nearest(series.p, step, 0), row = document.createElement('div'), name = document.createElement('span');
    const dot = Object.assign(document.createElement('i'), {textContent: '\\u25cf', className: 'c' + series.c});
    name.append(dot, series.l + (point[0] === step ? '' : ' (step ' + point[0] + ')'));
    row.append(name, Object.assign(document.createElement('b'), {textContent: point[3]})); tip.append(row);
  }
  tip.hidden = false;
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
  tip.style.left = left + 'px'; tip.style.top = Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8) + 'px';
  mark(step);
}
for (const plot of plots) {
  plot.addEventListener('pointermove', event => read(plot, event));
  plot.addEventListener('pointerleave', () => { tip.hidden = true; mark(null); });
}
"""
