"use strict";
(() => {
  const answers = JSON.parse(document.getElementById("answers").textContent);
  const names = Object.keys(answers);
  const form = document.getElementById("filters");
  const list = document.getElementById("rows");
  const more = document.getElementById("more");
  const count = document.getElementById("count");
  const STEP = 12;
  let found = [];
  let shown = 0;

  // Everything that comes from data becomes text, never markup.
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const fill = (select, options) => {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      return option;
    }));
  };

  const data = () => answers[form.elements.run.value];
  const last = (row) => row.h[row.h.length - 1];
  const slot = (row) => (row.a ? row.a.indexOf(Math.max(...row.a)) : -1);
  const named = (index) => `${index + 1} ${data().tasks[index] ?? "slot"}`;
  const score = (value) => (value === null ? "no score" : String(value));

  const attention = (row) => {
    const bars = element("div", "attention");
    const order = row.a.map((share, index) => [share, index]).sort((a, b) => b[0] - a[0]);
    for (const [share, index] of order.filter(([value]) => value > 0).slice(0, 5)) {
      const line = element("div");
      const bar = element("span", "bar");
      bar.style.width = `${share}%`;
      line.append(element("span", "name", named(index)), element("span", "track"), element("span", "share", `${share}%`));
      line.children[1].append(bar);
      bars.append(line);
    }
    return bars;
  };

  const card = (row) => {
    const [, answer, points] = last(row);
    const made = element("article", points === 100 ? "right" : points > 0 ? "partly" : "wrong");
    const head = element("p", "head", named(row.t));
    head.append(element("span", "points", score(points)));
    const facts = element("dl");
    const fact = (what, ...values) => {
      facts.append(element("dt", "", what));
      values.forEach((value) => facts.append(value instanceof Node ? value : element("dd", "", value)));
    };
    fact("input", row.i);
    fact("answer", answer === "" ? "(nothing)" : answer);
    fact(row.r.length > 1 ? "references" : "reference", ...row.r);
    if (row.a) {
      const holder = element("dd");
      holder.append(attention(row));
      fact("attention", holder);
    }
    made.append(head, facts);
    if (row.h.length > 1) {
      const steps = element("details");
      steps.append(element("summary", "", `changed ${row.h.length - 1} time${row.h.length > 2 ? "s" : ""}`));
      const story = element("ol");
      for (const [stage, text, value] of row.h) {
        const step = element("li", "", text === "" ? "(nothing)" : text);
        step.prepend(element("span", "stage", `after ${named(stage)}: `));
        step.append(element("span", "points", score(value)));
        story.append(step);
      }
      steps.append(story);
      made.append(steps);
    } else {
      made.append(element("p", "same", "the same answer ever since it was learned"));
    }
    return made;
  };

  const showMore = () => {
    list.append(...found.slice(shown, shown + STEP).map(card));
    shown = Math.min(shown + STEP, found.length);
    more.hidden = shown >= found.length;
    more.textContent = `Show more (${found.length - shown} left)`;
  };

  const filter = () => {
    const { task, score: wanted, slot: chosen, text } = form.elements;
    const words = text.value.trim().toLowerCase();
    const kinds = { all: () => true, right: (x) => x === 100, partly: (x) => x > 0 && x < 100, wrong: (x) => x === 0 };
    found = data().rows.filter((row) =>
      (task.value === "all" || row.t === Number(task.value)) &&
      kinds[wanted.value](last(row)[2]) &&
      (chosen.value === "all" || slot(row) === Number(chosen.value)) &&
      (!words || [row.i, last(row)[1], ...row.r].some((part) => part.toLowerCase().includes(words))));
    const { shown: kept, of } = data();
    const part = kept < of ? ` The page holds ${kept} of the run's ${of} last answers, spread evenly over each test set.` : "";
    count.textContent = kept ? `${found.length} answers match.${part}` : "This run has left no predictions.";
    shown = 0;
    list.replaceChildren();
    showMore();
  };

  const choose = () => {
    const { tasks, rows } = data();
    fill(form.elements.task, [["all", "all"], ...tasks.map((_, index) => [index, named(index)])]);
    const slots = [...new Set(rows.map(slot))].filter((index) => index >= 0).sort((a, b) => a - b);
    fill(form.elements.slot, [["all", "on any slot"], ...slots.map((index) => [index, named(index)])]);
    form.elements.slot.disabled = !slots.length;
    filter();
  };

  more.addEventListener("click", showMore);
  form.addEventListener("submit", (event) => event.preventDefault());
  if (names.length) {
    fill(form.elements.run, names.map((name) => [name, name]));
    document.getElementById("of-run").hidden = names.length < 2;
    form.hidden = false;
    form.elements.run.addEventListener("change", choose);
    for (const name of ["task", "score", "slot"]) form.elements[name].addEventListener("change", filter);
    form.elements.text.addEventListener("input", filter);
    choose();
  } else {
    count.textContent = "There are no predictions.";
  }

  // A link into a folded part, and paper, need it open.
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    target?.querySelectorAll?.("details.run").forEach((part) => { part.open = true; });
  };
  addEventListener("hashchange", open);
  addEventListener("beforeprint", () => document.querySelectorAll("details.run").forEach((part) => { part.open = true; }));
  open();
})();
