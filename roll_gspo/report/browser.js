// The sample browser.
const PAGE = 50, MAX_COLUMNS = 16;
const signed = v => (v > 0 ? '+' : '') + number(v);
const METRICS = {
  logp: {label: 'log-prob (trainer)', low: true, scale: v => v},
  diff: {label: 'engine \u2212 trainer', scale: v => v},
  ratio: {label: 'ratio after the update', scale: v => Math.log(Math.max(v, 1e-300)), unscale: Math.exp},
  adv: {label: 'advantage', scale: v => v},
};
let all = [], shown = [], page = 0, selected = null, shownMetric = 'logp', token = -1, browser = null;

// The samples of one step: `set` is training or validation.
async function samplesOf(data) {
  const groups = (await unpack(data.value)).split('\n').filter(Boolean).map(line => JSON.parse(line));
  const expanded = sample => {
    for (const name in METRICS) if (typeof sample[name] === 'number') sample[name] = sample.tokens.map(() => sample[name]);
    return sample;
  };
  return groups.flatMap(group => group.samples.map(sample => ({...group, ...expanded(sample), set: data.dataset.set, samples: null})));
}
const responseOf = s => s.tokens ? s.tokens.join('') : s.response;
const lengthOf = s => s.length ?? s.characters;
const mismatchOf = s => (s.diff || []).reduce((most, v) => Math.max(most, Math.abs(v)), 0);
const searchText = s => s.searchText ??= [s.prompt, responseOf(s), s.truth, s.answer, s.id, s.source].join('\n').toLowerCase();
const ORDERS = {
  new: (a, b) => b.step - a.step || a.index - b.index, old: (a, b) => a.step - b.step || a.index - b.index,
  best: (a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity), worst: (a, b) => (a.score ?? Infinity) - (b.score ?? Infinity),
  long: (a, b) => lengthOf(b) - lengthOf(a), short: (a, b) => lengthOf(a) - lengthOf(b),
  stale: (a, b) => (b.staleness ?? 0) - (a.staleness ?? 0),
  mismatch: (a, b) => mismatchOf(b) - mismatchOf(a),
  turns: (a, b) => (b.num_turns ?? 1) - (a.num_turns ?? 1),
};
const isTruncated = s => s.end === undefined ? s.finish === 'length' : s.end === 'max_tokens';
const KINDS = {
  all: () => true, failed: s => s.failure !== undefined, truncated: isTruncated, traced: s => s.ratio !== undefined,
};

const sameGroup = (a, b) => a.set === b.set && a.step === b.step && a.group === b.group && a.group !== undefined;
const samePrompt = (a, b) => a.set === b.set && (a.id === undefined ? a.prompt === b.prompt : a.id === b.id && a.source === b.source);

function filter(event) {
  const field = name => browser.querySelector(`[name=${name}]`).value;
  const limit = (name, otherwise) => field(name).trim() === '' ? otherwise : Number(field(name));
  const [set, step, domain, end] = ['set', 'step', 'domain', 'end'].map(field), [kind, words] = [KINDS[field('kind')], field('words').toLowerCase()];
  const [low, high] = [limit('low', -Infinity), limit('high', Infinity)];
  const bounded = low !== -Infinity || high !== Infinity;
  shown = all.filter(s => (set === '' || s.set === set) && (step === '' || s.step === Number(step)) && (domain === '' || s.domain === domain)
    && (end === '' || s.end === end) && kind(s)
    && (!bounded || (s.score !== undefined && s.score >= low && s.score <= high)) && (!words || searchText(s).includes(words)));
  shown.sort((a, b) => ORDERS[field('order')](a, b) || ORDERS.new(a, b));
  page = 0;
  showList();
  show(event?.keep && shown.includes(selected) ? selected : shown[0] ?? null, event?.keep);
}

function scoreBadge(s) {
  const tone = s.failure !== undefined ? ' bad' : !s.advantage ? '' : s.advantage > 0 ? ' good' : ' bad';
  return make('span', {className: 'score' + tone, textContent: s.failure !== undefined ? 'failed' : s.score === undefined ? 'unknown' : number(s.score)});
}

function showList() {
  const first = page * PAGE, pages = Math.max(1, Math.ceil(shown.length / PAGE));
  byId('count').textContent = `${shown.length.toLocaleString('en')} of ${all.length.toLocaleString('en')} samples`;
  byId('rows').replaceChildren(...shown.slice(first, first + PAGE).map((s, i) => {
    const facts = make('p', {className: 'facts'}, scoreBadge(s), `${s.set === 'validation' ? 'validation, ' : ''}step ${s.step}`);
    if (s.domain !== undefined) facts.append(make('span', {textContent: visible(s.domain)}));
    facts.append(make('span', {textContent: [s.turns && counted(s.num_turns, 'turn'), s.length === undefined ? null : `${s.length.toLocaleString('en')} tokens`].filter(Boolean).join(', ')}));
    const excerpt = (s.turns ? answersOf(s) : responseOf(s)).slice(0, 120);
    const row = make('li', {id: 'row' + i}, facts, make('div', {className: 'excerpt', textContent: visible(excerpt) || '(empty)'}));
    row.setAttribute('role', 'option');
    row.addEventListener('click', () => choose(s));
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
  if (row && scroll) { // within the list only: the page itself must not move
    const list = byId('rows'), top = row.offsetTop - list.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + row.offsetHeight - list.clientHeight;
  }
  byId('sample').replaceChildren(...(s ? sampleView(s) : [make('p', {className: 'facts', textContent: 'No sample matches.'})]));
  if (s) colorTokens();
}

// Select a sample and put its link into the address bar.
function choose(s) {
  if (!shown.includes(s)) browser.querySelector('form').reset();
  if (!shown.includes(s)) filter({keep: true});
  show(s, true);
  history.replaceState(null, '', linkTo(s));
}
const linkTo = s => '#' + new URLSearchParams({step: s.step, sample: s.sample ?? 0, ...(s.set === 'validation' ? {set: s.set} : {})});

// Select the sample that the address names, e.g. #step=12&sample=3 or #step=12&sample=3&set=validation.
function followLink() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (!wanted.has('step')) return;
  const set = wanted.get('set') ?? 'training', ofStep = all.filter(s => s.set === set && s.step === Number(wanted.get('step')));
  const found = wanted.has('sample') ? ofStep.find(s => s.sample === Number(wanted.get('sample'))) : ofStep[0];
  if (found) choose(found);
  else byId('sample').replaceChildren(make('p', {className: 'failure', textContent: `This page does not hold the ${set} sample ${wanted.get('sample') ?? ''} of step ${wanted.get('step')}.`}));
  browser.scrollIntoView();
}

function sampleView(s) {
  const facts = make('p', {className: 'facts'}, scoreBadge(s));
  const details = [s.failure === undefined ? null : 'not trained on',
    s.advantage === undefined ? null : `advantage ${signed(s.advantage)}`,
    s.turns === undefined ? null : counted(s.num_turns, 'turn'), endText(s),
    s.length === undefined ? null : `${s.length.toLocaleString('en')} tokens${s.given ? `, ${s.given.toLocaleString('en')} of them given` : ''}`,
    s.branches > 1 ? `one of ${s.branches} conversations; the others are trained on with the same reward` : null,
    s.rewritten === undefined ? null : `the template would have rewritten the history before ${s.rewritten} of the turns`,
    isTruncated(s) ? 'truncated at the length limit' : null,
    s.version === undefined ? null : `sampled by weights ${s.version}${s.newest === undefined ? '' : ` to ${s.newest}`}`,
    s.staleness === undefined ? null : `staleness ${s.staleness}`,
    s.sample === undefined ? null : `sample ${s.sample} of ${s.set === 'validation' ? 'validation' : 'rollouts'}/step_${String(s.step).padStart(6, '0')}.parquet`];
  facts.append(details.filter(Boolean).map(t => ' \u00b7 ' + t).join(''), ' \u00b7 ', make('a', {href: linkTo(s), textContent: 'link'}));
  const origin = [['row', s.id], ['source', s.source]].filter(pair => pair[1] !== undefined).map(pair => `${pair[0]} ${visible(pair[1])}`);
  const heading = [s.set === 'validation' ? `Validation at step ${s.step}` : `Step ${s.step}`, s.group === undefined ? null : `group ${s.group}`, s.domain].filter(v => v !== null && v !== undefined);
  const parts = [make('h3', {textContent: visible(heading.join(' \u00b7 '))}), facts, ...(origin.length ? [make('p', {className: 'facts origin', textContent: origin.join(' \u00b7 ')})] : [])];
  if (s.failure !== undefined) parts.push(make('p', {className: 'failure', textContent: `${s.end === undefined ? 'Reward' : 'Environment'} failed: ${visible(s.failure)}`}), ...traceback(s));
  parts.push(...groupButtons(s), ...stepButtons(s), ...text('Prompt', s.prompt));
  const answers = make('div', {className: 'answers'});
  for (const [name, value] of [['Ground truth', s.truth], ['Answer that the reward extracted', s.answer]]) {
    if (value !== undefined && value !== '') answers.append(make('div', {}, ...text(name, value)));
  }
  parts.push(answers, ...components(s), ...response(s));
  return parts;
}

function text(name, value) {
  return value === undefined ? [] : [make('h4', {textContent: name}), make('pre', {dir: 'auto', textContent: visible(value)})];
}

const scoreText = s => s.failure !== undefined ? 'failed' : number(s.score ?? null);
function groupButtons(s) {
  const group = all.filter(o => sameGroup(o, s));
  if (group.length < 2) return [];
  const row = make('div', {className: 'members'}, 'This group: ');
  for (const other of group) {
    const button = make('button', {type: 'button', textContent: scoreText(other)});
    button.setAttribute('aria-pressed', other === s);
    button.addEventListener('click', () => { choose(other); byId('sample').querySelector('.members [aria-pressed=true]').focus(); });
    row.append(button);
  }
  const columns = make('div', {className: 'columns', hidden: true}), sideButton = make('button', {type: 'button', className: 'side', textContent: 'side by side'});
  sideButton.addEventListener('click', () => {
    columns.hidden = !columns.hidden;
    sideButton.setAttribute('aria-expanded', !columns.hidden);
    if (!columns.childElementCount) columns.append(...group.slice(0, MAX_COLUMNS).map(column));
  });
  row.append(sideButton);
  return [row, columns];
}

function column(s) {
  const head = make('p', {className: 'facts'}, scoreBadge(s), ` ${lengthOf(s)?.toLocaleString('en') ?? '?'} tokens `, make('a', {href: linkTo(s), textContent: `sample ${s.sample ?? ''}`}));
  const answer = s.answer === undefined ? [] : [make('p', {className: 'facts', textContent: 'answer ' + visible(s.answer)})];
  return make('div', {}, head, ...answer, make('pre', {dir: 'auto', textContent: visible(responseOf(s)) || '(empty)'}));
}

// The same prompt in other steps: one button per step with the mean score.
function stepButtons(s) {
  const steps = new Map();
  for (const o of all) if (samePrompt(o, s)) steps.set(o.step, [...(steps.get(o.step) ?? []), o]);
  if (steps.size < 2) return [];
  const row = make('div', {className: 'members steps'}, 'This prompt: ');
  for (const [step, same] of [...steps].sort((a, b) => a[0] - b[0])) {
    const scores = same.map(o => o.score).filter(v => v !== undefined);
    const mean = scores.length ? number(scores.reduce((a, b) => a + b) / scores.length) : 'no score';
    const button = make('button', {type: 'button', textContent: `step ${step}: ${mean}`});
    button.setAttribute('aria-pressed', step === s.step);
    button.addEventListener('click', () => choose(same[0]));
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
  const head = make('div', {className: 'shading'}, make('h4', {textContent: s.turns ? 'Conversation' : 'Response'}));
  const pre = s.turns ? conversation(s) : plainResponse(s);
  if (known.length) {
    const select = make('select', {id: 'metric'}, ...known.map(name => make('option', {value: name, textContent: METRICS[name].label})));
    select.value = known.includes(shownMetric) ? shownMetric : known[0];
    select.addEventListener('change', () => { shownMetric = select.value; colorTokens(); });
    head.append(make('label', {}, 'tokens colored by ', select), make('span', {className: 'scale', id: 'scale'}));
  }
  if (s.turns) head.append(...foldButtons(s));
  const hidden = s.tokens ? lengthOf(s) - s.tokens.length : s.characters - s.response.length;
  const rest = hidden > 0 ? [make('p', {className: 'rest', textContent: `\u2026 ${hidden.toLocaleString('en')} more ${s.tokens ? 'tokens' : 'characters'} in the file.`})] : [];
  pre.addEventListener('pointermove', event => showTokenTip(event));
  pre.addEventListener('pointerleave', () => { tip.hidden = true; });
  pre.addEventListener('keydown', moveToken);
  return [head, pre, ...rest, make('p', {id: 'token', ariaLive: 'polite'})];
}

function plainResponse(s) {
  const pre = make('pre', {id: 'tokens', tabIndex: 0, dir: 'auto'});
  pre.setAttribute('aria-label', 'Response; use the arrow keys to select a token');
  if (s.tokens) s.tokens.forEach((t, i) => pre.append(tokenSpan(t, i)));
  else pre.textContent = visible(s.response) || '(empty)';
  return pre;
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
  byId('tokens').querySelectorAll('[data-i]').forEach(span => {
    const v = values[span.dataset.i], part = v === null || v === undefined || !limit ? 0 : Math.min(1, Math.abs(v) / limit);
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
  if (wasGiven(s, i)) return [['given by the environment', 'outside the loss']];
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
  if (event.target !== event.currentTarget) return; // the head of a turn has the focus
  const spans = [...byId('tokens').querySelectorAll('[data-i]')].filter(span => !span.closest('details:not([open])')), last = spans.length - 1;
  const at = spans.findIndex(span => Number(span.dataset.i) === token);
  const to = {ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last}[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  byId('tokens').querySelector('.on')?.classList.remove('on');
  token = Number(spans[to].dataset.i);
  spans[to].classList.add('on');
  spans[to].scrollIntoView({block: 'nearest'});
  byId('token').textContent = [tokenName(token), ...tokenValues(token).map(r => r.join(' '))].join(' \u00b7 ');
}

function moveSelection(event) {
  const index = shown.indexOf(selected), last = shown.length - 1;
  const to = {ArrowDown: index + 1, ArrowUp: index - 1, PageDown: index + 10, PageUp: index - 10, Home: 0, End: last}[event.key];
  if (to === undefined || last < 0) return;
  event.preventDefault();
  choose(shown[Math.max(0, Math.min(to, last))]);
}

function fillFilters() {
  const fill = (name, values) => {
    const select = browser.querySelector(`[name=${name}]`), value = select.value;
    select.replaceChildren(select.firstElementChild, ...values.map(v => make('option', {value: v, textContent: visible(String(v))})));
    select.value = value;
  };
  fill('step', [...new Set(all.map(s => s.step))].sort((a, b) => a - b));
  const domains = [...new Set(all.map(s => s.domain))].filter(d => d !== undefined).sort();
  fill('domain', domains);
  const ends = [...new Set(all.map(s => s.end))].filter(end => end !== undefined).sort();
  fill('end', ends);
  browser.querySelector('[name=end]').closest('label').hidden = !ends.length;
  browser.querySelector('[name=order] [value=turns]').hidden = !ends.length;
  browser.querySelector('[name=domain]').closest('label').hidden = domains.length < 2;
  browser.querySelector('[name=set]').closest('label').hidden = new Set(all.map(s => s.set)).size < 2;
}

// Add the samples of steps that the browser does not hold yet.
async function addSamples(elements) {
  const known = new Set(all.map(s => `${s.set} ${s.step}`));
  const missing = elements.filter(element => !known.has(`${element.dataset.set} ${element.dataset.step}`));
  if (!missing.length) return;
  all = [...all, ...(await Promise.all(missing.map(samplesOf))).flat()];
  all.forEach((s, i) => { s.index = i; });
  fillFilters();
  filter({keep: true});
}

async function openBrowser() {
  browser = byId('browser');
  if (!browser || !('DecompressionStream' in window)) return;
  browser.hidden = false;
  await addSamples([...document.querySelectorAll('data.rollouts')]);
  let waiting;
  browser.querySelector('form').addEventListener('input', event => {
    clearTimeout(waiting);
    if (event.target.name === 'words') waiting = setTimeout(filter, 120); else filter();
  });
  browser.querySelector('form').addEventListener('submit', event => event.preventDefault());
  browser.querySelector('[type=reset]').addEventListener('click', () => setTimeout(filter));
  byId('rows').addEventListener('keydown', moveSelection);
  byId('before').addEventListener('click', () => turnPage(-1));
  byId('after').addEventListener('click', () => turnPage(1));
  addEventListener('hashchange', followLink);
  byId('samples-static').hidden = true;
  followLink();
}
openBrowser().catch(error => { console.error(error); browser.hidden = true; byId('samples-static').hidden = false; });
