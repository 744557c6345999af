// The page: its controls, the pictures, and what the worker tells. The drawing itself is in worker.js.

import { Inside } from './inside.js';
import { CELLS, cost } from './model.js';
import { Picture, partMask, savePictures } from './pictures.js';
import { isGuided, spaced } from './sampler.js';
import { COUNT, defaults, fromLink, toLink, trained, within } from './settings.js';

const $ = (id) => document.getElementById(id);

let names = []; // of the models
let about = null; // model.json of the one that draws
let settings = null;
let drawing = 0; // the number of the drawing that was asked for last
let isDone = false;
let watched = 0;
let inside = null; // of the watched picture
let worker = null;
let paintSeed = 1;
let isReady; // called once the worker is
const ready = new Promise((resolve) => (isReady = resolve));
const own = []; // the nine pictures
const other = []; // those of the plain CNN

// --- what goes wrong -----------------------------------------------------------------------------------------------

function problem(sentence) {
  $('problem').textContent = sentence;
  $('problem').hidden = !sentence;
  if (sentence) $('status').textContent = 'Nothing is being drawn.';
}

/** Whether the browser has WebAssembly with SIMD: it validates a module whose one function uses it. */
function hasWebAssembly() {
  // prettier-ignore
  const module = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  return typeof WebAssembly === 'object' && WebAssembly.validate(Uint8Array.from(module));
}

// --- pictures ------------------------------------------------------------------------------------------------------

function makePictures() {
  for (let index = 0; index < COUNT; index++) {
    const on = { watch: () => watch(index), paint: (mask) => fillIn(index, mask) };
    own.push(new Picture($('pictures'), problem, on));
    other.push(new Picture($('other-pictures'), problem));
  }
}

/** Put noise back where the mask of a picture is 1. */
function fillIn(index, mask) {
  watch(index);
  setDone(false);
  worker.postMessage({ type: 'paint', id: drawing, index, mask, from: Number($('from').value), seed: paintSeed++ });
}

function watch(index) {
  watched = index;
  own.forEach(({ holder }, i) => holder.setAttribute('aria-pressed', String(i === index)));
  for (const id of ['watched', 'painted']) $(id).textContent = index + 1;
  worker.postMessage({ type: 'watch', index });
}

// --- what the worker tells -----------------------------------------------------------------------------------------

const tells = {
  ready({ threads }) {
    $('threads').textContent = threads > 1 ? `It computes with ${threads} threads.` : 'It computes with one thread.';
    isReady();
  },

  about(message) {
    about = message.about;
    const { parameters, classes, shape } = about;
    const size = `${shape[2]}x${shape[1]}`;
    const network = about.ode ? `The liquid (${about.model})` : `A network without an ODE (${about.model})`;
    $('pictures-caption').textContent = `${network}: ${parameters.toLocaleString('en')} parameters, ${size} pixels.`;
    const name = (i) => (classes.length ? settings.class || classes[i % classes.length] : '');
    for (const list of [own, other]) list.forEach((picture, i) => picture.name(i + 1, name(i)));
    $('inside').hidden = !about.ode;
    $('no-inside').hidden = Boolean(about.ode);
    showCost();
  },

  frame({ which, index, call, calls, t, milliseconds, shape, rgba }) {
    const list = which === 'own' ? own : other;
    const area = 4 * shape[1] * shape[2];
    const pictures = index === null ? list : [list[index]];
    pictures.forEach((picture, i) => picture.show(rgba.slice(i * area, (i + 1) * area), shape));
    if (which !== 'own') return;
    $('progress').max = calls;
    $('progress').value = call;
    $('status').textContent =
      `Network call ${call} of ${calls}: on to timestep ${Math.max(0, t)} of ${about.timesteps}.`;
    const per = milliseconds / pictures.length;
    $('cost-measured').textContent =
      `${milliseconds.toFixed(0)} ms per network call (${per.toFixed(0)} ms per picture)`;
  },

  inside({ index, cells }) {
    if (index !== watched) return;
    inside.play(cells, about.ode.horizon, isDone ? 1200 : 400);
  },

  done() {
    setDone(true);
    $('status').textContent = 'Done: change anything, or hold down on a picture.';
    keepForLater();
  },

  problem({ message }) {
    setDone(true);
    problem(message);
  },
};

/** With everything drawn once, the browser keeps the page for when there is no network. */
function keepForLater() {
  if ('serviceWorker' in navigator && !navigator.serviceWorker.controller) {
    navigator.serviceWorker.register('service-worker.js').catch(() => {}); // without it the page needs a network
  }
}

// --- controls ------------------------------------------------------------------------------------------------------

const ode = () => ({ guidance: settings.guidance, solver: settings.solver, steps: settings.steps });

/** What is on the screen is not yet what was asked for; tests wait for its end. */
function setDone(done) {
  isDone = done;
  document.body.dataset.state = done ? 'done' : 'drawing';
}

/** Draw all pictures anew. */
function draw() {
  problem('');
  setDone(false);
  drawing += 1;
  const beside = settings.beside ? companion(settings.model) : null;
  $('other').hidden = !beside;
  const { model, seed, calls } = settings;
  const what = { model, beside, seed, calls, chosen: settings.class, count: COUNT };
  worker.postMessage({ type: 'draw', id: drawing, what, settings: ode() });
}

let soon = 0;

/** Draw anew once a slider rests. */
function drawSoon() {
  setDone(false);
  clearTimeout(soon);
  soon = setTimeout(draw, 200);
}

/** What may change while it draws; if all is drawn, it is drawn anew. */
function changeOde() {
  worker.postMessage({ type: 'settings', settings: ode() });
  show();
  if (isDone) drawSoon();
}

/** The CNN that was trained like this liquid, if it is there. */
function companion(name) {
  const candidate = name.replace(/^true/, 'inspired');
  return candidate !== name && names.includes(candidate) ? candidate : null;
}

function title(name) {
  const [kind, ...set] = name.split('-');
  const sets = { cifar10: 'CIFAR-10: photographs of ten classes', kanji: 'kanji that do not exist', digits: 'digits' };
  const network = { true: 'liquid', inspired: 'plain CNN' }[kind] ?? kind;
  return `${sets[set.join('-')] ?? set.join(' ')} (${network})`;
}

/** All controls as the settings are. */
function show() {
  for (const [name, value] of Object.entries({
    model: settings.model,
    class: settings.class,
    solver: settings.solver,
  })) {
    $(name).value = value;
  }
  for (const name of ['seed', 'guidance', 'calls']) $(name).value = settings[name];
  for (const name of ['guidance', 'calls']) $(`${name}-value`).textContent = settings[name];
  Object.keys(CELLS).forEach((name, i) => {
    $(`steps-${name}`).value = settings.steps[i];
    $(`steps-${name}-value`).textContent = settings.steps[i];
  });
  $('beside').checked = settings.beside;
  $('from-value').textContent = `${Math.round(100 * $('from').value)} %`;
  showCost();
}

function showCost() {
  if (!about) return;
  const isLiquid = Boolean(about.ode);
  const call = cost(about, settings);
  const times = spaced(about.timesteps, settings.calls).slice(0, -1);
  const twice = times.filter((t) => isGuided(about, t, settings.guidance)).length;
  const millions = (value) =>
    `${(value / 1e6).toLocaleString('en', { maximumFractionDigits: 1 })} million multiply-adds`;
  $('cost-call').textContent = millions(call) + (twice ? `, twice in ${twice} of ${times.length} calls` : '');
  $('cost-drawing').textContent = millions(call * (times.length + twice));
  for (const id of ['steps-global', 'steps-local', 'steps-detail', 'solver', 'as-trained', 'ode-time'])
    $(id).disabled = !isLiquid;
  for (const id of ['class', 'guidance']) $(id).disabled = !about.classes.length;
}

/** Another model: what it starts with, and its classes. */
async function choose(name, wanted = {}) {
  const answer = await fetch(`models/${name}/model.json`).catch(() => null);
  drawing += 1; // what is still being drawn is no longer wanted
  about = answer?.ok ? await answer.json().catch(() => null) : null;
  if (!about) {
    problem(`The network ${name} could not be loaded: models/${name}/model.json is missing or damaged.`);
    return false;
  }
  settings = { ...defaults(name, about), ...wanted, model: name };
  const all = new Option(about.classes.length ? 'each in turn' : 'it has none', '');
  $('class').replaceChildren(all, ...about.classes.map((one) => new Option(one, one)));
  if (!about.classes.includes(settings.class)) settings.class = '';
  const usual = trained(about).steps.join('/');
  $('as-trained-note').textContent = !about.ode?.random_steps
    ? ''
    : `In training it took ${usual}, or at random half, twice or four times as many; here it begins with half.`;
  const partner = companion(name);
  settings.beside &&= Boolean(partner);
  $('beside').disabled = !partner;
  $('beside-note').textContent = partner ? '' : 'There is no CNN that was trained like this network.';
  show();
  return true;
}

function listen() {
  $('model').addEventListener('change', async () => {
    const { seed, calls, beside } = settings;
    if (await choose($('model').value, { seed, calls, beside })) draw();
  });
  $('class').addEventListener('change', () => {
    settings.class = $('class').value;
    draw();
  });
  $('seed').addEventListener('change', () => {
    settings.seed = within('seed', Math.round(Number($('seed').value) || 0));
    show();
    draw();
  });
  $('calls').addEventListener('input', () => {
    settings.calls = Number($('calls').value);
    show();
    drawSoon();
  });
  $('beside').addEventListener('change', () => {
    settings.beside = $('beside').checked;
    draw();
  });
  $('guidance').addEventListener('input', () => {
    settings.guidance = Number($('guidance').value);
    changeOde();
  });
  Object.keys(CELLS).forEach((name, i) => {
    $(`steps-${name}`).addEventListener('input', () => {
      settings.steps = settings.steps.map((value, j) => (i === j ? Number($(`steps-${name}`).value) : value));
      changeOde();
    });
  });
  $('solver').addEventListener('change', () => {
    settings.solver = $('solver').value;
    changeOde();
  });
  $('as-trained').addEventListener('click', () => {
    Object.assign(settings, trained(about));
    changeOde();
  });
  $('again').addEventListener('click', () => {
    settings.seed = within('seed', settings.seed + COUNT);
    show();
    draw();
  });
  $('pause').addEventListener('click', () => {
    const paused = $('pause').getAttribute('aria-pressed') !== 'true';
    $('pause').setAttribute('aria-pressed', String(paused));
    $('pause').textContent = paused ? 'Go on' : 'Pause';
    worker.postMessage({ type: 'pause', paused });
  });
  $('from').addEventListener('input', show);
  $('paint').addEventListener('click', () => {
    const picture = own[watched];
    if (picture.rgba) fillIn(watched, partMask($('part').value, picture.shape));
  });
  $('save').addEventListener('click', () => {
    const name = `${settings.model}-${settings.seed}.png`;
    if (own[0].rgba) savePictures(settings.beside ? [own, other] : [own], name);
  });
  $('link').addEventListener('click', copyLink);
  addEventListener('hashchange', async () => {
    const wanted = fromLink(location.hash);
    if (await choose(names.includes(wanted.model) ? wanted.model : settings.model, wanted)) draw();
  });
}

async function copyLink() {
  const link = `${location.href.split('#')[0]}#${toLink(settings)}`;
  history.replaceState(null, '', link);
  try {
    await navigator.clipboard.writeText(link);
    $('status').textContent = 'The link is copied; it holds all settings.';
  } catch {
    $('status').textContent = 'The address of this page now holds all settings; copy it from there.';
  }
}

async function begin() {
  makePictures();
  inside = new Inside($('inside'), $('ode-time'), $('ode-time-value'));
  if (!hasWebAssembly()) {
    problem('This browser has no WebAssembly with SIMD, without which the network cannot run here.');
    return;
  }
  const answer = await fetch('models/models.json').catch(() => null);
  names = answer?.ok ? await answer.json().catch(() => []) : [];
  if (!names.length) {
    problem('The list of networks, models/models.json, is missing or damaged.');
    return;
  }
  $('model').replaceChildren(...names.map((name) => new Option(title(name), name)));
  worker = new Worker('worker.js', { type: 'module' });
  worker.onmessage = ({ data }) => {
    if (!data.id || data.id === drawing) tells[data.type](data);
  };
  worker.onerror = (event) => {
    event.preventDefault();
    problem(
      `The part of this page that draws could not start (${event.message || 'its files are missing or damaged'}).`,
    );
  };
  $('from').value = 0.6;
  const wanted = fromLink(location.hash);
  listen();
  watch(0);
  const chosen = choose(names.includes(wanted.model) ? wanted.model : names[0], wanted);
  if ((await Promise.all([chosen, ready]))[0]) draw();
}

begin();
