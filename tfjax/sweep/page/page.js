// SPDX-License-Identifier: Apache-2.0
// The live page of a sweep: asks for its state again and again, and shows it.
// Names and logs are set as text, never as HTML.

import {Chart, colour} from './chart.js';
import * as words from './words.js';

const POLL_MS = 1500;
const HURRY_MS = 100;  // while the server has more curves to read
const FIRST_ROWS = 24;
// In the order of the bar, and how a status is called.
const STATES = {complete: 'complete', stopped: 'stopped', diverged: 'diverged',
  failed: 'failed', damaged: 'damaged', running: 'running',
  interrupted: 'interrupted', pending: 'waiting'};
const ROW_ORDER = ['running', 'damaged', 'failed', 'interrupted', 'diverged',
  'complete', 'stopped', 'pending'];
const AXES = {
  tokens: {name: 'tokens', label: 'training tokens', unit: 'tokens',
    format: words.amount},
  flops: {name: 'FLOPs', label: 'training FLOPs', unit: 'FLOPs',
    format: words.power},
  step: {name: 'step', label: 'step', unit: 'steps', format: words.amount}};

const byId = (id) => document.getElementById(id);
const isDark = matchMedia('(prefers-color-scheme: dark)');
const chart = new Chart(document.querySelector('#chart svg'), byId('tip'));
const curves = new Map();
const hiddenSizes = new Set();
const chosen = {loss: 'train', axis: 'tokens', xLog: true, yLog: true,
  state: null, all: false};
const shown = new Map();  // what each part was last drawn from
let state = null;

/** Draws a part anew if what it is drawn from has changed. */
function part(name, source, draw) {
  const text = JSON.stringify(source);
  if (shown.get(name) === text) return;
  shown.set(name, text);
  draw();
}

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  const {data, style, ...others} = properties;
  Object.assign(made, others);
  Object.assign(made.dataset, data);
  Object.assign(made.style, style);
  made.append(...children);
  return made;
}

const stateColour = (status) =>
  `var(--${status in STATES ? status : 'interrupted'})`;
const dot = (value) => element('i', {style: {background: value}});

// --- Parts -------------------------------------------------------------------

function drawHead() {
  byId('sweep').textContent = state.sweep;
  byId('workdir').textContent = state.workdir;
  byId('problems').textContent = state.problems.join('\n');
  byId('problems').hidden = !state.problems.length;
  const share = state.share_done;
  const total = state.runs.reduce((sum, run) => sum + run.flops, 0);
  byId('share').textContent = words.percent(share);
  byId('share-of').textContent = total ? `of ${words.power(total)} FLOPs` :
      'of the FLOPs';
  const ended = state.runs.filter((run) => !['running', 'pending',
    'interrupted'].includes(run.status)).length;
  byId('ended').textContent = `${ended} of ${state.runs.length}`;
  byId('hours').textContent = words.hours(
      state.cost.so_far.device_seconds.sum);
  drawEta();
  document.title = `${words.percent(share)} · ${state.sweep}`;
}

function drawEta() {
  const left = state.seconds_left;
  const failed = state.failures.filter((one) => one.is_retried).length;
  let note = 'left';
  if (state.is_over) {
    note = failed ? `the rest has ended; ${failed} failed` : 'all runs ended';
  } else if (left !== null) {
    note = `left, until ${words.timeOfDay(state.time + left, left)}`;
  } else if (state.counts.running) {
    note = 'left: too little seen yet';
  } else if (state.runs.length) {
    note = 'left: nobody is at it';
  }
  byId('eta').textContent = state.is_over ? 'done' :
      left === null ? 'unknown' : words.duration(left);
  byId('eta-note').textContent = note;
}

function drawBar() {
  const total = state.runs.reduce((sum, run) => sum + run.flops, 0);
  byId('bar').replaceChildren(...Object.keys(STATES).flatMap((status) => {
    const amount = state.runs.filter((run) => run.status === status).reduce(
        (sum, run) => sum + (['failed', 'damaged'].includes(status) ?
            run.flops : run.settled), 0);
    return amount && status !== 'pending' ? [element('i', {
      title: STATES[status], style: {background: stateColour(status),
        width: `${100 * amount / total}%`}})] : [];
  }));
  byId('counts').replaceChildren(...Object.keys(STATES).flatMap((status) => {
    const count = state.counts[status];
    if (!count) return [];
    const isOff = chosen.state !== null && chosen.state !== status;
    return [element('button', {
      data: {status}, className: isOff ? 'off' : '',
      title: 'show only these below',
      onclick: () => {
        chosen.state = chosen.state === status ? null : status;
        show();
      }}, dot(stateColour(status)), `${count} ${STATES[status]}`)];
  }));
}

function drawFailures() {
  const open = new Set([...document.querySelectorAll('.failure details[open]')]
      .map((one) => one.dataset.run));
  byId('failures').hidden = !state.failures.length;
  byId('failure-list').replaceChildren(...state.failures.map((one) => {
    const box = element('div', {className: `failure ${one.status}`,
      data: {run: one.id}},
    element('b', {}, one.label), ` ${one.status} `,
    element('small', {}, one.id),
    element('p', {}, one.reason || 'no reason is known'));
    if (one.log) {
      box.append(element('details', {open: open.has(one.id),
        data: {run: one.id}}, element('summary', {}, 'the end of its log'),
      element('pre', {}, one.log)));
    }
    return box;
  }));
  byId('retry').hidden = !state.failures.some((one) => one.is_retried);
  byId('retry-command').textContent = state.retry;
}

function drawRuns() {
  const rank = (run) => (ROW_ORDER.indexOf(run.status) + ROW_ORDER.length) %
      ROW_ORDER.length;
  const rows = state.runs.filter(
      (run) => chosen.state === null || run.status === chosen.state);
  rows.sort((one, other) => rank(one) - rank(other));
  const kept = chosen.all ? rows : rows.slice(0, FIRST_ROWS);
  document.querySelector('#runs tbody').replaceChildren(...kept.map(drawRun));
  const more = byId('more');
  more.hidden = rows.length <= FIRST_ROWS;
  more.textContent = chosen.all ? 'fewer' : `all ${rows.length} runs`;
}

function drawRun(run) {
  const paint = stateColour(run.status);
  const isSettled = run.settled >= run.flops;
  const share = isSettled ? 1 : (run.step || 0) / run.steps;
  const loss = words.loss(run.loss);
  return element('tr', {data: {run: run.id, status: run.status}},
      element('td', {}, run.label, element('small', {}, run.id)),
      element('td', {className: 'state'}, dot(paint),
          STATES[run.status] || run.status),
      element('td', {className: 'wide meter'}, element('span', {}, element(
          'i', {style: {width: `${100 * share}%`, background: paint}}))),
      element('td', {className: 'number'},
          `${words.whole(run.step || 0)} / ${words.whole(run.steps)}`),
      element('td', {className: 'number loss',
        title: run.is_held_out ? 'held-out' : 'training'}, loss),
      element('td', {className: 'number wide'},
          run.status === 'running' ? words.amount(run.speed) : ''));
}

function drawCost() {
  const {so_far: soFar, at_the_end: atTheEnd, forecast} = state.cost;
  const rows = [
    ['FLOPs', 'flops', words.power],
    ['device-hours', 'device_seconds', words.hours],
    ['price, USD', 'price_usd', words.plain],
    ['energy, kWh', 'energy_kwh', words.plain],
    ['CO₂e, kg', 'co2e_kg', words.plain]];
  const cell = (value, format, ...more) => element('td', {className:
    `number${typeof value === 'number' ? '' : ' unknown'}`},
  typeof value === 'number' ? format(value) : 'unknown', ...more);
  document.querySelector('#cost tbody').replaceChildren(
      ...rows.map(([name, key, format]) => {
        const {sum, unknown} = soFar[key];
        const note = sum !== null && unknown ? [element('small', {},
            `without ${unknown} of ${state.cost.begun} runs`)] : [];
        return element('tr', {data: {cost: key}}, element('td', {}, name),
            cell(sum, format, ...note),
            key in atTheEnd ? cell(atTheEnd[key], format) :
                element('td', {}),
            forecast ? cell(forecast[key], format) : element('td', {}));
      }));
  const notes = ['So far: rows and records of runs, a shared trunk counted ' +
    'once. At the end: the rest at the speed of the runs so far.'];
  if (state.cost.basis) notes.push(`Forecast: ${state.cost.basis}.`);
  else notes.push('There is no forecast; scripts/plan.py makes one.');
  byId('cost-note').textContent = notes.join(' ');
}

function drawReport() {
  const {state: standing, text, figures} = state.report;
  const link = (name) => element('a', {href: 'report.html'}, name);
  byId('report-text').replaceChildren(...{
    none: ['It is made once all runs have ended.'],
    old: ['Of an earlier state: ', link('report.html'),
      '. It is made anew once all runs have ended.'],
    making: ['All runs have ended: it is being made.'],
    failed: [`It could not be made: ${text}`],
    ready: [link('report.html'), ' with fits, figures and all runs.'],
  }[standing]);
  byId('figures').replaceChildren(...figures.map((name) => element(
      'a', {href: 'report.html'}, element('img', {
        src: `figures/${encodeURIComponent(name)}.svg`, alt: name}))));
}

// --- Curves ------------------------------------------------------------------

function drawCurves() {
  const sizes = [...new Set(state.runs.map((run) => run.size))];
  sizes.sort((one, other) => one - other);
  const paint = new Map(sizes.map(
      (size, k) => [size, colour(k, sizes.length, isDark.matches)]));
  const series = [];
  for (const run of state.runs) {
    const curve = curves.get(run.id);
    if (!curve || hiddenSizes.has(run.size) ||
        (chosen.state !== null && run.status !== chosen.state)) continue;
    const [steps, losses] = curve[chosen.loss];
    const factor = chosen.axis === 'step' ? 1 : curve.per_step[chosen.axis];
    const kept = losses.map((loss, k) => k).filter((k) => losses[k] > 0);
    series.push({label: run.label, colour: paint.get(run.size),
      xs: kept.map((k) => steps[k] * factor), ys: kept.map((k) => losses[k]),
      isRunning: run.status === 'running',
      isDotted: chosen.loss === 'evaluation'});
  }
  byId('no-curves').hidden = series.some((one) => one.xs.length);
  chart.draw(series, {x: {...AXES[chosen.axis], isLog: chosen.xLog},
    y: {label: `${chosen.loss === 'train' ? 'training' : 'held-out'} loss, ` +
      'nats / token', isLog: chosen.yLog, format: words.tick}});
  byId('sizes').replaceChildren(...sizes.map((size) => element('button', {
    data: {size}, className: hiddenSizes.has(size) ? 'off' : '',
    title: 'show or hide this size',
    onclick: () => {
      if (!hiddenSizes.delete(size)) hiddenSizes.add(size);
      show();
    }}, dot(paint.get(size)), `N = ${words.amount(size)}`)));
}

/** Buttons of which one is pressed, or each for itself. */
function choices(id, options, isPressed, press) {
  byId(id).replaceChildren(...options.map(([value, name]) => {
    const button = element('button', {onclick: () => {
      press(value);
      show();
    }}, name);
    button.setAttribute('aria-pressed', String(isPressed(value)));
    return button;
  }));
}

function drawChoices() {
  choices('loss-choice', [['train', 'training'], ['evaluation', 'held-out']],
      (one) => chosen.loss === one, (one) => chosen.loss = one);
  choices('axis-choice', Object.entries(AXES).map(
      ([key, axis]) => [key, axis.name]),
  (one) => chosen.axis === one, (one) => chosen.axis = one);
  choices('scale-choice', [['xLog', 'log x'], ['yLog', 'log y']],
      (one) => chosen[one], (one) => chosen[one] = !chosen[one]);
}

// --- Over time ---------------------------------------------------------------

function show() {
  if (!state) return;
  drawHead();
  part('bar', [state.runs, chosen.state], drawBar);
  part('failures', [state.failures, state.retry], drawFailures);
  part('choices', chosen, drawChoices);
  part('curves', [state.version, state.runs.map((run) => run.status), chosen,
    [...hiddenSizes], isDark.matches], drawCurves);
  part('runs', [state.runs, chosen], drawRuns);
  part('cost', state.cost, drawCost);
  part('report', state.report, drawReport);
}

function take(found) {
  if (!state || state.epoch !== found.epoch) curves.clear();
  for (const [id, curve] of Object.entries(found.curves)) {
    curves.set(id, curve);
  }
  state = found;
  show();
}

async function poll() {
  const pulse = byId('pulse');
  let wait = POLL_MS;
  try {
    const query = state ? `?epoch=${state.epoch}&after=${state.version}` : '';
    const answer = await fetch(`state.json${query}`);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    take(await answer.json());
    if (state.behind) wait = HURRY_MS;
    pulse.className = 'live';
    pulse.textContent = state.behind ? 'reading the curves' :
        `as of ${words.timeOfDay(state.time, 0)}`;
  } catch (error) {
    pulse.className = 'lost';
    pulse.textContent = 'the server does not answer; this is the last it said';
  }
  setTimeout(poll, wait);
}

byId('more').addEventListener('click', () => {
  chosen.all = !chosen.all;
  show();
});
isDark.addEventListener('change', show);
drawChoices();
poll();
