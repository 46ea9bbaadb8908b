// Finished scores: their queries, and the training examples of each.
import { byId, counted, el, get, hitList, largestOf, opposes, setPlace, supports, trying } from "./parts.js";

let queries = [], current = { name: "", query: -1 };

export async function openScores() {
  const results = byId("results"), filter = byId("find-query");
  results.addEventListener("change", trying(() => show(results.value, 0)));
  filter.addEventListener("input", narrow);
  byId("queries").addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    let next = event.target.closest("li");
    do next = step > 0 ? next?.nextElementSibling : next?.previousElementSibling; while (next?.hidden);
    next?.firstElementChild.focus();
    next?.firstElementChild.click();
  });

  return async (picked) => {
    const { scores, others } = await get("/api/scores");
    const chosen = scores.includes(picked.get("name")) ? picked.get("name") : scores.includes(current.name) ? current.name : scores[0];
    results.replaceChildren(...scores.map((name) => el("option", { value: name, textContent: name })));
    results.closest(".line").hidden = filter.hidden = !scores.length;
    byId("others").textContent = [
      scores.length ? "" : "No finished scores of queries yet. `wherefrom score` makes them; the answers that you ask about are found under Ask.",
      others ? `${counted(others, "other result of this run does", "other results of this run do")} not say which texts they are of, as those of answers.` : "",
    ].filter(Boolean).join(" ");
    if (chosen) { results.value = chosen; await show(chosen, Number(picked.get("query") ?? Math.max(current.query, 0))); }
  };
}

async function show(name, query) {
  if (name !== current.name) {
    byId("hits").replaceChildren(el("p", { className: "meaning", role: "status", textContent: "Reading the scores and their texts…" }));
    byId("queries").replaceChildren();
    const found = await get(`/api/scores/${encodeURIComponent(name)}`).catch((error) => { byId("hits").replaceChildren(); current = { name: "", query: -1 }; throw error; });
    queries = found.queries;
    byId("queries").replaceChildren(...queries.map(({ title, excerpt }, index) => {
      const button = el("button", { type: "button" },
        el("span", { className: "index", textContent: index }),
        el("span", { className: "name", textContent: title || `Query ${index}`, dir: "auto" }),
        el("span", { className: "excerpt", textContent: excerpt, dir: "auto" }));
      button.addEventListener("click", trying(() => show(name, index)));
      return el("li", {}, button);
    }));
    narrow();
    current = { name, query: -1, stored: found.stored, by: found.computed_by };
  }
  const picked = Math.min(Math.max(query || 0, 0), queries.length - 1);
  setPlace("scores", { name, query: picked });
  if (picked === current.query) return;
  const hits = await get(`/api/scores/${encodeURIComponent(name)}/${picked}?k=10`);
  current.query = picked;
  for (const [index, item] of [...byId("queries").children].entries()) {
    if (index === picked) item.firstElementChild.setAttribute("aria-current", "true"); else item.firstElementChild.removeAttribute("aria-current");
  }
  const largest = largestOf(hits.supporting, hits.opposing);
  byId("hits").replaceChildren(
    el("div", { className: "about" },
      el("p", { className: "eyebrow" }, `Query ${picked}`,
        hits.query.label ? el("span", { className: "label", textContent: hits.query.label, dir: "auto" }) : null),
      hits.query.title ? el("h2", { textContent: hits.query.title, dir: "auto" }) : null,
      el("div", { className: "text", textContent: hits.query.text, dir: "auto" })),
    el("p", { className: "reading" }, el("strong", { textContent: hits.heading }), `: ${hits.meaning}; ${current.stored} are stored (${current.by}).`),
    el("div", { className: "columns" },
      hitList("positive", "Supports it", supports, hits.supporting, largest),
      hitList("negative", "Opposes it", opposes, hits.opposing, largest)));
}

function narrow() {
  const terms = components.plain(byId("find-query").value).split(/\s+/).filter(Boolean);
  [...byId("queries").children].forEach((item, index) => {
    const text = components.plain(`${queries[index].title} ${queries[index].excerpt}`);
    item.hidden = !terms.every((term) => text.includes(term));
  });
}
