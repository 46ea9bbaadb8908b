// Training examples: searched, filtered, judged, and exported.
import { byId, counted, el, exampleItem, get, judgementCount, save, setPlace, trying, whenJudged } from "./parts.js";

let latest = 0; // the search that counts, while older ones still answer

export async function openExamples(run) {
  const words = byId("words"), source = byId("source"), verdict = byId("verdict");
  for (const name of run.sources) source.append(el("option", { value: name, textContent: name }));
  byId("source-part").hidden = !run.sources.length;
  let waiting = 0;
  words.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(trying(anew), 200); });
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(waiting); trying(anew)(); });
  source.addEventListener("change", trying(anew));
  verdict.addEventListener("change", trying(anew));
  byId("more").addEventListener("click", trying(() => look(Number(byId("more").value))));

  const button = (text, path) => {
    const made = el("button", { type: "button", className: "more", textContent: text });
    made.addEventListener("click", trying(() => save(path)));
    return made;
  };
  const exports = [
    button("Export the judgements", "/export/judgements.jsonl"),
    ...run.files.map((file, index) => button(`Export ${file.split("/").at(-1)} without what is to be dropped`, `/export/filtered/${index}`)),
  ];
  const none = el("span", { className: "meaning", textContent: run.read_only ? "This page is read only: nothing is judged here." : "Open an example to judge it: keep, fix or drop. Judgements and a file without what is dropped can be exported then." });
  const showExports = () => byId("exports").replaceChildren(...(judgementCount() ? exports : [none]));
  showExports();
  whenJudged(showExports);

  return async (picked) => {
    const train = picked.get("train");
    if (train !== null) { await one(train); return; }
    words.value = picked.get("words") ?? "";
    source.value = picked.get("source") ?? "";
    verdict.value = picked.get("verdict") ?? "";
    await anew();
  };
}

async function one(train) {
  latest += 1;
  const item = exampleItem(await get(`/api/examples/${encodeURIComponent(train)}`));
  item.querySelector("details").open = true;
  byId("words").value = "";
  byId("examples").replaceChildren(item);
  byId("more").hidden = true;
  byId("count").replaceChildren("One example. ", el("a", { href: "#examples", textContent: "Show all" }));
}

async function anew() {
  byId("examples").replaceChildren();
  await look(0);
}

async function look(start) {
  const mine = latest += 1;
  const asked = { words: byId("words").value.trim(), source: byId("source").value, verdict: byId("verdict").value };
  setPlace("examples", asked);
  byId("count").textContent = "Looking…";
  const found = await get(`/api/examples?${new URLSearchParams({ ...asked, start })}`);
  if (mine !== latest) return;
  byId("examples").append(...found.examples.map((each) => exampleItem(each)));
  const shown = byId("examples").children.length, seen = found.next ?? found.of;
  byId("more").hidden = found.next === null;
  byId("more").value = found.next ?? "";
  const all = counted(found.of, "example", "examples");
  byId("count").textContent = shown
    ? `${counted(shown, "example", "examples")}${found.next === null ? "" : " so far"}, of ${seen === found.of ? "all" : `the first ${seen.toLocaleString("en-US")} of`} ${all}`
    : found.next === null ? `None of ${all}.` : `None of the first ${seen.toLocaleString("en-US")} of ${all} so far.`;
}
