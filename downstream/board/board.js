"use strict";
// Sorting by a click on a heading, and filters over all tables. Ranks and places stay those of the whole board.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const falling = heading.getAttribute("aria-sort") === "descending" ||
        (heading.getAttribute("aria-sort") === null && heading.dataset.first === "rising");
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falling ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.key;
      const compare = (one, two) => {
        const [a, b] = [key(one), key(two)];
        if (a === "" || b === "") return (a === "") - (b === ""); // what is not known stays last
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return falling ? order : -order;
      };
      [...body.rows].sort(compare).forEach((row) => body.append(row));
    });
  });
}
const filters = document.querySelector("#filters");
function apply() {
  const words = filters.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const most = { ms: filters.elements.ms.value, parameters: filters.elements.parameters.value };
  const rows = [...document.querySelectorAll("tbody tr")];
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const allowed = !filters.elements.commercial.checked || ["yes", "with conditions"].includes(row.dataset.product);
    const small = Object.entries(most).every(([name, limit]) =>
      limit === "" || (row.dataset[name] !== "" && Number(row.dataset[name]) <= Number(limit)));
    row.hidden = !(allowed && small && words.every((word) => text.includes(word)));
    shown += !row.hidden;
  }
  document.querySelector("#shown").textContent = `${shown} of ${rows.length} lines`;
}
filters.addEventListener("input", apply);
filters.addEventListener("submit", (event) => event.preventDefault());
filters.addEventListener("reset", () => setTimeout(apply));
apply();
