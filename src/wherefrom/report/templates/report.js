"use strict";
// Picks, filters and unfolds what the page already holds. Texts are moved as text, never as markup.
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // The theme is set before the first paint. Storage may be refused to a page opened from disk.
  const remembered = "wherefrom-theme";
  const recall = () => { try { return localStorage.getItem(remembered); } catch { return null; } };
  const remember = (theme) => { try { localStorage.setItem(remembered, theme); } catch { /* lasts for this visit */ } };
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme || (systemDark.matches ? "dark" : "light");
  if (["light", "dark"].includes(recall())) root.dataset.theme = recall();

  const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();

  function startTheme() {
    const button = document.getElementById("theme");
    const other = () => (theme() === "dark" ? "light" : "dark");
    const show = () => { button.textContent = other() === "dark" ? "Dark theme" : "Light theme"; };
    button.addEventListener("click", () => {
      root.dataset.theme = other();
      remember(root.dataset.theme);
      show();
    });
    systemDark.addEventListener("change", show);
    show();
  }

  function startQueries() {
    const byId = (id) => document.getElementById(id);
    const nav = document.querySelector("nav"), main = byId("queries"), filter = byId("filter");
    const links = [...byId("list").querySelectorAll("a")];
    const sections = [...main.querySelectorAll(".query")];
    const searched = sections.map((section) => plain(section.querySelector(".about").textContent));
    let current = 0;

    const shown = (index) => !links[index].parentElement.hidden;

    // Keeps the picked entry in view inside the list, without moving the page.
    function reveal() {
      const list = byId("list"), item = links[current].parentElement;
      const end = item.offsetTop + item.offsetHeight - list.clientHeight;
      list.scrollTop = Math.max(Math.min(list.scrollTop, item.offsetTop), end);
    }

    function pick(index, { arrive = true } = {}) {
      sections[current].classList.remove("current");
      links[current].removeAttribute("aria-current");
      current = index;
      sections[current].classList.add("current");
      links[current].setAttribute("aria-current", "true");
      const name = links[current].querySelector(".name").textContent;
      byId("place").textContent = name;
      fold(sections[current].querySelector(".about"));
      fill(sections[current]);
      reveal();
      if (!arrive) return;
      byId("announcement").textContent = `Query ${current}: ${name}`;
      try { history.replaceState(null, "", `#query-${current}`); } catch { /* no address to update */ }
      if (main.getBoundingClientRect().top < 0) main.scrollIntoView();
    }

    function move(step) {
      for (let index = current + step; index >= 0 && index < links.length; index += step) {
        if (shown(index)) { pick(index); return; }
      }
    }

    function narrow() {
      const terms = plain(filter.value).split(/\s+/).filter(Boolean);
      searched.forEach((text, index) => {
        links[index].parentElement.hidden = !terms.every((term) => text.includes(term));
      });
      const left = links.filter((_, index) => shown(index)).length;
      const total = `${links.length} ${links.length === 1 ? "query" : "queries"}`;
      byId("count").textContent = terms.length ? `${left} of ${total}` : total;
    }

    function open(state) {
      nav.classList.toggle("open", state);
      byId("toggle").setAttribute("aria-expanded", String(nav.classList.contains("open")));
      reveal();
    }

    // A long query is folded to a few lines, so that its training sequences stay on the first screen.
    function fold(about) {
      const text = about.querySelector(".text");
      if (about.querySelector("button")) return;
      text.classList.add("folded");
      if (text.scrollHeight <= 1.4 * text.clientHeight) { text.classList.remove("folded"); return; }
      const button = document.createElement("button");
      const show = () => {
        const folded = text.classList.contains("folded");
        button.textContent = folded ? "Show all of it" : "Show less";
        button.setAttribute("aria-expanded", String(!folded));
      };
      button.type = "button";
      button.className = "more";
      button.addEventListener("click", () => { text.classList.toggle("folded"); show(); });
      show();
      about.append(button);
    }

    // A sequence's text stands once in the page; a hit takes its copy when its query is first picked.
    function fill(section) {
      for (const link of section.querySelectorAll(".hit .text > a")) {
        const source = byId(link.hash.slice(1));
        link.parentElement.textContent = source.querySelector(".text").textContent;
      }
    }

    function fromAddress() {
      const found = /^#query-(\d+)$/.exec(location.hash);
      return found && Number(found[1]) < links.length ? Number(found[1]) : null;
    }

    byId("list").addEventListener("click", (event) => {
      const link = event.target.closest("a");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      open(false);
      pick(links.indexOf(link));
    });
    byId("previous").addEventListener("click", () => move(-1));
    byId("next").addEventListener("click", () => move(1));
    byId("toggle").addEventListener("click", () => open());
    filter.addEventListener("input", narrow);
    filter.addEventListener("keydown", (event) => {
      const first = links.findIndex((_, index) => shown(index));
      if (event.key === "Escape") {
        filter.value = "";
        narrow();
        filter.blur();
      } else if (first >= 0 && (event.key === "Enter" || event.key === "ArrowDown")) {
        event.preventDefault();
        if (!shown(current) || event.key === "Enter") pick(first);
        open(false);
        links[current].focus({ preventScroll: true });
      }
    });
    window.addEventListener("hashchange", () => { if (fromAddress() !== null) pick(fromAddress()); });

    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, pre")) return;
      const inList = byId("list").contains(event.target);
      const steps = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1 };
      if (inList) Object.assign(steps, { ArrowDown: 1, ArrowUp: -1 });
      if (event.key in steps) {
        event.preventDefault();
        move(steps[event.key]);
        if (inList) links[current].focus({ preventScroll: true });
      } else if (event.key === "/") {
        event.preventDefault();
        open(true);
        filter.focus();
      } else if (event.key === "Escape") {
        open(false);
      }
    });

    narrow();
    pick(fromAddress() ?? 0, { arrive: false });
  }

  document.addEventListener("DOMContentLoaded", () => {
    startTheme();
    startQueries();
  });
})();
