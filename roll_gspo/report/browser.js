// The sample browser. Text of samples is only ever set as textContent, so that it cannot become HTML.
(() => {
const PAGE = 50;
const browser = document.getElementById('browser');
if (!browser || !('DecompressionStream' in window)) return;
const byId = id => document.getElementById(id);
const make = (tag, props = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...inside);
  return element;
};
const number = v => v === null || v === undefined ? 'not finite' : v === 0 ? '0' : (Math.abs(v) >= 1e-3
  ? String(Number(v.toPrecision(4))) : v.toExponential(2)).replace('-', '\u2212');
const signed = v => (v > 0 ? '+' : '') + number(v);
// Replace characters that are invisible or that change the direction of the text around them.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/\u007f/g, '\u2421')
  .replace(/[\u0080-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    c => '\u27e8U+' + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0') + '\u27e9');
const METRICS = {
  logp: {label: 'log-prob (trainer)', low: true, scale: v => v},
  diff: {label: 'engine \u2212 trainer', scale: v => v},
  ratio: {label: 'ratio after the update', scale: v => Math.log(Math.max(v, 1e-300)), unscale: Math.exp},
  adv: {label: 'advantage', scale: v => v},
};
let all = [], shown = [], page = 0, selected = null, shownMetric = 'logp', token = -1;

async function decompress(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  const groups = (await new Response(stream).text()).split('\n').filter(Boolean).map(line => JSON.parse(line));
  const expanded = sample => {
    for (const name in METRICS) if (typeof sample[name] === 'number') sample[name] = sample.tokens.map(() => sample[name]);
    return sample;
  };
  return groups.flatMap(group => group.samples.map(sample => ({...group, ...expanded(sample), samples: null})));
}
const responseOf = s => s.tokens ? s.tokens.join('') : s.response;
const lengthOf = s => s.length ?? s.characters;
const mismatchOf = s => (s.diff || []).reduce((most, v) => Math.max(most, Math.abs(v)), 0);
const searchText = s => s.searchText ??= [s.prompt, responseOf(s), s.truth, s.answer].join('\n').toLowerCase();
const ORDERS = {
  new: (a, b) => b.step - a.step || a.index - b.index, old: (a, b) => a.step - b.step || a.index - b.index,
  best: (a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity), worst: (a, b) => (a.score ?? Infinity) - (b.score ?? Infinity),
  long: (a, b) => lengthOf(b) - lengthOf(a), short: (a, b) => lengthOf(a) - lengthOf(b),
  mismatch: (a, b) => mismatchOf(b) - mismatchOf(a),
};
const KINDS = {
  all: () => true, failed: s => s.failure !== undefined, truncated: s => s.finish === 'length', traced: s => s.ratio !== undefined,
};

function filter() {
  const field = name => browser.querySelector(`[name=${name}]`).value;
  const limit = (name, otherwise) => field(name).trim() === '' ? otherwise : Number(field(name));
  const [step, domain, kind, words] = [field('step'), field('domain'), KINDS[field('kind')], field('words').toLowerCase()];
  const [low, high] = [limit('low', -Infinity), limit('high', Infinity)];
  const bounded = low !== -Infinity || high !== Infinity;
  shown = all.filter(s => (step === '' || s.step === Number(step)) && (domain === '' || s.domain === domain) && kind(s)
    && (!bounded || (s.score !== undefined && s.score >= low && s.score <= high)) && (!words || searchText(s).includes(words)));
  shown.sort((a, b) => ORDERS[field('order')](a, b) || ORDERS.new(a, b));
  page = 0;
  showList();
  show(shown[0] ?? null);
}

function scoreBadge(s) {
  const tone = s.failure !== undefined ? ' bad' : !s.advantage ? '' : s.advantage > 0 ? ' good' : ' bad';
  return make('span', {className: 'score' + tone, textContent: s.failure !== undefined ? 'failed' : s.score === undefined ? 'unknown' : number(s.score)});
}

function showList() {
  const first = page * PAGE, pages = Math.max(1, Math.ceil(shown.length / PAGE));
  byId('count').textContent = `${shown.length.toLocaleString('en')} of ${all.length.toLocaleString('en')} samples`;
  byId('rows').replaceChildren(...shown.slice(first, first + PAGE).map((s, i) => {
    const facts = make('p', {className: 'facts'}, scoreBadge(s), `step ${s.step}`);
    if (s.domain !== undefined) facts.append(make('span', {textContent: visible(s.domain)}));
    facts.append(make('span', {textContent: s.length === undefined ? '' : `${s.length.toLocaleString('en')} tokens`}));
    const row = make('li', {id: 'row' + i}, facts, make('div', {className: 'excerpt', textContent: visible(responseOf(s).slice(0, 120)) || '(empty)'}));
    row.setAttribute('role', 'option');
    row.addEventListener('click', () => show(s));
    return row;
  }));
  byId('rows').scrollTop = 0;
  byId('page').textContent = `page ${page + 1} of ${pages}`;
  byId('before').disabled = page === 0;
  byId('after').disabled = page + 1 >= pages;
  markSelected();
}

function markSelected() {
  const index = shown.indexOf(selected) - page * PAGE;
  [...byId('rows').children].forEach((row, i) => row.setAttribute('aria-selected', i === index));
  const row = byId('rows').children[index];
  if (row) byId('rows').setAttribute('aria-activedescendant', row.id); else byId('rows').removeAttribute('aria-activedescendant');
  return row;
}

function turnPage(by) { page += by; showList(); }

function show(s, scroll = false) {
  selected = s;
  token = -1;
  if (s && scroll) {
    const index = shown.indexOf(s);
    if (index >= 0 && Math.floor(index / PAGE) !== page) { page = Math.floor(index / PAGE); showList(); }
  }
  const row = markSelected();
  if (row && scroll) row.scrollIntoView({block: 'nearest'});
  byId('sample').replaceChildren(...(s ? sampleView(s) : [make('p', {className: 'facts', textContent: 'No sample matches.'})]));
  if (s) colorTokens();
}

function sampleView(s) {
  const facts = make('p', {className: 'facts'}, scoreBadge(s));
  const details = [s.failure === undefined ? null : `counted as ${number(s.score)}`,
    s.advantage === undefined ? null : `advantage ${signed(s.advantage)}`,
    s.length === undefined ? null : `${s.length.toLocaleString('en')} tokens`,
    s.finish === 'length' ? 'truncated at the length limit' : null,
    s.version === undefined ? null : `sampled by weights ${s.version}`,
    s.line === undefined ? null : `line ${s.line} of rollouts/step_${String(s.step).padStart(6, '0')}.jsonl`];
  facts.append(details.filter(Boolean).map(t => ' \u00b7 ' + t).join(''));
  const heading = [`Step ${s.step}`, s.group === undefined ? null : `group ${s.group}`, s.domain].filter(v => v !== null && v !== undefined);
  const parts = [make('h3', {textContent: visible(heading.join(' \u00b7 '))}), facts];
  if (s.failure !== undefined) parts.push(make('p', {className: 'failure', textContent: 'Reward failed: ' + visible(s.failure)}));
  parts.push(...groupButtons(s), ...text('Prompt', s.prompt));
  const answers = make('div', {className: 'answers'});
  for (const [name, value] of [['Ground truth', s.truth], ['Answer that the reward extracted', s.answer]]) {
    if (value !== undefined) answers.append(make('div', {}, ...text(name, value)));
  }
  parts.push(answers, ...components(s), ...response(s));
  return parts;
}

function text(name, value) {
  return value === undefined ? [] : [make('h4', {textContent: name}), make('pre', {dir: 'auto', textContent: visible(value)})];
}

function groupButtons(s) {
  const group = all.filter(o => o.step === s.step && o.group === s.group && s.group !== undefined);
  if (group.length < 2) return [];
  const row = make('div', {className: 'members'}, 'This group: ');
  for (const other of group) {
    const button = make('button', {type: 'button', textContent: other.failure !== undefined ? 'failed' : number(other.score ?? null)});
    button.setAttribute('aria-pressed', other === s);
    button.addEventListener('click', () => { show(other, true); byId('sample').querySelector('.members [aria-pressed=true]').focus(); });
    row.append(button);
  }
  return [row];
}

function components(s) {
  const parts = Object.entries(s.components || {});
  if (!parts.length) return [];
  const rows = [...parts.map(([name, v]) => [name, v, '']), ...(s.score === undefined ? [] : [['score', s.score, 'sum']])];
  const low = Math.min(0, ...rows.map(r => r[1])), high = Math.max(0, ...rows.map(r => r[1])), range = high - low || 1;
  const grid = make('div', {className: 'parts'});
  for (const [name, value, style] of rows) {
    const bar = make('i', {className: value < 0 ? 'less' : ''});
    bar.style.left = (Math.min(0, value) - low) / range * 100 + '%';
    bar.style.width = Math.abs(value) / range * 100 + '%';
    grid.append(make('span', {className: style, textContent: visible(name)}), make('div', {className: 'track'}, bar), make('b', {textContent: number(value)}));
  }
  return [make('h4', {textContent: 'Reward by component'}), grid];
}

function response(s) {
  const known = Object.keys(METRICS).filter(name => s[name]);
  const head = make('div', {className: 'shading'}, make('h4', {textContent: 'Response'}));
  const pre = make('pre', {id: 'tokens', tabIndex: 0, dir: 'auto'});
  pre.setAttribute('aria-label', 'Response; use the arrow keys to select a token');
  if (s.tokens) s.tokens.forEach((t, i) => pre.append(tokenSpan(t, i)));
  else pre.textContent = visible(s.response) || '(empty)';
  if (known.length) {
    const select = make('select', {id: 'metric'}, ...known.map(name => make('option', {value: name, textContent: METRICS[name].label})));
    select.value = known.includes(shownMetric) ? shownMetric : known[0];
    select.addEventListener('change', () => { shownMetric = select.value; colorTokens(); });
    head.append(make('label', {}, 'tokens colored by ', select), make('span', {className: 'scale', id: 'scale'}));
  }
  const hidden = s.tokens ? lengthOf(s) - s.tokens.length : s.characters - s.response.length;
  const rest = hidden > 0 ? [make('p', {className: 'rest', textContent: `\u2026 ${hidden.toLocaleString('en')} more ${s.tokens ? 'tokens' : 'characters'} in the file.`})] : [];
  pre.addEventListener('pointermove', event => showTokenTip(event));
  pre.addEventListener('pointerleave', () => { tip.hidden = true; });
  pre.addEventListener('keydown', moveToken);
  return [head, pre, ...rest, make('p', {id: 'token', ariaLive: 'polite'})];
}

function tokenSpan(t, i) {
  const span = make('span', {});
  span.dataset.i = i;
  if (t === '') span.append(make('i', {textContent: '\u00b7'}));
  t.split('\n').forEach((line, n) => {
    if (n) span.append(make('i', {textContent: '\u21b5'}), '\n');
    span.append(visible(line));
  });
  return span;
}

function colorTokens() {
  const select = byId('metric');
  if (!select) return;
  const name = select.value, metric = METRICS[name], values = selected[name].map(v => v === null ? null : metric.scale(v));
  const sizes = values.filter(v => v !== null).map(Math.abs).sort((a, b) => a - b);
  // The scale ends at the 95th percentile, so that a few large values do not make all others pale.
  const limit = metric.low ? 5 : sizes[Math.ceil(sizes.length * .95) - 1] || sizes.at(-1) || 0;
  byId('tokens').querySelectorAll('span').forEach((span, i) => {
    const v = values[i], part = v === null || v === undefined || !limit ? 0 : Math.min(1, Math.abs(v) / limit);
    span.style.backgroundColor = part ? `rgb(var(--${v < 0 ? 'hot' : 'cold'}) / ${(.75 * part).toFixed(3)})` : '';
  });
  const unscale = metric.unscale || (v => v), bar = make('i');
  const stops = metric.low ? ['hot', 0] : ['hot', 'cold'];
  bar.style.background = `linear-gradient(90deg, rgb(var(--${stops[0]}) / .75), transparent${stops[1] ? ', rgb(var(--cold) / .75)' : ''})`;
  const ends = metric.low ? ['\u2264 \u22125', '0'] : limit ? ['\u2264 ' + number(unscale(-limit)), '\u2265 ' + number(unscale(limit))] : null;
  byId('scale').replaceChildren(...(ends ? [ends[0], bar, ends[1]] : [`all ${number(unscale(0))}`]));
}

function tokenValues(i) {
  const s = selected, rows = [];
  if (s.logp) rows.push(['log-prob, trainer', number(s.logp[i])], ['probability', s.logp[i] === null ? 'not finite' : number(Math.exp(s.logp[i]) * 100) + ' %']);
  if (s.diff) rows.push(['log-prob, engine', number(s.diff[i] === null || s.logp[i] === null ? null : s.logp[i] + s.diff[i])],
    ['engine \u2212 trainer', number(s.diff[i])]);
  if (s.ratio) rows.push(['ratio after the update', number(s.ratio[i])]);
  if (s.adv) rows.push(['advantage', number(s.adv[i])]);
  return rows;
}
const tokenName = i => `token ${i + 1} ` + (selected.tokens[i] === '' ? '(part of the next character)' : visible(JSON.stringify(selected.tokens[i])));

function showTokenTip(event) {
  const span = event.target.closest('[data-i]');
  tip.hidden = !span;
  if (!span) return;
  const i = Number(span.dataset.i);
  tip.replaceChildren(make('b', {textContent: tokenName(i)}), ...tokenValues(i).map(([name, value]) => make('div', {}, make('span', {textContent: name}), make('b', {textContent: value}))));
  placeTip(event, 18);
}

function moveToken(event) {
  const spans = byId('tokens').querySelectorAll('span'), last = spans.length - 1;
  const to = {ArrowRight: Math.min(token + 1, last), ArrowLeft: Math.max(token - 1, 0), Home: 0, End: last}[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  spans[token]?.classList.remove('on');
  token = to;
  spans[token].classList.add('on');
  spans[token].scrollIntoView({block: 'nearest'});
  byId('token').textContent = [tokenName(token), ...tokenValues(token).map(r => r.join(' '))].join(' \u00b7 ');
}

function moveSelection(event) {
  const index = shown.indexOf(selected), last = shown.length - 1;
  const to = {ArrowDown: index + 1, ArrowUp: index - 1, PageDown: index + 10, PageUp: index - 10, Home: 0, End: last}[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  show(shown[Math.max(0, Math.min(to, last))], true);
}

async function open() {
  const steps = [...document.querySelectorAll('data.rollouts')];
  all = (await Promise.all(steps.map(step => decompress(step.value)))).flat();
  all.forEach((s, i) => { s.index = i; });
  const fill = (name, values) => browser.querySelector(`[name=${name}]`).append(...values.map(v => make('option', {value: v, textContent: visible(String(v))})));
  fill('step', [...new Set(all.map(s => s.step))]);
  const domains = [...new Set(all.map(s => s.domain))].filter(d => d !== undefined).sort();
  fill('domain', domains);
  browser.querySelector('[name=domain]').closest('label').hidden = domains.length < 2;
  let waiting;
  browser.querySelector('form').addEventListener('input', event => {
    clearTimeout(waiting);
    if (event.target.name === 'words') waiting = setTimeout(filter, 120); else filter();
  });
  browser.querySelector('form').addEventListener('submit', event => event.preventDefault());
  browser.querySelector('form').addEventListener('reset', () => setTimeout(filter));
  byId('rows').addEventListener('keydown', moveSelection);
  byId('before').addEventListener('click', () => turnPage(-1));
  byId('after').addEventListener('click', () => turnPage(1));
  browser.hidden = false;
  byId('samples-static').hidden = true;
  filter();
}
open().catch(error => { console.error(error); browser.hidden = true; byId('samples-static').hidden = false; });
})();
