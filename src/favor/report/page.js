"use strict";
(() => {
  const box = document.getElementById("answers");
  if (!box) return;
  const [search, order, count, more] = ["search", "order", "count", "all"].map((id) => document.getElementById(id));
  const articles = [...box.children];
  let most = 6;
  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const sign = order.value === "up" ? 1 : -1;
    articles.sort((a, b) => sign * (a.dataset.change - b.dataset.change));
    box.append(...articles);
    const found = articles.filter((one) => words.every((word) => one.textContent.toLowerCase().includes(word)));
    for (const one of articles) one.hidden = !found.slice(0, most).includes(one);
    count.textContent = `${Math.min(most, found.length)} of ${found.length} shown`;
    more.hidden = found.length <= most;
  };
  search.addEventListener("input", show);
  order.addEventListener("change", show);
  more.addEventListener("click", () => { most = Infinity; show(); });
  // on paper everything stands
  window.addEventListener("beforeprint", () => { most = Infinity; show(); });
  document.querySelector(".tools").hidden = false;
  show();
})();
