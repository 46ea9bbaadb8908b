"use strict";
// Picks, filters, unfolds and shades what the page already holds. Texts are moved as text, never as markup.
(() => {
  const { plain, shade, startTheme } = components;

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
        const text = link.parentElement, original = source.querySelector(".text");
        text.textContent = original.textContent;
        if (text.dataset.shares) text.dataset.lengths = original.dataset.lengths;
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

  // Tokens: see report/shading.py for how lengths and shares are written.
  const base64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

  function numbers(letters) {
    const found = [];
    let bits = 0, shift = 0;
    for (const letter of letters) {
      const digit = base64.indexOf(letter);
      bits |= (digit & 31) << shift;
      shift += 5;
      if (digit & 32) continue; // there is more of it
      found.push(bits & 1 ? -(bits >> 1) : bits >> 1);
      bits = shift = 0;
    }
    return found;
  }

  function cut(text, lengths) {
    let end = 0;
    return lengths.map((length) => text.slice(end, end += length));
  }

  // The number `multiple` times ten to the `exponent`, with all its decimals and no others.
  function number(multiple, exponent) {
    if (multiple === 0) return "0";
    const digits = String(Math.abs(multiple)), size = Number(`${digits}e${exponent}`);
    const places = Math.max(0, -exponent);
    const plain = exponent > -7 && exponent < 3
      ? size.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places })
      : size.toExponential(digits.length - 1);
    return (multiple > 0 ? "+" : "−") + plain.replace("-", "−");
  }

  function startTokens() {
    // The event does not bubble, but it is seen on its way down.
    document.getElementById("queries").addEventListener("toggle", ({ target }) => {
      const text = target.querySelector(".text[data-shares]:not(.tokens)");
      if (!target.open || !text) return;
      const { exponent, lengths, shares } = text.dataset;
      shade(text, cut(text.textContent, numbers(lengths)), numbers(shares), (share) => number(share, exponent));
    }, true);
  }

  document.addEventListener("DOMContentLoaded", () => {
    startTheme();
    startTokens();
    startQueries();
  });
})();
