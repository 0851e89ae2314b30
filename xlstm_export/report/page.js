"use strict";
// Headings of tables become buttons that sort; without this script the tables are as they are.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.title = head.title;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent;
      };
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (typeof x === "number" && typeof y === "number") return x < y ? -1 : x > y ? 1 : 0;
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // what is missing comes last
        return String(x).localeCompare(String(y), "en", { numeric: true });
      };
      const rows = [...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a)));
      body.append(...rows);
    });
  });
}
document.documentElement.dataset.sortable = "yes";
// Folded tables are printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
