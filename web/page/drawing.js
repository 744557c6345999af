// Draws nine pictures from a model, call by call, and fills in a part of one again. The page's worker and Node use it.

import { randn } from './noise.js';
import { dpmpp, guided, isGuided, keepOutside, scaled, schedule, spaced } from './sampler.js';

/** The class of each picture: the chosen one or, where none is, all in turn; null for a model without classes. */
export function labelsOf(about, count, chosen) {
  if (!about.classes.length) return null;
  const index = about.classes.indexOf(chosen);
  return Array.from({ length: count }, (_, i) => (index < 0 ? i % about.classes.length : index));
}

/** The noise of pictures seed, seed + 1, ...: what sample.py draws them from. */
export function noiseOf(about, count, seed) {
  const size = about.shape.reduce((a, b) => a * b);
  const noise = new Float32Array(count * size);
  for (let i = 0; i < count; i++) noise.set(randn(seed + i, size), i * size);
  return noise;
}

/**
 * A function (x, t) -> x_0 for a sampler.
 *
 * settings() gives { guidance, solver, steps } as they are now: they may change while it draws. between(milliseconds)
 * is awaited after each run of the network, which took so long. watched(): the picture whose inside watch(cell, what) is
 * told, or -1.
 */
function denoiser(model, labels, settings, { between = async () => {}, watched = () => -1, watch = null } = {}) {
  const { about } = model;
  const { at } = schedule(about);
  return async (x, t) => {
    const now = settings();
    const both = labels && isGuided(about, t, now.guidance); // with and without the class, in one run
    const rows = both ? new Float32Array(2 * x.length) : x;
    if (both) [0, x.length].forEach((start) => rows.set(x, start));
    const classes = both ? [...labels, ...labels.map(() => about.no_class)] : labels;
    const picture = watched();
    const begun = performance.now();
    const found = await model.predict(rows, t, classes, now, picture < 0 ? null : { picture, tell: watch });
    await between(performance.now() - begun);
    const own = found.subarray(0, x.length);
    const x0 = both ? guided(own, found.subarray(x.length), now.guidance) : own;
    return scaled(x0, x, at(t).alpha, about.eps_scale);
  };
}

/** Draw `count` pictures from the noise of seed, seed + 1, ...; yields { t, x, x0 } after each of the calls. */
export function draw(model, { count, seed, chosen, calls }, settings, options) {
  const { about } = model;
  const labels = labelsOf(about, count, chosen);
  const times = spaced(about.timesteps, calls);
  return dpmpp(schedule(about), times, noiseOf(about, count, seed), denoiser(model, labels, settings, options));
}

/**
 * Put noise back on a part of one picture, from timestep `from` on, and fill it in again: yields as `draw` does.
 *
 * x0: the picture, C x H x W, flat; mask: H x W, 1 where it is drawn again. label: its class, or null.
 */
export function fillIn(model, { x0, mask, label, from, seed, calls }, settings, options) {
  const { about } = model;
  const times = spaced(about.timesteps, calls, from);
  const kept = schedule(about);
  const noise = randn(seed, x0.length);
  const { alpha, sigma } = kept.at(from);
  const x = x0.map((value, i) => alpha * value + sigma * noise[i]);
  const denoise = denoiser(model, label === null ? null : [label], settings, options);
  return dpmpp(kept, times, x, denoise, keepOutside(kept, x0, mask, noise));
}
