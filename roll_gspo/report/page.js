// Helpers of all scripts of a page. Text of a run is only ever set as textContent, so that it cannot become HTML.
const byId = id => document.getElementById(id);
const make = (tag, props = {}, ...inside) => {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...inside);
  return element;
};
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
}
const number = v => {
  if (v === null || v === undefined || !Number.isFinite(v)) return 'not finite';
  const size = Math.abs(v), places = Math.abs(v - 1) < 5e-3 ? v.toFixed(6) : v.toPrecision(4);
  const text = v === 0 ? '0' : size >= 1e4 && size < 1e15 ? v.toLocaleString('en', {maximumFractionDigits: 0})
    : size < 1e-3 || size >= 1e15 ? v.toExponential(2) : String(Number(places));
  return text.replace('-', '\u2212');
};
// Replace characters that are invisible or that change the direction of the text around them, and halves of characters.
const visible = text => text.replace(/[\u0000-\u0008\u000b-\u001f]/g, c => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/\u007f/g, '\u2421')
  .replace(/[\u0080-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\p{Surrogate}\u{e0000}-\u{e007f}]/gu,
    c => '\u27e8U+' + c.codePointAt(0).toString(16).toUpperCase().padStart(4, '0') + '\u27e9');
const tip = byId('tip');
function placeTip(event, below) {
  tip.hidden = false;
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
  tip.style.left = Math.max(4, left) + 'px';
  tip.style.top = Math.max(4, Math.min(event.clientY + below, innerHeight - tip.offsetHeight - 8)) + 'px';
}
function save(name, blob) {
  const link = make('a', {href: URL.createObjectURL(blob), download: name.replace(/[^\w.@-]+/g, '_')});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
