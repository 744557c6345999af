// A model that export.py wrote, run by onnxruntime: the network's parts, and the ODE that this page integrates itself.

// the cells from slow to fast, and the features that each reads
export const CELLS = { global: 'coarse', local: 'medium', detail: 'fine' };

// One step moves the state by the fraction g(a) of its way, a = dt / tau (see liquid_diffusion.py).
const FRACTION = {
  euler: (a) => a,
  'semi-implicit': (a) => a / (1 + a),
  exponential: (a) => -Math.expm1(-a),
};
// how often a solver computes W_rec * h in a step
export const EVALUATIONS = { euler: 1, 'semi-implicit': 1, exponential: 1, midpoint: 2, rk4: 4 };

const ACTIVATION = { silu: (x) => x / (1 + Math.exp(-x)), tanh: Math.tanh };

/** f(0), f(1), ... as a Float32Array; a loop, because TypedArray.map is several times slower. */
function filled(length, f) {
  const values = new Float32Array(length);
  for (let i = 0; i < length; i++) values[i] = f(i);
  return values;
}

export class Model {
  /** read(name) gives the bytes of a file of the model. Throws what reading or onnxruntime throws. */
  static async load(ort, read) {
    const model = new Model();
    model.ort = ort;
    model.about = JSON.parse(new TextDecoder().decode(await read('model.json')));
    model.isLiquid = 'ode' in model.about;
    const names = model.isLiquid ? ['features', 'global', 'local', 'detail', 'step', 'head'] : ['denoiser'];
    model.sessions = {};
    const files = await Promise.all(names.map((name) => read(`${name}.onnx`)));
    for (const [i, name] of names.entries()) {
      const options = { executionProviders: ['wasm'], graphOptimizationLevel: 'all' };
      model.sessions[name] = await ort.InferenceSession.create(files[i], options);
    }
    return model;
  }

  async run(name, inputs) {
    return this.sessions[name].run(inputs);
  }

  /**
   * x_0 (batch x C x H x W, flat) as the model sees it in x at timestep t.
   *
   * labels: a class for each image, or null. ode: { solver, steps: [global, local, detail] } of a liquid model.
   * watch: { picture, tell }, where tell(cell, { tau, states }) is called with what happens to that picture: tau and the
   * state after each step, each C x H x W, flat.
   */
  async predict(x, t, labels, ode, watch = null) {
    const { ort, about } = this;
    const batch = x.length / about.shape.reduce((a, b) => a * b);
    const integers = (values) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [batch]);
    const image = { x_t: new ort.Tensor('float32', x, [batch, ...about.shape]), t: integers(Array(batch).fill(t)) };
    const own = labels ? { labels: integers(labels) } : {};
    if (!this.isLiquid) return (await this.run('denoiser', { ...image, ...own })).x_0.data;

    const features = await this.run('features', { ...image, ...own });
    let slower = {};
    for (const [i, [name, scale]] of Object.entries(CELLS).entries()) {
      const inputs = { features: features[scale], conditioning: features.conditioning, ...slower };
      const cell = await this.run(name, inputs);
      const size = cell.tau.data.length / batch;
      const watched = (values) => values.slice(watch.picture * size, (watch.picture + 1) * size);
      const states = [];
      const note = (h) => watch && states.push(watched(h));
      const h = await this.integrate(cell, ode.solver, ode.steps[i], note);
      watch?.tell(name, { tau: watched(cell.tau.data), states });
      slower = { slower: h };
    }
    return (await this.run('head', { ...image, fine: features.fine, h: slower.slower })).x_0.data;
  }

  /** The state of a cell after the horizon, starting from zeros, as a tensor; note(h) is called after each step. */
  async integrate({ drive, tau, recurrent }, solver, steps, note) {
    const { horizon, activation } = this.about.ode;
    const size = drive.data.length;
    const tensor = (values) => new this.ort.Tensor('float32', values, drive.dims);
    const fractions = (g) => tensor(filled(size, (i) => g(horizon / steps / tau.data[i])));
    const whole = fractions(FRACTION[solver] ?? FRACTION.euler);
    // where the state is after a step of a fraction of its way; an array, as all states here
    const step = async (h, fraction = whole) =>
      (await this.run('step', { h: tensor(h), drive, fraction, recurrent })).next.data;
    const half = solver === 'midpoint' ? fractions((a) => a / 2) : null;

    let h = new Float32Array(size);
    for (let n = 0; n < steps; n++) {
      if (solver === 'midpoint') {
        const [from, middle] = [h, await step(h, half)];
        const end = await step(middle);
        h = filled(size, (i) => from[i] + end[i] - middle[i]);
      } else if (solver === 'rk4') {
        h = await this.rungeKutta(h, step);
      } else if (n === 0) {
        const f = ACTIVATION[activation]; // W_rec * 0 = 0
        h = filled(size, (i) => whole.data[i] * f(drive.data[i]));
      } else {
        h = await step(h);
      }
      note(h);
    }
    return tensor(h);
  }

  /** One step of Runge and Kutta's method of fourth order, by the 3/8 rule, as torchdiffeq's rk4 has it. */
  async rungeKutta(h, step) {
    const size = h.length;
    const slope = async (at) => {
      const end = await step(at);
      return filled(size, (i) => end[i] - at[i]); // dt dh/dt
    };
    const k1 = await slope(h);
    const k2 = await slope(filled(size, (i) => h[i] + k1[i] / 3));
    const k3 = await slope(filled(size, (i) => h[i] + k2[i] - k1[i] / 3));
    const k4 = await slope(filled(size, (i) => h[i] + k1[i] - k2[i] + k3[i]));
    return filled(size, (i) => h[i] + (k1[i] + 3 * (k2[i] + k3[i]) + k4[i]) / 8);
  }
}

/** Multiply-adds of a network call for one picture, by a model that model.json is about. */
export function cost(about, ode) {
  if (!about.ode) return about.multiply_adds;
  let total = about.multiply_adds;
  for (const [i, { steps, step_multiply_adds: each }] of Object.values(about.ode.cells).entries()) {
    const free = ode.solver in FRACTION ? 1 : 0; // the first step from zeros
    total += each * (EVALUATIONS[ode.solver] * ode.steps[i] - free - (steps - 1));
  }
  return total;
}
