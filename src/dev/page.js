'use strict';

// The API's messages, as far as this page speaks them: each field's number, its
// type, and whether it may come often. A map is a list of entries.
const messages = {
  Duration: { seconds: [1, 'int'] },
  Timestamp: { seconds: [1, 'int'] },
  Status: { code: [1, 'int'], message: [2, 'string'] },
  Entry: { key: [1, 'string'], value: [2, 'string'] },

  Download: { inline: [2, 'int'] },
  Checksum: { sha256: [5, 'bytes'] },
  Upload: { content_type: [1, 'string'], content_length: [2, 'int'], checksum: [3, 'Checksum'] },
  FormUpload: { min_size: [1, 'int'], max_size: [2, 'int'], content_type: [3, 'string'] },
  PresignRequest: {
    bucket: [1, 'string'], key: [2, 'string'], ttl: [3, 'Duration'],
    download: [4, 'Download'], upload: [5, 'Upload'], form_upload: [8, 'FormUpload'],
  },
  FormField: { name: [1, 'string'], value: [2, 'string'] },
  PresignResponse: {
    method: [1, 'string'], url: [2, 'string'], headers: [3, 'Entry', true], form_fields: [4, 'FormField', true],
    expires_at: [5, 'Timestamp'], signer: [7, 'string'],
  },

  ListRequest: {
    bucket: [1, 'string'], prefix: [2, 'string'], page_size: [4, 'int'], page_token: [5, 'string'],
  },
  ObjectEntry: { key: [1, 'string'], size: [2, 'int'], last_modified: [4, 'Timestamp'] },
  ListResponse: { objects: [1, 'ObjectEntry', true], next_page_token: [3, 'string'] },

  RevokeRequest: { url: [3, 'string'], reason: [5, 'string'] },
  SignerRotation: { signer: [1, 'string'], confirmed_at: [4, 'Timestamp'] },
  RevokeResponse: { signer_rotation: [1, 'SignerRotation'], already_dead: [4, 'int'] },

  StartUploadRequest: {
    bucket: [1, 'string'], key: [2, 'string'], size: [3, 'int'], upload: [4, 'Upload'], checksum_algorithm: [5, 'int'],
  },
  StartUploadResponse: { upload_token: [1, 'string'], part_size: [3, 'int'], part_count: [4, 'int'] },
  PartRequest: { part_number: [1, 'int'], checksum: [2, 'Checksum'] },
  PartResult: { part_number: [1, 'int'], response: [2, 'PresignResponse'], error: [3, 'Status'] },
  SignPartsRequest: { upload_token: [1, 'string'], parts: [2, 'PartRequest', true] },
  SignPartsResponse: { parts: [1, 'PartResult', true] },
  CompletedPart: { part_number: [1, 'int'], etag: [2, 'string'], checksum: [3, 'Checksum'] },
  CompleteUploadRequest: { upload_token: [1, 'string'], parts: [2, 'CompletedPart', true] },
  CompleteUploadResponse: { key: [1, 'string'], checksum: [5, 'Checksum'], composite: [6, 'int'] },
  AbortUploadRequest: { upload_token: [1, 'string'] },
  AbortUploadResponse: {},
};

const SHA256 = 5; // ChecksumAlgorithm

// How often something is tried that may go well later, and how long it waits.
const TRIES = 5;
const pause = (tries, signal) => new Promise(resolve => {
  setTimeout(resolve, 125 * 2 ** tries);
  signal?.addEventListener('abort', resolve, { once: true });
});

// --- Protocol Buffers: https://protobuf.dev/programming-guides/encoding/

const VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5;

function putVarint(out, number) {
  let rest = BigInt(number);
  for (; rest > 127n; rest >>= 7n) out.push(Number(rest & 127n) | 128);
  out.push(Number(rest));
}

function encode(type, value) {
  const out = [];
  for (const [name, [number, kind, often]] of Object.entries(messages[type])) {
    const items = value[name] === undefined ? [] : often ? value[name] : [value[name]];
    for (const item of items) {
      if (kind === 'int') {
        putVarint(out, number << 3 | VARINT);
        putVarint(out, item);
        continue;
      }
      const bytes = kind === 'bytes' ? item : kind === 'string' ? new TextEncoder().encode(item) : encode(kind, item);
      putVarint(out, number << 3 | BYTES);
      putVarint(out, bytes.length);
      for (const byte of bytes) out.push(byte);
    }
  }
  return Uint8Array.from(out);
}

function decode(type, bytes) {
  const fields = Object.entries(messages[type]);
  const value = {};
  for (const [name, [, kind, often]] of fields) {
    value[name] = often ? [] : kind === 'int' ? 0 : kind === 'string' ? '' : undefined;
  }
  let at = 0;
  const varint = () => {
    let number = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = bytes[at++];
      if (byte === undefined) throw new Error('the answer is cut off');
      number |= BigInt(byte & 127) << shift;
      if (byte < 128) return Number(number);
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const [name, [, kind, often]] = fields.find(([, [number]]) => number === tag >>> 3) ?? [null, []];
    let item;
    switch (tag & 7) {
      case VARINT: item = varint(); break;
      case FIXED64: at += 8; break;
      case FIXED32: at += 4; break;
      case BYTES: {
        const length = varint();
        item = bytes.subarray(at, at += length);
        if (at > bytes.length) throw new Error('the answer is cut off');
        if (kind === 'string') item = new TextDecoder().decode(item);
        else if (kind && kind !== 'bytes') item = decode(kind, item);
        break;
      }
      default: throw new Error('the answer is no message of this API');
    }
    if (name && often) value[name].push(item);
    else if (name) value[name] = item;
  }
  return value;
}

// --- gRPC-Web: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-WEB.md

const OK = '0', DEADLINE_EXCEEDED = '4', UNAVAILABLE = '14';

// Asks again, for some seconds, where the answer says that it helps.
async function call(method, request, signal) {
  for (let tries = 1; ; tries++) {
    const { status, message, body } = await callOnce(method, encode(`${method}Request`, request), { signal });
    if (status === OK && body) return decode(`${method}Response`, body);
    // What took too long goes on, and to ask again is to wait for it. But for
    // this, which would open another upload.
    const again = status === UNAVAILABLE || status === DEADLINE_EXCEEDED && method !== 'StartUpload';
    if (!again || tries === TRIES) throw new Error(message || `status ${status}`);
    await pause(tries, signal);
  }
}

async function callOnce(method, message, options) {
  const frame = new Uint8Array(5 + message.length);
  new DataView(frame.buffer).setUint32(1, message.length);
  frame.set(message, 5);
  const answer = await fetch(`/fileaccess.v1.FileAccess/${method}`, {
    method: 'POST',
    headers: { 'content-type': 'application/grpc-web+proto' },
    body: frame,
    ...options,
  });
  const bytes = new Uint8Array(await answer.arrayBuffer());
  if (!answer.ok) throw new Error(new TextDecoder().decode(bytes));
  let body;
  // An answer without a message may have its trailers in the headers.
  const trailers = new Map([...answer.headers].filter(([name]) => name.startsWith('grpc-')));
  for (let at = 0; at < bytes.length;) {
    const length = new DataView(bytes.buffer, at + 1).getUint32(0);
    const content = bytes.subarray(at + 5, at + 5 + length);
    if (bytes[at] & 128) {
      for (const line of new TextDecoder().decode(content).split('\r\n')) {
        const colon = line.indexOf(':');
        if (colon > 0) trailers.set(line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim());
      }
    } else {
      body = content;
    }
    at += 5 + length;
  }
  return { status: trailers.get('grpc-status'), message: decodeURIComponent(trailers.get('grpc-message') ?? ''), body };
}

// --- Uploads

// What the browser may send at once, in all uploads together: so many parts are
// in memory, because they are hashed there.
const AT_ONCE = 4;
// Files up to this size are hashed as a whole.
const HASHED_BYTES = 64 << 20;

let free = AT_ONCE;
const waiting = [];

// Does `work` when it is its turn, unless `signal` comes before.
async function inTurn(signal, work) {
  signal.throwIfAborted();
  if (free > 0) free--;
  else {
    await new Promise((resolve, reject) => {
      const leave = () => {
        waiting.splice(waiting.indexOf(enter), 1);
        reject(signal.reason);
      };
      const enter = () => {
        signal.removeEventListener('abort', leave);
        resolve();
      };
      waiting.push(enter);
      signal.addEventListener('abort', leave, { once: true });
    });
  }
  try {
    return await work();
  } finally {
    if (waiting.length) waiting.shift()();
    else free++;
  }
}

// Sends what was presigned. Browsers set the length by themselves, and let
// nobody else.
function send(method, url, headers, body, progress, signal) {
  signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const abort = () => request.abort();
    request.open(method, url);
    for (const { key, value } of headers) {
      if (key !== 'content-length') request.setRequestHeader(key, value);
    }
    request.upload.onprogress = event => progress(event.loaded);
    request.onload = () => {
      if (request.status < 300) resolve(request);
      else reject(new Error(`S3 answers ${request.status} ${errorCode(request.responseText)}`));
    };
    request.onerror = () => reject(new Error('S3 can’t be reached, or its CORS rules keep this page out'));
    request.onabort = () => reject(signal.reason);
    request.onloadend = () => signal.removeEventListener('abort', abort);
    signal.addEventListener('abort', abort, { once: true });
    request.send(body);
  });
}

const errorCode = text => /<Code>([^<]*)<\/Code>/.exec(text)?.[1] ?? '';
const typeOf = file => file.type || 'application/octet-stream';
const sha256 = async bytes => new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));

function put(file, bucket, key, { progress, signal }) {
  return inTurn(signal, async () => {
    const upload = { content_type: typeOf(file), content_length: file.size };
    let body = file;
    if (file.size <= HASHED_BYTES) {
      // What was hashed is what is sent, whatever becomes of the file meanwhile.
      body = await file.arrayBuffer();
      upload.checksum = { sha256: await sha256(body) };
    }
    const { method, url, headers } = await call('Presign', { bucket, key, upload }, signal);
    await send(method, url, headers, body, progress, signal);
  });
}

function form(file, bucket, key, { progress, signal }) {
  return inTurn(signal, async () => {
    const form_upload = { min_size: file.size, max_size: file.size, content_type: typeOf(file) };
    const { method, url, form_fields } = await call('Presign', { bucket, key, form_upload }, signal);
    const body = new FormData();
    for (const { name, value } of form_fields) body.append(name, value);
    // S3 ignores what comes after the file.
    body.append('file', file);
    await send(method, url, [], body, progress, signal);
  });
}

// Who leaves the page gives up what is not done.
const unfinished = new Set();
addEventListener('pagehide', () => {
  for (const upload_token of unfinished) {
    callOnce('AbortUpload', encode('AbortUploadRequest', { upload_token }), { keepalive: true }).catch(() => {});
  }
});

// `finishing` is told when it is too late for `signal`.
async function multipart(file, bucket, key, { progress, signal, finishing }) {
  // Never broken off: nobody could give up an upload whose token did not arrive.
  const { upload_token, part_size, part_count } = await call('StartUpload', {
    bucket, key, size: file.size, upload: { content_type: typeOf(file) }, checksum_algorithm: SHA256,
  });
  unfinished.add(upload_token);
  const sent = new Array(part_count).fill(0);
  const parts = [];
  let next = 1, failed = false;
  const sendPart = async part_number => {
    const start = (part_number - 1) * part_size;
    const bytes = await file.slice(start, start + part_size).arrayBuffer();
    const checksum = { sha256: await sha256(bytes) };
    for (let tries = 1; ; tries++) {
      try {
        // Signed only now: a URL that waits in a queue expires.
        const ask = { upload_token, parts: [{ part_number, checksum }] };
        const { parts: [signed] } = await call('SignParts', ask, signal);
        if (!signed?.response) throw new Error(signed?.error?.message ?? 'no URL came');
        const { method, url, headers } = signed.response;
        const answer = await send(method, url, headers, bytes, loaded => {
          sent[part_number - 1] = loaded;
          progress(sent.reduce((sum, bytes) => sum + bytes));
        }, signal);
        return { part_number, etag: answer.getResponseHeader('etag'), checksum };
      } catch (error) {
        if (tries === TRIES || failed || signal.aborted) throw error;
        await pause(tries, signal);
      }
    }
  };
  const work = async () => {
    while (next <= part_count && !failed) {
      // The number is taken when it is its turn, so that parts go in order.
      await inTurn(signal, async () => {
        if (next <= part_count && !failed) parts.push(await sendPart(next++));
      });
    }
  };
  try {
    const workers = Array.from({ length: AT_ONCE }, () => work().catch(error => {
      failed = true;
      throw error;
    }));
    await Promise.allSettled(workers);
    await Promise.all(workers);
    parts.sort((a, b) => a.part_number - b.part_number);
    signal.throwIfAborted();
    finishing();
    unfinished.delete(upload_token);
    const { checksum, composite } = await call('CompleteUpload', { upload_token, parts });
    const sums = await new Blob(parts.map(part => part.checksum.sha256)).arrayBuffer();
    if (!composite || `${checksum?.sha256}` !== `${await sha256(sums)}`) throw new Error('S3 has another checksum');
  } catch (error) {
    // Parts that nobody completes cost money.
    await call('AbortUpload', { upload_token }).catch(left => {
      throw new Error(`${error.message}; and S3 keeps its parts: ${left.message}`);
    });
    throw error;
  } finally {
    unfinished.delete(upload_token);
  }
}

const ways = { put, form, multipart };

// --- The page

const at = id => document.getElementById(id);
const where = at('where').elements;

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function size(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  const unit = bytes < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(bytes) / 10));
  return `${(bytes / 1024 ** unit).toFixed(unit && 1)} ${units[unit]}`;
}

async function upload(file) {
  const bucket = where.bucket.value, key = where.prefix.value + file.name;
  const way = document.querySelector('#way :checked').value;
  const bar = element('progress', { max: file.size || 1, value: 0 });
  const said = element('span', { className: 'said' });
  const cancelled = new AbortController(), { signal } = cancelled;
  const cancel = element('button', { textContent: 'Cancel' });
  const row = element('li', {}, element('span', { className: 'name', textContent: key }), bar, said, cancel);
  const say = (state, text) => {
    said.textContent = text;
    row.dataset.state = state;
  };
  const finishing = () => cancel.disabled = true;
  cancel.onclick = () => {
    finishing();
    say('cancelling', 'being cancelled …');
    cancelled.abort(new Error('cancelled'));
  };
  row.dataset.key = key;
  say('running', size(file.size));
  at('uploads').prepend(row);
  const begun = performance.now();
  const progress = loaded => {
    if (signal.aborted) return;
    // A form's length is more than its file's.
    bar.value = Math.min(loaded, file.size);
    say('running', `${size(bar.value)} of ${size(file.size)}`);
  };
  try {
    await ways[way](file, bucket, key, { progress, signal, finishing });
    bar.value = bar.max;
    say('done', `${size(file.size)} in ${((performance.now() - begun) / 1000).toFixed(1)} s`);
  } catch (error) {
    say(error === signal.reason ? 'cancelled' : 'failed', error.message);
  } finally {
    cancel.remove();
  }
  // Also if it was cancelled: S3 may have had all of it.
  await list();
}

let lists = 0;

async function list(page_token = '') {
  const turn = ++lists;
  const bucket = where.bucket.value, prefix = where.prefix.value;
  let page;
  try {
    page = await call('List', { bucket, prefix, page_size: 200, page_token });
  } catch (error) {
    at('listing').textContent = error.message;
    return;
  }
  // A later one is under way, and knows more.
  if (turn !== lists) return;
  const rows = page.objects.map(object => {
    const button = element('button', { textContent: 'Get a link', onclick: () => link(bucket, object.key) });
    const row = element('tr', {},
      element('td', { textContent: object.key }),
      element('td', { className: 'number', textContent: size(object.size) }),
      element('td', { textContent: time(object.last_modified) }),
      element('td', {}, button));
    row.dataset.key = object.key;
    return row;
  });
  if (page_token) at('objects').append(...rows);
  else at('objects').replaceChildren(...rows);
  at('listing').textContent = at('objects').rows.length ? '' : 'Nothing is stored here.';
  at('more').hidden = !page.next_page_token;
  at('more').onclick = () => list(page.next_page_token);
}

const time = stamp => stamp ? new Date(stamp.seconds * 1000).toLocaleString() : '';

// A link that is out, and whether it lives.
async function link(bucket, key) {
  let signed;
  try {
    signed = await call('Presign', { bucket, key, ttl: { seconds: 3600 }, download: { inline: 1 } });
  } catch (error) {
    at('listing').textContent = error.message;
    return;
  }
  const said = element('span', { className: 'said' });
  const open = element('a', { href: signed.url, target: '_blank', rel: 'noreferrer', textContent: 'Open' });
  const check = element('button', { textContent: 'Check' });
  const revoke = element('button', { textContent: 'Revoke' });
  const name = element('span', { className: 'name', textContent: `${key}, signed by ${signed.signer}` });
  const row = element('li', {}, name, said, open, check, revoke);
  const say = (state, text) => {
    said.textContent = text;
    row.dataset.state = state;
    revoke.disabled = state === 'dead' || state === 'revoking';
  };
  row.dataset.key = key;
  check.onclick = async () => {
    try {
      // Only the beginning is of interest, and nothing that is cached.
      const answer = await fetch(signed.url, { cache: 'no-store', headers: { range: 'bytes=0-0' } });
      const text = await answer.text();
      // An empty object has no first byte.
      if (answer.ok || answer.status === 416) say('live', 'works');
      else say('dead', `S3 answers ${answer.status} ${errorCode(text)}`);
    } catch {
      say('unknown', 'S3 can’t be reached, or its CORS rules keep this page out');
    }
  };
  revoke.onclick = async () => {
    say('revoking', 'being revoked …');
    try {
      await call('Revoke', { url: signed.url, reason: 'revoked on the page' });
      // The same signer's other links are dead too.
      for (const other of at('links').children) other.check();
    } catch (error) {
      say('unknown', error.message);
    }
  };
  row.check = check.onclick;
  at('links').prepend(row);
  await row.check();
}

const drop = at('drop');
for (const kind of ['dragenter', 'dragover', 'dragleave', 'drop']) {
  drop.addEventListener(kind, event => {
    event.preventDefault();
    drop.classList.toggle('over', kind === 'dragenter' || kind === 'dragover');
  });
}
drop.addEventListener('drop', event => [...event.dataTransfer.files].forEach(upload));
at('files').addEventListener('change', event => {
  [...event.target.files].forEach(upload);
  // So that the same file can be picked again.
  event.target.value = '';
});
at('where').addEventListener('submit', event => {
  event.preventDefault();
  list();
});

// `?bucket=NAME` for another than that of `fileaccess dev`.
where.bucket.value = new URLSearchParams(location.search).get('bucket') ?? 'demo';
list();
