// The page in a real browser: headless Chromium, where it is installed. SCREENSHOTS names a folder for pictures of it.

import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, readdirSync, statSync } from 'node:fs';
import { createServer } from 'node:http';
import os from 'node:os';
import path from 'node:path';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import puppeteer from 'puppeteer-core';

const DIST = path.join(path.dirname(fileURLToPath(import.meta.url)), '../dist');
const CHROMIUM = ['chromium', 'chromium-browser', 'google-chrome']
  .flatMap((name) => process.env.PATH.split(path.delimiter).map((folder) => path.join(folder, name)))
  .find(existsSync);
const TYPES = { '.html': 'text/html', '.js': 'text/javascript', '.mjs': 'text/javascript', '.css': 'text/css' };
Object.assign(TYPES, { '.svg': 'image/svg+xml', '.json': 'application/json', '.wasm': 'application/wasm' });
const QUICK = 'model=true-digits&calls=4&steps=2,2,2';

/** dist/ on the loopback, where change(name, bytes) may give other bytes, or null for a missing file. */
function serve(change = (_, bytes) => bytes) {
  const server = createServer((request, response) => {
    const name = new URL(request.url, 'http://x').pathname.slice(1) || 'index.html';
    const file = path.join(DIST, name);
    const bytes = existsSync(file) ? change(name, readFileSync(file)) : null;
    response.writeHead(bytes ? 200 : 404, { 'Content-Type': TYPES[path.extname(name)] ?? 'application/octet-stream' });
    response.end(bytes);
  });
  return new Promise((resolve) => server.listen(0, '127.0.0.1', () => resolve(server)));
}

describe('the page', { skip: CHROMIUM ? false : 'needs Chromium (Debian: apt-get install chromium)' }, () => {
  let browser, server, page, errors;

  /** A page of its own; what it says in the console goes into `errors`. */
  async function open(hash = '', { from = server, prepare = async () => {} } = {}) {
    const context = await browser.createBrowserContext();
    const opened = await context.newPage();
    errors = [];
    opened.on('console', (message) => {
      const ours = message.text().includes('willReadFrequently'); // `pictures` reads what the page only writes
      if (['error', 'warn'].includes(message.type()) && !ours) errors.push(message.text());
    });
    opened.on('pageerror', (error) => errors.push(error.message));
    await opened.setViewport({ width: 1280, height: 900 });
    await opened.emulateMediaFeatures([{ name: 'prefers-reduced-motion', value: 'reduce' }]);
    await prepare(opened);
    await opened.goto(`http://127.0.0.1:${from.address().port}/#${hash}`);
    return opened;
  }

  const done = (which = page) => which.waitForSelector('body[data-state=done]', { timeout: 120000 });
  const text = (selector, which = page) => which.$eval(selector, (element) => element.textContent);
  const problem = async (which) => {
    await which.waitForSelector('#problem:not([hidden])', { timeout: 30000 });
    return text('#problem', which);
  };
  /** The pixels of the pictures as they are shown: nine arrays of RGBA. */
  const pictures = (of = '#pictures') =>
    page.$$eval(`${of} canvas`, (all) =>
      all.map((one) => [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data]),
    );
  /** Sets a control as a person would, and waits until all is drawn. */
  async function set(selector, value) {
    const event = await page.$eval(
      selector,
      (control, to) => {
        if (control.type === 'checkbox') control.checked = to;
        else control.value = to;
        const kind = control.type === 'range' ? 'input' : 'change';
        control.dispatchEvent(new Event(kind, { bubbles: true }));
        return kind;
      },
      value,
    );
    assert.ok(event);
    await new Promise((resolve) => setTimeout(resolve, 50));
    await done();
  }
  async function screenshot(name, which = page) {
    if (!process.env.SCREENSHOTS) return;
    await which.screenshot({ path: path.join(process.env.SCREENSHOTS, name), fullPage: true });
  }

  before(async () => {
    server = await serve();
    browser = await puppeteer.launch({ executablePath: CHROMIUM, args: ['--no-sandbox'] });
  });
  after(async () => {
    await browser?.close();
    server?.close();
  });

  test('draws nine pictures by itself, with what is inside of one', async () => {
    page = await open('calls=4');
    await done();
    const drawn = await pictures();
    assert.equal(new Set(drawn.map(String)).size, 9);
    // neighbouring pixels of a picture are alike, those of noise are not
    for (const picture of drawn) {
      const steps = picture.map((value, i) => Math.abs(value - (picture[i + 4] ?? value)));
      assert.ok(steps.reduce((a, b) => a + b) / steps.length < 30);
    }
    for (const cell of ['global', 'local', 'detail']) {
      const [width, spread] = await page.$eval(`#tau-${cell}`, (canvas) => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return [
          canvas.width,
          Math.max(...data.filter((_, i) => i % 4 === 0)) - Math.min(...data.filter((_, i) => i % 4 === 0)),
        ];
      });
      assert.equal(width, { global: 8, local: 16, detail: 32 }[cell]);
      assert.ok(spread > 100);
    }
    assert.match(await text('#pictures'), /airplane.*ship/s);
    await screenshot('desk.png');
    assert.deepEqual(errors, []);
  });

  test('every control changes what it should', async () => {
    page = await open(QUICK);
    await done();
    const first = await pictures();
    const changes = async (selector, value) => {
      const earlier = await pictures();
      await set(selector, value);
      assert.notDeepEqual(await pictures(), earlier, selector);
    };
    await changes('#seed', 9);
    await set('#seed', 0);
    assert.deepEqual(await pictures(), first);
    await changes('#guidance', 6);
    assert.equal(await text('#guidance-value'), '6');
    await changes('#solver', 'midpoint');
    await changes('#steps-global', 5);
    const cost = await text('#cost-call');
    await changes('#steps-detail', 9);
    assert.notEqual(await text('#cost-call'), cost);
    assert.match(await text('#inside'), /step 5 of 5.*step 2 of 2.*step 9 of 9/s);
    await page.$eval('#ode-time', (slider) => {
      slider.value = 0;
      slider.dispatchEvent(new Event('input'));
    });
    assert.match(await text('#inside'), /step 0 of 5.*step 0 of 2.*step 0 of 9/s);
    await changes('#calls', 6);
    assert.match(await text('#status'), /Done/);
    await page.click('#as-trained');
    await page.waitForFunction(() => document.querySelector('#steps-detail-value').textContent === '7');
    await done();
    await changes('#class', '3');
    assert.equal(await text('#pictures'), '3'.repeat(9));
    await page.click('#again');
    assert.equal(await page.$eval('#seed', (input) => input.value), '9');
    await done();
    await page.click('#pictures button:nth-child(4)');
    assert.equal(await text('#watched'), '4');
    await changes('#model', 'true-kanji');
    assert.ok(await page.$eval('#class', (select) => select.disabled));
    assert.deepEqual(errors, []);
  });

  test('the ODE can be changed while it draws, and the drawing can pause', async () => {
    page = await open('model=true-digits&calls=100');
    await page.waitForFunction(() => document.querySelector('#progress').value > 2);
    await page.click('#pause');
    await new Promise((resolve) => setTimeout(resolve, 300));
    const paused = await text('#status');
    await new Promise((resolve) => setTimeout(resolve, 300));
    assert.equal(await text('#status'), paused);
    assert.match(paused, /call \d+ of 100/);
    await page.$eval('#steps-global', (slider) => {
      slider.value = 11;
      slider.dispatchEvent(new Event('input'));
    });
    await page.click('#pause');
    await page.waitForFunction(() => document.querySelector('#inside').textContent.includes('of 11'));
    assert.equal(await page.$eval('body', (body) => body.dataset.state), 'drawing'); // it did not begin anew
  });

  test('the plain CNN draws beside it from the same noise', async () => {
    page = await open('calls=4&steps=1,1,1&beside=1');
    await done();
    const [own, other] = [await pictures(), await pictures('#other-pictures')];
    assert.equal(new Set([...own, ...other].map(String)).size, 18);
    await screenshot('beside.png');
    await set('#model', 'inspired-cifar10');
    assert.ok(await page.$eval('#solver', (select) => select.disabled));
    assert.deepEqual(await pictures(), other);
    assert.deepEqual(errors, []);
  });

  test('noise that is put back is filled in, and nothing else changes', async () => {
    page = await open(QUICK);
    await done();
    const earlier = await pictures();
    const box = await (await page.$('#pictures button:nth-child(2) canvas')).boundingBox();
    await page.mouse.move(box.x + box.width / 4, box.y + box.height / 4);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width / 4, box.y + box.height / 2, { steps: 4 });
    await page.mouse.up();
    await done();
    const now = await pictures();
    assert.equal(await text('#watched'), '2');
    assert.deepEqual(now.toSpliced(1, 1), earlier.toSpliced(1, 1));
    const changed = now[1]
      .map((value, i) => value !== earlier[1][i] && Math.floor(i / 4) % 16)
      .filter(Number.isInteger);
    assert.ok(changed.length && Math.max(...changed) < 9); // the brush was in the left half
    await page.select('#part', 'right');
    await page.click('#paint');
    await done();
    const after = (await pictures())[1];
    const columns = after.map((value, i) => value !== now[1][i] && Math.floor(i / 4) % 16).filter(Number.isInteger);
    assert.ok(columns.length && Math.min(...columns) >= 8);
    assert.deepEqual(errors, []);
  });

  test('a link holds the settings, and the pictures are saved as PNG', async () => {
    page = await open('model=true-digits&class=5&seed=77&guidance=2.5&calls=5&solver=rk4&steps=1,2,3');
    await done();
    const drawn = await pictures();
    await page.click('#link');
    const { hash } = new URL(page.url());
    const folder = mkdtempSync(path.join(os.tmpdir(), 'liquid-page-'));
    const session = await page.createCDPSession();
    await session.send('Browser.setDownloadBehavior', {
      behavior: 'allow',
      downloadPath: folder,
      browserContextId: page.browserContext().id,
    });
    await page.click('#save');
    const saved = path.join(folder, 'true-digits-77.png');
    for (let i = 0; i < 100 && !existsSync(saved); i++) await new Promise((resolve) => setTimeout(resolve, 50));
    const png = readFileSync(saved);
    assert.deepEqual([png.toString('latin1', 1, 4), png.readUInt32BE(16)], ['PNG', 3 * 4 * 16 + 4]);
    page = await open(hash.slice(1));
    await done();
    assert.deepEqual(await pictures(), drawn);
    assert.equal(await page.$eval('#solver', (select) => select.value), 'rk4');
    page = await open('model=none&seed=x&guidance=1e9&steps=0,5&calls=4.4&solver=toString');
    await page.waitForFunction(() => document.querySelector('#calls-value').textContent === '4');
    assert.equal(await text('#guidance-value'), '8');
    assert.equal(await page.$eval('#solver', (select) => select.value), 'euler');
  });

  test('it works without a network once it was loaded, then with threads', async () => {
    page = await open(QUICK);
    await done();
    await page.waitForFunction(() => navigator.serviceWorker.controller, { timeout: 60000 });
    await page.setOfflineMode(true);
    await page.reload();
    await done();
    assert.equal(await problemShown(page), false);
    assert.match(await text('#threads'), os.availableParallelism() > 1 ? /[2-4] threads/ : /one thread/);
    await set('#model', 'true-kanji');
    assert.equal(await problemShown(page), false);
  });

  const problemShown = (which) => which.$eval('#problem', (element) => !element.hidden);

  test('what is missing or broken is said in one sentence', async () => {
    const cases = [
      [(name, bytes) => (name.endsWith('digits/step.onnx') ? null : bytes), /true-digits.*step\.onnx.*404/],
      [
        (name, bytes) => (name.endsWith('digits/local.onnx') ? bytes.subarray(0, bytes.length / 2) : bytes),
        /true-digits/,
      ],
      [
        (name, bytes) => (name.endsWith('model.json') ? bytes.subarray(0, 99) : bytes),
        /model\.json is missing or damaged/,
      ],
      [(name, bytes) => (name.endsWith('models.json') ? null : bytes), /models\.json/],
      [(name, bytes) => (name.endsWith('.wasm') ? bytes.subarray(0, 1000) : bytes), /could not be loaded/],
      [(name, bytes) => (name === 'worker.js' ? null : bytes), /could not start/],
      [(name, bytes) => (name === 'app.js' ? null : bytes), /app\.js, could not be loaded/],
    ];
    for (const [change, sentence] of cases) {
      const from = await serve(change);
      page = await open(QUICK, { from });
      assert.match(await problem(page), sentence);
      await page.browserContext().close();
      from.close();
    }
    const prepare = (opened) => opened.evaluateOnNewDocument(() => delete globalThis.WebAssembly);
    page = await open(QUICK, { prepare });
    assert.match(await problem(page), /no WebAssembly/);
    page = await open(QUICK);
    await done();
    const lose = (event) => page.$eval('canvas', (canvas, kind) => canvas.dispatchEvent(new Event(kind)), event);
    await lose('contextlost');
    assert.match(await problem(page), /memory/);
    await lose('contextrestored');
    assert.equal(await problemShown(page), false);
  });

  test('keyboard and screen reader reach every control', async () => {
    page = await open(QUICK);
    await done();
    const reached = new Set();
    for (let i = 0; i < 60; i++) {
      await page.keyboard.press('Tab');
      reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.ariaLabel));
    }
    const ids = await page.$$eval('button[id], input, select', (all) =>
      all.filter((one) => !one.disabled).map((one) => one.id),
    );
    assert.deepEqual(
      ids.filter((id) => !reached.has(id)),
      [],
    );
    assert.equal([...reached].filter((name) => /^Picture \d/.test(name)).length, 9);
    const flat = (node) => [node, ...(node.children ?? []).flatMap(flat)];
    const nodes = flat(await page.accessibility.snapshot({ interestingOnly: true }));
    const controls = nodes.filter(({ role }) =>
      ['button', 'slider', 'combobox', 'checkbox', 'spinbutton'].includes(role),
    );
    assert.ok(controls.length >= ids.length + 9);
    assert.deepEqual(
      controls.filter(({ name }) => !name),
      [],
    );
  });

  test('a phone shows it without scrolling sideways, in the dark, too', async () => {
    page = await open(QUICK);
    await page.setViewport({ width: 360, height: 740, isMobile: true, hasTouch: true });
    await done();
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert.equal(wide, 0);
    await screenshot('phone.png');
    const back = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await back();
    await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: 'dark' }]);
    assert.notEqual(await back(), light);
    await screenshot('dark.png');
  });

  test('the page itself is small', () => {
    const files = readdirSync(DIST).map((name) => statSync(path.join(DIST, name)));
    assert.ok(files.filter((file) => file.isFile()).reduce((sum, { size }) => sum + size, 0) < 400000);
  });
});
