// The page around the view: it holds the token, and stands in for the widget's model.
import view from "./view.js";

const main = document.getElementById("view");
const ask = new URL(main.dataset.ask, document.baseURI);
// One key per page and per tab: other servers on this host have their own.
const key = `asena-token ${ask}`;

// The address bar, the history and whoever looks over a shoulder need not keep the token.
const address = new URL(location);
const given = address.searchParams.get("token");
if (given) {
  sessionStorage.setItem(key, given);
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}

class Model {
  #listeners = new Set();
  get() {
    return undefined;
  }
  on(event, listener) {
    if (event === "msg:custom") this.#listeners.add(listener);
  }
  off(event, listener) {
    this.#listeners.delete(listener);
  }
  async send(request) {
    if (request.do === "bye") return;
    let answer;
    try {
      const response = await fetch(ask, {
        method: "POST",
        headers: { "Content-Type": "application/json", Authorization: `Bearer ${sessionStorage.getItem(key) ?? ""}` },
        body: JSON.stringify(request),
        signal: AbortSignal.timeout(10_000),
      });
      if (response.status === 403) return login("This token is not valid any more.");
      answer = await response.json();
    } catch {
      answer = { state: "unreachable", error: "The server does not answer." };
    }
    for (const listener of this.#listeners) listener({ ...answer, view: request.view, to: request.do });
  }
}

let stop;

function open() {
  main.replaceChildren();
  stop = view.render({ model: new Model(), el: main });
}

function login(why) {
  stop?.();
  stop = undefined;
  sessionStorage.removeItem(key);
  const form = document.createElement("form");
  form.className = "asena-login";
  const title = document.createElement("h1");
  title.textContent = "Rooms and sockets";
  const label = document.createElement("label");
  label.textContent = "Token";
  const input = document.createElement("input");
  input.type = "password";
  input.autocomplete = "off";
  input.required = true;
  label.append(input);
  const button = document.createElement("button");
  button.textContent = "Open";
  const hint = document.createElement("p");
  hint.setAttribute("role", "status");
  hint.textContent = `${why} server.inspector_url has it.`;
  form.append(title, hint, label, button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(key, input.value.trim());
    open();
  });
  main.replaceChildren(form);
  input.focus();
}

if (sessionStorage.getItem(key)) open();
else login("This page needs the server's token.");
