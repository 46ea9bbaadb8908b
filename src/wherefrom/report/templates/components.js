"use strict";
// What the report and the served page have in common: the theme, shaded tokens, and how texts are compared.
const components = (() => {
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

  // The token above or below: the nearest one of the next line in that direction.
  function beside(tokens, from, step) {
    const distance = (index) => Math.abs(tokens[index].offsetLeft - tokens[from].offsetLeft);
    let nearest = from, line = null;
    for (let index = from + step; index >= 0 && index < tokens.length; index += step) {
      const top = tokens[index].offsetTop;
      if (top === tokens[from].offsetTop) continue;
      line ??= top;
      if (top !== line) break;
      if (nearest === from || distance(index) < distance(nearest)) nearest = index;
    }
    return nearest;
  }

  // Makes a text of tokens, shaded by their shares of a score, and gives it a cursor, which pointer and keys move alike.
  // `written` makes a text of a share.
  function shade(text, pieces, shares, written) {
    const largest = Math.max(...shares.map(Math.abs)) || 1;
    const tokens = pieces.map((piece, index) => {
      const token = document.createElement("span");
      token.textContent = piece;
      token.className = shares[index] < 0 ? "negative" : "positive";
      token.classList.toggle("newline", piece.trim() === "" && piece.includes("\n"));
      token.style.setProperty("--share", `${(100 * Math.abs(shares[index])) / largest}%`);
      return token;
    });
    const bar = document.getElementById("token-bar").content.firstElementChild.cloneNode(true);
    const part = (selector) => bar.querySelector(selector);
    let cursor = 0;

    function show(index) {
      tokens[cursor].classList.remove("cursor");
      cursor = index;
      tokens[cursor].classList.add("cursor");
      const share = shares[cursor];
      part("bdi").textContent = `“${tokens[cursor].textContent.replaceAll("\n", "↵").replaceAll("\t", "⇥")}”`;
      part("strong").textContent = written(share);
      part("strong").className = share < 0 ? "negative" : "positive";
      part(".ramp").style.setProperty("--at", `${50 + (50 * share) / largest}%`);
    }

    text.addEventListener("pointerover", (event) => {
      const index = tokens.findIndex((token) => token.contains(event.target));
      if (index >= 0) show(index);
    });
    text.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
      const onward = getComputedStyle(text).direction === "rtl" ? -1 : 1;
      const goal = {
        ArrowRight: cursor + onward, ArrowLeft: cursor - onward, Home: 0, End: tokens.length - 1,
        ArrowUp: beside(tokens, cursor, -1), ArrowDown: beside(tokens, cursor, 1),
      }[event.key];
      if (goal === undefined) return;
      event.preventDefault();
      event.stopPropagation(); // the arrows would move to another query
      show(Math.min(Math.max(goal, 0), tokens.length - 1));
      tokens[cursor].scrollIntoView({ block: "nearest" });
    });

    text.replaceChildren(...tokens);
    text.classList.add("tokens");
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", "Tokens; arrow keys move over them");
    part(".low").textContent = written(-largest);
    part(".high").textContent = written(largest);
    show(Math.max(0, shares.findIndex((share) => Math.abs(share) === largest)));
    text.after(bar);
  }

  return { plain, shade, startTheme };
})();
