// The live view of a server's rooms and sockets. `model` is anywidget's, or the page's stand-in: it takes requests
// with `send` and gives answers as "msg:custom". Nothing that a client said becomes markup: only text.

const PERIOD = 1000; // ms between looks
const PATIENCE = 15000; // ms until a look that got no answer is asked again
const EVENTS = 200; // kept on the screen

let views = 0;

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const setText = (element, text) => {
  if (element.textContent !== text) element.textContent = text;
};

// Makes `parent` show one element per item, in order, keeping those that stay: focus and selection survive.
function reconcile(parent, items, keyOf, create, update) {
  const before = parent.reconciled ?? new Map();
  const after = new Map();
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    const element = before.get(key) ?? create(item);
    after.set(key, element);
    update(element, item);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  for (const [key, element] of before) if (!after.has(key)) element.remove();
  parent.reconciled = after;
}

const number = new Intl.NumberFormat("en");
const plural = (count, what) => `${number.format(count)} ${what}${count === 1 ? "" : "s"}`;
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });

function bytes(count) {
  if (count < 1000) return `${count} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(1)} kB`;
  return `${(count / 1e6).toFixed(1)} MB`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} d`;
}

function render({ model, el }) {
  const view = `${Math.random().toString(36).slice(2)}-${++views}`;
  const id = (name) => `asena-${view}-${name}`;
  const look = { namespace: null, room: null, socket: null, search: "", offset: 0, limit: 50, since: 0, messages: true };
  let answer = null;
  let rates = new Map(); // id → what it had received and sent when
  let notBefore = 0; // a costly answer is not asked for every second
  let askedAt = 0; // of the look that is not answered yet
  let onScreen = true;
  let changed = false; // what is looked at has changed: the answer under way is of no use
  let events = [];

  // -- the frame

  const title = h("h2", { class: "title" }, "Rooms and sockets");
  const state = h("span", { class: "state" }, "connecting…");
  const search = h("input", { id: id("search"), type: "search", placeholder: "id, room, value, address, SDK", maxlength: 200 });
  const crumbs = h("p", { class: "crumbs" });
  const namespaces = h("ul", { class: "list" });
  const rooms = h("ul", { class: "list" });
  const roomsNote = h("p", { class: "note" });
  const heads = ["Socket", "Rooms", "Protocol", "In", "Out", "Waiting", "Round trip", "Last error"];
  const body = h("tbody");
  const table = h(
    "table",
    {},
    h("caption", { class: "hidden" }, "Connected sockets"),
    h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))),
    body,
  );
  const empty = h("p", { class: "empty" });
  const previous = h("button", { type: "button", onclick: () => turn(-1) }, "Previous");
  const following = h("button", { type: "button", onclick: () => turn(1) }, "Next");
  const range = h("span", {});
  const pages = h("nav", { class: "pages", "aria-label": "Pages of sockets" }, previous, range, following);
  const detail = h("section", { class: "detail", tabindex: "-1" });
  const composer = messageForm("publish", "Send", (data) => act({ do: "publish", ...composer.addressee, data }));
  const receipt = h("p", { class: "receipt", role: "status" });
  const stream = h("ol", { class: "events", tabindex: "0", "aria-label": "Events, newest first" });
  const traffic = h("input", { type: "checkbox", id: id("messages"), checked: true });

  const root = h(
    "div",
    // In a notebook keys are commands, but not while somebody types here.
    { class: "asena-view", "data-lm-suppress-shortcuts": "true" },
    h(
      "header",
      {},
      title,
      state,
      h("div", { class: "search" }, h("label", { for: id("search") }, "Search"), search),
    ),
    h(
      "div",
      { class: "columns" },
      h(
        "div",
        { class: "side" },
        h("h3", {}, "Namespaces"),
        namespaces,
        h("h3", {}, "Rooms"),
        rooms,
        roomsNote,
      ),
      h(
        "div",
        { class: "main" },
        crumbs,
        composer,
        receipt,
        h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Sockets" }, table),
        empty,
        pages,
        detail,
        h(
          "div",
          { class: "events-head" },
          h("h3", {}, "Events"),
          h("label", { for: id("messages") }, traffic, "with messages"),
        ),
        stream,
      ),
    ),
  );

  search.addEventListener("input", () => change({ search: search.value.trim(), offset: 0 }));
  traffic.addEventListener("change", () => change({ messages: traffic.checked }));

  // -- talking

  const send = (request) => model.send({ ...request, view });
  const visible = () => onScreen && document.visibilityState === "visible" && root.isConnected;

  function ask() {
    const now = Date.now();
    if (!visible() || now < notBefore || (askedAt && now - askedAt < PATIENCE)) return;
    askedAt = now;
    send({ do: "look", ...look });
  }

  function change(what) {
    Object.assign(look, what);
    notBefore = 0;
    const story = ["namespace", "room", "socket", "messages"].some((name) => name in what);
    if (story) {
      look.since = 0;
      events = [];
    }
    changed = askedAt > 0;
    if (!changed) ask();
    draw();
  }

  function act(request) {
    setText(receipt, "…");
    send(request);
  }

  function hear(message) {
    if (message.view !== view) return;
    if (message.to !== "look" && !message.pushed) {
      receipt.classList.toggle("error", Boolean(message.error));
      setText(receipt, message.error ?? message.receipt ?? "");
      notBefore = 0;
      ask();
      return;
    }
    if (!message.pushed) askedAt = 0;
    if (changed && !message.pushed) {
      changed = false;
      ask();
      return;
    }
    take(message);
  }

  function take(message) {
    if (message.state !== "running") {
      state.className = "state off";
      setText(state, message.error ?? "not running");
      return;
    }
    notBefore = Date.now() + 1000 * (message.again ?? 0) - PERIOD / 2;
    remember(message);
    answer = message;
    look.offset = message.offset;
    const fresh = message.events.filter((event) => event.number > look.since);
    if (fresh.length) look.since = fresh[fresh.length - 1].number;
    events = [...fresh.reverse(), ...events].slice(0, EVENTS);
    draw();
  }

  function remember(message) {
    const after = new Map();
    for (const socket of message.sockets) {
      const before = rates.get(socket.id);
      const seconds = before ? message.now - before.now : 0;
      const rate = (name) => (seconds > 0 ? (socket[name] - before[name]) / seconds : 0);
      socket.rate_in = rate("messages_in");
      socket.rate_out = rate("messages_out");
      const { messages_in, messages_out } = socket;
      after.set(socket.id, { messages_in, messages_out, now: message.now });
    }
    rates = after;
  }

  // -- drawing

  function draw() {
    if (!answer) return;
    state.className = "state on";
    const all = answer.namespaces.reduce((sum, each) => sum + each.sockets, 0);
    setText(state, `live · ${plural(all, "socket")}${answer.read_only ? " · read-only" : ""}`);
    drawNamespaces();
    drawRooms();
    drawSockets();
    drawDetail();
    drawComposer();
    drawEvents();
  }

  const choice = (create) => h("li", {}, h("button", { type: "button", class: "choice", onclick: create }, h("span", { class: "name" }), h("span", { class: "count" })));

  function fill(item, name, count, chosen, hint) {
    const button = item.firstElementChild;
    setText(button.children[0], name);
    setText(button.children[1], number.format(count));
    button.setAttribute("aria-pressed", String(chosen));
    button.setAttribute("aria-label", `${name}, ${hint}`);
  }

  function drawNamespaces() {
    reconcile(
      namespaces,
      answer.namespaces,
      (each) => each.path,
      (each) =>
        choice(() =>
          change({ namespace: look.namespace === each.path ? null : each.path, room: null, socket: null, offset: 0 }),
        ),
      (item, each) =>
        fill(item, each.path, each.sockets, look.namespace === each.path, `${each.service}, ${plural(each.sockets, "socket")}`),
    );
  }

  function drawRooms() {
    const several = new Set(answer.rooms.map((each) => each.namespace)).size > 1;
    reconcile(
      rooms,
      answer.rooms,
      (each) => `${each.namespace} ${each.room}`,
      (each) =>
        choice(() => {
          const chosen = look.room === each.room && look.namespace === each.namespace;
          change({ namespace: each.namespace, room: chosen ? null : each.room, socket: null, offset: 0 });
        }),
      (item, each) =>
        fill(
          item,
          several ? `${each.room} · ${each.namespace}` : each.room,
          each.sockets,
          look.room === each.room && look.namespace === each.namespace,
          plural(each.sockets, "socket"),
        ),
    );
    const more = answer.rooms_total - answer.rooms.length;
    setText(roomsNote, answer.rooms_total === 0 ? "No rooms." : more > 0 ? `The largest; ${number.format(more)} more.` : "");
  }

  function drawSockets() {
    const scope = [look.namespace, look.room && `room ${look.room}`, look.search && `“${look.search}”`];
    setText(crumbs, `${plural(answer.total, "socket")} ${scope.filter(Boolean).map((each) => `· ${each}`).join(" ")}`);
    reconcile(body, answer.sockets, (socket) => socket.id, createRow, updateRow);
    table.hidden = answer.total === 0;
    empty.hidden = answer.total > 0;
    setText(empty, look.search || look.room ? "No socket matches." : "Nobody is connected.");
    pages.hidden = answer.total <= look.limit;
    setText(
      range,
      `${number.format(answer.offset + 1)}–${number.format(answer.offset + answer.sockets.length)} of ${number.format(answer.total)}`,
    );
    previous.disabled = answer.offset === 0;
    following.disabled = answer.offset + answer.sockets.length >= answer.total;
  }

  function turn(pages) {
    change({ offset: Math.max(0, answer.offset + pages * look.limit) });
  }

  function createRow(socket) {
    const open = h(
      "button",
      { type: "button", class: "open", onclick: () => choose(look.socket === socket.id ? null : socket.id) },
      h("span", { class: "id" }, socket.id.slice(0, 8)),
      answer.namespaces.length > 1 ? h("span", { class: "path" }, socket.namespace) : null,
      h("span", { class: "who" }),
    );
    const cell = (label) => h("td", { "data-label": label, class: ["Rooms", "Protocol", "Last error"].includes(label) ? null : "short" });
    return h("tr", {}, h("th", { scope: "row" }, open), ...heads.slice(1).map(cell));
  }

  function updateRow(row, socket) {
    const [first, inRooms, protocol, received, sent, waiting, trip, error] = row.children;
    const open = first.firstElementChild;
    setText(open.lastElementChild, socket.values);
    open.setAttribute("aria-pressed", String(look.socket === socket.id));
    row.classList.toggle("chosen", look.socket === socket.id);
    const more = socket.rooms_total - socket.rooms.length;
    reconcile(
      inRooms,
      [...socket.rooms, ...(more > 0 ? [`+${more}`] : [])],
      (room) => room,
      () => h("span", { class: "chip" }),
      (chip, room) => setText(chip, room),
    );
    setText(protocol, socket.protocol);
    count(received, socket.messages_in, socket.rate_in);
    count(sent, socket.messages_out, socket.rate_out);
    setText(waiting, socket.waiting ? bytes(socket.waiting) : "–");
    waiting.classList.toggle("warn", socket.waiting > 0);
    setText(trip, socket.round_trip_time == null ? "–" : `${(socket.round_trip_time * 1000).toFixed(1)} ms`);
    setText(error, socket.last_error ?? "–");
    error.classList.toggle("warn", Boolean(socket.last_error));
  }

  function count(cell, total, rate) {
    if (!cell.firstElementChild) cell.append(h("span"), h("span", { class: "rate" }));
    setText(cell.firstElementChild, number.format(total));
    setText(cell.lastElementChild, rate < 0.05 ? "" : `${rate < 10 ? rate.toFixed(1) : number.format(Math.round(rate))}/s`);
  }

  function choose(socket) {
    detail.built = null;
    change({ socket });
  }

  // The details of one socket: built once, then only their texts change, so that nobody loses what they type.
  function drawDetail() {
    const socket = answer.socket;
    detail.hidden = look.socket == null;
    if (detail.hidden) return;
    if (!socket || socket.id !== look.socket) {
      if (detail.built && !socket) setText(detail.gone, "This socket is not connected any more.");
      return;
    }
    if (detail.built !== socket.id) buildDetail(socket);
    setText(detail.gone, "");
    const facts = [
      ["values", socket.values || "–"],
      ["address", socket.address],
      ["protocol", socket.protocol],
      ["connected", `${clock(socket.since)}, ${duration(answer.now - socket.since)} ago`],
      ["received", `${plural(socket.messages_in, "message")}, ${bytes(socket.bytes_in)}`],
      ["sent", `${plural(socket.messages_out, "message")}, ${bytes(socket.bytes_out)}`],
      ["running", plural(socket.pending_calls, "handler")],
      ["waiting", bytes(socket.waiting)],
      ["dropped", plural(socket.dropped, "message")],
      ["last error", socket.last_error ?? "none"],
    ];
    reconcile(
      detail.facts,
      facts,
      ([name]) => name,
      ([name]) => h("div", {}, h("dt", {}, name), h("dd")),
      (item, [, value]) => setText(item.lastElementChild, value),
    );
    reconcile(
      detail.rooms,
      socket.rooms,
      (room) => room,
      (room) =>
        h(
          "li",
          { class: "chip" },
          h("span", {}, room),
          answer.read_only
            ? null
            : h(
                "button",
                {
                  type: "button",
                  "aria-label": `Take out of ${room}`,
                  onclick: () => act({ do: "leave", socket: socket.id, room }),
                },
                "×",
              ),
        ),
      () => {},
    );
  }

  function buildDetail(socket) {
    detail.built = socket.id;
    detail.setAttribute("aria-label", `Socket ${socket.id.slice(0, 8)}`);
    detail.gone = h("p", { class: "gone", role: "status" });
    detail.facts = h("dl");
    detail.rooms = h("ul", { class: "chips", "aria-label": "Rooms of this socket" });
    detail.replaceChildren(
      h(
        "div",
        { class: "detail-head" },
        h("h3", {}, "Socket ", h("span", { class: "id" }, socket.id)),
        h("button", { type: "button", onclick: () => choose(null) }, "Close details"),
      ),
      detail.gone,
      detail.facts,
      detail.rooms,
    );
    if (answer.read_only) return;
    const room = h("input", { id: id("join"), required: true });
    const reason = h("input", { id: id("reason"), maxlength: 100 });
    const send = messageForm("send", "Send to this socket", (data) => act({ do: "send", socket: socket.id, data }));
    const others = h(
      "div",
      { class: "forms" },
      lineForm("Put into room", room, h("button", {}, "Join"), () => {
        act({ do: "join", socket: socket.id, room: room.value });
        room.value = "";
      }),
      lineForm("Disconnect, with a reason if you like", reason, h("button", { class: "danger" }, "Disconnect"), () => {
        act({ do: "disconnect", socket: socket.id, reason: reason.value });
      }),
    );
    detail.append(send, others);
  }

  function lineForm(label, input, button, submit) {
    const onsubmit = (event) => {
      event.preventDefault();
      submit();
    };
    return h("form", { class: "line", onsubmit }, h("label", { for: input.id }, label), input, button);
  }

  function messageForm(name, label, submit) {
    const text = h("textarea", { id: id(name), rows: 1, placeholder: 'hello, or {"type": "announcement"}' });
    const json = h("input", { type: "checkbox", id: id(`${name}-json`) });
    const trouble = h("span", { class: "trouble", role: "alert" });
    const caption = h("label", { for: id(name) }, label);
    const button = h("button", {}, "Send");
    text.addEventListener("input", () => {
      if (/^\s*[[{]/.test(text.value)) json.checked = true;
    });
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    const form = h(
      "form",
      {
        class: "line",
        onsubmit: (event) => {
          event.preventDefault();
          let data = text.value;
          setText(trouble, "");
          if (json.checked) {
            try {
              data = JSON.parse(data);
            } catch (error) {
              setText(trouble, `Not JSON: ${error.message}`);
              return;
            }
          }
          submit(data);
        },
      },
      caption,
      text,
      h("label", { class: "check", for: id(`${name}-json`) }, json, "as JSON"),
      button,
      trouble,
    );
    form.caption = caption;
    form.controls = [text, button];
    return form;
  }

  function drawComposer() {
    composer.hidden = answer.read_only;
    const namespace = look.namespace ?? (answer.namespaces.length === 1 ? answer.namespaces[0].path : null);
    const to = namespace && (look.room ? `Send to room ${look.room}` : `Send to everybody in ${namespace}`);
    setText(composer.caption, to ?? "Choose a namespace or a room to send to");
    for (const control of composer.controls) control.disabled = !to;
    composer.addressee = { namespace, room: look.room };
  }

  function drawEvents() {
    const several = answer.namespaces.length > 1;
    reconcile(
      stream,
      events,
      (event) => event.number,
      (event) =>
        h(
          "li",
          { class: event.kind },
          h("time", {}, clock(event.time)),
          several ? h("span", { class: "path" }, event.namespace) : null,
          event.socket ? h("span", { class: "id" }, event.socket.slice(0, 8)) : null,
          h("span", { class: "what" }, event.sentence),
        ),
      () => {},
    );
  }

  // -- living and dying

  const observer = new IntersectionObserver(([entry]) => {
    onScreen = entry.isIntersecting;
    if (onScreen) ask();
  });
  el.append(root);
  observer.observe(root);
  const still = model.get("snapshot");
  if (still?.sockets) {
    take(still);
    state.className = "state";
    setText(state, `as of ${clock(still.now)}`);
  }
  model.on("msg:custom", hear);
  const timer = setInterval(ask, PERIOD);
  document.addEventListener("visibilitychange", ask);
  ask();

  return () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", ask);
    observer.disconnect();
    model.off("msg:custom", hear);
    send({ do: "bye" });
    root.remove();
  };
}

export default { render };
