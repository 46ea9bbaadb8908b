// What all views are made of: elements, requests, events of jobs, training examples and their judgements.
// Texts become text nodes; nothing here makes HTML of a string.

export const byId = (id) => document.getElementById(id);

// An element with properties; attributes that are no properties are those with a hyphen, and `role`.
export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const characters = (text) => [...text].length; // as Python counts them
export const counted = (count, one, many) => `${count.toLocaleString("en-US")} ${count === 1 ? one : many}`;

export function number(value) {
  const size = Math.abs(value);
  const plain = size === 0 ? "0" : size >= 1e-4 && size < 1e6
    ? size.toLocaleString("en-US", { maximumSignificantDigits: 3 }) : size.toExponential(2);
  return (value > 0 ? "+" : value < 0 ? "−" : "") + plain.replace("-", "−");
}

const signed = (shown) => shown.replaceAll("-", "−");

// Requests. What goes wrong is an Error with a sentence.

const lost = "The server does not answer. Start it again with `wherefrom serve`, and open the address that it prints.";
const expired = "The server has been started again since this page was opened: open the address that it has printed.";

async function refusal(response) {
  if (response.status === 401) return new Error(expired);
  const said = await response.text();
  try { return new Error(JSON.parse(said).message); } catch { return new Error(said || lost); }
}

async function request(path, options) {
  let response;
  try { response = await fetch(path, options); } catch (error) {
    throw error.name === "AbortError" ? error : new Error(lost);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

const sent = (method, said, signal) =>
  ({ method, signal, headers: { "content-type": "application/json" }, body: JSON.stringify(said) });

export const get = async (path) => (await request(path)).json();
export const put = async (path, said) => (await request(path, sent("PUT", said))).json();

// Starts a job and hands its events to functions by their names, until its end. Aborting stops the job.
export async function follow(path, said, signal, on) {
  const response = await request(path, sent("POST", said, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", ended = false;
  for (;;) {
    let part;
    try { part = await reader.read(); } catch (error) {
      throw error.name === "AbortError" ? error : new Error(lost);
    }
    if (part.done) break;
    held += part.value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const found = /^event: (\w+)\ndata: (.*)$/s.exec(event);
      if (!found) continue;
      const value = JSON.parse(found[2]);
      if (found[1] === "failed") throw new Error(value.message);
      ended ||= found[1] === "answered" || found[1] === "found";
      on[found[1]]?.(value);
    }
  }
  if (!ended) throw new Error(lost);
}

export async function save(path) {
  const response = await request(path);
  const name = /filename="([^"]+)"/.exec(response.headers.get("content-disposition"))?.[1] ?? "export";
  const address = URL.createObjectURL(await response.blob());
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

export function trouble(error) {
  const banner = byId("banner");
  banner.textContent = error?.message ?? "";
  banner.hidden = !error;
  if (error) banner.scrollIntoView({ block: "nearest" });
}

// Runs what a person has asked for; what goes wrong is said above the view.
export const trying = (work) => async (...said) => {
  try { trouble(); await work(...said); } catch (error) { if (error.name !== "AbortError") trouble(error); }
};

// Judgements, by training position. Other pages may add some: they are read again when this one is looked at.

const judgements = new Map();
export const permitted = { judging: false };
const judged = new EventTarget();

export async function readJudgements() {
  const found = (await get("/api/judgements")).judgements;
  judgements.clear();
  for (const each of found) judgements.set(each.train, each);
  judged.dispatchEvent(new Event("change"));
}

export const judgementCount = () => judgements.size;
export const whenJudged = (work) => judged.addEventListener("change", work);

function verdictTag(train) {
  const tag = el("span", { className: "label verdict-tag" });
  const show = () => {
    const verdict = judgements.get(train)?.verdict || (judgements.get(train)?.note ? "note" : "");
    tag.textContent = verdict;
    tag.dataset.verdict = verdict;
    tag.hidden = !verdict;
  };
  show();
  whenJudged(() => { if (tag.isConnected) show(); });
  return tag;
}

function judgeControl(train) {
  const state = el("span", { className: "state", role: "status" });
  const note = el("input", { type: "text", maxLength: 2000, placeholder: "Note", className: "note", "aria-label": `Note on example ${train}`, dir: "auto" });
  const buttons = ["keep", "fix", "drop"].map((verdict) =>
    el("button", { type: "button", textContent: verdict[0].toUpperCase() + verdict.slice(1), value: verdict }));
  const show = () => {
    const now = judgements.get(train);
    if (document.activeElement !== note) note.value = now?.note ?? "";
    for (const button of buttons) button.setAttribute("aria-pressed", String(now?.verdict === button.value));
  };
  const judge = trying(async (verdict) => {
    state.textContent = "Saving…";
    try {
      const now = await put("/api/judgements", { train, verdict, note: note.value });
      if (now.verdict || now.note) judgements.set(train, now); else judgements.delete(train);
      state.textContent = "Saved";
    } catch (error) {
      state.textContent = "Not saved";
      throw error;
    } finally {
      judged.dispatchEvent(new Event("change"));
    }
  });
  for (const button of buttons) {
    button.addEventListener("click", () => judge(button.getAttribute("aria-pressed") === "true" ? "" : button.value));
  }
  note.addEventListener("change", () => judge(judgements.get(train)?.verdict ?? ""));
  show();
  whenJudged(() => { if (note.isConnected) show(); });
  return el("div", { className: "judge", role: "group", "aria-label": `Judgement of example ${train}` }, ...buttons, note, state);
}

// Training examples.

// A text in which some parts, in characters as Python counts them, stand out.
function marked(text, parts, start = 0) {
  const letters = [...text], found = [];
  let at = 0;
  for (const [first, last] of parts) {
    const [begin, end] = [Math.max(first - start, at), Math.min(last - start, letters.length)];
    if (begin >= end) continue;
    found.push(letters.slice(at, begin).join(""), el("u", { className: "same", textContent: letters.slice(begin, end).join("") }));
    at = end;
  }
  return [...found, letters.slice(at).join("")];
}

function fill(text, hit) {
  const pieces = (hit.tokens ?? []).map(([piece]) => piece.replaceAll("\r", "␍"));
  if (!pieces.length) { text.replaceChildren(...marked(hit.text, hit.overlaps ?? [])); return; }
  components.shade(text, pieces, hit.tokens.map(([, share]) => share), number);
  let at = 0;
  for (const token of text.children) {
    const length = characters(token.textContent);
    if (hit.overlaps.some(([first, last]) => first < at + length && last > at)) token.replaceChildren(...marked(token.textContent, hit.overlaps, at));
    at += length;
  }
}

// One training example, which unfolds: the item of the report page, with its judgement.
export function exampleItem(hit, largest = 0) {
  const facts = [
    el("a", { href: `#examples?train=${hit.train}`, textContent: `train ${hit.train}` }),
    hit.source ? el("span", { textContent: `from ${hit.source}`, dir: "auto" }) : null,
    hit.label ? el("span", { className: "label", textContent: hit.label, dir: "auto" }) : null,
    hit.overlaps?.length ? el("span", { className: "label", textContent: "shares words" }) : null,
    verdictTag(hit.train),
  ];
  const bar = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  rect.setAttribute("width", `${largest ? (100 * Math.abs(hit.raw)) / largest : 0}%`);
  bar.setAttribute("class", "bar");
  bar.setAttribute("aria-hidden", "true");
  bar.append(rect);
  const text = el("div", { className: "text", dir: "auto" });
  const details = el("details", {},
    el("summary", {},
      el("span", { className: "rank", textContent: hit.rank ?? "" }),
      el("span", { className: "name", textContent: hit.title || `Example ${hit.train}`, dir: "auto" }),
      el("span", { className: "score", textContent: signed(hit.shown ?? ""), title: hit.raw === undefined ? "" : `raw score ${hit.raw}` }),
      largest ? bar : null,
      el("span", { className: "excerpt", textContent: hit.excerpt, dir: "auto" }),
      el("span", { className: "facts" }, ...facts)),
    text);
  details.addEventListener("toggle", () => {
    if (!details.open || text.hasChildNodes()) return;
    fill(text, hit);
    if (permitted.judging) details.append(judgeControl(hit.train));
  });
  return el("li", { className: "hit" }, details);
}

export function hitList(kind, heading, meaning, hits, largest) {
  return el("div", { className: `hits ${kind}` },
    el("h3", { textContent: heading }),
    el("p", { className: "meaning", textContent: meaning }),
    hits.length
      ? el("ol", {}, ...hits.map((hit) => exampleItem(hit, largest)))
      : el("p", { className: "none", textContent: "No training example." }));
}

export const largestOf = (...lists) => Math.max(0, ...lists.flat().map((hit) => Math.abs(hit.raw)));

export const supports = "Training on these made it likelier.";
export const opposes = "Training on these made it less likely.";

// The address after its #: a view and what is picked there.
export function place() {
  const [view, ...rest] = location.hash.slice(1).split("?");
  return { view, picked: new URLSearchParams(rest.join("?")) };
}

export function setPlace(view, picked) {
  const said = new URLSearchParams(Object.entries(picked).filter(([, value]) => value !== "" && value !== null)).toString();
  const next = `#${view}${said && `?${said}`}`;
  if (next !== location.hash) history.replaceState(null, "", next);
}
