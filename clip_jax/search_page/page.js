"use strict";
// Results come as JSON and are put into the page as text, never as HTML.
const byId = (id) => document.getElementById(id);
const create = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
let chosen = null; // the image to name: {row} or {file}
let hasImages = true;
let latestSearch = 0; // of two searches the later one's answer stays

async function request(address, options) {
  const response = await fetch(address, options);
  const answer = await response.json().catch(() => ({ error: `the server said ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function setStatus(id, text, isWrong = false) {
  byId(id).textContent = text;
  byId(id).classList.toggle("wrong", isWrong);
}

async function search(address, options, what) {
  const number = ++latestSearch;
  setStatus("status", "Searching…");
  try {
    const start = performance.now();
    const { hits } = await request(address, options);
    if (number !== latestSearch) return;
    const took = Math.round(performance.now() - start);
    byId("hits").replaceChildren(...hits.map(hitItem));
    setStatus("status", `${hits.length} nearest to ${what}, in ${took} ms`);
  } catch (error) {
    if (number === latestSearch) setStatus("status", error.message, true);
  }
}

function hitItem(hit) {
  const item = create("li", "hit");
  const frame = create("div", "frame", hasImages ? undefined : "no image");
  if (hasImages) {
    const image = create("img");
    image.alt = hit.caption || hit.path;
    image.src = `/thumbnails/${hit.row}`;
    image.addEventListener("error", () => frame.replaceChildren("no image"));
    frame.append(image);
  }
  const caption = create("div", "caption", hit.caption || hit.path);
  caption.title = hit.path;
  const like = create("button", "small", "more like it");
  like.type = "button";
  like.addEventListener("click", () =>
    search(`/search?row=${hit.row}`, {}, `“${hit.caption || hit.path}”`));
  const name = create("button", "small", "name it");
  name.type = "button";
  name.addEventListener("click", () => {
    choose({ row: hit.row }, hasImages ? `/thumbnails/${hit.row}` : "", hit.caption || hit.path);
    byId("labels").focus();
  });
  item.append(frame, caption, create("div", "score", hit.score === null ? "" : hit.score.toFixed(4)), like, name);
  return item;
}

function choose(what, source, alt) {
  chosen = what;
  const image = create("img");
  image.alt = alt;
  image.src = source;
  byId("shown").replaceChildren(source ? image : create("p", "", alt));
  byId("bars").replaceChildren();
  setStatus("name-status", "");
}

async function classify(event) {
  event.preventDefault();
  if (!chosen) return setStatus("name-status", "Choose an image first.", true);
  const labels = byId("labels").value.split("\n").map((s) => s.trim()).filter(Boolean);
  const query = new URLSearchParams(labels.map((label) => ["label", label]));
  query.set("template", byId("template").value);
  if ("row" in chosen) query.set("row", chosen.row);
  setStatus("name-status", "Naming…");
  try {
    const options = { method: "POST", body: chosen.file };
    const { probabilities } = await request(`/classify?${query}`, options);
    const order = labels.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
    byId("bars").replaceChildren(...order.map((i) => barItem(labels[i], probabilities[i])));
    setStatus("name-status", `Most likely: ${labels[order[0]]}`);
  } catch (error) {
    setStatus("name-status", error.message, true);
  }
}

function barItem(label, probability) {
  const item = create("li", "bar");
  const percent = 100 * probability;
  const track = create("div", "track");
  const fill = create("div", "fill");
  fill.style.width = `${percent}%`;
  track.setAttribute("aria-hidden", "true");
  track.append(fill);
  item.append(create("b", "", label), track, create("span", "probability", `${percent.toFixed(1)} %`));
  return item;
}

async function start() {
  byId("find").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = byId("words").value;
    search(`/search?${new URLSearchParams({ words })}`, {}, `“${words}”`);
  });
  byId("by-image").addEventListener("change", (event) => {
    const file = event.target.files[0];
    if (file) search("/search", { method: "POST", body: file }, `“${file.name}”`);
  });
  byId("image").addEventListener("change", (event) => {
    const file = event.target.files[0];
    if (file) choose({ file }, URL.createObjectURL(file), file.name);
  });
  byId("name").addEventListener("submit", classify);
  const about = await request("/about");
  hasImages = !about.no_images;
  byId("template").value = about.template;
  byId("about").textContent = `${about.count.toLocaleString("en")} images by ${about.model}, ` +
    `${about.method} search${about.no_images ? `; no images: ${about.no_images}` : ""}`;
}

start().catch((error) => setStatus("status", error.message, true));
