// SPDX-License-Identifier: Apache-2.0
// A click on a heading sorts the table by that column; what is folded is printed too.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const column = [...heading.parentNode.children].indexOf(heading);
    const descending = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = heading.closest("table").tBodies[0];
    const key = (row) => row.children[column].dataset.value;
    const rows = [...body.rows].sort((a, b) =>
      key(a) === "" || key(b) === "" ? (key(a) === "") - (key(b) === "")
        : (key(a) - key(b)) * (descending ? -1 : 1));
    body.append(...rows);
  });
}
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});
