// An episode as a conversation: what the model sampled, and what its environment gave it.
const OPEN_FIRST = 3, OPEN_LAST = 3, EXCERPT = 100;
// Calls of tools in the formats of Hermes and Qwen, Mistral, and Llama 3. A match ends with the call.
const CALLS = [/<tool_call>([^]*?)(?:<\/tool_call>|$)/g, /\[TOOL_CALLS\]([^]*?)(?=\[TOOL_CALLS\]|$)/g, /<\|python_tag\|>([^]*)$/g,
  /^(\s*\{\s*"(?:type|name)"[^]*"(?:parameters|arguments)"[^]*\})\s*(?:<\|[^]*)?$/g];

// The calls in a text as {start, end, text}; `text` is name and arguments.
function callsIn(text) {
  for (const format of CALLS) {
    const found = [...text.matchAll(format)].map(match => ({start: match.index, end: match.index + match[0].length, text: callText(match[1])}));
    if (found.length) return found;
  }
  return [];
}
function callText(body) {
  const named = /^\s*([^\s[{]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(\{[^]*)$/.exec(body);
  const text = named ? named[2] : body, end = Math.max(text.lastIndexOf('}'), text.lastIndexOf(']')) + 1;
  try {
    const calls = [JSON.parse(text.slice(0, end))].flat();
    if (!named && !calls.every(call => typeof call.name === 'string')) return 'malformed: ' + body.trim();
    return named ? `${named[1]}(${JSON.stringify(calls[0])})`
      : calls.map(call => `${call.name}(${JSON.stringify(call.arguments ?? call.parameters ?? {})})`).join(', ');
  } catch { return 'malformed: ' + body.trim(); }
}
const counted = (n, noun) => `${n.toLocaleString('en')} ${noun}${n === 1 ? '' : 's'}`;
const shortened = (text, length = EXCERPT) => text.length > length ? text.slice(0, length) + '\u2026' : text;

// The turns with the positions of their tokens: given ones from `start`, sampled ones from `first` to `end`.
function turnsOf(s) {
  let start = 0;
  return s.turns.map((turn, i) => {
    const first = start + turn.given, end = first + turn.tokens, answer = s.tokens.slice(first, end).join('');
    const placed = {...turn, number: i + 1, start, first, end, answer, calls: callsIn(answer)};
    start = end;
    return placed;
  });
}
const wasGiven = (s, i) => s.turns !== undefined && (s.placed ??= turnsOf(s)).every(turn => i < turn.first || i >= turn.end);
const answersOf = s => (s.placed ??= turnsOf(s)).map(turn => turn.answer).join(' \u2192 ');
const endText = s => s.end === undefined ? null : s.end === 'done' ? 'ended by the environment' : s.end === 'failed' ? 'environment failed' : `ended by ${s.end}`;

function conversation(s) {
  const turns = s.placed ??= turnsOf(s), whole = make('div', {id: 'tokens', className: 'conversation', tabIndex: 0});
  whole.setAttribute('role', 'group');
  whole.setAttribute('aria-label', 'Conversation; use the arrow keys to select a token');
  turns.forEach((turn, i) => {
    const fold = make('details', {className: 'turn', open: turns.length <= OPEN_FIRST + OPEN_LAST + 2 || i < OPEN_FIRST || i >= turns.length - OPEN_LAST});
    fold.append(turnHead(s, turn), ...(i ? givenTokens(s, turn) : []), answerBubble(s, turn), ...(turn.messages ?? []).map(messageBubble));
    whole.append(fold);
  });
  const after = turns.at(-1)?.end ?? 0, hidden = s.num_turns - turns.length;
  if (!hidden && after < s.tokens.length) whole.append(...givenTokens(s, {start: after, first: s.tokens.length, given: s.tokens.length - after}));
  if (hidden > 0) whole.append(make('p', {className: 'rest', textContent: `\u2026 ${counted(hidden, 'more turn')} in the file.`}));
  return whole;
}

function turnHead(s, turn) {
  const advantages = (s.adv ?? []).slice(turn.first, turn.end).filter(v => v !== null);
  const facts = [counted(turn.tokens, 'token'), `reward ${number(turn.reward)}`,
    advantages.length ? `advantage ${signed(advantages.reduce((a, b) => a + b) / advantages.length)}` : null,
    turn.versions === undefined ? null : `weights ${turn.versions.join(', ')}`,
    ...Object.entries(turn.metrics ?? {}).map(([name, value]) => `${visible(name)} ${number(value)}`)];
  const head = make('summary', {}, make('b', {textContent: `Turn ${turn.number}`}), make('span', {textContent: facts.filter(Boolean).join(' \u00b7 ')}));
  if (turn.invalid) head.append(make('span', {className: 'score bad', textContent: 'invalid'}));
  for (const call of turn.calls) head.append(make('span', {className: 'call', textContent: 'calls ' + shortened(visible(call.text))}));
  head.append(make('span', {className: 'excerpt', textContent: shortened(visible(turn.answer))}));
  return head;
}

function answerBubble(s, turn) {
  const pre = make('pre', {dir: 'auto'});
  let place = 0;
  s.tokens.slice(turn.first, turn.end).forEach((text, i) => {
    const span = tokenSpan(text, turn.first + i), from = place;
    place += text.length;
    if (turn.calls.some(call => from < call.end && place > call.start)) span.classList.add('call');
    pre.append(span);
  });
  const hidden = turn.end - Math.max(turn.first, Math.min(turn.end, s.tokens.length));
  if (!turn.tokens) pre.textContent = '(empty)';
  const rest = hidden > 0 ? [make('p', {className: 'rest', textContent: `\u2026 ${counted(hidden, 'token')} of this answer in the file.`})] : [];
  return make('div', {className: 'bubble sampled'}, make('h5', {textContent: 'assistant, sampled'}), pre, ...rest);
}

function messageBubble(message) {
  const role = message.role === 'tool' ? 'tool result' : message.role;
  const bubble = make('div', {className: 'bubble given'}, make('h5', {textContent: `${visible(role)}, given`}), make('pre', {dir: 'auto', textContent: visible(message.content) || '(empty)'}));
  if (message.fields !== undefined) bubble.append(make('p', {className: 'facts', textContent: visible(message.fields)}));
  return bubble;
}

// The tokens between two answers as the model read them. They are outside the loss.
function givenTokens(s, turn) {
  const shown = s.tokens.slice(turn.start, turn.first);
  if (!turn.given) return [];
  const pre = make('pre', {dir: 'auto', className: 'masked'}, ...shown.map((text, i) => tokenSpan(text, turn.start + i)));
  return [make('details', {className: 'raw'}, make('summary', {textContent: counted(turn.given, 'given token') + ', outside the loss'}), pre)];
}

// Open or fold all turns; only with several.
function foldButtons(s) {
  if (s.turns.length < 2) return [];
  return [['Open all turns', true], ['Fold all turns', false]].map(([label, open]) => {
    const button = make('button', {type: 'button', textContent: label});
    button.addEventListener('click', () => { for (const turn of byId('tokens').querySelectorAll('.turn')) turn.open = open; });
    return button;
  });
}

function traceback(s) {
  return s.traceback === undefined ? [] : [make('details', {className: 'raw'}, make('summary', {textContent: 'Traceback of the environment'}), make('pre', {textContent: visible(s.traceback)}))];
}
