// The thread that draws, so that the page stays alive: it loads models, draws, and tells the page what it sees.
//
// The page sends { type: 'draw' | 'settings' | 'watch' | 'pause' | 'paint', ... }; each has a function below. It is sent
// { type: 'about' | 'frame' | 'inside' | 'done' | 'problem', ... }.

import * as ort from './runtime/ort.wasm.min.mjs';

import { draw, fillIn, labelsOf } from './drawing.js';
import { Model } from './model.js';

ort.env.wasm.wasmPaths = new URL('./runtime/', self.location.href).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

class Stopped extends Error {} // another drawing was asked for

const models = new Map(); // name -> a promise of the model
let settings = {};
let watched = 0;
let paused = false;
let current = 0; // the drawing that was asked for last; older ones stop
let finished = null; // what can be painted on and looked into: { id, model, x0, before, labels, calls }
let busy = Promise.resolve(); // the work that is going on; what comes next waits for it

async function read(name, file) {
  const answer = await fetch(`models/${name}/${file}`);
  if (!answer.ok) throw new Error(`models/${name}/${file} is missing (${answer.status})`);
  return new Uint8Array(await answer.arrayBuffer());
}

function load(name) {
  if (!models.has(name)) {
    const loading = Model.load(ort, (file) => read(name, file)).catch((error) => {
      models.delete(name); // the next drawing tries again
      throw new Error(`The network ${name} could not be loaded: ${error.message}`);
    });
    models.set(name, loading);
  }
  return models.get(name);
}

/** Lets messages in; with setTimeout browsers would wait for longer. */
function breath() {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

/** Waits while the page pauses; throws once the drawing is no longer wanted. */
async function stillWanted(id) {
  await breath();
  while (paused && id === current) await new Promise((resolve) => setTimeout(resolve, 50));
  if (id !== current) throw new Stopped();
}

/** Images (flat, C x H x W, in [-1, 1]) as RGBA. */
function pixels(x0, [channels, height, width]) {
  const area = height * width;
  const count = x0.length / (channels * area);
  const rgba = new Uint8ClampedArray(count * area * 4).fill(255);
  for (let k = 0; k < count; k++) {
    for (let i = 0; i < area; i++) {
      for (let c = 0; c < 3; c++) {
        const value = x0[k * channels * area + (channels === 3 ? c * area : 0) + i];
        rgba[(k * area + i) * 4 + c] = (value + 1) * 127.5; // rounded and clamped by the array; 0 for NaN
      }
    }
  }
  return rgba;
}

/** tau on average over the channels, from its least to its greatest as 0..255; each channel's states to -127..127. */
function shown(name, { tau, states }, about) {
  const size = about.ode.cells[name].state;
  const [channels, height, width] = size;
  const area = height * width;
  const mean = new Float32Array(area);
  for (let i = 0; i < tau.length; i++) mean[i % area] += tau[i] / channels;
  const range = [Math.min(...mean), Math.max(...mean)];
  const map = Uint8ClampedArray.from(mean, (value) => (255 * (value - range[0])) / (range[1] - range[0] || 1));
  const scaled = states.map((state) => new Int8Array(state.length));
  for (let c = 0; c < channels; c++) {
    const [first, last] = [c * area, (c + 1) * area];
    let most = 1e-6;
    for (const state of states) for (let i = first; i < last; i++) most = Math.max(most, Math.abs(state[i]));
    states.forEach((state, n) => {
      for (let i = first; i < last; i++) scaled[n][i] = (127 * state[i]) / most;
    });
  }
  return { size, range, tau: map, states: scaled };
}

/**
 * Runs the sampler that make(options) gives, and tells the page of each call; `which`: 'own' or 'other', for the page.
 * watched(): which picture of the drawing is looked into, or -1. Gives the images and { t, x } before the last call.
 */
async function follow(make, { id, model, which, calls, index = null, watched = () => -1 }) {
  const { about } = model;
  let spent = 0;
  const between = (milliseconds) => {
    spent += milliseconds;
    return stillWanted(id);
  };
  let call = 0;
  let last = null;
  let before = null;
  for await (const step of make({ between, watched, watch: watcher(model, id) })) {
    [before, last] = [last ?? step, step];
    const rgba = pixels(last.x0, about.shape);
    const told = { id, which, index, call: ++call, calls, t: last.t, milliseconds: spent, shape: about.shape, rgba };
    self.postMessage({ type: 'frame', ...told }, [rgba.buffer]);
    spent = 0;
    await stillWanted(id);
  }
  return { x0: last.x, before };
}

/** Tells the page of the inside of the watched picture once all three cells have run. */
function watcher(model, id) {
  const cells = {};
  return (name, what) => {
    cells[name] = shown(name, what, model.about);
    if (name === 'detail') self.postMessage({ type: 'inside', id, index: watched, cells: { ...cells } });
  };
}

const on = {
  async draw({ id, what }) {
    finished = null;
    const { calls } = what;
    const model = await load(what.model);
    const other = what.beside ? await load(what.beside) : null;
    if (id !== current) throw new Stopped();
    self.postMessage({ type: 'about', id, name: what.model, about: { ...model.about, alphas_cumprod: undefined } });
    const from = (drawn) => (options) => draw(drawn, what, () => settings, options);
    const [drawn] = await Promise.all([
      follow(from(model), { id, model, which: 'own', calls, watched: () => watched }),
      other && follow(from(other), { id, model: other, which: 'other', calls }), // they take turns
    ]);
    finished = { id, model, ...drawn, labels: labelsOf(model.about, what.count, what.chosen), calls };
    self.postMessage({ type: 'done', id });
  },

  async paint({ id, index, mask, from, seed }) {
    if (!finished || id !== current) return; // another drawing has begun
    const { model, x0, labels } = finished;
    const { shape, timesteps } = model.about;
    const size = shape.reduce((a, b) => a * b);
    const t = Math.max(0, Math.round(from * timesteps) - 1);
    const calls = Math.min(t + 1, Math.max(2, Math.round(finished.calls * from)));
    const image = x0.slice(index * size, (index + 1) * size);
    const part = { x0: image, mask, label: labels ? labels[index] : null, from: t, seed, calls };
    const make = (options) => fillIn(model, part, () => settings, options);
    const seen = () => (watched === index ? 0 : -1);
    x0.set((await follow(make, { id, model, which: 'own', calls, index, watched: seen })).x0, index * size);
    self.postMessage({ type: 'done', id });
  },

  /** After a drawing: the inside of another picture, in the last network call. */
  async watch({ index }) {
    if (!finished?.model.isLiquid) return;
    const { id, model, before, labels } = finished;
    const size = model.about.shape.reduce((a, b) => a * b);
    const x = before.x.slice(index * size, (index + 1) * size);
    const watch = { picture: 0, tell: watcher(model, id) };
    await model.predict(x, before.t, labels && [labels[index]], settings, watch);
  },
};

self.onmessage = ({ data }) => {
  if (data.type === 'settings') settings = data.settings;
  else if (data.type === 'pause') paused = data.paused;
  else {
    if (data.type === 'watch') watched = data.index;
    if (data.type === 'draw') {
      current = data.id;
      settings = data.settings;
    }
    busy = busy
      .then(() => on[data.type](data))
      .catch((error) => {
        if (!(error instanceof Stopped)) self.postMessage({ type: 'problem', id: data.id, message: error.message });
      });
  }
};

self.postMessage({ type: 'ready', threads: ort.env.wasm.numThreads });
