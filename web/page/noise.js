// The noise of torch.randn on a CPU, so that a seed means here what it means to sample.py.

/** The Mersenne Twister of torch.Generator().manual_seed(seed): a function that gives 32 random bits. */
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed % 2 ** 32;
  for (let i = 1; i < 624; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let next = 624;
  return () => {
    if (next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/**
 * What torch.randn(size, generator=torch.Generator().manual_seed(seed)) gives, up to rounding; with `calls`, that of so
 * many calls in a row. size: a multiple of 16, as all sizes of our images are.
 */
export function randn(seed, size, calls = 1) {
  if (size % 16) throw new Error(`noise of ${size} numbers: must be a multiple of 16`);
  const bits = mersenneTwister(seed);
  const values = new Float32Array(size * calls);
  for (let i = 0; i < values.length; i++) values[i] = (bits() & 0xffffff) / 2 ** 24;
  for (let first = 0; first < values.length; first += 16) {
    for (let i = first; i < first + 8; i++) {
      // Box and Muller's method, on the pairs that torch takes
      const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
      const angle = 2 * Math.PI * values[i + 8];
      values[i] = radius * Math.cos(angle);
      values[i + 8] = radius * Math.sin(angle);
    }
  }
  return values;
}
