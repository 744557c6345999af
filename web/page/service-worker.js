// Keeps the page for when there is no network. build.mjs writes VERSION and FILES above this line.
//
// It also adds the two headers that browsers ask for before WebAssembly may use threads, which static hosts do not send;
// so the page has threads from its second visit on.

/* global VERSION, FILES */

const HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cross-Origin-Resource-Policy': 'same-origin',
};

self.addEventListener('install', (event) => {
  event.waitUntil(
    caches
      .open(VERSION)
      .then((cache) => cache.addAll(FILES.filter((file) => file !== 'service-worker.js')))
      .then(() => self.skipWaiting()),
  );
});

self.addEventListener('activate', (event) => {
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(names.filter((name) => name !== VERSION).map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

async function answer(request) {
  const isPage = request.mode === 'navigate';
  const wanted = isPage ? 'index.html' : request;
  const cache = await caches.open(VERSION);
  const found = (await cache.match(wanted, { ignoreSearch: true })) ?? (await fetch(request));
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}

self.addEventListener('fetch', (event) => {
  const { request } = event;
  const here = new URL(self.registration.scope);
  const url = new URL(request.url);
  if (request.method !== 'GET' || url.origin !== here.origin || !url.pathname.startsWith(here.pathname)) return;
  if (request.mode === 'navigate' && ![here.pathname, `${here.pathname}index.html`].includes(url.pathname)) return;
  event.respondWith(answer(request));
});
