"use strict";
// Draws the figures from the specifications and tables that the page brings along.
(() => {
  const choices = JSON.parse(document.getElementById("filter-choices").textContent);
  const figures = [...document.querySelectorAll("figure")].map((element) => ({ element, view: null, drawing: null }));
  const filters = { hidden: new Set(), capacity: "", layer: "" };

  // Colours of letters and lines follow the page's, light or dark, also in print.
  const config = {
    background: "transparent",
    view: { stroke: "currentColor", strokeOpacity: 0.3 },
    axis: { gridColor: "currentColor", gridOpacity: 0.14, domainColor: "currentColor", domainOpacity: 0.5,
            tickColor: "currentColor", tickOpacity: 0.5 },
    text: { color: "currentColor" },
    style: { "guide-label": { fill: "currentColor" }, "guide-title": { fill: "currentColor" },
             "group-title": { fill: "currentColor" }, "group-subtitle": { fill: "currentColor" } },
  };

  function merged(base, more) {
    const result = { ...base };
    for (const [key, value] of Object.entries(more)) {
      result[key] = value && typeof value === "object" && !Array.isArray(value) ? merged(base[key] ?? {}, value) : value;
    }
    return result;
  }

  function content(figure) {
    if (figure.spec) return;
    const data = JSON.parse(figure.element.querySelector("script").textContent);
    figure.spec = data.spec;
    figure.narrow = data.narrow;
    figure.table = data.table;
    figure.filters = data.spec.usermeta?.kvreplay?.filters ?? [];
    const columns = data.table.values.map((column) =>
      Array.isArray(column) ? (row) => column[row] : (row) => column.texts[column.codes[row]]);
    figure.rows = Array.from({ length: data.table.rows }, (_, row) =>
      Object.fromEntries(data.table.columns.map((name, i) => [name, columns[i](row)])));
  }

  function selected(figure) {
    let rows = figure.rows;
    if (figure.filters.includes("policy") && filters.hidden.size > 0) {
      rows = rows.filter((row) => !filters.hidden.has(row.policy) && !filters.hidden.has(row.other));
    }
    if (figure.filters.includes("capacity") && filters.capacity) {
      rows = rows.filter((row) => row.capacity === filters.capacity);
    }
    return rows;
  }

  // Legends and panels without what is filtered out.
  function without_hidden(node) {
    if (Array.isArray(node)) return node.map(without_hidden);
    if (!node || typeof node !== "object") return node;
    const result = Object.fromEntries(Object.entries(node).map(([key, value]) => [key, without_hidden(value)]));
    if (Array.isArray(node.domain) && Array.isArray(node.range) && node.domain.length === node.range.length) {
      const kept = node.domain.map((name, i) => i).filter((i) => !filters.hidden.has(node.domain[i]) &&
        !(filters.capacity && choices.capacities.includes(node.domain[i]) && node.domain[i] !== filters.capacity));
      result.domain = kept.map((i) => node.domain[i]);
      result.range = kept.map((i) => node.range[i]);
    }
    return result;
  }

  // Drawn for a column of paper, letters are as high as the text of a telephone; for a window, as that of the page.
  const is_narrow = (figure) => figure.element.clientWidth < 480;

  function specification(figure) {
    figure.drawn_narrow = is_narrow(figure);
    let spec = { ...(figure.drawn_narrow ? figure.narrow : figure.spec), data: { values: selected(figure) } };
    if (figure.filters.includes("policy") || figure.filters.includes("capacity")) {
      const { data, ...rest } = spec;
      spec = { ...without_hidden(rest), data };
    }
    spec.config = merged(spec.config ?? {}, config);
    spec.background = "transparent";
    const rows = spec.usermeta?.kvreplay?.rows;
    if (rows) spec.height = rows.step * new Set(spec.data.values.map((row) => row[rows.column])).size;
    spec.params = (spec.params ?? []).map((parameter) => {
      // A choice among what the filters leave.
      const column = parameter.name.replace(/^shown_/, "");
      const left = new Set(spec.data.values.map((row) => String(row[column])));
      const options = parameter.bind.options.filter((option) => left.has(option));
      let value = figure.chosen?.[parameter.name] ?? parameter.value;
      for (const [name, wanted] of [["shown_capacity", filters.capacity], ["shown_layer", filters.layer]]) {
        if (parameter.name !== name || !figure.filters.includes(name)) continue;
        if (wanted) value = wanted;
      }
      if (!options.includes(value)) value = options.includes(parameter.value) ? parameter.value : options[0];
      return { ...parameter, value, bind: { ...parameter.bind, options } };
    });
    return spec;
  }

  function tell(figure, text) {
    figure.element.querySelector(".message").textContent = text;
  }

  async function draw_now(figure) {
    const element = figure.element;
    const plot = element.querySelector(".plot");
    try {
      if (!window.vegaEmbed) throw new Error("what draws figures is missing; see above");
      content(figure);
      const spec = specification(figure);
      figure.view?.finalize();
      figure.view = null;
      plot.replaceChildren();
      element.querySelector(".choices").replaceChildren();
      if (spec.data.values.length === 0) {
        tell(figure, "The filters leave nothing to draw here.");
      } else {
        const result = await window.vegaEmbed(plot, spec, {
          actions: false, renderer: "svg", bind: element.querySelector(".choices"), logLevel: 2,
          tooltip: { theme: "custom" },
        });
        figure.view = result.view;
        tell(figure, "");
        for (const { name } of spec.params) {
          figure.view.addSignalListener(name, (_, value) => { (figure.chosen ??= {})[name] = value; });
        }
      }
      delete element.dataset.failed;
      element.dataset.drawn = "true";
    } catch (error) {
      delete element.dataset.drawn;
      element.dataset.failed = "true";
      tell(figure, `This figure could not be drawn: ${error.message ?? error}`);
    }
  }

  // One drawing of a figure at a time; what is asked for meanwhile comes after it.
  function draw(figure, again = false) {
    if (!figure.drawing || again) figure.drawing = (figure.drawing ?? Promise.resolve()).then(() => draw_now(figure));
    return figure.drawing;
  }

  async function drawAll() {
    for (const figure of figures) await draw(figure);
    return figures.every((figure) => figure.element.dataset.drawn === "true");
  }

  function filter_changed(kinds) {
    for (const figure of figures) {
      if (figure.drawing && figure.filters?.some((filter) => kinds.includes(filter))) {
        for (const kind of kinds) if (figure.chosen) delete figure.chosen[kind];
        draw(figure, true);
      }
    }
  }

  // The numbers behind a figure, as far as a person reads them.
  function show_numbers(figure) {
    const place = figure.element.querySelector(".numbers > div");
    if (place.childElementCount > 0) return;
    content(figure);
    const most = 200;
    const table = document.createElement("table");
    const add_row = (parent, tag, texts, align) => {
      const row = parent.appendChild(document.createElement("tr"));
      texts.forEach((text, i) => {
        const cell = row.appendChild(document.createElement(tag));
        cell.textContent = text;
        if (tag === "th") cell.scope = "col";
        if (align[i]) cell.className = "text";
      });
    };
    const { columns, values } = figure.table;
    const align = values.map((column) => !Array.isArray(column));
    add_row(table.createTHead(), "th", columns, align);
    const body = table.createTBody();
    for (const row of figure.rows.slice(0, most)) {
      add_row(body, "td", columns.map((name) => {
        const value = row[name];
        return typeof value === "number" && !Number.isInteger(value) ? String(+value.toPrecision(5)) : value ?? "";
      }), align);
    }
    place.append(table);
    if (figure.rows.length > most) {
      const rest = place.appendChild(document.createElement("p"));
      rest.textContent = `${figure.rows.length - most} more rows are in the CSV file.`;
    }
  }

  // A piece of a policy's line.
  function swatch({ colour, dashes }) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "swatch");
    svg.setAttribute("viewBox", "0 0 27 9");
    svg.setAttribute("aria-hidden", "true");
    const line = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
    line.setAttribute("d", "M0,4.5H27");
    line.setAttribute("stroke", colour);
    line.setAttribute("stroke-width", "3");
    if (dashes[1] > 0) line.setAttribute("stroke-dasharray", dashes.join(" "));
    return svg;
  }

  function labelled(text, control) {
    const label = document.createElement("label");
    label.append(text, " ", control);
    return label;
  }

  function selection(values, all, changed) {
    const select = document.createElement("select");
    for (const value of ["", ...values]) {
      const option = select.appendChild(document.createElement("option"));
      option.value = value;
      option.textContent = value || all;
    }
    select.addEventListener("change", () => changed(select.value));
    return select;
  }

  function show_filters() {
    const form = document.getElementById("filters");
    form.addEventListener("submit", (event) => event.preventDefault());
    if (choices.capacities.length > 1) {
      form.append(labelled("Capacity", selection(choices.capacities, "all", (value) => {
        filters.capacity = value;
        filter_changed(["capacity", "shown_capacity"]);
      })));
    }
    if (choices.layers.length > 1) {
      form.append(labelled("Layer", selection(choices.layers, "all", (value) => {
        filters.layer = value;
        filter_changed(["shown_layer"]);
      })));
    }
    if (choices.policies.length > 1) {
      const details = form.appendChild(document.createElement("details"));
      details.open = choices.policies.length <= 8;
      const summary = details.appendChild(document.createElement("summary"));
      summary.textContent = "Policies";
      const set = details.appendChild(document.createElement("div"));
      set.className = "policies";
      set.setAttribute("role", "group");
      set.setAttribute("aria-label", "Policies");
      for (const policy of choices.policies) {
        const box = document.createElement("input");
        box.type = "checkbox";
        box.checked = true;
        box.addEventListener("change", () => {
          filters.hidden[box.checked ? "delete" : "add"](policy.name);
          filter_changed(["policy"]);
        });
        const label = document.createElement("label");
        label.append(box, swatch(policy), policy.name);
        set.append(label);
      }
    }
    form.hidden = form.childElementCount === 0;
  }

  function theme_button() {
    const button = document.getElementById("theme");
    const root = document.documentElement;
    const system = window.matchMedia("(prefers-color-scheme: dark)");
    const is_dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const label = () => { button.textContent = is_dark() ? "Light" : "Dark"; };
    const remember = (theme) => { try { localStorage.setItem("kvreplay-theme", theme); } catch { /* not everywhere */ } };
    try { root.dataset.theme = localStorage.getItem("kvreplay-theme") ?? ""; } catch { /* as the system has it */ }
    if (!root.dataset.theme) delete root.dataset.theme;
    button.addEventListener("click", () => {
      root.dataset.theme = is_dark() ? "light" : "dark";
      remember(root.dataset.theme);
      label();
    });
    system.addEventListener("change", label);
    label();
    button.hidden = false;
  }

  window.kvreplay = { drawAll };
  theme_button();
  for (const figure of figures) {
    figure.element.querySelector(".numbers").addEventListener("toggle", () => show_numbers(figure));
  }
  if (!window.vegaEmbed) {
    for (const figure of figures) {
      figure.element.querySelector(".plot").remove();
      figure.element.querySelector(".numbers").open = true;
      figure.element.dataset.failed = "true";
    }
    return;
  }
  show_filters();
  // Those in sight first, the others while nothing else is to be done, so that a printer finds all of them.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) draw(figures.find((figure) => figure.element === entry.target));
    }
  }, { rootMargin: "200px" });
  for (const figure of figures) watcher.observe(figure.element);
  // Side by side without gaps: a figure takes as many of the grid's low rows as it is high.
  const grid = document.querySelector(".figures");
  const heights = new ResizeObserver((entries) => {
    grid.classList.add("packed");
    const row = parseFloat(getComputedStyle(grid).gridAutoRows);
    for (const { target } of entries) {
      const margin = parseFloat(getComputedStyle(target).marginTop);
      target.style.gridRowEnd = `span ${Math.ceil((target.offsetHeight + margin) / row)}`;
    }
  });
  for (const figure of figures) heights.observe(figure.element);
  let resized = 0;
  window.addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(() => {
      for (const figure of figures) {
        if (figure.drawing && figure.drawn_narrow !== is_narrow(figure)) draw(figure, true);
      }
    }, 200);
  });
  const when_idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 50));
  const next = () => {
    const figure = figures.find(({ drawing }) => !drawing);
    if (figure) draw(figure).then(() => when_idle(next));
  };
  window.addEventListener("load", () => when_idle(next));
  window.addEventListener("beforeprint", drawAll);
})();
