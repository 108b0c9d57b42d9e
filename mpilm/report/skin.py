"""How a report looks, and its few lines of script: sorting, and picking out a run."""

STYLE = """
:root { color-scheme: light; --ink: #20242b; --soft: #5a606a; --line: #e1e4e8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 10px; } h3 { font-size: 15px; margin: 18px 0 6px; }
.lead, .note { color: var(--soft); margin: 4px 0 14px; }
.note { font-size: 13px; margin: 8px 0 0; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 18px 20px; margin: 16px 0; }
.scroll { overflow: auto; max-height: 85vh; border: 1px solid var(--line);
  border-radius: 6px; }
.to-right { mask-image: linear-gradient(to left, transparent, #000 42px); }
.to-below { mask-image: linear-gradient(to top, transparent, #000 42px); }
.to-right.to-below { mask-composite: intersect; mask-image:
  linear-gradient(to left, transparent, #000 42px),
  linear-gradient(to top, transparent, #000 42px); }
table { border-collapse: separate; border-spacing: 0;
  font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 12px 5px 6px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); background: #fff; }
thead th { position: sticky; top: 0; z-index: 2; vertical-align: bottom;
  border-bottom: 2px solid var(--ink); white-space: normal; min-width: 64px; }
th:first-child { position: sticky; left: 0; z-index: 1; text-align: left;
  border-right: 1px solid var(--line); max-width: 46vw; overflow-wrap: anywhere;
  white-space: normal; min-width: min(270px, 40vw); }
thead th:first-child { z-index: 3; }
tbody th { font-weight: 500; }
td.word { text-align: left; max-width: 340px; white-space: normal; }
tr.group th { background: #f4f5f7; font-weight: 700; }
tr.group td { background: #f4f5f7; }
thead button { all: unset; cursor: pointer; font-weight: 600; }
thead button:focus-visible { outline: 2px solid #0072b2; }
[aria-sort=ascending] button::after { content: " \\25b4"; }
[aria-sort=descending] button::after { content: " \\25be"; }
.best { font-weight: 700; } .slow { color: #b3261e; font-weight: 700; }
.tag { display: inline-block; font-size: 11px; font-weight: 600; border-radius: 4px;
  padding: 0 6px; background: #fff1d6; color: #7a4b00; margin-left: 6px; }
.key { display: inline-block; width: 30px; height: 10px; margin-right: 6px; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px;
  margin: 0 0 10px; padding: 0; list-style: none; }
.keys li { overflow-wrap: anywhere; }
.charts { display: grid; gap: 14px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; max-width: 700px; }
svg text { font-size: 11px; fill: #3b4048; } svg .name { fill: var(--soft); }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .grid { stroke: #e6e8eb; } svg .axis { stroke: #8a8f98; }
svg .level { stroke: #8a8f98; stroke-dasharray: 1 3; } svg .bar { stroke-width: 1.5; }
svg.narrow { display: none; }
.picking [data-run] { opacity: 0.12; } .picking [data-run].picked { opacity: 1; }
.picking [data-run].picked polyline { stroke-width: 2.6; }
.picking :is(tr, li)[data-run] { opacity: 1; }
.picking tr.picked > * { background: #eef5fb; }
tr[data-run], li[data-run] { cursor: pointer; }
pre { background: #f7f8fa; border-radius: 6px; padding: 12px; overflow-x: auto;
  font-size: 13px; line-height: 1.4; }
summary { cursor: pointer; padding: 4px 0; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  .keys { max-height: 130px; overflow: auto; }
  main { padding: 14px 8px 40px; } section { padding: 12px 10px; }
  svg.wide { display: none; } svg.narrow { display: block; }
}
@media print {
  body { background: #fff; font-size: 11px; } main { max-width: none; padding: 0; }
  section { border: 0; padding: 6px 0; } figure, tr { break-inside: avoid; }
  .scroll { max-height: none; overflow: visible; border: 0; }
  .scroll, .keys { mask-image: none !important; }
  table { font-size: 8px; } th, td { padding: 2px 4px; position: static !important; }
  td, th { white-space: normal; min-width: 0 !important; }
  .charts { grid-template-columns: 1fr 1fr; }
}
"""

# a click on a heading sorts, on the first one brings back the groups; a click on a run
# picks it out in all charts, another one lets it go; what goes on beyond the edge of a
# box that scrolls fades out there
SCRIPT = """
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], first = [...body.rows];
  for (const head of table.tHead.rows[0].cells) head.onclick = () => {
    const at = head.cellIndex, up = head.getAttribute("aria-sort") === "descending";
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    for (const row of first) { row.hidden = at > 0 && row.className === "group";
      body.append(row); }
    if (at === 0) return;
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = first.filter(row => row.className !== "group");
    const worth = row => row.cells[at].dataset.v ?? row.cells[at].textContent;
    const compare = (a, b) => {
      const [v, w] = [worth(a), worth(b)], [x, y] = [Number(v), Number(w)];
      if (v === "" || w === "") return (v === "") - (w === "");
      const c = isNaN(x) || isNaN(y) ? v.localeCompare(w) : x - y;
      return up ? c : -c;
    };
    body.append(...rows.sort(compare));
  };
}
let kept = null;
const pick = run => {
  document.body.classList.toggle("picking", run !== null);
  for (const one of document.querySelectorAll("[data-run]"))
    one.classList.toggle("picked", one.dataset.run === run);
};
for (const one of document.querySelectorAll("tr[data-run], li[data-run]")) {
  one.onmouseenter = () => pick(one.dataset.run);
  one.onmouseleave = () => pick(kept);
  one.onclick = () => {
    kept = kept === one.dataset.run ? null : one.dataset.run; pick(kept);
  };
}
for (const box of document.querySelectorAll(".scroll, .keys")) {
  const fade = () => {
    const right = box.scrollWidth - box.clientWidth - box.scrollLeft;
    const below = box.scrollHeight - box.clientHeight - box.scrollTop;
    box.classList.toggle("to-right", right > 2);
    box.classList.toggle("to-below", below > 2);
  };
  box.addEventListener("scroll", fade);
  new ResizeObserver(fade).observe(box);
  fade();
}
for (const box of document.querySelectorAll("details"))
  addEventListener("beforeprint", () => { if (box.dataset.print) box.open = true; });
"""
