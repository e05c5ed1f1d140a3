// Refresh a page of `--serve` while the run continues. Zoom, smoothing, filters and the selected sample are kept.
const REFRESH_S = 5;
async function refresh() {
  const text = async path => { const answer = await fetch(path); if (!answer.ok) throw Error(answer.status); return answer.text(); };
  const state = byId('live'), now = await text('version');
  state.textContent = 'live';
  if (now === document.body.dataset.version) return;
  const fresh = new DOMParser().parseFromString(await text('.'), 'text/html');
  const open = new Set([...document.querySelectorAll('details[open] > summary')].map(s => s.textContent));
  const samples = section => section.dataset.name === 'Samples';
  const old = [...document.querySelectorAll('main > section')], kept = old.find(s => samples(s) && s.querySelector('#browser'));
  const form = byId('controls');
  for (const section of old) if (section !== kept) section.remove();
  for (const section of [...fresh.querySelectorAll('main > section')]) {
    if (!samples(section) || !kept) { if (form) section.querySelector('#controls')?.replaceWith(form); document.querySelector('main').append(section); continue; }
    document.querySelector('main').append(kept);
    await addSamples([...section.querySelectorAll('data.rollouts')]);
  }
  for (const summary of document.querySelectorAll('details > summary')) if (open.has(summary.textContent)) summary.parentElement.open = true;
  document.querySelector('header p').textContent = fresh.querySelector('header p').textContent;
  document.body.dataset.version = now;
  await openCharts();
  if (!kept) await openBrowser();
}
document.querySelector('header').append(make('p', {id: 'live', textContent: 'live'}));
(async () => {
  for (;;) {
    await new Promise(resolve => setTimeout(resolve, REFRESH_S * 1000));
    await refresh().catch(() => { byId('live').textContent = 'not live: the server does not answer'; });
  }
})();
