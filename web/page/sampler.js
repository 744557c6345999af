// From noise to images: the schedule, DPM-Solver++ (2M), guidance, and filling in a part again.

/** alpha and sigma of every timestep, where x_t = alpha x_0 + sigma eps; (1, 0) for t = -1, the clean image. */
export function schedule(about) {
  const at = (t) => {
    const kept = t < 0 ? 1 : about.alphas_cumprod[t];
    return { alpha: Math.sqrt(kept), sigma: Math.sqrt(1 - kept) };
  };
  return { timesteps: about.timesteps, at };
}

function roundHalfToEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

/** `calls` + 1 timesteps, evenly spaced from `from` (the last one) down to -1. */
export function spaced(timesteps, calls, from = timesteps - 1) {
  return Array.from({ length: calls + 1 }, (_, i) => roundHalfToEven((from + 1) * (1 - i / calls)) - 1);
}

/**
 * DPM-Solver++ (2M) (Lu et al. 2022, algorithm 2), as sample.py draws by default.
 *
 * denoise(x_t, t) gives x_0, clipped. Yields { t, x, x0 } after each call, t being that of x. With `keep(x, t)`, a
 * function that writes into x what is known of it at timestep t, only the rest is drawn.
 */
export async function* dpmpp({ at }, times, x, denoise, keep = () => {}) {
  let previous = null;
  let last = 0;
  for (let i = 0; i + 1 < times.length; i++) {
    const [t, s] = [times[i], times[i + 1]];
    const x0 = await denoise(x, t);
    keep(x0, -1);
    const [from, to] = [at(t), at(s)];
    const step = s < 0 ? Infinity : Math.log((to.alpha * from.sigma) / (from.alpha * to.sigma));
    const slope = previous === null || s < 0 ? 0 : step / (2 * last);
    const [ofImage, ofData] = [to.sigma / from.sigma, -to.alpha * Math.expm1(-step)];
    const next = new Float32Array(x.length);
    for (let j = 0; j < x.length; j++) {
      const data = slope ? x0[j] + slope * (x0[j] - previous[j]) : x0[j];
      next[j] = ofImage * x[j] + ofData * data;
    }
    keep(next, s);
    [x, previous, last] = [next, x0, step];
    yield { t: s, x, x0 };
  }
}

/** Whether guidance acts at timestep t: in a share of the timesteps, from the clean end, and not with a weight of 1. */
export function isGuided(about, t, weight) {
  return about.classes.length > 0 && weight !== 1 && (t + 0.5) / about.timesteps <= about.guided_share;
}

/** x_0 led away from what the model predicts without the class (Ho & Salimans 2022). */
export function guided(conditional, unconditional, weight) {
  return conditional.map((value, i) => unconditional[i] + weight * (value - unconditional[i]));
}

/** x_0 as it is when the predicted noise of x_t is divided by `scale` (Ning et al. 2024), then clipped to [-1, 1]. */
export function scaled(x0, xt, alpha, scale) {
  const part = (1 - 1 / scale) / alpha;
  return x0.map((value, i) => Math.min(1, Math.max(-1, value / scale + part * xt[i])));
}

/** `keep` for `dpmpp`: outside of the mask (1: draw again) an image x_0 stays as it is, under its own noise. */
export function keepOutside({ at }, x0, mask, noise) {
  return (x, t) => {
    const { alpha, sigma } = at(t);
    for (let i = 0; i < x.length; i++) {
      if (!mask[i % mask.length]) x[i] = alpha * x0[i] + sigma * noise[i];
    }
  };
}
