// A prompt, the answer to it, a part of the answer, and the training examples behind that part.
import {
  byId, characters, counted, el, follow, hitList, largestOf, opposes, place, setPlace, supports, trouble,
} from "./parts.js";

const state = { prompt: "", answer: "", pieces: [], span: null, anchor: 0 }; // span: the first token, and behind the last
let work = null; // what aborts the job under way

export async function openAsk(run) {
  const method = byId("method"), beside = byId("beside");
  for (const { name, words } of run.methods) {
    for (const select of [method, beside]) select.append(el("option", { value: name, textContent: words }));
  }
  for (const name of run.groupings) byId("group").append(el("option", { value: name, textContent: name }));
  byId("group-part").hidden = !run.groupings.length;
  for (const name of ["prompt", "given", "contrast"]) byId(name).maxLength = run.limits.text;
  for (const radio of document.querySelectorAll("[name=who]")) radio.addEventListener("change", whose);
  byId("question").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
  });
  byId("find").addEventListener("click", find);
  byId("draw").addEventListener("click", () => draw(run.limits.tokens));
  byId("contrast").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); find(); }
  });
  startSelection();

  return async (picked) => {
    const prompt = picked.get("prompt"), answer = picked.get("answer");
    if (prompt === null) return;
    byId("prompt").value = prompt;
    if (answer === null || (state.prompt === prompt && state.answer === answer)) return;
    for (const select of [method, beside, byId("group")]) {
      const said = picked.get(select.id);
      if (said !== null && [...select.options].some(({ value }) => value === said)) select.value = said;
    }
    const asked = ask({ prompt, answer });
    byId("contrast").value = picked.get("contrast") ?? "";  // at once, or it would close what a reader has opened since
    byId("contrast-part").open = byId("contrast").value !== "";
    await asked;
    if (!state.pieces.length) return;
    const span = /^(\d+)-(\d+)$/.exec(picked.get("span") ?? "");
    if (span) choose(...tokensOf(Number(span[1]), Number(span[2])));
    if (picked.get("method")) await find();
  };
}

const given = () => document.querySelector("[name=who]:checked").value === "given";

function whose() {
  byId("given-part").hidden = !given();
  byId("options").hidden = given();
  byId("write").textContent = given() ? "Take this answer" : "Write an answer";
}

function write() {
  const said = { prompt: byId("prompt").value };
  if (given()) said.answer = byId("given").value;
  else Object.assign(said, {
    max_new_tokens: Number(byId("most").value), temperature: Number(byId("temperature").value),
    seed: Math.floor(Math.random() * 2 ** 31),
  });
  return ask(said);
}

// Aborts what is under way, and starts anew; `status` is where it is said how far it is.
async function job(status, path, said, on) {
  work?.abort();
  const mine = work = new AbortController();
  const stop = el("button", { type: "button", className: "more", textContent: "Stop" });
  const words = el("span", { textContent: "Asking…" }), bar = el("progress"), note = el("p", { className: "meaning" });
  stop.addEventListener("click", () => mine.abort());
  status.replaceChildren(el("div", { className: "line status", role: "status" }, bar, words, stop), note);
  try {
    await follow(path, said, mine.signal, {
      waiting: ({ ahead }) => { words.textContent = ahead ? `Waiting for ${counted(ahead, "question", "questions")} before this one…` : "Working…"; },
      progress: ({ stage, done, total }) => {
        words.textContent = `${stage[0].toUpperCase()}${stage.slice(1)}: ${done.toLocaleString("en-US")} of ${total.toLocaleString("en-US")}`;
        bar.max = total;
        bar.value = done;
      },
      note: ({ message }) => { note.textContent = message; },
      ...on,
    });
    return true;
  } catch (error) {
    if (error.name !== "AbortError") status.replaceChildren(el("p", { className: "trouble", role: "alert", textContent: error.message }));
    else if (work === mine) status.replaceChildren(el("p", { className: "meaning", role: "status", textContent: "Stopped. What was computed is stored; asking again goes on from there." }));
    return false;
  } finally {
    if (work === mine) work = null;
  }
}

async function ask(said) {
  trouble();
  if (said.prompt !== state.prompt) { byId("contrast").value = ""; byId("contrast-part").open = false; }
  Object.assign(state, { prompt: said.prompt, answer: "", pieces: [], span: null });
  byId("found").replaceChildren();
  byId("find-part").hidden = true;
  const part = byId("answer-part"), answer = byId("answer");
  part.hidden = false;
  answer.replaceChildren();
  const status = el("div");
  part.append(status);
  await job(status, "/api/answer", said, {
    text: ({ text }) => { answer.textContent = text; },
    answered: ({ prompt, answer: written, pieces: tokens }) => {
      const pieces = tokens.filter(Boolean); // a character of several tokens stands with the last of them
      Object.assign(state, { prompt, answer: written, pieces });
      answer.replaceChildren(...pieces.map((piece) => el("span", { textContent: piece })));
      // A link that is followed may say more, which has to stay in the address until it is done.
      const { picked } = place();
      if (picked.get("prompt") !== prompt || picked.get("answer") !== written) setPlace("ask", { prompt, answer: written });
      choose(null);
      status.remove(); // now, or what is below would move under the pointer when the stream ends
      byId("find-part").hidden = false;
      answer.focus({ preventScroll: true });
    },
  });
  for (const old of [...part.querySelectorAll(":scope > div:not([id])")].slice(0, -1)) old.remove();
}

// Another answer, of at most as many tokens, which the model draws.
async function draw(most) {
  const status = byId("drawing"), other = byId("contrast");
  const said = {
    prompt: state.prompt, max_new_tokens: Math.min(state.pieces.length, most),
    temperature: Math.max(1, Number(byId("temperature").value)), seed: Math.floor(Math.random() * 2 ** 31),
  };
  const done = await job(status, "/api/answer", said, {
    text: ({ text }) => { other.value = text; },
    answered: ({ answer }) => { other.value = answer; },
  });
  if (done) { status.replaceChildren(); other.focus({ preventScroll: true }); }
}

// The chosen part of the answer.

// In characters, as Python counts them.
function span() {
  if (state.span === null) return null;
  const before = characters(state.pieces.slice(0, state.span[0]).join(""));
  return [before, before + characters(state.pieces.slice(...state.span).join(""))];
}

function tokensOf(start, stop) {
  let at = 0;
  const touched = state.pieces.flatMap((piece, index) => {
    const from = at;
    at += characters(piece);
    return from < stop && at > start ? [index] : [];
  });
  return touched.length ? [[touched[0], touched.at(-1) + 1]] : [null];
}

function choose(chosen) {
  state.span = chosen;
  const tokens = byId("answer").children;
  for (const [index, token] of [...tokens].entries()) token.classList.toggle("chosen", chosen !== null && index >= chosen[0] && index < chosen[1]);
  const words = chosen === null ? "" : state.pieces.slice(...chosen).join("").trim();
  byId("selected").replaceChildren(...(chosen === null
    ? [`The whole answer, ${counted(state.pieces.length, "token", "tokens")}`]
    : [el("bdi", { textContent: `“${words}”` }), ` ${counted(chosen[1] - chosen[0], "token", "tokens")}`]));
}

function startSelection() {
  const answer = byId("answer");
  let pointing = false;
  const selected = () => {
    const selection = getSelection();
    if (!pointing || !state.pieces.length || !selection.rangeCount) return;
    const range = selection.getRangeAt(0);
    if (!answer.contains(range.commonAncestorContainer)) return;
    if (range.collapsed) { choose(null); return; }
    const before = range.cloneRange();
    before.selectNodeContents(answer);
    before.setEnd(range.startContainer, range.startOffset);
    const start = characters(before.toString());
    choose(...tokensOf(start, start + characters(range.toString())));
  };
  answer.addEventListener("pointerdown", () => { pointing = true; });
  document.addEventListener("selectionchange", selected);
  answer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !state.pieces.length) return;
    const last = state.pieces.length - 1, [first, behind] = state.span ?? [0, 0];
    const focus = state.span === null ? -1 : state.anchor === first ? behind - 1 : first; // the end that moves
    const goal = { ArrowRight: focus + 1, ArrowLeft: state.span === null ? last : focus - 1, Home: 0, End: last }[event.key];
    if (event.key === "Enter") { event.preventDefault(); find(); return; }
    if (event.key === "Escape") { pointing = false; getSelection().removeAllRanges(); choose(null); return; }
    if (goal === undefined) return;
    event.preventDefault();
    pointing = false;
    getSelection().removeAllRanges();
    const to = Math.min(Math.max(goal, 0), last);
    if (!event.shiftKey || state.span === null) state.anchor = to;
    choose([Math.min(state.anchor, to), Math.max(state.anchor, to) + 1]);
    answer.children[to].scrollIntoView({ block: "nearest" });
  });
}

// The examples behind it.

async function find() {
  if (!state.pieces.length) return;
  const { prompt, answer } = state, part = span();
  const method = byId("method").value, beside = byId("beside").value;
  const group = byId("group").value, contrast = byId("contrast-part").open ? byId("contrast").value : "";
  const methods = [...new Set([method, beside].filter(Boolean))];
  setPlace("ask", { prompt, answer, span: part ? part.join("-") : "", contrast, method, beside, group });
  const asked = { prompt, answer, span: part, contrast: contrast || null, group: group || null, k: 10 };
  const shared = el("div"), columns = methods.map(() => el("div", { className: "result" }));
  byId("found").replaceChildren(
    contrast ? versus(part ? state.pieces.slice(...state.span).join("") : answer, contrast) : "",
    el("div", { className: methods.length > 1 ? "columns" : "" }, ...columns), shared);
  const found = [];
  for (const [index, name] of methods.entries()) {
    columns[index].append(el("p", { className: "meaning", textContent: "Waiting for its turn…" }));
    const done = await job(columns[index], "/api/attribute", { ...asked, method: name }, {
      shared: ({ hits }) => { if (!shared.hasChildNodes() && !methods.includes("bm25")) shared.append(...sharedWords(hits)); },
      found: (result) => { found.push(result); columns[index].replaceChildren(...resultParts(result, methods.length > 1, group)); },
    });
    if (!done) return;
  }
  if (found.length === 2) compare(columns, found);
}

function sharedWords(hits) {
  if (hits === null) return [el("p", { className: "meaning", textContent: "Shared words are not looked for: pip install 'wherefrom[evaluate]'." })];
  const list = hitList("neutral", "Shares its words", "By BM25, which knows texts alone: the model has no part in it.", hits, largestOf(hits));
  return [el("div", { className: "columns" }, list)];
}

// What is held against what.
const versus = (one, other) => el("p", { className: "versus" },
  "Why ", el("bdi", { textContent: `“${one.trim()}”` }), " and not ", el("bdi", { textContent: `“${other.trim()}”` }));

function resultParts({ method, computed_by: by, heading, meaning, supporting, opposing, contrast, groups, of_groups: ofGroups, scored, of }, narrow, column) {
  const against = contrast !== null;
  const largest = largestOf(supporting, opposing);
  const total = of.toLocaleString("en-US");
  const scope = scored === of ? `all ${total} training examples were scored exactly` : `${scored.toLocaleString("en-US")} of ${total} training examples were scored exactly, those that the index and BM25 named`;
  return [
    el("h2", { textContent: method }),
    el("p", { className: "reading" }, el("strong", { textContent: heading }), `: ${meaning}; ${scope} (${by}).`),
    el("div", { className: narrow ? "stacked" : "columns" },
      hitList("positive", against ? "Speaks for it" : "Supports it", against ? "Training on these made it likelier against the other answer." : supports, supporting, largest),
      hitList("negative", against ? "Speaks for the other" : "Opposes it", against ? "Training on these made the other answer likelier against it." : opposes, opposing, largest)),
    groups.length ? groupTable(groups, ofGroups, column, heading) : "",
  ];
}

// Sums over all training examples by what they have in a column.
function groupTable(groups, ofGroups, column, heading) {
  const lines = groups.map(([name, count, sum, mean]) => el("tr", {},
    el("th", { scope: "row", textContent: name || "–", title: name, dir: "auto" }),
    ...[count.toLocaleString("en-US"), sum, mean].map((said) => el("td", { textContent: said.replaceAll("-", "−") }))));
  const head = [column, "Examples", `Sum: ${heading.toLowerCase()}`, "Mean"].map((said) => el("th", { scope: "col", textContent: said }));
  return el("div", { className: "groups" },
    el("h3", {}, "Added up by ", el("bdi", { textContent: column })),
    el("p", { className: "meaning", textContent: `${lines.length < ofGroups ? `The ${lines.length / 2} highest and lowest of ${counted(ofGroups, "group", "groups")}. ` : ""}Sums over all training examples; they say what leaving out a whole group would do as far as effects add up.` }),
    el("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Scores by group" },
      el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...lines))));
}

// Says of each example where the other method has it.
function compare(columns, found) {
  columns.forEach((column, index) => {
    const other = found[1 - index];
    for (const kind of ["supporting", "opposing"]) {
      const ranks = new Map(other[kind].map(({ train, rank }) => [train, rank]));
      const items = column.querySelectorAll(`.${kind === "supporting" ? "positive" : "negative"} .hit`);
      found[index][kind].forEach(({ train }, at) => {
        if (ranks.has(train)) items[at].querySelector(".facts").append(el("span", { className: "label same", textContent: `rank ${ranks.get(train)} there` }));
      });
    }
  });
}
