// Which view is shown; the address after its # says it, and what is picked there.
import { openAsk } from "./ask.js";
import { byId, counted, get, permitted, place, readJudgements, trouble } from "./parts.js";
import { openExamples } from "./examples.js";
import { openScores } from "./scores.js";

const views = { ask: openAsk, scores: openScores, examples: openExamples };

async function start() {
  components.startTheme();
  history.replaceState(null, "", location.pathname + location.hash); // without the token
  const run = await get("/api/run");
  permitted.judging = !run.read_only;
  document.title = `${run.name} – wherefrom`;
  byId("run").textContent = `Where from? ${run.name}`;
  byId("facts").textContent = [
    run.model, counted(run.train, "training example", "training examples"), run.index ? "with an index" : "without an index",
    run.read_only ? "read only" : "",
  ].filter(Boolean).join(" · ");
  await readJudgements();

  const opened = {};
  const show = async () => {
    const { view: named, picked } = place();
    const view = named in views ? named : "ask";
    for (const each of Object.keys(views)) byId(`view-${each}`).hidden = each !== view;
    for (const link of document.querySelectorAll(".tabs a")) {
      if (link.hash === `#${view}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
    try { trouble(); opened[view] ??= views[view](run); await (await opened[view])(picked); } catch (error) { trouble(error); }
  };
  addEventListener("hashchange", show);
  addEventListener("visibilitychange", () => { if (!document.hidden) readJudgements().catch(trouble); });
  await show();
}

byId("skip").addEventListener("click", (event) => { event.preventDefault(); byId("main").focus(); });
start().catch(trouble);
