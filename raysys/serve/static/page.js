"use strict";

// The order of the stages, with what a person calls them.
const STAGES = { retrieve: "retrieval", learned: "learned from feedback", early: "early ranking", rank: "final ranking" };
const MAX_CHIPS = 20;

const byId = (id) => document.getElementById(id);
let userKeysAreNumbers = true;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function call(path, body) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (byId("key").value) headers["X-API-Key"] = byId("key").value;
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const content = await answer.json();
  if (answer.status === 401) byId("key-label").hidden = false;
  if (!answer.ok) throw new Error(`${answer.status}: ${content.error ?? content.detail ?? answer.statusText}`);
  return content;
}

async function attempt(work) {
  byId("problem").hidden = true;
  try {
    await work();
  } catch (error) {
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
}

async function start() {
  const { versions } = await call("/v1/models");
  byId("versions").textContent = versions
    .map((one) => `${one.version}: ${one.shadow ? "shadow" : `${Math.round(100 * one.share)} % of the users`}`)
    .join(", ");
  const found = await call("/v1/users?count=200");
  const keys = found.rows.map((row) => row[found.key]);
  userKeysAreNumbers = keys.every((key) => typeof key === "number");
  byId("users").replaceChildren(...keys.map((key) => element("option", { value: key })));
  if (!byId("user").value && keys.length) byId("user").value = keys[0];
}

async function recommend() {
  const text = byId("user").value.trim();
  const context = byId("context").value.trim();
  const answer = await call("/v1/recommend", {
    user: userKeysAreNumbers ? Number(text) : text,
    count: Number(byId("count").value),
    context: context ? JSON.parse(context) : {},
    explain: true,
  });
  const user = await call(`/v1/users/${encodeURIComponent(text)}`);
  const histories = user.rows.length ? user.item_columns.map((name) => [name, user.rows[0][name] ?? []]) : [];
  const wanted = new Set(histories.flatMap(([, items]) => items.slice(-MAX_CHIPS)));
  for (const list of [answer.items, answer.explored, ...answer.stages.map((stage) => stage.items)])
    for (const { item } of list) wanted.add(item);
  const titles = await readTitles(answer.version, [...wanted]);
  showHistory(user, histories, titles);
  showItems(answer, titles);
  showStages(answer);
  showCandidates(answer, titles);
  byId("result").hidden = false;
}

async function readTitles(version, items) {
  const titles = new Map();
  for (let from = 0; from < items.length; from += 1000) {
    const found = await call("/v1/items", { version, items: items.slice(from, from + 1000) });
    for (const row of found.rows) titles.set(row[found.key], row.title ?? row.name ?? `item ${row[found.key]}`);
  }
  return titles;
}

function showHistory(user, histories, titles) {
  if (!user.rows.length) {
    byId("history").replaceChildren(element("p", { className: "muted", textContent: "Nothing is known of this user." }));
    return;
  }
  const parts = histories.map(([name, items]) => [
    element("h3", { textContent: `${name} (${items.length})` }),
    element("div", { className: "chips" },
      ...items.slice(-MAX_CHIPS).reverse().map((item) => element("span", { className: "chip", textContent: titles.get(item) }))),
  ]);
  const facts = Object.entries(user.rows[0]).filter(([, value]) => !Array.isArray(value) && value !== null);
  const line = facts.map(([name, value]) => `${name} ${typeof value === "number" ? round(value) : value}`).join(" · ");
  byId("history").replaceChildren(element("p", { className: "muted", textContent: line }), ...parts.flat());
}

function showItems(answer, titles) {
  const seconds = answer.stages.map((stage) => `${STAGES[stage.stage]} ${stage.milliseconds.toFixed(1)} ms`).join(", ");
  byId("summary").textContent =
    `release ${answer.version}, ${seconds}${answer.complete ? "" : "; there was no time for all of it"}, request ${answer.request_id}`;
  byId("items").replaceChildren(...answer.items.map((item) => card(item, titles)));
  byId("explored").replaceChildren(...answer.explored.map((item) => card(item, titles)));
  byId("explored-part").hidden = !answer.explored.length;
}

function card(item, titles) {
  const predictions = Object.entries(item.predictions).map(([task, value]) => `${task} ${round(value)}`);
  const row = element("div", { className: "card" },
    element("span", { className: "name", textContent: titles.get(item.item) }),
    element("span", { className: "numbers", textContent: predictions.join(", ") || `bound ${round(item.score)}` }));
  if (item.impression) {
    for (const [label, reward] of [["I like it", 1], ["Not for me", 0]]) {
      const button = element("button", { type: "button", textContent: label });
      button.addEventListener("click", () => attempt(() => sendFeedback(row, item.impression, reward)));
      row.append(button);
    }
  }
  return element("li", {}, row);
}

async function sendFeedback(row, impression, reward) {
  await call("/v1/feedback", { rewards: [{ impression, reward }] });
  for (const button of row.querySelectorAll("button")) button.remove();
  row.append(element("span", { className: "sent", textContent: "noted" }));
}

function showStages(answer) {
  fill("stages", ["stage", "scored", "went on", "ms"],
    answer.stages.map((stage) => ({
      cells: [STAGES[stage.stage], stage.items.length, stage.left, stage.milliseconds.toFixed(1)],
    })));
}

// One row a candidate: its rank and score in each stage, and where it fell out.
function showCandidates(answer, titles) {
  const rows = new Map();
  for (const stage of answer.stages)
    stage.items.forEach((item, place) => {
      if (!rows.has(item.item)) rows.set(item.item, {});
      rows.get(item.item)[stage.stage] = { rank: place + 1, score: item.score, left: stage.left };
    });
  const names = answer.stages.map((stage) => stage.stage);
  const shown = new Map(answer.items.map((item, place) => [item.item, place + 1]));
  const explored = new Set(answer.explored.map((item) => item.item));
  const order = [...rows.entries()].sort((a, b) => depth(b, names, shown) - depth(a, names, shown) || last(a, names) - last(b, names));
  fill("candidates", ["item", ...names.map((name) => STAGES[name]), "what became of it"],
    order.map(([item, found]) => ({
      className: shown.has(item) ? "shown" : "out",
      cells: [titles.get(item),
        ...names.map((name) => (found[name] ? `${round(found[name].score)} (${found[name].rank})` : "")),
        shown.has(item) ? `shown at place ${shown.get(item)}` : reason(found, names) + (explored.has(item) ? ", explored" : "")],
    })));
}

const depth = ([item, found], names, shown) => (shown.has(item) ? names.length : names.findLastIndex((name) => found[name]));
const last = ([, found], names) => found[names.findLast((name) => found[name])].rank;

function reason(found, names) {
  const name = names.findLast((one) => found[one]);
  const { rank, left } = found[name];
  if (rank <= left) return `no time for it after ${STAGES[name]}`;
  return `fell out in ${STAGES[name]}: place ${rank}, ${left} ${name === "rank" ? "are shown" : "went on"}`;
}

function fill(id, head, rows) {
  const numeric = (cell) => typeof cell === "number" || /^-?[\d.]+( \(\d+\))?$/.test(cell);
  const table = byId(id);
  table.tHead.replaceChildren(element("tr", {}, ...head.map((name) => element("th", { textContent: name }))));
  table.tBodies[0].replaceChildren(...rows.map(({ className = "", cells }) =>
    element("tr", { className }, ...cells.map((cell) =>
      element("td", { textContent: cell, className: numeric(cell) ? "number" : "" })))));
}

function round(value) {
  return Number.isInteger(value) ? String(value) : value.toPrecision(3);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(recommend);
});
byId("key").addEventListener("change", () => attempt(start));
attempt(start);
