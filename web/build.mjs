// Puts the page, onnxruntime's WebAssembly and the exported models into dist/, which any static host can serve.
//
//     node build.mjs [MODELS]        MODELS: a folder with what export.py wrote for each model (default: ../exported)

import { createHash } from 'node:crypto';
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const DIST = path.join(HERE, 'dist');
const MODELS = path.resolve(process.argv[2] ?? path.join(HERE, '../exported'));
const RUNTIME = path.join(HERE, 'node_modules/onnxruntime-web/dist');
const RUNTIME_FILES = ['ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm'];

/** Every file below a folder, by its path from there. */
function filesBelow(folder, from = '') {
  return readdirSync(path.join(folder, from), { withFileTypes: true }).flatMap((entry) => {
    const name = path.posix.join(from, entry.name);
    return entry.isDirectory() ? filesBelow(folder, name) : [name];
  });
}

rmSync(DIST, { recursive: true, force: true });
cpSync(path.join(HERE, 'page'), DIST, { recursive: true });
mkdirSync(path.join(DIST, 'runtime'));
for (const name of RUNTIME_FILES) cpSync(path.join(RUNTIME, name), path.join(DIST, 'runtime', name));

const names = readdirSync(MODELS).filter((name) => filesBelow(path.join(MODELS, name)).includes('model.json'));
// true models first, that of CIFAR-10 before all
const rank = (name) => [!name.startsWith('true'), !name.endsWith('cifar10'), name].join();
names.sort((a, b) => (rank(a) < rank(b) ? -1 : 1));
for (const name of names) {
  // a liquid model is run by its parts
  const { files } = JSON.parse(readFileSync(path.join(MODELS, name, 'model.json'), 'utf8'));
  const needed = ['model.json', ...files.filter((file) => file !== 'denoiser.onnx' || files.length === 1)];
  for (const file of needed) cpSync(path.join(MODELS, name, file), path.join(DIST, 'models', name, file));
}
writeFileSync(path.join(DIST, 'models/models.json'), JSON.stringify(names));

// the service worker keeps all files for when there is no network, and drops them when one has changed
const files = filesBelow(DIST).sort();
const hash = createHash('sha256');
for (const file of files) hash.update(file).update(readFileSync(path.join(DIST, file)));
const worker = path.join(DIST, 'service-worker.js');
const header = `const VERSION = '${hash.digest('hex').slice(0, 16)}';\nconst FILES = ${JSON.stringify(files)};\n`;
writeFileSync(worker, header + readFileSync(worker, 'utf8'));

const size = (part) => files.filter(part).reduce((sum, file) => sum + statSync(path.join(DIST, file)).size, 0) / 1000;
const page = size((file) => !file.includes('/')).toFixed(0);
const models = size((file) => file.startsWith('models/')).toFixed(0);
const runtime = size((file) => file.startsWith('runtime/')).toFixed(0);
console.log(`built ${DIST}: page ${page} kB, ${names.length} models ${models} kB, runtime ${runtime} kB`);
