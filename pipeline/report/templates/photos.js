// The gallery of photos: filters, sorts and pages through them, and shows one at a time in a dialog.
// Names are only ever set as text or attributes, never as HTML. Only the pictures of one page are in the document.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("photo-data").textContent);
  const PER_PAGE = 60;
  const get = (id) => document.getElementById(id);
  const list = get("photo-list"), viewer = get("photo-viewer"), frame = get("viewer-frame"), slider = get("viewer-slider");
  const total = data.id.length;
  const conflicts = data.id.map((_, n) => data.missing[n].length + data.untagged[n].length);
  const doubt = data.id.map((_, n) => conflicts[n] + (data.uncertainty[n] ?? 0) / 1000);
  const covered = data.shares.map((shares) => shares.reduce((sum, [, share]) => sum + share, 0));
  const collator = new Intl.Collator(undefined, { numeric: true });
  const byName = (a, b) => collator.compare(data.id[a], data.id[b]) || a - b;
  const ORDERS = {
    doubt: (a, b) => doubt[b] - doubt[a] || a - b,
    sure: (a, b) => doubt[a] - doubt[b] || a - b,
    large: (a, b) => covered[b] - covered[a] || a - b,
    small: (a, b) => covered[a] - covered[b] || a - b,
    name: byName,
  };
  const SHOWN = {
    "": () => true,
    contradicted: (n) => conflicts[n] > 0,
    negative: (n) => data.tags[n] !== null && data.tags[n].length === 0,
    train: (n) => data.train[n] === 1,
    evaluation: (n) => data.train[n] === 0,
    label: (n) => data.label[n] === 1,
  };
  let chosen = [];  // numbers of the photos that pass the filters, in order
  let page = 0;
  let current = -1;  // position in ``chosen`` of the photo in the viewer
  let strength = 60, split = 50;  // percent: opacity of the masks, and where 'before' ends

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const picture = (kind, name, suffix) => `${data.folder}/${kind}/${name}.${suffix}`;
  const percent = (thousandths) => `${(thousandths / 10).toFixed(thousandths < 100 ? 1 : 0)} %`;
  const className = (id) => data.classes[id][0];
  const chip = (id, text, kind) => {
    const swatch = element("i");
    swatch.style.background = data.classes[id][1];
    return element("li", { class: kind }, swatch, text);
  };
  const maskText = (n) => {
    const parts = data.shares[n].map(([id, share]) => `${className(id)} ${percent(share)}`);
    return `mask of ${data.id[n]}: ${parts.join(", ") || "background only"}`;
  };

  function chips(n, withShares) {
    const shares = new Map(data.shares[n]);
    const ids = [...new Set([...(data.tags[n] ?? []), ...shares.keys()])];
    ids.sort((a, b) => (shares.get(b) ?? 0) - (shares.get(a) ?? 0));
    const items = ids.map((id) => {
      const share = withShares && shares.has(id) ? ` ${percent(shares.get(id))}` : "";
      if (data.missing[n].includes(id)) return chip(id, `${className(id)}: missing`, "wrong");
      if (data.untagged[n].includes(id)) return chip(id, `${className(id)}: no tag${withShares ? "," : ""}${share}`, "wrong");
      return chip(id, className(id) + share, "");
    });
    return element("ul", { class: "tags" }, ...(items.length ? items : [element("li", {}, "background only")]));
  }

  function tile(position) {
    const n = chosen[position];
    const size = { width: data.width[n], height: data.height[n], loading: "lazy", decoding: "async" };
    const pictures = element("span", { class: "pictures" },
      element("img", { src: picture("thumbs", data.photo[n], "jpg"), alt: `photo ${data.id[n]}`, ...size }),
      element("img", { src: picture("masks", data.mask[n], "png"), alt: maskText(n), class: "mask", ...size }));
    const unsure = data.uncertainty[n];
    const meter = element("span", { class: "unsure" });
    if (unsure === null) meter.append("pseudo label");
    else {
      const bar = element("span", { class: "meter", "aria-hidden": "true" }, element("span"));
      bar.firstChild.style.width = `${unsure / 10}%`;
      meter.append(bar, `${percent(unsure)} unsure`);
    }
    const button = element("button", { type: "button", class: "tile", "data-position": position },
      pictures, element("span", { class: "name" }, data.id[n]), meter);
    return element("li", { class: conflicts[n] ? "contradicted" : "" }, button, chips(n, false));
  }

  const pages = () => Math.max(1, Math.ceil(chosen.length / PER_PAGE));

  function showPage(number) {
    page = Math.min(Math.max(0, number), pages() - 1);
    const first = page * PER_PAGE, last = Math.min(first + PER_PAGE, chosen.length);
    list.replaceChildren(...Array.from({ length: last - first }, (_, k) => tile(first + k)));
    const range = chosen.length > PER_PAGE ? `, ${first + 1} to ${last} on this page` : "";
    get("photo-count").textContent = `${chosen.length} of ${total} photos${range}`;
    get("photo-pages").hidden = pages() === 1;
    get("photo-back").disabled = page === 0;
    get("photo-forward").disabled = page === pages() - 1;
    const select = get("photo-page");
    if (select.options.length !== pages())
      select.replaceChildren(...Array.from({ length: pages() }, (_, k) => new Option(`${k + 1} of ${pages()}`, k)));
    select.value = page;
  }

  function update() {
    const id = Number(get("photo-class").value), shown = SHOWN[get("photo-show").value];
    const part = get("photo-name").value.trim().toLowerCase();
    chosen = [];
    for (let n = 0; n < total; n++) {
      const has = !id || data.tags[n]?.includes(id) || data.shares[n].some(([other]) => other === id);
      if (has && shown(n) && data.id[n].toLowerCase().includes(part)) chosen.push(n);
    }
    chosen.sort(ORDERS[get("photo-sort").value]);
    showPage(0);
  }

  function applySlider() {
    const compare = get("viewer-compare").checked, mask = get("viewer-mask");
    get("viewer-slider-text").textContent = compare ? "Photo alone, from the left" : "Opacity of the mask";
    slider.value = compare ? split : strength;
    slider.setAttribute("aria-valuetext", `${slider.value} %`);
    mask.style.opacity = compare ? 1 : strength / 100;
    mask.style.clipPath = compare ? `inset(0 0 0 ${split}%)` : "";
    get("viewer-divider").hidden = !compare;
    get("viewer-divider").style.left = `${split}%`;
    list.style.setProperty("--strength", strength / 100);
    get("photo-strength").value = strength;
  }

  function slide(value) {
    const bounded = Math.min(100, Math.max(0, value));
    if (get("viewer-compare").checked) split = bounded; else strength = bounded;
    applySlider();
  }

  function show(position) {
    if (!chosen.length) return;
    current = Math.min(Math.max(0, position), chosen.length - 1);
    const n = chosen[current];
    frame.style.setProperty("--ratio", data.width[n] / data.height[n]);
    const photo = get("viewer-photo"), mask = get("viewer-mask"), unsure = get("viewer-doubt");
    photo.src = picture("photos", data.photo[n], "jpg");
    photo.alt = `photo ${data.id[n]}`;
    mask.src = picture("masks", data.mask[n], "png");
    mask.alt = maskText(n);
    const has = data.doubt[n] !== null, toggle = get("viewer-unsure");
    toggle.disabled = !has;
    unsure.hidden = !(has && toggle.checked);
    if (has) unsure.src = picture("doubt", data.doubt[n], "png"); else unsure.removeAttribute("src");
    unsure.alt = has ? `where the network is unsure of ${data.id[n]}` : "";
    get("viewer-title").textContent = data.id[n];
    get("viewer-place").textContent = `${current + 1} of ${chosen.length}`;
    get("viewer-back").disabled = current === 0;
    get("viewer-next").disabled = current === chosen.length - 1;
    const tags = data.tags[n] === null ? "not known" : data.tags[n].map(className).join(", ") || "none";
    const rows = [["Tags", tags], ["Unsure", data.uncertainty[n] === null ? "–" : percent(data.uncertainty[n])],
      ["Mask", data.label[n] ? "pseudo label" : "prediction"], ["Split", data.train[n] ? "training" : "evaluation"]];
    get("viewer-facts").replaceChildren(chips(n, true),
      element("dl", {}, ...rows.flatMap(([term, text]) => [element("dt", {}, term), element("dd", {}, text)])));
    applySlider();
    const next = chosen[current + 1];
    if (next !== undefined) new Image().src = picture("photos", data.photo[next], "jpg");
  }

  function open(position) {
    show(position);
    viewer.showModal();
    frame.focus();
  }

  function toggle(id) {
    const box = get(id);
    if (box.disabled) return;
    box.checked = !box.checked;
    box.dispatchEvent(new Event("change"));
  }

  const KEYS = {
    ArrowLeft: () => show(current - 1),
    ArrowRight: () => show(current + 1),
    Home: () => show(0),
    End: () => show(chosen.length - 1),
    ArrowUp: () => slide(Number(slider.value) + 10),
    ArrowDown: () => slide(Number(slider.value) - 10),
    b: () => toggle("viewer-compare"),
    u: () => toggle("viewer-unsure"),
  };
  for (let digit = 0; digit < 10; digit++) KEYS[digit] = () => slide(Math.round((100 * digit) / 9));

  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action || (event.target === slider && event.key.length > 1)) return;  // the slider has its own arrow keys
    event.preventDefault();
    action();
  });
  viewer.addEventListener("close", () => {
    showPage(Math.floor(current / PER_PAGE));
    list.querySelector(`[data-position="${current}"]`)?.focus();
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  slider.addEventListener("input", () => slide(Number(slider.value)));
  slider.addEventListener("pointerup", () => frame.focus());  // so that the arrows lead to the next photo again
  get("viewer-compare").addEventListener("change", applySlider);
  get("viewer-unsure").addEventListener("change", () => show(current));
  get("viewer-close").addEventListener("click", () => viewer.close());
  get("viewer-back").addEventListener("click", () => show(current - 1));
  get("viewer-next").addEventListener("click", () => show(current + 1));
  const drag = (event) => {
    if (!event.buttons || !get("viewer-compare").checked) return;
    const box = frame.getBoundingClientRect();
    slide(Math.round((100 * (event.clientX - box.left)) / box.width));
  };
  frame.addEventListener("pointerdown", drag);
  frame.addEventListener("pointermove", drag);
  frame.addEventListener("dragstart", (event) => event.preventDefault());
  list.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) open(Number(button.dataset.position));
  });
  get("photo-strength").addEventListener("input", (event) => { strength = Number(event.target.value); applySlider(); });
  for (const id of ["photo-class", "photo-show", "photo-sort"]) get(id).addEventListener("change", update);
  get("photo-name").addEventListener("input", update);
  get("photo-controls").addEventListener("submit", (event) => event.preventDefault());
  const turn = (number) => { showPage(number); get("photos").scrollIntoView(); };
  get("photo-back").addEventListener("click", () => turn(page - 1));
  get("photo-forward").addEventListener("click", () => turn(page + 1));
  get("photo-page").addEventListener("change", (event) => turn(Number(event.target.value)));
  get("photo-controls").reset();  // a reload keeps what was chosen, which the list would contradict
  update();
  applySlider();
})();
