// Charts drawn from the data of the page: hover, smoothing, scale, hidden lines, zoom, downloads.
const HEIGHT = 210, TOP = 22, BOTTOM = 36, RIGHT = 14, MAX_MARKERS = 60;
const DASHES = ['', '7 3', '4 2 1 2', '2 2'];
const view = {smoothing: 0, zoom: {}}; // zoom: [first, last] by the title of the horizontal axis
let charts = [];
const pen = document.createElement('canvas').getContext('2d');
pen.font = '11px ' + getComputedStyle(document.body).fontFamily;
const widthOf = text => pen.measureText(text).width;
function svg(tag, attributes = {}, ...inside) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

function niceStep(range, count, integer) {
  const power = 10 ** Math.floor(Math.log10(range / count));
  const step = [1, 2, 5, 10].map(n => n * power).find(s => range / s <= count) ?? 10 * power;
  return integer ? Math.max(1, step) : step;
}
function linearTicks(low, high, count, integer) {
  const step = niceStep(high - low || 1, count, integer), ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step && ticks.length < 50; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}
function logTicks(low, high) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), ticks = [];
  if (last - first >= 1) {
    const stride = Math.ceil((last - first + 1) / 7);
    for (let e = first; e <= last; e += stride) ticks.push(10 ** e);
    return ticks;
  }
  for (let e = first - 1; e <= last + 1; e++) for (const n of [1, 2, 5]) if (n * 10 ** e >= low && n * 10 ** e <= high) ticks.push(n * 10 ** e);
  return ticks.length >= 2 ? ticks : linearTicks(low, high, 5);
}
// The ticks of an axis share their unit prefix or exponent, which fits `largest`.
function tickLabel(value, largest) {
  if (value === 0 || largest === 0) return '0';
  let text;
  if (largest >= 1e-3 && largest < 1e12) {
    const [size, prefix] = largest >= 1e9 ? [1e9, 'G'] : largest >= 1e6 ? [1e6, 'M'] : largest >= 1e4 ? [1e3, 'k'] : [1, ''];
    text = Number((value / size).toPrecision(10)) + prefix;
  } else {
    const exponent = Math.floor(Math.log10(largest) + 1e-9);
    text = Number((value / 10 ** exponent).toPrecision(6)) + 'e' + exponent;
  }
  return text.replaceAll('-', '\u2212');
}
function smoothed(values, weight) {
  let sum = 0, share = 0;
  return values.map(v => { sum = sum * weight + v * (1 - weight); share = share * weight + 1 - weight; return sum / share; });
}
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (xs[middle] < x) low = middle + 1; else high = middle; }
  return low > 0 && x - xs[low - 1] <= xs[low] - x ? low - 1 : low;
}

class Chart {
  constructor(figure, data) {
    Object.assign(this, {figure, data, log: data.log, hidden: new Set(), host: figure.querySelector('.plot'), keys: figure.querySelectorAll('[data-series]')});
    for (const key of this.keys) key.addEventListener('click', () => this.toggle(Number(key.dataset.series)));
    const tool = (text, title, act) => { const button = make('button', {type: 'button', textContent: text, title}); button.addEventListener('click', act); return button; };
    this.logButton = tool('log', 'Logarithmic axis', () => { this.log = !this.log; this.draw(); });
    this.count = make('p', {className: 'count'});
    figure.querySelector('figcaption').append(this.count);
    figure.prepend(make('div', {className: 'tools'}, ...(data.bars ? [] : [this.logButton]),
      tool('PNG', 'Download the chart as a picture', () => this.png()), tool('CSV', 'Download the values', () => this.csv())));
    watcher.observe(this.host);
  }
  toggle(index) {
    if (!this.hidden.delete(index)) this.hidden.add(index);
    this.draw();
  }
  // Series that are not hidden: their values in the range of the axis, and the smoothed values.
  lines() {
    return this.data.series.map((s, index) => ({...s, index})).filter(s => !this.hidden.has(s.partOf ?? s.index)).map(s => {
      const keep = this.log ? s.y.flatMap((v, i) => v > 0 ? [i] : []) : null;
      const pick = values => values && keep ? keep.map(i => values[i]) : values;
      const [x, y, low, high] = [s.x, s.y, s.low, s.high].map(pick);
      const weight = s.style === 'line' && y.length > 2 && !this.data.bars ? view.smoothing : 0;
      const soft = values => values && weight ? smoothed(values, weight) : values;
      const isSpread = low && !s.span; // a spread over runs or samples is smoothed as its line; the extremes of steps are not
      return {...s, x, raw: y, y: soft(y), low: isSpread ? soft(low) : low, high: isSpread ? soft(high) : high, isSmooth: weight > 0};
    });
  }
  stacked() {
    const tops = [];
    return this.lines().map(s => ({...s, top: s.y.map((v, i) => tops[i] = (tops[i] || 0) + v)}));
  }
  draw() {
    const width = this.width = this.host.clientWidth;
    if (!width) return; // in a closed section
    const {data} = this, all = data.series.flatMap(s => s.x.length ? [s.x[0], s.x.at(-1)] : []);
    const lines = this.shown = data.bars ? this.stacked() : this.lines(), zoom = view.zoom[data.x];
    const half = data.bars ? (data.series[0].span || 1) / 2 : 0;
    let [first, last] = zoom ?? [Math.min(...all) - half, Math.max(...all) + half];
    if (!zoom) { const margin = .02 * (last - first) || .5; first -= margin; last += margin; }
    const inside = (xs, ys) => ys.filter((v, i) => xs[i] >= first && xs[i] <= last && (!this.log || v > 0));
    const values = lines.flatMap(s => [s.top ?? s.y, s.raw, s.low, s.high].filter(Boolean).flatMap(ys => inside(s.x, ys)));
    let [low, high] = values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : this.log ? [.1, 1] : [0, 1];
    if (this.log) { const factor = high < 3 * low ? 1.5 : 1.15; low /= factor; high *= factor; }
    else {
      if (data.bars) low = 0;
      const margin = high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high)) ? Math.abs(high) * .05 || .5 : (high - low) * .06;
      // A metric that is never negative gets no axis below 0.
      low = low >= 0 ? Math.max(low - margin, 0) : low - margin;
      high += margin;
    }
    const ticks = this.log ? logTicks(low, high) : linearTicks(low, high, 6);
    const largest = ticks.reduce((most, t) => Math.max(most, Math.abs(t)), 0);
    const labels = ticks.map(t => tickLabel(t, this.log ? t : largest));
    const left = Math.ceil(Math.max(12, ...labels.map(widthOf))) + 10;
    const wide = Math.max(20, width - left - RIGHT), tall = HEIGHT - TOP - BOTTOM;
    const level = this.log ? v => Math.log(Math.max(v, low)) : v => v, [a, b] = [level(low), level(high)];
    this.px = x => (x - first) / (last - first) * wide;
    this.py = y => tall - (level(y) - a) / (b - a) * tall;
    this.value = px => first + (px - left) / wide * (last - first);
    Object.assign(this, {left, wide, tall, first, last});
    const plot = this.svg = svg('svg', {viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: 'img', tabindex: 0, 'aria-label': visible(`${data.title}: ${data.y} by ${data.x}`)});
    const write = (x, y, text, anchor, css = '') => plot.append(svg('text', {x: x.toFixed(1), y: y.toFixed(1), 'text-anchor': anchor, class: css}, visible(text)));
    ticks.forEach((t, i) => {
      const y = TOP + this.py(t);
      plot.append(svg('path', {class: 'grid', d: `M${left} ${y.toFixed(1)}h${wide}`}));
      write(left - 6, y + 4, labels[i], 'end', 'y');
    });
    plot.append(svg('path', {class: 'axis', d: `M${left} ${TOP + tall}h${wide}`}));
    const steps = linearTicks(first, last, Math.max(2, Math.min(12, Math.floor(wide / 54))), data.x === 'step');
    const most = Math.max(...steps.map(Math.abs));
    for (const t of steps) {
      const text = tickLabel(t, most), room = widthOf(text) / 2 + 2;
      write(Math.min(Math.max(left + this.px(t), room), width - room), TOP + tall + 15, text, 'middle', 'x');
    }
    write(0, 11, data.y, 'start', 'title');
    write(left + wide / 2, HEIGHT - 4, data.x, 'middle', 'title');
    this.area = svg('svg', {x: left, y: TOP, width: wide, height: tall, overflow: 'hidden'});
    if (data.bars) this.drawBars(lines); else this.drawLines(lines);
    this.mark = svg('g', {class: 'mark', visibility: 'hidden'});
    plot.append(this.area, this.mark);
    this.host.replaceChildren(plot);
    this.listen(plot);
    for (const key of this.keys) key.setAttribute('aria-pressed', !this.hidden.has(Number(key.dataset.series)));
    this.logButton.setAttribute('aria-pressed', this.log);
    const dropped = this.log ? data.series.reduce((sum, s) => sum + s.y.filter(v => v <= 0).length, 0) : 0;
    this.count.textContent = dropped ? `${dropped.toLocaleString('en')} value${dropped === 1 ? '' : 's'} of 0 or below not drawn.` : '';
  }
  range(xs) { // the indices of the points in view, and one on each side
    let from = nearest(xs, this.first), to = nearest(xs, this.last);
    return [Math.max(0, from - 1), Math.min(xs.length, to + 2)];
  }
  path(xs, ys, from = 0, to = xs.length) {
    let text = '';
    for (let i = from; i < to; i++) text += (text ? 'L' : 'M') + this.px(xs[i]).toFixed(1) + ' ' + this.py(ys[i]).toFixed(1);
    return text;
  }
  fill(css, xs, low, high) {
    const [from, to] = this.range(xs), back = this.path(xs.slice(from, to).reverse(), low.slice(from, to).reverse());
    this.area.append(svg('path', {class: 'band ' + css, d: this.path(xs, high, from, to) + back.replace('M', 'L') + 'Z'}));
  }
  drawLines(lines) {
    const color = s => s.color === 'other' ? 'other' : 'c' + s.color % 7;
    const edges = [lines[0], lines.at(-1)];
    if (this.data.band && lines.length > 1 && edges[0].x.length === edges[1].x.length) this.fill(color(edges[0]), edges[0].x, edges[0].y, edges[1].y);
    for (const s of lines) if (s.low && s.x.length > 1) this.fill(color(s), s.x, s.low, s.high);
    for (const s of lines) {
      if (!s.x.length) continue;
      const [from, to] = this.range(s.x), line = (css, ys) => this.area.append(svg('path', {class: `${css} ${color(s)}`, d: this.path(s.x, ys, from, to), 'stroke-dasharray': DASHES[s.dash || 0]}));
      if (s.style !== 'points') {
        if (s.isSmooth && !s.low) line('faint', s.raw);
        line(s.style === 'faint' ? 'faint' : 'line', s.y);
      }
      if (s.x.length === 1 || s.style === 'points' || (s.style === 'dots' && to - from <= MAX_MARKERS)) {
        for (let i = from; i < to; i++) this.area.append(svg('circle', {class: 'dot ' + color(s), r: 3.2, cx: this.px(s.x[i]).toFixed(1), cy: this.py(s.y[i]).toFixed(1)}));
      }
    }
  }
  drawBars(lines) {
    for (const s of lines) {
      const [from, to] = this.range(s.x), span = s.span || 1, wide = Math.min(48, .82 * (this.px(span) - this.px(0)));
      let text = '';
      for (let i = from; i < to; i++) {
        const top = this.py(s.top[i]), bottom = this.py(s.top[i] - s.y[i]);
        text += `M${(this.px(s.x[i]) - wide / 2).toFixed(1)} ${bottom.toFixed(1)}V${top.toFixed(1)}h${wide.toFixed(1)}V${bottom.toFixed(1)}Z`;
      }
      this.area.append(svg('path', {class: 'bar ' + (s.color === 'other' ? 'other' : 'c' + s.color % 7), d: text}));
    }
  }
  listen(plot) {
    let start = null, box = null;
    const place = event => Math.min(Math.max(event.clientX - plot.getBoundingClientRect().left, this.left), this.left + this.wide);
    plot.addEventListener('pointerdown', event => { if (event.button === 0) start = place(event); });
    plot.addEventListener('pointermove', event => {
      if (start === null || !(event.buttons & 1)) { start = null; this.hover(event); return; }
      if (!box && Math.abs(place(event) - start) < 5) return;
      if (!box) { box = svg('rect', {class: 'zoom', y: TOP, height: this.tall}); plot.append(box); plot.setPointerCapture(event.pointerId); }
      box.setAttribute('x', Math.min(start, place(event)));
      box.setAttribute('width', Math.abs(place(event) - start));
    });
    plot.addEventListener('pointerup', event => {
      if (box) zoomTo(this.data.x, [start, place(event)].sort((a, b) => a - b).map(this.value));
      start = box = null;
    });
    plot.addEventListener('dblclick', () => zoomTo(this.data.x, null));
    plot.addEventListener('pointerleave', () => { if (!box) leave(); });
    plot.addEventListener('blur', leave);
    plot.addEventListener('keydown', event => this.move(event));
  }
  hover(event) {
    const bounds = this.svg.getBoundingClientRect(), x = this.value(event.clientX - bounds.left);
    const xs = this.shown.filter(s => s.x.length).map(s => s.x[nearest(s.x, x)]);
    if (!xs.length) return;
    this.tell(xs.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a), event, event.clientY - bounds.top - TOP);
  }
  move(event) { // by keyboard: the next or the previous point of the longest line
    const s = this.shown.reduce((a, b) => b.x.length > a.x.length ? b : a, {x: []}), last = s.x.length - 1;
    const index = this.at === undefined ? last + 1 : nearest(s.x, this.at);
    const to = {ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: last}[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    const x = s.x[Math.max(0, Math.min(last, to))], bounds = this.svg.getBoundingClientRect();
    this.tell(x, {clientX: bounds.left + this.left + this.px(x), clientY: bounds.top + TOP});
  }
  tell(x, event, y = null) {
    const rows = this.rows(x), text = v => this.data.x === 'step' ? v.toLocaleString('en') : number(v);
    const close = y === null ? null : rows.reduce((a, b) => !a || Math.abs(this.py(b.at) - y) < Math.abs(this.py(a.at) - y) ? b : a, null);
    tip.replaceChildren(make('b', {className: (close ?? rows[0])?.css, textContent: `${this.data.x} ${text(x)}`}), ...rows.map(row => {
      const where = row.x === x ? '' : ` (${this.data.x} ${text(row.x)})`;
      const value = number(row.y) + (row.low === undefined ? '' : ` (${number(row.low)} to ${number(row.high)})`);
      return make('div', {className: row.css + (row === close && rows.length > 1 ? ' close' : '')},
        make('span', {}, make('i', {textContent: '\u25cf'}), visible(row.label) + where), make('span', {className: 'value', textContent: value}));
    }));
    placeTip(event, 12);
    for (const chart of charts) if (chart.data.x === this.data.x) chart.point(x);
  }
  rows(x) { // the nearest point of each line, from the top of the legend
    const rows = this.shown.filter(s => s.x.length).map(s => {
      const i = nearest(s.x, x), css = s.color === 'other' ? 'other' : 'c' + s.color % 7;
      return {label: s.label, css, x: s.x[i], y: s.raw[i], at: s.top ? s.top[i] : s.y[i], low: s.low?.[i], high: s.high?.[i], style: s.style};
    });
    if (this.data.bars && rows.length > 1) rows.push({...rows.at(-1), label: 'sum', css: 'other', y: rows.at(-1).at});
    return this.data.bars ? rows.reverse() : rows;
  }
  point(x) {
    if (!this.width || !this.shown) return;
    this.at = x;
    this.mark.setAttribute('visibility', x >= this.first && x <= this.last ? 'visible' : 'hidden');
    const dots = this.data.bars ? [] : this.rows(x).filter(row => row.x >= this.first && row.x <= this.last)
      .map(row => svg('circle', {class: 'dot ' + row.css, r: 3.6, cx: this.left + this.px(row.x), cy: TOP + this.py(row.at)}));
    this.mark.replaceChildren(svg('path', {class: 'cursor', d: `M${(this.left + this.px(x)).toFixed(1)} ${TOP}v${this.tall}`}), ...dots);
  }
  csv() {
    const cell = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const name = text => cell(/^[=+@-]/.test(text) ? "'" + text : text); // spreadsheets would calculate it
    const columns = this.data.series.flatMap(s => [[s.label, s.x, s.y], ...(s.low ? [[s.label + ' low', s.x, s.low], [s.label + ' high', s.x, s.high]] : [])]);
    const xs = [...new Set(columns.flatMap(c => c[1]))].sort((a, b) => a - b);
    const known = columns.map(([, x, y]) => new Map(x.map((v, i) => [v, y[i]])));
    const lines = [[this.data.x, ...columns.map(c => c[0])].map(name), ...xs.map(x => [x, ...known.map(column => column.get(x) ?? '')])];
    save(this.data.title + '.csv', new Blob([lines.map(line => line.join(',')).join('\n') + '\n'], {type: 'text/csv'}));
  }
  async png() {
    const style = element => getComputedStyle(element), copy = this.svg.cloneNode(true);
    const from = [this.svg, ...this.svg.querySelectorAll('*')], to = [copy, ...copy.querySelectorAll('*')];
    const names = ['fill', 'fill-opacity', 'stroke', 'stroke-width', 'stroke-dasharray', 'stroke-linejoin', 'opacity', 'font-family', 'font-size', 'text-anchor'];
    from.forEach((element, i) => names.forEach(name => to[i].style.setProperty(name, style(element).getPropertyValue(name))));
    copy.querySelector('.mark').remove();
    const picture = new Image();
    picture.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(new XMLSerializer().serializeToString(copy));
    await picture.decode();
    const canvas = document.createElement('canvas'), scale = 2, head = 46, context = canvas.getContext('2d');
    Object.assign(canvas, {width: (this.width + 24) * scale, height: (HEIGHT + head + 12) * scale});
    context.scale(scale, scale);
    context.fillStyle = style(this.figure).backgroundColor;
    context.fillRect(0, 0, canvas.width, canvas.height);
    const write = (text, x, y, color, font) => { Object.assign(context, {fillStyle: color, font: `${font} ${style(document.body).fontFamily}`}); context.fillText(text, x, y); return context.measureText(text).width; };
    write(visible(this.data.title), 12, 20, style(document.body).color, '600 14px');
    let x = 12;
    for (const key of this.keys) {
      if (this.hidden.has(Number(key.dataset.series))) continue;
      const s = this.data.series[Number(key.dataset.series)];
      x += write('\u25cf ' + visible(s.label), x, 38, style(key.querySelector('i')).color, '12px') + 14;
    }
    context.drawImage(picture, 12, head, this.width, HEIGHT);
    canvas.toBlob(blob => save(this.data.title + '.png', blob));
  }
}

function leave() {
  tip.hidden = true;
  for (const chart of charts) { chart.mark?.setAttribute('visibility', 'hidden'); chart.at = undefined; }
}
function zoomTo(axis, range) {
  view.zoom[axis] = range ?? undefined;
  leave();
  byId('controls').elements.reset.disabled = !Object.values(view.zoom).some(Boolean);
  drawAll();
}
let waiting = 0;
function drawAll() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => charts.forEach(chart => chart.draw()));
}
const watcher = new ResizeObserver(entries => {
  for (const {target} of entries) {
    const chart = charts.find(c => c.host === target);
    if (chart && target.clientWidth !== chart.width) chart.draw();
  }
});
function filterCharts(form) {
  const words = form.elements.filter.value.toLowerCase();
  for (const {figure, data} of charts) {
    figure.hidden = ![data.title, ...data.series.map(s => s.label)].some(text => text.toLowerCase().includes(words));
    if (words && !figure.hidden) figure.closest('details')?.setAttribute('open', '');
  }
}
// Draw all charts of the page. Charts of the same title keep their scale and hidden lines, for a page that refreshes.
async function openCharts() {
  const {positions, charts: all} = JSON.parse(await unpack(byId('charts').value)), form = byId('controls');
  for (const data of all) for (const s of data.series) s.x = positions[s.x];
  const before = new Map(charts.map(c => [c.data.title + '\n' + c.data.x, c]));
  watcher.disconnect();
  charts = [...document.querySelectorAll('[data-chart]')].map(figure => new Chart(figure, all[figure.dataset.chart]));
  for (const chart of charts) {
    const same = before.get(chart.data.title + '\n' + chart.data.x);
    if (same) Object.assign(chart, {log: same.log, hidden: same.hidden});
  }
  if (!form.hidden) { filterCharts(form); return; }
  const {smoothing, reset} = form.elements;
  const smooth = () => { view.smoothing = Number(smoothing.value); form.querySelector('output').textContent = smoothing.value; drawAll(); };
  smoothing.addEventListener('input', smooth);
  form.elements.filter.addEventListener('input', () => filterCharts(form));
  form.addEventListener('submit', event => event.preventDefault());
  reset.addEventListener('click', () => Object.keys(view.zoom).forEach(axis => zoomTo(axis, null)));
  form.hidden = !charts.length;
  smooth();
}
if (byId('charts') && 'DecompressionStream' in window) openCharts();
