// Sliders over pictures drawn beforehand, and the lessons that a reader has ticked off.
for (const box of document.querySelectorAll('.slider')) {
  const [input, img, out] = ['input', 'img', 'output'].map(tag => box.querySelector(tag));
  const values = JSON.parse(box.dataset.values), alt = img.alt;
  const source = i => img.src.replace(/\d+\.webp$/, String(i).padStart(2, '0') + '.webp');
  const show = () => {
    const value = values[input.value];
    img.src = source(input.value);
    img.alt = `${alt}; ${input.name} ${value}`;
    out.value = value;
    input.setAttribute('aria-valuetext', value);
  };
  input.addEventListener('input', show);
  box.addEventListener('pointerenter', () => values.forEach((_, i) => { new Image().src = source(i); }), { once: true });
  show();
}

const read = () => { try { return JSON.parse(localStorage.getItem('lessons') || '[]'); } catch { return []; } };
const mark = () => {
  const done = read();
  for (const link of document.querySelectorAll('a[data-lesson]')) link.classList.toggle('done', done.includes(link.dataset.lesson));
  for (const count of document.querySelectorAll('.map-count'))
    count.textContent = `${done.length} of ${count.dataset.of} lessons ticked off in this browser.`;
};
for (const tick of document.querySelectorAll('input[data-lesson]')) {
  tick.checked = read().includes(tick.dataset.lesson);
  tick.addEventListener('change', () => {
    const others = read().filter(name => name !== tick.dataset.lesson);
    try { localStorage.setItem('lessons', JSON.stringify(tick.checked ? [...others, tick.dataset.lesson] : others)); } catch { }
    mark();
  });
}
mark();

// A formula that is too wide is broken where it has a wide space, then made smaller.
const wide = box => box.scrollWidth > box.clientWidth;
const draw = (item, tex) => { item.math = tex; item.rerender(MathJax.startup.document, 20); };    // from its TeX
const fit = () => {
  for (const item of window.MathJax?.startup?.document?.math || []) {
    const box = item.typesetRoot.closest('div.math');
    if (!box) continue;
    box.style.fontSize = '';
    if (item.whole) draw(item, item.whole);
    item.whole = '';
    const [, body, tag = ''] = /^(.*?)(\\tag\{.*\})?\s*$/s.exec(item.math);
    if (wide(box) && body.includes('\\qquad')) {
      item.whole = item.math;
      draw(item, `\\begin{gathered}${body.replaceAll('\\qquad', '\\\\')}\\end{gathered}${tag}`);
    }
    const fits = Math.floor(98 * box.clientWidth / box.scrollWidth);
    if (wide(box)) box.style.fontSize = `${fits < 70 ? 85 : fits}%`;                              // it scrolls, or it fits
  }
};

// What scrolls sideways can be reached and scrolled from the keyboard, once the formulas are drawn.
let seen;
const reach = () => {
  if (innerWidth === seen || innerWidth < 200) return;               // only a new width matters; a screenshot makes it 1
  seen = innerWidth;
  fit();
  for (const box of document.querySelectorAll('pre, div.math, .pst-scrollable-table-container, dt.sig, .cell_output'))
    if (wide(box)) box.tabIndex = 0;
};
addEventListener('load', () => Promise.resolve(window.MathJax?.startup?.promise).then(reach));
addEventListener('resize', reach);

// Two things of the theme and of Sphinx that a screen reader cannot name.
for (const s of document.querySelectorAll('summary'))
  if (!s.textContent.trim()) s.setAttribute('aria-label', 'Pages below ' + s.closest('li').querySelector('a').textContent.trim());
for (const e of document.querySelectorAll('dt.sig dl, dt.sig dd')) e.setAttribute('role', 'none');
