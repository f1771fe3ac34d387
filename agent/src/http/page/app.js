// Status page. The page only reads: api/status and one page of api/peers, every two seconds. All text is
// inserted as text, never as markup.
'use strict';

const POLL_INTERVAL = 2000; // ms; the agent samples its counters at the same interval
const CHART_WINDOW = 300_000; // ms
const MAX_SAMPLE_INTERVAL = 9000; // ms; a longer pause between samples is a gap in the chart
const REQUEST_TIMEOUT = 5000; // ms
const PEERS_PER_PAGE = 50;

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ['svg', 'path', 'line', 'text', 'g'].includes(tag);
  const element = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// ---- formats of numbers

function scaled(value, base, units) {
  let unit = 0;
  while (value >= base && unit + 1 < units.length) {
    value /= base;
    unit += 1;
  }
  const digits = unit === 0 ? 0 : value < 10 ? 2 : value < 100 ? 1 : 0;
  return `${value.toFixed(digits)}${units[unit]}`;
}
const count = (value) => (value < 10_000 ? String(Math.round(value)) : scaled(value, 1000, ['', 'k', 'M', 'G', 'T', 'P', 'E']));
const bytes = (value) => scaled(value, 1024, [' B', ' KiB', ' MiB', ' GiB', ' TiB', ' PiB', ' EiB']);
const bits = (value) => scaled(value, 1000, [' bit/s', ' kbit/s', ' Mbit/s', ' Gbit/s', ' Tbit/s']);
const rate = (value) => (value > 0 && value < 10 ? value.toFixed(1) : count(value));
const ratio = (value) => (value < 100 ? value.toFixed(1) : value.toFixed(0));

function age(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  const [d, h, m] = [Math.floor(s / 86_400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  if (d > 0) return `${d} d ${h} h`;
  if (h > 0) return `${h} h ${m} min`;
  return m > 0 ? `${m} min ${s % 60} s` : `${s} s`;
}
const plural = (n, one, many) => `${n} ${n === 1 ? one : many}`;

// ---- samples of the charts: totals; two adjacent samples give a rate

const samples = []; // sorted by time

let end = 0; // end of the charts: time of the last sample, or the current time after a gap

function addSamples(history) {
  const rows = history.rows.map((row) => Object.fromEntries(history.columns.map((name, index) => [name, row[index]])));
  // The node's clock was set back: the older samples have later times and are removed.
  if (rows.length > 0 && rows[0].time_ms <= samples.at(-1)?.time_ms) samples.length = 0;
  samples.push(...rows);
  const newest = samples.at(-1)?.time_ms ?? history.now_ms;
  end = history.now_ms - newest > MAX_SAMPLE_INTERVAL ? history.now_ms : newest;
  // Keep the last sample, because its time is the `since` of the next request.
  while (samples.length > 1 && samples[0].time_ms < end - CHART_WINDOW) samples.shift();
}

// Returns points {time, values}. `of` computes the values from the differences of two adjacent samples. null is
// a gap.
function points(of) {
  const all = [];
  for (let index = 1; index < samples.length; index += 1) {
    const [before, now] = [samples[index - 1], samples[index]];
    const ms = now.time_ms - before.time_ms;
    // The counters of a new data process start at zero.
    if (ms > MAX_SAMPLE_INTERVAL || now.process !== before.process) {
      all.push(null);
      continue;
    }
    const difference = (name) => Math.max(0, now[name] - before[name]);
    all.push({ time: now.time_ms, values: of(difference, ms / 1000) });
  }
  return all;
}

// Returns the share of packets that were dropped in the last minute; 0 below the limits of the alert
// SkeinPacketsDropped, one packet per second and 1 %.
function lossShare(direction) {
  const of = (d) => [d(`${direction}_lost`), d(`${direction}_inner_packets`)];
  const recent = points(of).filter((point) => point !== null && point.time > end - 60_000);
  const sum = (index) => recent.reduce((total, point) => total + point.values[index], 0);
  const [dropped, passed] = [sum(0), sum(1)];
  return dropped > 60 && dropped > 0.01 * (dropped + passed) ? dropped / (dropped + passed) : 0;
}

const share = (a, b) => (b > 0 ? a / b : 0);
const CHARTS = [
  {
    id: 'packets', title: 'Packets per second', keys: ['out', 'in'], show: rate, least: 10,
    of: (d, s) => [d('out_inner_packets') / s, d('in_inner_packets') / s],
  },
  {
    id: 'bits', title: 'Throughput', keys: ['out', 'in'], show: bits, least: 1000,
    of: (d, s) => [(d('out_inner_bytes') * 8) / s, (d('in_inner_bytes') * 8) / s],
  },
  {
    id: 'batch', title: 'Packets per system call', keys: ['out', 'in'], show: ratio, least: 2,
    of: (d) => [share(d('out_inner_packets'), d('out_calls')), share(d('in_inner_packets'), d('in_calls'))],
  },
  {
    id: 'drops', title: 'Dropped packets per second', keys: ['dropped'], show: rate, least: 1,
    of: (d, s) => [d('drops') / s],
  },
];

const HEIGHT = 150;
const [LEFT, RIGHT, TOP, BOTTOM] = [72, 8, 8, 20];

// Rounds up to the next of 1, 2, 3, 5, 10, 20, …
function axisMaximum(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

function chartFrame(chart) {
  const keys = chart.keys.map((key, index) => make('span', { class: index > 0 ? 'key second' : 'key', id: `${chart.id}-${key}` }));
  const svg = make('svg', { role: 'img', id: `chart-${chart.id}` });
  svg.addEventListener('pointermove', (event) => {
    chart.pointer = event.clientX - svg.getBoundingClientRect().left;
    drawChart(chart);
  });
  svg.addEventListener('pointerleave', () => {
    chart.pointer = undefined;
    drawChart(chart);
  });
  chart.svg = svg;
  return make('figure', {}, make('figcaption', {}, make('strong', {}, chart.title), ...keys), svg);
}

function drawChart(chart) {
  const all = points(chart.of);
  const known = all.filter((point) => point !== null);
  const width = Math.max(200, chart.svg.clientWidth);
  const most = axisMaximum(Math.max(chart.least, ...known.flatMap((point) => point.values)));
  const x = (time) => LEFT + ((time - end + CHART_WINDOW) / CHART_WINDOW) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / most) * (HEIGHT - TOP - BOTTOM);
  const parts = [];
  for (const part of [0, 0.5, 1]) {
    const at = y(most * part);
    parts.push(make('line', { class: 'grid', x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    parts.push(make('text', { x: LEFT - 6, y: at + 4, 'text-anchor': 'end' }, chart.show(most * part).replace(/\.0+(?!\d)/, '')));
  }
  for (const minutes of width > 360 ? [5, 4, 3, 2, 1, 0] : [5, 3, 1]) {
    const anchor = minutes === 5 ? 'start' : minutes === 0 ? 'end' : 'middle';
    const label = minutes === 0 ? 'now' : `−${minutes} min`;
    parts.push(make('text', { x: x(end - minutes * 60_000), y: HEIGHT - 4, 'text-anchor': anchor }, label));
  }
  chart.keys.forEach((_, index) => {
    let path = '';
    let pen = false;
    for (const point of all) {
      if (point === null) {
        pen = false;
        continue;
      }
      path += `${pen ? 'L' : 'M'}${x(point.time).toFixed(1)} ${y(point.values[index]).toFixed(1)}`;
      pen = true;
    }
    if (path !== '') parts.push(make('path', { class: index > 0 ? 'line second' : 'line', d: path }));
  });
  let shown = all.at(-1)?.time === end ? all.at(-1) : undefined;
  if (chart.pointer !== undefined && known.length > 0) {
    const far = (point) => Math.abs(x(point.time) - chart.pointer);
    shown = known.reduce((best, point) => (far(point) < far(best) ? point : best));
    parts.push(make('line', { class: 'cursor', x1: x(shown.time), x2: x(shown.time), y1: TOP, y2: HEIGHT - BOTTOM }));
  }
  chart.keys.forEach((key, index) => {
    const value = shown === undefined ? '–' : chart.show(shown.values[index]);
    const when = chart.pointer !== undefined && shown !== undefined ? ` ${Math.round((end - shown.time) / 1000)} s ago` : '';
    setText($(`${chart.id}-${key}`), `${key} ${value}${when}`);
  });
  const peak = known.length === 0 ? 'no samples yet' : `maximum ${chart.show(Math.max(...known.flatMap((point) => point.values)))}`;
  chart.svg.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
  chart.svg.setAttribute('aria-label', `${chart.title} in the last five minutes: ${peak}`);
  chart.svg.replaceChildren(...parts);
}

// ---- status

const OFFLOADS = {
  tun_uso: 'UDP segmentation offload of the TUN device (USO)',
  tun_tso: 'TCP segmentation offload of the TUN device (TSO)',
  tun_checksum: 'Checksum offload of the TUN device',
  udp_gso: 'Segmentation of sent UDP datagrams by the kernel (GSO)',
  udp_gro: 'Coalescing of received UDP datagrams by the kernel (GRO)',
  udp_ecn: 'Copies of congestion marks between inner and outer headers (ECN)',
  reuseport_steering: 'Steering of received datagrams to their lane',
};
const LEVELS = {
  on: 'good', degraded: 'warn', unsupported: 'idle', forced_off: 'idle',
  established: 'good', connecting: 'warn', unreachable: 'bad', idle: 'idle',
};
const badge = (state) => make('span', { class: 'badge', 'data-level': LEVELS[state] }, state.replace('_', ' '));

function verdict(status) {
  const { peers } = status;
  if (!status.ready) return ['bad', 'Not ready: the network of pods on this node is not reliable.', status.reasons];
  const warnings = [];
  if (peers.unreachable > 0) warnings.push(`${plural(peers.unreachable, 'peer is', 'peers are')} unreachable: see Peers`);
  if (status.records.source_error) warnings.push(`the node records cannot be read, changes are not applied: ${status.records.source_error}`);
  if (status.records.rejected_count > 0) warnings.push(`${plural(status.records.rejected_count, 'node record is', 'node records are')} rejected: see Details`);
  const low = status.offloads.filter((offload) => offload.state === 'degraded');
  if (low.length > 0) warnings.push(`degraded offloads: ${low.map((offload) => offload.name).join(', ')}`);
  for (const direction of ['out', 'in']) {
    const part = lossShare(direction);
    if (part > 0) warnings.push(`${(part * 100).toFixed(0)} % of the pods’ packets (${direction}) were dropped in the last minute: see Dropped packets`);
  }
  if (peers.narrow > 0) warnings.push(`reduced path MTU to ${plural(peers.narrow, 'peer', 'peers')}`);
  for (const pool of status.pools ?? []) {
    if (pool.free < pool.total * 0.05) warnings.push(`less than 5 % of the pod addresses in ${pool.cidr} are free`);
  }
  if (warnings.length > 0) return ['warn', 'Ready, with warnings:', warnings];
  const reached = `${peers.established} of ${plural(peers.total, 'peer', 'peers')} connected`;
  const idle = peers.idle + peers.connecting > 0 ? `, ${peers.idle + peers.connecting} without a session` : '';
  return ['good', `Healthy: ready, ${reached}${idle}.`, []];
}

function tile(name, value, note, level) {
  return make('div', { 'data-level': level }, make('dt', {}, name), make('dd', { 'data-field': name }, value), make('dd', { class: 'note' }, note ?? ''));
}

function showTiles(status) {
  const { peers, dataplane } = status;
  const up = dataplane.process !== null;
  const restarts = plural(dataplane.restarts, 'restart', 'restarts');
  $('tiles').replaceChildren(
    tile('Ready', status.ready ? 'yes' : 'no', `agent ${status.version}`, status.ready ? undefined : 'bad'),
    tile('Data process', up ? 'up' : 'not available', up ? `process ${dataplane.process}, up ${age(dataplane.uptime_seconds)}, ${restarts}` : dataplane.error ?? '', up ? undefined : 'bad'),
    tile('Connected peers', `${peers.established} / ${peers.total}`, `${peers.unreachable} unreachable, ${peers.connecting} connecting, ${peers.idle} idle`, peers.unreachable > 0 ? 'warn' : undefined),
    tile('Lanes', String(status.lanes), status.cipher ?? ''),
    tile('Pod MTU', String(status.interface.mtu), peers.narrow > 0 ? plural(peers.narrow, 'reduced path MTU', 'reduced path MTUs') : status.interface.name, peers.narrow > 0 ? 'warn' : undefined),
    tile('Node records', String(status.records.accepted), status.records.source_error ?? `from ${status.records.source}`, status.records.source_error ? 'warn' : undefined),
  );
}

function showOffloads(status) {
  const rows = status.offloads.map((offload) => make('tr', { 'data-name': offload.name },
    make('td', {}, make('span', { class: 'what' }, OFFLOADS[offload.name] ?? offload.name), make('span', { class: 'why mono' }, offload.name)),
    make('td', {}, badge(offload.state), offload.reason ? make('span', { class: 'why' }, offload.reason) : null)));
  fill($('offloads'), rows, 2, 'The data process is not available.');
}

let dropsBefore;
function showDrops(status) {
  const now = { at: performance.now(), process: status.dataplane.process, packets: new Map() };
  const key = (drop) => `${drop.direction} ${drop.reason}`;
  for (const drop of status.drops) now.packets.set(key(drop), drop.packets);
  const before = dropsBefore?.process === now.process ? dropsBefore : undefined;
  dropsBefore = now;
  const rows = status.drops.map((drop) => {
    const grown = before ? drop.packets - (before.packets.get(key(drop)) ?? 0) : undefined;
    const speed = grown === undefined ? '–' : rate((Math.max(0, grown) * 1000) / Math.max(1, now.at - before.at));
    return make('tr', { 'data-name': key(drop) },
      make('td', {}, make('span', { class: 'what' }, drop.meaning), make('span', { class: 'why mono' }, `${drop.direction} ${drop.reason}`)),
      make('td', { class: 'number', 'data-packets': drop.packets }, count(drop.packets)),
      make('td', { class: 'number' }, speed));
  });
  fill($('drops'), rows, 3, 'None.');
}

function fill(table, rows, columns, nothing) {
  const none = make('tr', {}, make('td', { class: 'none', colspan: columns }, nothing));
  table.tBodies[0].replaceChildren(...(rows.length > 0 ? rows : [none]));
}

function showPools(status) {
  const pools = status.pools ?? [];
  $('pools').hidden = status.pools === null;
  $('pool-list').replaceChildren(...pools.map((pool) => {
    const percent = (pool.used / pool.total) * 100;
    return make('div', { class: 'pool', 'data-cidr': pool.cidr },
      make('p', {}, make('span', { class: 'mono' }, pool.cidr), make('span', {}, `${pool.used} used, ${count(pool.free)} free${pool.resting > 0 ? `, ${pool.resting} quarantined` : ''}`)),
      make('meter', { min: 0, max: 100, low: 80, high: 95, optimum: 0, value: percent.toFixed(2), 'aria-label': `${pool.cidr}: ${percent.toFixed(0)} % used` }));
  }));
}

function showDetails(status) {
  const { interface: device, records } = status;
  const list = (items) => (items.length > 0 ? items.join(', ') : '–');
  const entries = [
    ['Public key', status.public_key],
    ['Interface', `${device.name}, ${list(device.addresses)}`],
    ['Pod CIDRs', list(device.local_cidrs)],
    ['Routes', String(device.routes)],
    ['Source of records', records.source],
    ['Agent', `process ${status.process}, version ${status.version}`],
    ['Revision', String(status.dataplane.revision)],
    ...records.rejected.map((rejected) => ['Rejected', `${rejected.file}: ${rejected.error}`]),
  ];
  $('details').replaceChildren(...entries.flatMap(([name, value]) => [make('dt', {}, name), make('dd', { class: 'mono' }, value)]));
}

// ---- one page of peers

const COLUMNS = [
  ['name', 'Peer'], ['state', 'State'], ['rtt', 'RTT'], ['heard', 'Last received'],
  ['sent', 'Sent'], ['received', 'Received'], ['path_mtu', 'Path MTU'],
];
const view = { sort: 'state', descending: false, offset: 0, total: 0 };

function peerRow(peer) {
  const cell = (label, text) => make('td', { class: 'number', 'data-label': label }, text);
  const heard = peer.last_received_seconds;
  return make('tr', { 'data-name': peer.name },
    make('td', {}, make('span', { class: 'what' }, peer.name), make('span', { class: 'why mono' }, [peer.endpoint ?? 'no endpoint', ...peer.pod_cidrs].join(' · '))),
    make('td', {}, badge(peer.state), peer.reason ? make('span', { class: 'why' }, peer.reason) : null),
    cell('RTT', peer.rtt_us === null ? '–' : `${(peer.rtt_us / 1000).toFixed(2)} ms`),
    cell('Last received', heard === null ? '–' : `${age(heard)} ago`),
    cell('Sent', bytes(peer.tx_bytes)),
    cell('Received', bytes(peer.rx_bytes)),
    cell('Path MTU', peer.path_mtu === null ? 'full' : String(peer.path_mtu)));
}

function drawHead() {
  $('peer-head').replaceChildren(...COLUMNS.map(([key, title], index) => {
    const button = make('button', { type: 'button' }, title);
    button.addEventListener('click', () => sortBy(key, view.sort === key && !view.descending));
    const order = view.sort === key ? (view.descending ? 'descending' : 'ascending') : 'none';
    return make('th', { scope: 'col', 'aria-sort': order, class: index > 1 ? 'number' : null, 'data-key': key }, button);
  }));
}

function sortBy(key, descending) {
  Object.assign(view, { sort: key, descending, offset: 0 });
  const focused = document.activeElement?.closest('th')?.dataset.key;
  drawHead();
  if (focused) $('peer-head').querySelector(`[data-key=${focused}] button`).focus();
  $('sort').value = key;
  refreshPeers();
}

let requests = 0; // number of the last request; answers to earlier ones are ignored
async function refreshPeers() {
  requests += 1;
  const mine = requests;
  const query = new URLSearchParams({ sort: view.sort, descending: view.descending, offset: view.offset, limit: PEERS_PER_PAGE });
  if ($('search').value.trim() !== '') query.set('search', $('search').value.trim());
  if ($('state').value !== '') query.set('state', $('state').value);
  try {
    const answer = await fetchJson(`api/peers?${query}`);
    if (mine === requests) showPeers(answer);
  } catch {
    // The next request for the status shows the failure.
  }
}

function showPeers(answer) {
  if (answer.offset > 0 && answer.peers.length === 0) {
    view.offset = 0;
    refreshPeers();
    return;
  }
  const rows = answer.peers.map(peerRow);
  const nothing = answer.total === 0 ? 'This node has no peers.' : 'No peer matches.';
  $('peer-rows').replaceChildren(...(rows.length > 0 ? rows : [make('tr', {}, make('td', { class: 'none', colspan: COLUMNS.length }, nothing))]));
  view.total = answer.matching;
  setText($('peer-count'), answer.matching === answer.total ? `${answer.total}` : `${answer.matching} of ${answer.total}`);
  const last = answer.offset + answer.peers.length;
  setText($('range'), answer.matching === 0 ? '' : `${answer.offset + 1} to ${last} of ${answer.matching}`);
  $('previous').disabled = answer.offset === 0;
  $('next').disabled = last >= answer.matching;
  document.querySelector('.pages').hidden = answer.matching <= PEERS_PER_PAGE;
}

function turn(pages) {
  view.offset = Math.max(0, view.offset + pages * PEERS_PER_PAGE);
  refreshPeers();
}

// ---- requests

async function fetchJson(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(REQUEST_TIMEOUT), cache: 'no-store', credentials: 'omit' });
  if (!response.ok) throw new Error(`the agent answered ${response.status}`);
  return response.json();
}

let answeredAt; // time of the last answer, performance.now()
let agentProcess;
let restartedAt;

function showStatus(status) {
  setText($('node'), status.node);
  addSamples(status.history);
  const [level, text, reasons] = verdict(status);
  if (agentProcess !== undefined && agentProcess !== status.process) restartedAt = new Date();
  agentProcess = status.process;
  $('verdict').dataset.level = level;
  setText($('verdict-text'), text);
  const noted = restartedAt ? [...reasons, `the agent was restarted at ${restartedAt.toLocaleTimeString()}`] : reasons;
  if ($('verdict-reasons').dataset.shown !== noted.join('\n')) {
    $('verdict-reasons').dataset.shown = noted.join('\n');
    $('verdict-reasons').replaceChildren(...noted.map((reason) => make('li', {}, reason)));
  }
  document.title = `${{ good: '✓', warn: '!', bad: '✗' }[level]} ${status.node} – Skein`;
  showTiles(status);
  showOffloads(status);
  showDrops(status);
  showPools(status);
  showDetails(status);
  CHARTS.forEach(drawChart);
}

function showLive(error) {
  const live = $('live');
  const main = $('main');
  live.dataset.state = error ? 'stale' : 'live';
  main.classList.toggle('stale', Boolean(error));
  main.setAttribute('aria-busy', 'false');
  if (!error) {
    setText(live, 'live');
    return;
  }
  const since = answeredAt === undefined ? '' : `; the data below is ${age((performance.now() - answeredAt) / 1000)} old`;
  setText(live, 'no answer');
  $('verdict').dataset.level = 'bad';
  setText($('verdict-text'), `The agent does not answer (trying again)${since}.`);
  $('verdict-reasons').dataset.shown = '';
  $('verdict-reasons').replaceChildren();
  document.title = '✗ no answer – Skein';
}

async function poll() {
  try {
    const since = samples.at(-1)?.time_ms ?? 0;
    const [status] = await Promise.all([fetchJson(`api/status?since=${since}`), refreshPeers()]);
    answeredAt = performance.now();
    showStatus(status);
    showLive();
  } catch (error) {
    showLive(error);
  }
}

async function run() {
  for (;;) {
    // A hidden page sends no requests.
    if (!document.hidden) await poll();
    await new Promise((resolve) => setTimeout(resolve, POLL_INTERVAL));
  }
}

let typing;
$('search').addEventListener('input', () => {
  clearTimeout(typing);
  typing = setTimeout(() => {
    view.offset = 0;
    refreshPeers();
  }, 150);
});
$('state').addEventListener('change', () => {
  view.offset = 0;
  refreshPeers();
});
$('sort').append(...COLUMNS.map(([key, title]) => make('option', { value: key }, title)));
$('sort').value = view.sort;
$('sort').addEventListener('change', () => sortBy($('sort').value, false));
$('tools').addEventListener('submit', (event) => event.preventDefault());
$('previous').addEventListener('click', () => turn(-1));
$('next').addEventListener('click', () => turn(1));
$('charts').append(...CHARTS.map(chartFrame));
new ResizeObserver(() => CHARTS.forEach(drawChart)).observe($('charts'));
drawHead();
run();
