// Inside one picture: the time constants of the three cells, and their states while the ODE runs.

import { paintState, paintTau } from './maps.js';

const SPEEDS = { global: 'slow', local: 'medium', detail: 'fast' };

export class Inside {
  /** into: the element that gets a column for each cell; slider: of the ODE's time, 0 to 1000; output: its value. */
  constructor(into, slider, output) {
    [this.slider, this.output] = [slider, output];
    this.still = matchMedia('(prefers-reduced-motion: reduce)');
    this.frame = 0;
    this.cells = null; // what the worker told last
    this.parts = {};
    for (const [name, speed] of Object.entries(SPEEDS)) {
      const column = document.createElement('div');
      column.innerHTML = `<h3>${speed}</h3><p></p><canvas role="img"></canvas><p></p><canvas role="img"></canvas>`;
      const [ofTau, ofState] = column.querySelectorAll('p');
      const [tau, state] = column.querySelectorAll('canvas');
      [tau.id, state.id] = [`tau-${name}`, `state-${name}`];
      this.parts[name] = { ofTau, ofState, tau, state };
      into.append(column);
    }
    slider.addEventListener('input', () => {
      cancelAnimationFrame(this.frame);
      this.show(slider.value / 1000);
    });
  }

  /** Shows the time constants, and the states at a share of the ODE's horizon. */
  show(share) {
    if (!this.cells) return;
    for (const [name, { size, range, tau, states }] of Object.entries(this.cells)) {
      const part = this.parts[name];
      const [channels, height, width] = size;
      const step = Math.round(share * states.length);
      paintTau(part.tau, tau, size);
      paintState(part.state, step ? states[step - 1] : null, size);
      const [low, high] = range.map((value) => value.toFixed(2));
      part.ofTau.textContent = `\u03c4 ${low} to ${high}`;
      part.ofState.textContent = `step ${step} of ${states.length}`;
      part.tau.setAttribute('aria-label', `time constants of the ${SPEEDS[name]} cell, from ${low} to ${high}`);
      const state = `state of the ${SPEEDS[name]} cell after step ${step}: ${channels} channels of ${width}x${height}`;
      part.state.setAttribute('aria-label', state);
    }
    this.output.textContent = `${(share * this.horizon).toFixed(2)} of ${this.horizon}`;
  }

  /** Shows other cells, and lets the ODE's time run once in so many milliseconds, for those who like motion. */
  play(cells, horizon, duration) {
    [this.cells, this.horizon] = [cells, horizon];
    cancelAnimationFrame(this.frame);
    const begun = performance.now();
    const most = Math.max(...Object.values(cells).map(({ states }) => states.length));
    let seen = -1;
    const next = (now) => {
      const share = this.still.matches ? 1 : Math.min(1, Math.max(0, (now - begun) / duration));
      const step = Math.floor(share * most); // to show the same again would take time from the network
      if (step !== seen) {
        seen = step;
        this.slider.value = (1000 * step) / most;
        this.show(step / most);
      }
      if (share < 1) this.frame = requestAnimationFrame(next);
    };
    this.frame = requestAnimationFrame(next);
  }
}
