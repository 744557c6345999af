// The pictures: canvases that can be clicked, painted on with noise, and saved.

import { paintPixels } from './maps.js';

const BRUSH = 0.16; // radius, as a share of a picture's side
const HELD = 250; // milliseconds after which a press is not a click any more

/**
 * One picture in a button, or in a div where `on` is missing. on.watch() is called for a click, on.paint(mask) after a
 * pointer was held down, with H x W values that are 1 where it was; on.problem(sentence) when a canvas is lost.
 */
export class Picture {
  constructor(into, problem, on = null) {
    this.canvas = document.createElement('canvas');
    this.canvas.setAttribute('role', 'img');
    this.label = document.createElement('span');
    this.holder = document.createElement(on ? 'button' : 'div');
    this.holder.append(this.canvas, this.label);
    this.rgba = null;
    this.shape = null; // [C, H, W]
    this.canvas.addEventListener('contextlost', () => problem('The browser took back the memory of a picture.'));
    this.canvas.addEventListener('contextrestored', () => {
      problem('');
      if (this.rgba) this.show(this.rgba, this.shape);
    });
    if (on) {
      this.holder.type = 'button';
      this.holder.addEventListener('click', on.watch);
      this.listen(on.paint);
    }
    into.append(this.holder);
  }

  name(number, name) {
    this.label.textContent = name;
    this.canvas.setAttribute('aria-label', name || `picture ${number}`);
    if (this.holder.type)
      this.holder.setAttribute('aria-label', `Picture ${number}${name && `, ${name}`}: look inside`);
  }

  show(rgba, shape) {
    [this.rgba, this.shape] = [rgba, shape];
    paintPixels(this.canvas, rgba, shape[2], shape[1]);
  }

  listen(paint) {
    const { holder } = this;
    let mask = null;
    let timer = 0;
    let begun = null;
    const start = (event) => {
      mask = new Uint8Array(this.shape[1] * this.shape[2]);
      this.dab(mask, event);
    };
    holder.addEventListener('pointerdown', (event) => {
      if (!this.rgba || event.button) return;
      holder.setPointerCapture(event.pointerId);
      begun = event;
      timer = setTimeout(() => start(event), HELD);
    });
    holder.addEventListener('pointermove', (event) => {
      if (mask) this.dab(mask, event);
      else if (begun && Math.hypot(event.clientX - begun.clientX, event.clientY - begun.clientY) > 6) {
        clearTimeout(timer);
        start(begun);
      }
    });
    for (const end of ['pointerup', 'pointercancel']) {
      holder.addEventListener(end, () => {
        clearTimeout(timer);
        if (mask) paint(mask);
        [mask, begun] = [null, null];
      });
    }
  }

  /** Adds what is under the pointer to the mask, and shows some noise there; the real one comes from the worker. */
  dab(mask, event) {
    const [, height, width] = this.shape;
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const y = ((event.clientY - box.top) / box.height) * height;
    const noisy = new Uint8ClampedArray(this.rgba);
    for (let i = 0; i < mask.length; i++) {
      if (Math.hypot((i % width) + 0.5 - x, Math.floor(i / width) + 0.5 - y) < BRUSH * width) mask[i] = 1;
      if (mask[i]) for (let c = 0; c < 3; c++) noisy[4 * i + c] = 255 * Math.random();
    }
    paintPixels(this.canvas, noisy, width, height);
  }
}

/** The mask of a part that has a name, for those who have no pointer. */
export function partMask(part, [, height, width]) {
  const isIn = {
    all: () => true,
    left: (x) => x < 0.5,
    right: (x) => x > 0.5,
    top: (x, y) => y < 0.5,
    bottom: (x, y) => y > 0.5,
    middle: (x, y) => Math.hypot(x - 0.5, y - 0.5) < 0.3,
  }[part];
  const at = (i) => [((i % width) + 0.5) / width, (Math.floor(i / width) + 0.5) / height];
  return Uint8Array.from({ length: height * width }, (_, i) => Number(isIn(...at(i))));
}

/** Lists of nine pictures as one PNG, side by side and four times as large, which the browser saves under the name. */
export function savePictures(lists, name) {
  const [, height, width] = lists[0][0].shape;
  const [scale, gap] = [4, 2];
  const canvas = document.createElement('canvas');
  const across = lists.length * 3;
  canvas.width = across * scale * width + (across - 1) * gap;
  canvas.height = 3 * scale * height + 2 * gap;
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  lists.forEach((list, l) => {
    list.forEach((picture, i) => {
      const [x, y] = [3 * l + (i % 3), Math.floor(i / 3)];
      const box = [x * (scale * width + gap), y * (scale * height + gap), scale * width, scale * height];
      if (picture.rgba) context.drawImage(picture.canvas, ...box);
    });
  });
  canvas.toBlob((blob) => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
