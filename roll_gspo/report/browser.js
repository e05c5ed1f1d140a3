// Shows the samples that the page carries. Whatever a model said is text here, never HTML: textContent only.
(() => {
const PAGE = 50;
const home = document.getElementById('browser');
if (!home || !('DecompressionStream' in window)) return;
const at = id => document.getElementById(id);
const make = (tag, props = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...inside);
  return element;
};
const number = v => v === null || v === undefined ? 'not finite' : v === 0 ? '0' : (Math.abs(v) >= 1e-3
  ? String(Number(v.toPrecision(4))) : v.toExponential(2)).replace('-', '\u2212');
const signed = v => (v > 0 ? '+' : '') + number(v);
// Marks that would be invisible, or turn the text around them.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/\u007f/g, '\u2421')
  .replace(/[\u0080-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
    c => '\u27e8U+' + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0') + '\u27e9');
const FIGURES = {
  logp: {label: 'log-prob (trainer)', low: true, of: v => v},
  diff: {label: 'engine \u2212 trainer', of: v => v},
  ratio: {label: 'ratio after the update', of: v => Math.log(Math.max(v, 1e-300)), back: Math.exp},
  adv: {label: 'advantage', of: v => v},
};
let all = [], shown = [], page = 0, chosen = null, shade = 'logp', token = -1;

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
  const groups = (await new Response(stream).text()).split('\n').filter(Boolean).map(line => JSON.parse(line));
  const whole = sample => {
    for (const name in FIGURES) if (typeof sample[name] === 'number') sample[name] = sample.tokens.map(() => sample[name]);
    return sample;
  };
  return groups.flatMap(group => group.samples.map(sample => ({...group, ...whole(sample), samples: null})));
}
const responseOf = s => s.tokens ? s.tokens.join('') : s.response;
const lengthOf = s => s.length ?? s.characters;
const spreadOf = s => (s.diff || []).reduce((most, v) => Math.max(most, Math.abs(v)), 0);
const searched = s => s.searched ??= [s.prompt, responseOf(s), s.truth, s.answer].join('\n').toLowerCase();
const ORDERS = {
  new: (a, b) => b.step - a.step || a.place - b.place, old: (a, b) => a.step - b.step || a.place - b.place,
  best: (a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity), worst: (a, b) => (a.score ?? Infinity) - (b.score ?? Infinity),
  long: (a, b) => lengthOf(b) - lengthOf(a), short: (a, b) => lengthOf(a) - lengthOf(b),
  apart: (a, b) => spreadOf(b) - spreadOf(a),
};
const KINDS = {
  all: () => true, failed: s => s.failure !== undefined, cut: s => s.finish === 'length', traced: s => s.ratio !== undefined,
};

function filter() {
  const field = name => home.querySelector(`[name=${name}]`).value;
  const limit = (name, otherwise) => field(name).trim() === '' ? otherwise : Number(field(name));
  const [step, domain, kind, words] = [field('step'), field('domain'), KINDS[field('kind')], field('words').toLowerCase()];
  const [low, high] = [limit('low', -Infinity), limit('high', Infinity)];
  const bounded = low !== -Infinity || high !== Infinity;
  shown = all.filter(s => (step === '' || s.step === Number(step)) && (domain === '' || s.domain === domain) && kind(s)
    && (!bounded || (s.score !== undefined && s.score >= low && s.score <= high)) && (!words || searched(s).includes(words)));
  shown.sort((a, b) => ORDERS[field('order')](a, b) || ORDERS.new(a, b));
  page = 0;
  list();
  choose(shown[0] ?? null);
}

function score(s) {
  const tone = s.failure !== undefined ? ' bad' : !s.advantage ? '' : s.advantage > 0 ? ' good' : ' bad';
  return make('span', {className: 'score' + tone, textContent: s.failure !== undefined ? 'failed' : s.score === undefined ? 'unknown' : number(s.score)});
}

function list() {
  const first = page * PAGE, pages = Math.max(1, Math.ceil(shown.length / PAGE));
  at('count').textContent = `${shown.length.toLocaleString('en')} of ${all.length.toLocaleString('en')} samples`;
  at('rows').replaceChildren(...shown.slice(first, first + PAGE).map((s, i) => {
    const facts = make('p', {className: 'facts'}, score(s), `step ${s.step}`);
    if (s.domain !== undefined) facts.append(make('span', {textContent: visible(s.domain)}));
    facts.append(make('span', {textContent: s.length === undefined ? '' : `${s.length.toLocaleString('en')} tokens`}));
    const row = make('li', {id: 'row' + i}, facts, make('div', {className: 'said', textContent: visible(responseOf(s).slice(0, 120)) || '(empty)'}));
    row.setAttribute('role', 'option');
    row.addEventListener('click', () => choose(s));
    return row;
  }));
  at('rows').scrollTop = 0;
  at('page').textContent = `page ${page + 1} of ${pages}`;
  at('before').disabled = page === 0;
  at('after').disabled = page + 1 >= pages;
  select();
}

function select() {
  const place = shown.indexOf(chosen) - page * PAGE;
  [...at('rows').children].forEach((row, i) => row.setAttribute('aria-selected', i === place));
  const row = at('rows').children[place];
  if (row) at('rows').setAttribute('aria-activedescendant', row.id); else at('rows').removeAttribute('aria-activedescendant');
  return row;
}

function turn(by) { page += by; list(); }

function choose(s, scroll = false) {
  chosen = s;
  token = -1;
  if (s && scroll) {
    const place = shown.indexOf(s);
    if (place >= 0 && Math.floor(place / PAGE) !== page) { page = Math.floor(place / PAGE); list(); }
  }
  const row = select();
  if (row && scroll) row.scrollIntoView({block: 'nearest'});
  at('sample').replaceChildren(...(s ? detail(s) : [make('p', {className: 'facts', textContent: 'No sample matches.'})]));
  if (s) paint();
}

function detail(s) {
  const facts = make('p', {className: 'facts'}, score(s));
  const told = [s.failure === undefined && s.score === undefined ? null : s.failure !== undefined ? `counted as ${number(s.score)}` : null,
    s.advantage === undefined ? null : `advantage ${signed(s.advantage)}`,
    s.length === undefined ? null : `${s.length.toLocaleString('en')} tokens`,
    s.finish === 'length' ? 'cut at the length limit' : null,
    s.version === undefined ? null : `sampled by weights ${s.version}`,
    s.line === undefined ? null : `line ${s.line} of rollouts/step_${String(s.step).padStart(6, '0')}.jsonl`];
  facts.append(told.filter(Boolean).map(t => ' \u00b7 ' + t).join(''));
  const title = [`Step ${s.step}`, s.group === undefined ? null : `group ${s.group}`, s.domain].filter(v => v !== null && v !== undefined);
  const parts = [make('h3', {textContent: visible(title.join(' \u00b7 '))}), facts];
  if (s.failure !== undefined) parts.push(make('p', {className: 'why', textContent: 'No reward: ' + visible(s.failure)}));
  parts.push(...alike(s), ...text('Prompt', s.prompt));
  const short = make('div', {className: 'short'});
  for (const [name, value] of [['Ground truth', s.truth], ['Answer as the reward read it', s.answer]]) {
    if (value !== undefined) short.append(make('div', {}, ...text(name, value)));
  }
  parts.push(short, ...components(s), ...response(s));
  return parts;
}

function text(name, value) {
  return value === undefined ? [] : [make('h4', {textContent: name}), make('pre', {dir: 'auto', textContent: visible(value)})];
}

function alike(s) {
  const group = all.filter(o => o.step === s.step && o.group === s.group && s.group !== undefined);
  if (group.length < 2) return [];
  const row = make('div', {className: 'alike'}, 'This group: ');
  for (const other of group) {
    const button = make('button', {type: 'button', textContent: other.failure !== undefined ? 'failed' : number(other.score ?? null)});
    button.setAttribute('aria-pressed', other === s);
    button.addEventListener('click', () => { choose(other, true); at('sample').querySelector('.alike [aria-pressed=true]').focus(); });
    row.append(button);
  }
  return [row];
}

function components(s) {
  const parts = Object.entries(s.components || {});
  if (!parts.length) return [];
  const rows = [...parts.map(([name, v]) => [name, v, '']), ...(s.score === undefined ? [] : [['score', s.score, 'sum']])];
  const low = Math.min(0, ...rows.map(r => r[1])), high = Math.max(0, ...rows.map(r => r[1])), wide = high - low || 1;
  const grid = make('div', {className: 'parts'});
  for (const [name, value, style] of rows) {
    const bar = make('i', {className: value < 0 ? 'less' : ''});
    bar.style.left = (Math.min(0, value) - low) / wide * 100 + '%';
    bar.style.width = Math.abs(value) / wide * 100 + '%';
    grid.append(make('span', {className: style, textContent: visible(name)}), make('div', {className: 'track'}, bar), make('b', {textContent: number(value)}));
  }
  return [make('h4', {textContent: 'Reward by component'}), grid];
}

function response(s) {
  const known = Object.keys(FIGURES).filter(name => s[name]);
  const head = make('div', {className: 'shade'}, make('h4', {textContent: 'Response'}));
  const pre = make('pre', {id: 'tokens', tabIndex: 0, dir: 'auto'});
  pre.setAttribute('aria-label', 'Response; arrow keys read its tokens');
  if (s.tokens) s.tokens.forEach((t, i) => pre.append(piece(t, i)));
  else pre.textContent = visible(s.response) || '(empty)';
  if (known.length) {
    const select = make('select', {id: 'shade'}, ...known.map(name => make('option', {value: name, textContent: FIGURES[name].label})));
    select.value = known.includes(shade) ? shade : known[0];
    select.addEventListener('change', () => { shade = select.value; paint(); });
    head.append(make('label', {}, 'tokens coloured by ', select), make('span', {className: 'scale', id: 'scale'}));
  }
  const left = s.tokens ? lengthOf(s) - s.tokens.length : s.characters - s.response.length;
  const rest = left > 0 ? [make('p', {className: 'rest', textContent: `\u2026 ${left.toLocaleString('en')} more ${s.tokens ? 'tokens' : 'characters'} in the file.`})] : [];
  pre.addEventListener('pointermove', event => hover(event));
  pre.addEventListener('pointerleave', () => { tip.hidden = true; });
  pre.addEventListener('keydown', step);
  return [head, pre, ...rest, make('p', {id: 'reading', ariaLive: 'polite'})];
}

function piece(t, i) {
  const span = make('span', {});
  span.dataset.i = i;
  if (t === '') span.append(make('i', {textContent: '\u00b7'}));
  t.split('\n').forEach((line, n) => {
    if (n) span.append(make('i', {textContent: '\u21b5'}), '\n');
    span.append(visible(line));
  });
  return span;
}

function paint() {
  const select = at('shade');
  if (!select) return;
  const name = select.value, figure = FIGURES[name], values = chosen[name].map(v => v === null ? null : figure.of(v));
  const sizes = values.filter(v => v !== null).map(Math.abs).sort((a, b) => a - b);
  // A few large figures must not make all others pale: the scale ends where 19 of 20 tokens lie within.
  const end = figure.low ? 5 : sizes[Math.ceil(sizes.length * .95) - 1] || sizes.at(-1) || 0;
  at('tokens').querySelectorAll('span').forEach((span, i) => {
    const v = values[i], part = v === null || v === undefined || !end ? 0 : Math.min(1, Math.abs(v) / end);
    span.style.backgroundColor = part ? `rgb(var(--${v < 0 ? 'hot' : 'cold'}) / ${(.75 * part).toFixed(3)})` : '';
  });
  const back = figure.back || (v => v), bar = make('i');
  const stops = figure.low ? ['hot', 0] : ['hot', 'cold'];
  bar.style.background = `linear-gradient(90deg, rgb(var(--${stops[0]}) / .75), transparent${stops[1] ? ', rgb(var(--cold) / .75)' : ''})`;
  const ends = figure.low ? ['\u2264 \u22125', '0'] : end ? ['\u2264 ' + number(back(-end)), '\u2265 ' + number(back(end))] : null;
  at('scale').replaceChildren(...(ends ? [ends[0], bar, ends[1]] : [`all ${number(back(0))}`]));
}

function readings(i) {
  const s = chosen, rows = [];
  if (s.logp) rows.push(['log-prob, trainer', number(s.logp[i])], ['probability', s.logp[i] === null ? 'not finite' : number(Math.exp(s.logp[i]) * 100) + ' %']);
  if (s.diff) rows.push(['log-prob, engine', number(s.diff[i] === null || s.logp[i] === null ? null : s.logp[i] + s.diff[i])],
    ['engine \u2212 trainer', number(s.diff[i])]);
  if (s.ratio) rows.push(['ratio after the update', number(s.ratio[i])]);
  if (s.adv) rows.push(['advantage', number(s.adv[i])]);
  return rows;
}
const named = i => `token ${i + 1} ` + (chosen.tokens[i] === '' ? '(part of the next character)' : visible(JSON.stringify(chosen.tokens[i])));

function hover(event) {
  const span = event.target.closest('[data-i]');
  tip.hidden = !span;
  if (!span) return;
  const i = Number(span.dataset.i);
  tip.replaceChildren(make('b', {textContent: named(i)}), ...readings(i).map(([name, value]) => make('div', {}, make('span', {textContent: name}), make('b', {textContent: value}))));
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
  tip.style.left = Math.max(4, left) + 'px';
  tip.style.top = Math.min(event.clientY + 18, innerHeight - tip.offsetHeight - 8) + 'px';
}

function step(event) {
  const spans = at('tokens').querySelectorAll('span'), last = spans.length - 1;
  const to = {ArrowRight: Math.min(token + 1, last), ArrowLeft: Math.max(token - 1, 0), Home: 0, End: last}[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  spans[token]?.classList.remove('on');
  token = to;
  spans[token].classList.add('on');
  spans[token].scrollIntoView({block: 'nearest'});
  at('reading').textContent = [named(token), ...readings(token).map(r => r.join(' '))].join(' \u00b7 ');
}

function walk(event) {
  const place = shown.indexOf(chosen), last = shown.length - 1;
  const to = {ArrowDown: place + 1, ArrowUp: place - 1, PageDown: place + 10, PageUp: place - 10, Home: 0, End: last}[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  choose(shown[Math.max(0, Math.min(to, last))], true);
}

async function open() {
  const steps = [...document.querySelectorAll('data.rollouts')];
  all = (await Promise.all(steps.map(step => unpack(step.value)))).flat();
  all.forEach((s, i) => { s.place = i; });
  const fill = (name, values) => home.querySelector(`[name=${name}]`).append(...values.map(v => make('option', {value: v, textContent: visible(String(v))})));
  fill('step', [...new Set(all.map(s => s.step))]);
  const domains = [...new Set(all.map(s => s.domain))].filter(d => d !== undefined).sort();
  fill('domain', domains);
  home.querySelector('[name=domain]').closest('label').hidden = domains.length < 2;
  let waiting;
  home.querySelector('form').addEventListener('input', event => {
    clearTimeout(waiting);
    if (event.target.name === 'words') waiting = setTimeout(filter, 120); else filter();
  });
  home.querySelector('form').addEventListener('submit', event => event.preventDefault());
  home.querySelector('form').addEventListener('reset', () => setTimeout(filter));
  at('rows').addEventListener('keydown', walk);
  at('before').addEventListener('click', () => turn(-1));
  at('after').addEventListener('click', () => turn(1));
  home.hidden = false;
  at('rollouts-plain').hidden = true;
  filter();
}
open().catch(error => { console.error(error); home.hidden = true; at('rollouts-plain').hidden = false; });
})();
