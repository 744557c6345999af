// What a person has chosen, its limits, and its form in a link.

import { EVALUATIONS } from './model.js';

export const COUNT = 9; // pictures
const LIMITS = { seed: [0, 999999999999], guidance: [1, 8], calls: [4, 100], steps: [1, 24], from: [0.1, 1] };

/**
 * What a model starts with: guidance as sample.py has it, 14 network calls, and the ODE as in training; or with half of
 * its steps if it learned to do with these, too: they draw as well.
 */
export function defaults(name, about) {
  const ode = trained(about);
  if (about.ode?.random_steps) ode.steps = ode.steps.map((value) => Math.ceil(value / 2));
  return { model: name, class: '', seed: 0, guidance: about.guidance, calls: 14, beside: false, ...ode };
}

/** The ODE's solver and steps of a model's training; those of the default model where there is no ODE. */
export function trained(about) {
  if (!about.ode) return { solver: 'euler', steps: [3, 5, 7] };
  return { solver: about.ode.solver, steps: Object.values(about.ode.cells).map((cell) => cell.steps) };
}

export function within(name, value) {
  const [low, high] = LIMITS[name];
  return Math.min(high, Math.max(low, value));
}

/** The part of a link after #. */
export function toLink(settings) {
  const { model, class: chosen, seed, guidance, calls, solver, steps, beside } = settings;
  const words = { model, class: chosen, seed, guidance, calls, solver, steps: steps.join(','), beside: Number(beside) };
  return new URLSearchParams(words).toString();
}

/** The settings that a link holds; whatever it does not hold, or not rightly, is missing. */
export function fromLink(hash) {
  const words = new URLSearchParams(hash.replace(/^#/, ''));
  const found = {};
  for (const name of ['model', 'class']) if (words.has(name)) found[name] = words.get(name);
  for (const name of ['seed', 'guidance', 'calls']) {
    const value = words.get(name) ? Number(words.get(name)) : NaN;
    if (Number.isFinite(value)) found[name] = within(name, name === 'guidance' ? value : Math.round(value));
  }
  if (Object.hasOwn(EVALUATIONS, words.get('solver'))) found.solver = words.get('solver');
  const steps = (words.get('steps') ?? '').split(',').map((text) => (text ? Number(text) : NaN));
  if (steps.length === 3 && steps.every(Number.isFinite)) {
    found.steps = steps.map((value) => within('steps', Math.round(value)));
  }
  if (words.has('beside')) found.beside = words.get('beside') === '1';
  return found;
}
