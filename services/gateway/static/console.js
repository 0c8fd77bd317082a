// The console: asks /console/mesh every second and draws it, /console/step for a timeline, and the API for the chat.
"use strict";

const EVERY_MS = 1000;
const BOX = { width: 220, height: 62, gap: 14 };  // pixels, as are all of the picture's
const HEAD = 30, GAP = 50, GUTTER = 30;  // above a role's boxes; between columns, at least; beside boxes in one column
const NARROW = 680;
const COLUMNS = [["gateway", "GATEWAYS"], ["attention", "ATTENTION REPLICAS"], ["ffn", "FFN SHARDS"]];
const byId = (id) => document.getElementById(id);
const state = { model: "", replicas: [], chosen: null, slowest: false, messages: [], timelineUrl: null, isAsking: false };

function headers() {
  const key = sessionStorage.getItem("afd-api-key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function get(path) {
  const answer = await fetch(path, { headers: headers(), cache: "no-store" });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw Object.assign(new Error(body?.error?.message ?? `${answer.status} ${answer.statusText}`), { status: answer.status });
}

// --- the mesh ---

async function refresh() {
  try {
    const mesh = await (await get("/console/mesh")).json();
    Object.assign(state, { model: mesh.model, replicas: mesh.replicas });
    showProblem(null);
    byId("key").hidden = true;
    draw();
  } catch (error) {
    showProblem(error instanceof TypeError ? "the gateway does not answer" : error.message);
    byId("key").hidden = error.status !== 401 && error.status !== 403;
    byId("no-step").textContent = "";
  } finally {
    setTimeout(refresh, EVERY_MS);
  }
}

function showProblem(sentence) {
  byId("problem").textContent = sentence ?? "";
  byId("problem").hidden = sentence === null;
}

const of = (role) => state.replicas.filter((replica) => replica.role === role)
  .sort((a, b) => a.shard - b.shard || a.replica_id.localeCompare(b.replica_id));
const sum = (replicas, value) => replicas.reduce((total, replica) => total + (value(replica) ?? 0), 0);
const percent = (share) => `${Math.round(100 * share)} %`;
const number = (value) => (value ?? 0) >= 100 ? Math.round(value).toString() : (value ?? 0).toFixed((value ?? 0) >= 10 ? 0 : 1);

function draw() {
  const attention = of("attention");
  if (!attention.some((replica) => replica.replica_id === state.chosen)) choose(attention[0]?.replica_id ?? null);
  byId("model").textContent = state.model;
  drawTotals(attention);
  drawMesh();
}

function drawTotals(attention) {
  const totals = [
    ["tokens/s", number(sum(attention, (replica) => replica.rates.generated_tokens))],
    ["sequences", sum(attention, (replica) => replica.load.sequences)],
    ["waiting", sum(attention, (replica) => replica.load.waiting)],
  ];
  byId("totals").replaceChildren(...totals.map(([name, value]) => {
    const entry = document.createElement("div");
    entry.append(element("dt", name), element("dd", value));
    return entry;
  }));
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawMesh() {
  const width = byId("mesh").clientWidth, roles = COLUMNS.map(([role]) => of(role));
  const { heads, places, height, curve } = (width < NARROW ? inOneColumn : sideBySide)(roles, width);
  const names = COLUMNS.map(([, name], number) => svg("text", { class: "column", ...heads[number] }, name));
  byId("mesh").setAttribute("viewBox", `0 0 ${width} ${height}`);
  byId("mesh").replaceChildren(...names, ...edges(places, curve), ...roles.flat().map((replica) => box(replica, places.get(replica.replica_id))));
}

// Where heads and boxes are, and the curve of an edge: a column for each role.
function sideBySide(roles, width) {
  const boxWidth = Math.min(BOX.width, (width - 2 * GAP) / 3), left = (number) => 1 + number * (width - boxWidth - 2) / 2;
  const most = Math.max(1, ...roles.map((replicas) => replicas.length)), places = new Map();
  roles.forEach((replicas, number) => replicas.forEach((replica, row) => {
    const y = HEAD + (row + (most - replicas.length) / 2) * (BOX.height + BOX.gap);
    places.set(replica.replica_id, { x: left(number), y, width: boxWidth });
  }));
  const curve = (from, to) => {
    const x1 = from.x + boxWidth, x2 = to.x, middle = (x1 + x2) / 2;
    return `M${x1},${centre(from)} C${middle},${centre(from)} ${middle},${centre(to)} ${x2},${centre(to)}`;
  };
  return { heads: roles.map((_, number) => ({ x: left(number), y: 14 })), places, height: HEAD + most * (BOX.height + BOX.gap), curve };
}

// On a phone: one under the other. Edges to attention replicas are at their left, those to FFN shards at the right.
function inOneColumn(roles, width) {
  const heads = [], places = new Map();
  let y = 0;
  for (const replicas of roles) {
    heads.push({ x: GUTTER, y: y + 14 });
    y += HEAD - 8;
    for (const replica of replicas) {
      places.set(replica.replica_id, { x: GUTTER, y, width: width - 2 * GUTTER });
      y += BOX.height + BOX.gap;
    }
  }
  const curve = (from, to, role) => {
    const [x, far] = role === "attention" ? [GUTTER, 2 - GUTTER / 3] : [width - GUTTER, width - 2 + GUTTER / 3];
    return `M${x},${centre(from)} C${far},${centre(from)} ${far},${centre(to)} ${x},${centre(to)}`;
  };
  return { heads, places, height: y, curve };
}

const centre = (place) => place.y + BOX.height / 2;

function edges(places, curve) {
  const drawn = [];
  const draw = (from, to, role, isLive, carries) => {
    const ends = [places.get(from), places.get(to)];
    if (!ends.every(Boolean)) return;  // gone just now
    const path = svg("path", { d: curve(...ends, role), class: isLive ? "live" : "" });
    path.append(svg("title", {}, carries));
    drawn.push(path);
  };
  for (const gateway of of("gateway"))
    for (const replica of of("attention")) {
      const count = gateway.sequences_at[replica.replica_id] ?? 0;
      draw(gateway.replica_id, replica.replica_id, "attention", count > 0, `${count} sequences`);
    }
  for (const replica of of("attention"))
    for (const [ffn, transport] of Object.entries(replica.links))
      draw(replica.replica_id, ffn, "ffn", (replica.rates.handoffs ?? 0) > 0, `frames over ${transport}`);
  return drawn;
}

function box(replica, { x, y, width }) {
  const group = svg("g", { class: replica.role, transform: `translate(${x},${y})` });
  group.append(svg("rect", { class: "box", width, height: BOX.height, rx: 7 }));
  group.append(svg("title", {}, `${replica.replica_id} at ${replica.address}`));
  group.append(svg("text", { x: 10, y: 19 }, name(replica)));
  const { line, level, of: what } = told(replica);
  group.append(svg("text", { class: "soft", x: 10, y: 37 }, line));
  const share = Math.min(1, Math.max(0, level)), length = width - 100;
  group.append(svg("rect", { class: "track", x: 10, y: 47, width: length, height: 6, rx: 3 }));
  group.append(svg("rect", { class: share > 0.9 ? "level full" : "level", x: 10, y: 47, width: share * length, height: 6, rx: 3 }));
  group.append(svg("text", { class: "soft", x: width - 10, y: 54, "text-anchor": "end" }, `${percent(share)} ${what}`));
  if (!replica.is_ready) group.classList.add("not-ready");
  if (replica.role === "attention") {
    group.classList.toggle("chosen", replica.replica_id === state.chosen);
    group.setAttribute("tabindex", 0);
    group.setAttribute("role", "button");
    group.addEventListener("click", () => choose(replica.replica_id));
    group.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(replica.replica_id); });
  }
  return group;
}

function name(replica) {
  const short = replica.replica_id.length > 18 ? `${replica.replica_id.slice(0, 17)}…` : replica.replica_id;
  return replica.role === "ffn" ? `${replica.shard}/${replica.num_shards}  ${short}` : short;
}

// One line about a replica, and what its bar shows.
function told(replica) {
  const { load, capacity, rates } = replica;
  if (replica.role === "gateway") {
    const line = `${load.requests ?? 0} requests, ${number(rates.output_tokens)} tokens/s`;
    return { line, level: (load.requests ?? 0) / (capacity.requests || 1), of: "open" };
  }
  if (replica.role === "attention") {
    const stepMs = rates.steps > 0 ? `, ${(1000 * rates.step_seconds / rates.steps).toFixed(1)} ms a step` : "";
    return { line: `${load.sequences ?? 0} sequences${stepMs}`, level: (load.kv_blocks ?? 0) / (capacity.kv_blocks || 1), of: "of KV" };
  }
  const transports = new Set(of("attention").map((attention) => attention.links[replica.replica_id]).filter(Boolean));
  const fill = rates.ffn_batches > 0 ? `, ${number(rates.ffn_tokens / rates.ffn_batches)} rows a batch` : "";
  const line = (transports.size ? `over ${[...transports].sort().join(", ")}` : "no attention replica") + fill;
  return { line, level: rates.ffn_compute_seconds ?? 0, of: "busy" };
}

// --- a step's timeline ---

function choose(replicaId) {
  state.chosen = replicaId;
  byId("step-of").textContent = replicaId ? `of ${replicaId}` : "";
  showStep();
}

async function showStep() {
  byId("last").setAttribute("aria-pressed", !state.slowest);
  byId("slowest").setAttribute("aria-pressed", state.slowest);
  if (!state.chosen) return;
  try {
    const width = Math.min(1600, Math.max(300, byId("mesh").clientWidth));
    const query = new URLSearchParams({ replica: state.chosen, slowest: state.slowest, width });
    const picture = await (await get(`/console/step?${query}`)).blob();
    if (state.timelineUrl) URL.revokeObjectURL(state.timelineUrl);
    state.timelineUrl = URL.createObjectURL(picture);
    byId("timeline").src = state.timelineUrl;
    byId("timeline").alt = `where the time of a decode step of ${state.chosen} went`;
    byId("timeline").style.display = "block";
    byId("no-step").hidden = true;
  } catch (error) {
    byId("timeline").style.display = "none";
    byId("no-step").hidden = false;
    byId("no-step").textContent = error.status === 404 ? "Nothing has been decoded yet: ask something." : error.message;
  }
}

// --- chat ---

async function ask(question) {
  if (!question || state.isAsking) return;
  state.isAsking = true;
  say("user", question);
  state.messages.push({ role: "user", content: question });
  const answer = say("assistant", "");
  const begun = performance.now();
  let first = null, count = 0, text = "";
  try {
    for await (const chunk of chatChunks(state.messages)) {
      first ??= performance.now();
      count += 1;
      text += chunk;
      answer.textContent = text;
      answer.scrollIntoView({ block: "nearest" });
    }
    state.messages.push({ role: "assistant", content: text });
    if (first !== null) say("measured", `first after ${Math.round(first - begun)} ms, ${count} pieces in ${Math.round(performance.now() - begun)} ms`);
  } catch (error) {
    if (!text) answer.remove();
    state.messages.pop();
    say("error", error instanceof TypeError ? "the gateway does not answer" : error.message);
  }
  state.isAsking = false;
  showStep();
}

async function* chatChunks(messages) {
  state.model ||= (await (await get("/v1/models")).json()).data[0].id;  // one who may not see the mesh may ask
  const body = JSON.stringify({ model: state.model, messages, stream: true });
  const answer = await fetch("/v1/chat/completions", { method: "POST", headers: { ...headers(), "Content-Type": "application/json" }, body });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const piece = event.choices?.[0]?.delta?.content;
    if (piece) yield piece;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

function say(kind, text) {
  const line = element("p", text, kind);
  byId("messages").append(line);
  line.scrollIntoView({ block: "nearest" });
  return line;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  byId("question").value = "";
  ask(question);
});
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("afd-api-key", byId("key-value").value.trim());
});
byId("last").addEventListener("click", () => { state.slowest = false; showStep(); });
byId("slowest").addEventListener("click", () => { state.slowest = true; showStep(); });
let drawsStep;
addEventListener("resize", () => {
  drawMesh();
  clearTimeout(drawsStep);
  drawsStep = setTimeout(showStep, 200);  // once, when the window has its size
});
refresh();
