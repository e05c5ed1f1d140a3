// Shows the values of all series of a plot at the pointer, and a cursor at the same step in every plot.
const tip = document.getElementById('tip'), plots = [...document.querySelectorAll('svg[data-tooltips]')];
const nearest = (points, value, column) => points.reduce((a, b) => Math.abs(b[column] - value) < Math.abs(a[column] - value) ? b : a);
for (const plot of plots) {
  plot.series = JSON.parse(plot.dataset.tooltips);
  plot.points = plot.series.flatMap(series => series.points); // of [step, x in pixels, text]
}
function placeTip(event, below) {
  tip.hidden = false;
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
  tip.style.left = Math.max(4, left) + 'px';
  tip.style.top = Math.min(event.clientY + below, innerHeight - tip.offsetHeight - 8) + 'px';
}
function moveCursors(step) {
  for (const plot of plots) {
    const cursor = plot.querySelector('.cursor');
    cursor.setAttribute('visibility', step === null ? 'hidden' : 'visible');
    if (step !== null) cursor.setAttribute('transform', `translate(${nearest(plot.points, step, 0)[1]} 0)`);
  }
}
function showValues(plot, event) {
  const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width;
  const step = nearest(plot.points, x, 1)[0];
  tip.replaceChildren(Object.assign(document.createElement('b'), {textContent: 'step ' + step}));
  for (const series of [...plot.series].reverse()) {
    const point = nearest(series.points, step, 0), row = document.createElement('div'), name = document.createElement('span');
    const dot = Object.assign(document.createElement('i'), {textContent: '\u25cf', className: series.class});
    name.append(dot, series.label + (point[0] === step ? '' : ' (step ' + point[0] + ')'));
    row.append(name, Object.assign(document.createElement('b'), {textContent: point[2]}));
    tip.append(row);
  }
  placeTip(event, 12);
  moveCursors(step);
}
for (const plot of plots) {
  plot.addEventListener('pointermove', event => showValues(plot, event));
  plot.addEventListener('pointerleave', () => { tip.hidden = true; moveCursors(null); });
}
