"use strict";
// The map: points from one packed array, drawn pixel by pixel; a million of them take some milliseconds a frame, with
// or without a graphics card. All text goes to the page as text.
(async () => {
  const root = document.getElementById("adq-map");
  if (!root || !("DecompressionStream" in window)) return; // the picture stays
  const data = await unpacked(document.getElementById("adq-map-data").textContent);
  const { arrays, names, counts, images } = data;
  const { x, y } = arrays;
  const n = x.length;
  const imageOf = new Map(images.map(([point, uri, near]) => [point, { uri, near }]));
  const FULL = 65535; // the largest coordinate
  const SHOWN = 12; // values of a legend
  const FALLBACK = { kept: "#0072b2", quota: "#8a9299", duplicate: "#d9730d", label: "#b5469a", bad: "#d1332e", excluded: "#8c6d46" };

  // The page's parts.
  const canvas = el("canvas", { tabIndex: 0 });
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", `Map of ${n.toLocaleString("en")} samples. Arrow keys move it, plus and minus zoom, ` +
    "0 shows all. Enter chooses the sample nearest to the middle, N and P the next and previous ones, Escape none.");
  const choice = el("select", {});
  const choices = ["kept", "reason", "bin", "class"].filter((name) => name in names && counts[name].filter(Boolean).length > 1);
  if (!choices.length) choices.push("kept");
  for (const name of choices) choice.append(el("option", { value: name, textContent: name }));
  const find = el("input", { type: "search", placeholder: "Find a key", autocomplete: "off", spellcheck: false });
  find.setAttribute("aria-label", "Find a key");
  const form = el("form", {}, find, el("button", { textContent: "Find" }));
  const legend = el("ul", { className: "map-legend" });
  const panel = el("div", { className: "map-point" });
  panel.setAttribute("role", "status");
  root.replaceChildren(
    el("div", { className: "map-bar" },
      el("label", {}, "Colour by ", choice),
      button("+", () => zoom(2), "Zoom in"), button("−", () => zoom(0.5), "Zoom out"), button("All", showAll, "Show all"),
      form),
    el("div", { className: "map-body" }, el("div", {}, canvas, legend), panel));
  const context = canvas.getContext("2d");

  // What is shown: the middle in coordinates of points, the zoom (1 shows all), the chosen point.
  let middle = [FULL / 2, FULL / 2], zoomed = 1, chosen = -1, pinned = false, only = -1, waiting = false;
  let image = null, pixels = null, ratio = 1;
  const scale = () => (zoomed * (Math.min(canvas.width, canvas.height) - 16 * ratio)) / FULL;

  // Colours: those of reasons are the page's; of bins from blue to red in the order filled; of classes by golden angle.
  function hex(name) {
    const value = getComputedStyle(root).getPropertyValue(`--${name}`).trim();
    return /^#[0-9a-f]{6}$/i.test(value) ? value : FALLBACK[name];
  }
  function colours(name) {
    return names[name].map((word, i) => {
      if (name === "kept") return hex(i ? "kept" : "quota");
      if (name === "reason") return word in FALLBACK ? hex(word) : FALLBACK.quota;
      if (name === "bin") return i ? hsl(240 - (230 * (i - 1)) / Math.max(1, names.bin.length - 2), 0.7, 0.55) : FALLBACK.quota;
      return word ? hsl((i * 137.508) % 360, 0.65, 0.45 + 0.08 * (i % 3)) : FALLBACK.quota;
    });
  }

  function draw() {
    waiting = false;
    const w = canvas.width, h = canvas.height;
    if (!w || !h) return;
    if (!image || image.width !== w || image.height !== h) {
      image = context.createImageData(w, h);
      pixels = new Uint32Array(image.data.buffer);
    }
    pixels.fill(0);
    const name = choice.value, code = arrays[name], s = scale();
    const table = Uint32Array.from(colours(name), (colour, i) => word(colour, only >= 0 && i !== only ? 0x30 : 0xff));
    const left = w / 2 - middle[0] * s, top = h / 2 + middle[1] * s;
    // Points are as large as their number on the screen allows.
    const room = Math.sqrt((w * h * zoomed * zoomed) / Math.max(1, n));
    const r = Math.max(0, Math.min(Math.round(4 * ratio), Math.round(room / 5)));
    const disc = [];
    for (let dy = -r; dy <= r; dy++) for (let dx = -r; dx <= r; dx++) if (dx * dx + dy * dy <= r * r + 1) disc.push(dy * w + dx);
    const dots = Int32Array.from(disc), nDots = dots.length;
    // Kept points come last in the arrays, so that they lie on top; with one value chosen its points do.
    for (let pass = only < 0 ? 1 : 0; pass < 2; pass++) {
      for (let i = 0; i < n; i++) {
        if (only >= 0 && (code[i] === only) !== (pass === 1)) continue;
        const px = (left + x[i] * s) | 0, py = (top - y[i] * s) | 0;
        if (px < r || py < r || px >= w - r || py >= h - r) continue;
        const at = py * w + px, colour = table[code[i]];
        if (nDots === 1) pixels[at] = colour;
        else for (let d = 0; d < nDots; d++) pixels[at + dots[d]] = colour;
      }
    }
    context.putImageData(image, 0, 0);
    if (chosen >= 0) ring(left + x[chosen] * s, top - y[chosen] * s, r);
    root.dataset.drawn = String(Number(root.dataset.drawn || 0) + 1);
  }
  function ring(px, py, r) {
    context.strokeStyle = getComputedStyle(root).color;
    context.lineWidth = 2 * ratio;
    context.beginPath();
    context.arc(px, py, r + 5 * ratio, 0, 2 * Math.PI);
    context.stroke();
  }
  function redraw() {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  }

  // Looks for the point that comes after `from` by distance from a place (or before it), as (distance, number).
  function next(place, from, down) {
    const far = (i) => (x[i] - place[0]) ** 2 + (y[i] - place[1]) ** 2;
    const limit = from < 0 ? -1 : far(from);
    let best = -1, least = down ? -1 : Infinity;
    for (let i = 0; i < n; i++) {
      const d = far(i);
      if (down ? (d < limit || (d === limit && i < from)) && d >= least : (d > limit || (d === limit && i > from)) && d < least) {
        best = i;
        least = d;
      }
    }
    return best;
  }
  function under(event) {
    const box = canvas.getBoundingClientRect(), s = scale() / ratio;
    const place = [middle[0] + (event.clientX - box.left - box.width / 2) / s, middle[1] - (event.clientY - box.top - box.height / 2) / s];
    return { place, s };
  }
  function near(event) {
    const { place, s } = under(event), i = next(place, -1, false);
    return i >= 0 && Math.hypot(x[i] - place[0], y[i] - place[1]) * s <= 14 ? i : -1;
  }

  // Says what is known of a point.
  const decoder = new TextDecoder(), ends = new Float64Array(arrays.length.length + 1);
  for (let i = 0; i < arrays.length.length; i++) ends[i + 1] = ends[i] + arrays.length[i];
  function keyOf(point) {
    let low = 0, high = arrays.named.length;
    while (low < high) {
      const half = (low + high) >> 1;
      if (arrays.named[half] < point) low = half + 1;
      else high = half;
    }
    return arrays.named[low] === point ? decoder.decode(data.keys.subarray(ends[low], ends[low + 1])) : null;
  }
  function choose(point) {
    chosen = point;
    redraw();
    panel.replaceChildren();
    if (point < 0) {
      panel.append(el("p", { className: "hint", textContent:
        "Point at a sample, or choose the map and press Enter. Drag to move; once the map is chosen the wheel zooms." }));
      return;
    }
    const rank = arrays.rank[point];
    const rows = [["key", keyOf(point) ?? "in report.parquet"], ["shard", value("shard", point)], ["class", value("class", point) || "no label"],
      ["bin", value("bin", point)], ["rank", rank === 0 ? "none" : rank === 1 ? "always kept" : (rank - 2).toLocaleString("en")],
      ["kept", value("kept", point) === "kept" ? "yes" : "no"]];
    if ("reason" in names) rows.push(["reason", value("reason", point)]);
    const list = el("dl", {});
    for (const [term, text] of rows) list.append(el("dt", { textContent: term }), el("dd", {}, el("bdi", { textContent: text })));
    panel.append(list);
    const own = imageOf.get(point);
    if (!own) return;
    panel.append(figure(own.uri, "this sample"));
    if (own.near < 0) return;
    const other = imageOf.get(own.near);
    if (other) panel.append(figure(other.uri, "nearest kept of its class"));
    panel.append(button("Go to the nearest kept", () => goTo(own.near)));
  }
  function value(name, point) {
    return names[name][arrays[name][point]];
  }
  function figure(uri, caption) {
    return el("figure", {}, el("img", { src: uri, alt: "" }), el("figcaption", { textContent: caption }));
  }
  function goTo(point) {
    middle = [x[point], y[point]];
    zoomed = Math.max(zoomed, 4);
    pinned = true;
    choose(point);
  }

  function showLegend() {
    const name = choice.value, number = counts[name], all = colours(name);
    const order = [...number.keys()].filter((i) => number[i]);
    if (name !== "bin") order.sort((a, b) => number[b] - number[a] || a - b);
    legend.replaceChildren(...order.slice(0, SHOWN).map((i) => {
      const dot = el("i", {});
      dot.style.backgroundColor = all[i];
      const item = button("", () => {
        only = only === i ? -1 : i;
        for (const other of legend.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === item && only >= 0));
        redraw();
      });
      item.setAttribute("aria-pressed", "false");
      item.append(dot, el("bdi", { textContent: names[name][i] || "no label" }), ` ${number[i].toLocaleString("en")}`);
      return el("li", {}, item);
    }));
    if (order.length > SHOWN) legend.append(el("li", { className: "hint", textContent: `and ${order.length - SHOWN} more` }));
  }

  // Moves. A zoom keeps the chosen point, or the place under the pointer, where it is.
  function zoom(factor, place) {
    const fixed = place ?? (chosen >= 0 ? [x[chosen], y[chosen]] : middle);
    const after = Math.min(4096, Math.max(0.5, zoomed * factor));
    middle = middle.map((m, axis) => fixed[axis] + ((m - fixed[axis]) * zoomed) / after);
    zoomed = after;
    redraw();
  }
  function move(dx, dy) { // in CSS pixels
    const s = scale() / ratio;
    middle = [middle[0] - dx / s, middle[1] + dy / s];
    redraw();
  }
  function showAll() {
    middle = [FULL / 2, FULL / 2];
    zoomed = 1;
    redraw();
  }
  const keys = {
    ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
    "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: showAll,
    Enter: () => pin(next(middle, -1, false)), n: () => pin(next(middle, chosen, false)), p: () => pin(next(middle, chosen, true)),
    Escape: () => pin(-1),
  };
  function pin(point) {
    pinned = point >= 0;
    choose(point);
  }
  canvas.addEventListener("keydown", (event) => {
    const act = keys[event.key] ?? keys[event.key.toLowerCase()];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey) return; // else the page could not be scrolled past the map
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 300), under(event).place);
  }, { passive: false });
  let drag = null, hover = null;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
      if (!drag.moved && Math.hypot(dx, dy) < 4) return;
      drag = { x: event.clientX, y: event.clientY, moved: true };
      move(dx, dy);
    } else if (!pinned) {
      if (!hover) requestAnimationFrame(() => {
        const point = near(hover);
        hover = null;
        if (point >= 0 && point !== chosen) choose(point);
      });
      hover = event;
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) pin(near(event));
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  choice.addEventListener("change", () => {
    only = -1;
    showLegend();
    redraw();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = new TextEncoder().encode(find.value), m = arrays.named.length;
    const start = arrays.named.findIndex((point) => point > chosen);
    for (let step = 0; wanted.length && step < m; step++) { // the next one after the chosen point, since shards may share keys
      const i = ((start < 0 ? 0 : start) + step) % m;
      if (arrays.length[i] !== wanted.length) continue;
      if (wanted.every((byte, j) => data.keys[ends[i] + j] === byte)) return goTo(arrays.named[i]);
    }
    pin(-1);
    panel.replaceChildren(el("p", { textContent: `None of ${m.toLocaleString("en")} keys is exactly this.` }));
  });
  new ResizeObserver(() => {
    ratio = Math.min(2, window.devicePixelRatio || 1);
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    draw();
  }).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { showLegend(); redraw(); });
  showLegend();
  choose(-1);

  function el(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }
  function button(text, act, label) {
    const made = el("button", { textContent: text, type: "button" });
    if (label) made.setAttribute("aria-label", label);
    made.addEventListener("click", act);
    return made;
  }
  function hsl(h, s, l) {
    const part = (k) => {
      const t = (k + h / 30) % 12;
      return Math.round(255 * (l - s * Math.min(l, 1 - l) * Math.max(-1, Math.min(t - 3, 9 - t, 1)))).toString(16).padStart(2, "0");
    };
    return `#${part(0)}${part(8)}${part(4)}`;
  }
  function word(colour, opacity) { // a pixel, on little-endian machines
    const v = parseInt(colour.slice(1), 16);
    return ((opacity << 24) | ((v & 255) << 16) | (v & 0xff00) | (v >> 16)) >>> 0;
  }
  async function unpacked(text) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    const all = await new Response(stream).arrayBuffer();
    let at = 4 + new DataView(all).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(all, 4, at - 4)));
    const arrays = {};
    for (const [name, count, size] of header.arrays) {
      const end = at + count * size;
      arrays[name] = new { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[size](all.slice(at, end));
      at = end;
    }
    return { ...header, arrays, keys: new Uint8Array(all, at) };
  }
})();
