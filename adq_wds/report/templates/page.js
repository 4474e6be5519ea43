"use strict";
// Tables sort by a click on a column's head; a picture opens large.
for (const head of document.querySelectorAll("thead th:not(.wide)")) {
  const table = head.closest("table");
  if (table.querySelector(".rest") || table.tBodies[0].rows.length < 3) continue;
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[head.cellIndex].textContent.trim();
    const number = (text) => parseFloat(text.replace(/[,\s]/g, "").replace("<", ""));
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)], [m, n] = [number(x), number(y)];
      return (Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  });
}
const dialog = document.createElement("dialog");
dialog.setAttribute("aria-label", "Picture");
const large = document.createElement("img"), text = document.createElement("p"), close = document.createElement("button");
close.textContent = "Close";
close.addEventListener("click", () => dialog.close());
dialog.append(large, text, close);
document.body.append(dialog);
const open = (image) => {
  large.src = image.src;
  large.alt = "";
  text.textContent = image.alt;
  dialog.showModal();
};
for (const image of document.querySelectorAll(".pic img")) {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => open(image));
  image.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open(image);
    }
  });
}
