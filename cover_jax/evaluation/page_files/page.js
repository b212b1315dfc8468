'use strict';
// Every name of the user's becomes text by `textContent`; nothing here makes HTML of a string.
(() => {
  const data = JSON.parse(document.getElementById('data').textContent);
  if (!data.heads.length) {  // all have several labels an example: their tables need no script
    for (const id of ['classes', 'confusion', 'wall']) document.getElementById(id).hidden = true;
    return;
  }
  const two = data.runs.length > 1;
  const PAGE = 48, MATRIX = 40;
  const at = id => document.getElementById(id);
  const state = {head: 0, which: two ? 'changed' : 'all', label: '', predicted: null, order: 'hardest', shown: PAGE, still: false};
  let sorting = {column: 0, up: true};

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === 'text') node.textContent = value;
      else if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
      else if (value !== false && value !== null) node.setAttribute(key, value === true ? '' : value);
    }
    node.append(...children);
    return node;
  }

  const head = () => data.heads[state.head];
  const name = k => head().classes[k];
  const percent = x => `${(100 * x).toFixed(1)} %`;
  const right = (clip, run) => clip[run][0][0] === clip.t;

  // Classes.

  const COLUMNS = two ? [
    {title: 'class', value: r => name(r[0]), first: true},
    {title: 'examples', value: r => r[1]},
    {title: 'first', value: r => r[2] / r[1], text: percent},
    {title: 'second', value: r => r[3] / r[1], text: percent},
    {title: 'difference', value: r => (r[3] - r[2]) / r[1], text: x => (x > 0 ? '+' : '') + percent(x)},
    {title: 'only first right', value: r => r[4]},
    {title: 'only second right', value: r => r[5]},
    {title: 'p, corrected (Holm)', value: r => r[6], text: p => p < 0.001 ? p.toExponential(1) : p.toFixed(3)},
  ] : [
    {title: 'class', value: r => name(r[0]), first: true},
    {title: 'examples', value: r => r[1]},
    {title: 'right', value: r => r[2]},
    {title: 'accuracy', value: r => r[1] ? r[2] / r[1] : -1, text: x => x < 0 ? '' : percent(x)},
    {title: 'from (95 %)', value: r => r[1] ? r[3] : -1, text: x => x < 0 ? '' : percent(x)},
    {title: 'to', value: r => r[1] ? r[4] : -1, text: x => x < 0 ? '' : percent(x)},
  ];

  function drawClasses(focus) {
    const column = COLUMNS[sorting.column];
    const order = (a, b) => typeof a === 'string' ? a.localeCompare(b) : a - b;
    const rows = [...head().rows].sort((a, b) => (sorting.up ? 1 : -1) * order(column.value(a), column.value(b)));
    const header = make('tr');
    COLUMNS.forEach((c, i) => {
      const sorted = i !== sorting.column ? 'none' : sorting.up ? 'ascending' : 'descending';
      const arrow = i !== sorting.column ? '' : sorting.up ? ' ▲' : ' ▼';
      const button = make('button', {type: 'button', text: c.title + arrow, onclick: () => {
        sorting = {column: i, up: i === sorting.column ? !sorting.up : true};
        drawClasses(i);
      }});
      header.append(make('th', {scope: 'col', 'aria-sort': sorted}, button));
    });
    const body = make('tbody');
    for (const row of rows) {
      const line = make('tr');
      COLUMNS.forEach(c => {
        const value = c.value(row), text = c.text ? c.text(value) : String(value);
        line.append(c.first
          ? make('th', {scope: 'row'}, make('button', {type: 'button', text, title: 'Show its clips', onclick: () => show(row[0], null)}))
          : make('td', {text}));
      });
      body.append(line);
    }
    at('class-table').replaceChildren(make('table', {}, make('thead', {}, header), body));
    if (focus !== undefined) at('class-table').querySelectorAll('thead button')[focus].focus();
  }

  // Confusions.

  function drawConfusion() {
    at('confusion').hidden = at('to-confusion').hidden = two;
    if (two) return;
    const cells = head().cells, wrong = cells.filter(c => c[0] !== c[1]);
    let some = head().rows.map(r => r[0]);
    if (some.length > MATRIX) {
      const of = new Set();
      for (const [t, p] of wrong) if (of.size < MATRIX - 1) of.add(t).add(p);
      some = some.filter(k => of.has(k));
    }
    const times = new Map(cells.map(([t, p, n]) => [`${t} ${p}`, n]));
    const total = new Map(head().rows.map(r => [r[0], r[1]]));
    const header = make('tr', {}, make('th', {scope: 'col', text: 'true ↓ answered →'}));
    for (const k of some) header.append(make('th', {scope: 'col', title: name(k)}, make('span', {text: name(k)})));
    const body = make('tbody'), grid = [];
    for (const t of some) {
      const line = make('tr', {}, make('th', {scope: 'row', text: name(t)}));
      const buttons = some.map(p => {
        const n = times.get(`${t} ${p}`) || 0, share = n / Math.max(total.get(t), 1);
        const said = `${name(t)}, answered ${name(p)}: ${n} of ${total.get(t)}`;
        const pressed = state.predicted === p && state.label === String(t);
        const button = make('button', {type: 'button', tabindex: -1, title: said, 'aria-label': said, text: n || '', 'aria-pressed': String(pressed), onclick: () => show(t, p)});
        const colour = t === p ? '26, 127, 55' : '198, 40, 40';
        if (n) button.style.background = `rgba(${colour}, ${0.12 + 0.7 * share})`;
        line.append(make('td', {}, button));
        return button;
      });
      grid.push(buttons);
      body.append(line);
    }
    // One stop of the Tab key; arrows move within.
    grid.forEach((buttons, i) => buttons.forEach((button, j) => button.addEventListener('keydown', event => {
      const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      const next = step && grid[i + step[0]] && grid[i + step[0]][j + step[1]];
      if (!next) return;
      event.preventDefault();
      button.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    })));
    if (grid.length) grid[0][0].tabIndex = 0;
    at('matrix').replaceChildren(make('table', {}, make('thead', {}, header), body));
    const all = head().classes.length;
    const left = head().cells_left_out ? ` ${head().cells_left_out} rare cells are left out.` : '';
    at('confusion-note').textContent = (some.length < all ? `The ${some.length} of ${all} classes that are confused most often. ` : '') +
      `A cell opens its clips; arrow keys move between cells.${left}`;
    at('pairs').replaceChildren(...wrong.slice(0, 20).map(([t, p, n]) => make('li', {}, make('button', {
      type: 'button', text: `${name(t)} → ${name(p)}: ${n} of ${total.get(t)}`, onclick: () => show(t, p)}))));
    if (!wrong.length) at('pairs').replaceChildren(make('li', {text: 'No example of this head is wrong.'}));
  }

  // Clips.

  const WHICH = two ? [
    ['changed', 'changed', c => right(c, 'a') !== right(c, 'b')],
    ['second', 'only second right', c => !right(c, 'a') && right(c, 'b')],
    ['first', 'only first right', c => right(c, 'a') && !right(c, 'b')],
    ['wrong', 'both wrong', c => !right(c, 'a') && !right(c, 'b')],
    ['right', 'both right', c => right(c, 'a') && right(c, 'b')],
    ['all', 'all', () => true],
  ] : [
    ['all', 'all', () => true],
    ['wrong', 'wrong', c => !right(c, 'a')],
    ['right', 'right', c => right(c, 'a')],
  ];
  const surest = c => c.a[0][1];
  const ORDERS = [
    ['hardest', 'most confident errors first', (a, b) => right(a, 'a') - right(b, 'a') || (right(a, 'a') ? surest(a) - surest(b) : surest(b) - surest(a))],
    ['surest', 'most confident first', (a, b) => surest(b) - surest(a)],
    ['unsure', 'least confident first', (a, b) => surest(a) - surest(b)],
    ['number', 'by number', (a, b) => a.e - b.e],
  ];

  function answers(clip, run, title) {
    const list = make('ol', title ? {'aria-label': title} : {});
    clip[run].forEach(([k, p], i) => {
      const correct = k === clip.t;
      const mark = correct ? '✓ ' : i ? '' : '✗ ';
      const bar = make('span', {class: 'bar'});
      bar.style.setProperty('--share', p);
      list.append(make('li', {class: correct ? 'right' : i ? '' : 'wrong'}, bar, make('span', {text: mark + name(k)}), make('span', {text: percent(p)})));
    });
    return list;
  }

  function card(clip) {
    const image = make('img', {src: `data:image/webp;base64,${clip.i}`, alt: `Clip of class ${name(clip.t)}`});
    image.addEventListener('load', () => {
      if (image.naturalWidth < 100) image.classList.add('small');
      if (!state.still) return;
      const canvas = make('canvas', {width: image.naturalWidth, height: image.naturalHeight, role: 'img', 'aria-label': image.alt, class: image.className});
      canvas.getContext('2d').drawImage(image, 0, 0);
      image.replaceWith(canvas);
    });
    const caption = make('figcaption', {}, make('strong', {text: name(clip.t)}));
    const sides = two ? [['a', `First: ${data.runs[0]}`], ['b', `Second: ${data.runs[1]}`]] : [['a', '']];
    for (const [run, title] of sides) {
      if (title) caption.append(make('div', {class: 'name', text: title}));
      caption.append(answers(clip, run, title));
    }
    caption.append(make('div', {class: 'name', text: `${clip.n || ''} #${clip.e}`.trim()}));
    return make('figure', {}, image, caption);
  }

  function drawClips() {
    const keep = WHICH.find(w => w[0] === state.which)[2], order = ORDERS.find(o => o[0] === state.order)[2];
    const wanted = c => keep(c) && (state.label === '' || c.t === Number(state.label)) && (state.predicted === null || c.a[0][0] === state.predicted);
    const found = head().clips.filter(wanted).sort(order);
    at('clips').replaceChildren(...found.slice(0, state.shown).map(card));
    const left = head().judged - head().clips.length;
    const cell = state.predicted === null ? null : head().cells.find(c => c[0] === Number(state.label) && c[1] === state.predicted);
    at('count').textContent = `${found.length} clip${found.length === 1 ? '' : 's'}` + (cell ? ` of the ${cell[2]} examples of this cell. ` : '. ') +
      `This page holds ${head().clips.length} of the ${head().judged} examples that were judged; ${left} are left out, and listed in predictions_${head().name}.csv. ${head().views}`;
    at('more').hidden = found.length <= state.shown;
    at('clear').hidden = state.predicted === null;
    if (state.predicted !== null) at('clear').textContent = `Answered “${name(state.predicted)}” only ✕`;
  }

  function show(label, predicted) {
    Object.assign(state, {label: String(label), predicted, which: 'all', shown: PAGE});
    at('which').value = 'all';
    at('label').value = state.label;
    if (!two) drawConfusion();
    drawClips();
    at('wall').scrollIntoView();
    at('wall').focus({preventScroll: true});
  }

  function options(id, pairs, value) {
    at(id).replaceChildren(...pairs.map(([key, text]) => make('option', {value: key, text})));
    at(id).value = value;
  }

  function drawHead(number) {
    Object.assign(state, {head: number, label: '', predicted: null, shown: PAGE});
    document.querySelectorAll('.head-name').forEach(node => { node.textContent = head().name; });
    [...at('tabs').children].forEach((tab, i) => tab.setAttribute('aria-pressed', String(i === number)));
    const labels = head().rows.map(r => [String(r[0]), name(r[0])]).sort((a, b) => a[1].localeCompare(b[1]));
    options('label', [['', 'all'], ...labels], '');
    drawClasses();
    drawConfusion();
    drawClips();
  }

  at('tabs').append(...data.heads.map((h, i) => make('button', {type: 'button', text: h.name, onclick: () => drawHead(i)})));
  options('which', WHICH, state.which);
  options('order', ORDERS, state.order);
  for (const id of ['which', 'label', 'order']) {
    at(id).addEventListener('change', () => {
      Object.assign(state, {[id]: at(id).value, shown: PAGE}, id === 'label' ? {predicted: null} : {});
      drawClips();
    });
  }
  at('filters').addEventListener('submit', event => event.preventDefault());
  at('clear').addEventListener('click', () => { state.predicted = null; drawConfusion(); drawClips(); at('label').focus(); });
  at('more').addEventListener('click', () => { state.shown += PAGE; drawClips(); });
  at('still').addEventListener('change', () => { state.still = at('still').checked; drawClips(); });
  if (window.matchMedia && window.matchMedia('(prefers-reduced-motion: reduce)').matches) at('still').checked = state.still = true;
  drawHead(0);
})();
