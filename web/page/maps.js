// Numbers as colours on canvases: pictures, time constants, and the states of a cell.

// dark to bright, from short time constants to long ones
const STOPS = [
  [13, 8, 60],
  [110, 20, 110],
  [195, 55, 90],
  [245, 130, 50],
  [252, 240, 160],
];

const [ORANGE, BLUE] = [
  [235, 120, 20],
  [30, 110, 230],
];

function colour(share) {
  const at = share * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(at));
  return STOPS[low].map((value, i) => value + (at - low) * (STOPS[low + 1][i] - value));
}

const PALETTE = Array.from({ length: 256 }, (_, i) => [...colour(i / 255), 255]);

/** Draws width x height RGBA values into a canvas, whose size becomes that. */
export function paintPixels(canvas, rgba, width, height) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  canvas.getContext('2d').putImageData(new ImageData(rgba, width, height), 0, 0);
}

/** A map of time constants (0 to 255) of a cell of size [channels, height, width]. */
export function paintTau(canvas, tau, [, height, width]) {
  const rgba = new Uint8ClampedArray(4 * tau.length);
  tau.forEach((value, i) => rgba.set(PALETTE[value], 4 * i));
  paintPixels(canvas, rgba, width, height);
}

/** A state (-127 to 127; null: all zero) as a map for each channel, orange where positive and blue where negative. */
export function paintState(canvas, state, [channels, height, width]) {
  let columns = Math.ceil(Math.sqrt(channels));
  while (channels % columns) columns++;
  const across = columns * width;
  const rgba = new Uint8ClampedArray(4 * channels * height * width);
  if (state) {
    for (let c = 0; c < channels; c++) {
      const corner = Math.floor(c / columns) * height * across + (c % columns) * width;
      for (let i = 0; i < height * width; i++) {
        const value = state[c * height * width + i];
        const to = 4 * (corner + Math.floor(i / width) * across + (i % width));
        rgba.set(value > 0 ? ORANGE : BLUE, to);
        rgba[to + 3] = 2 * Math.abs(value);
      }
    }
  }
  paintPixels(canvas, rgba, across, (channels / columns) * height);
}
