// A small client of the Centrifuge protocol (JSON, version 2). Names and behaviour are those of the npm package
// `centrifuge`, as far as they go: a page that outgrows this one changes its import, and nothing else.

const failure = (code, message) => ({ code, message });
const mapped = (object, change) => Object.fromEntries(Object.entries(object).map(([key, value]) => [key, change(value)]));
const infoOf = ({ client, user, conn_info: connInfo, chan_info: chanInfo }) => ({ client, user, connInfo, chanInfo });
const publicationOf = (channel, { data, offset, tags, info }) =>
  ({ channel, data, offset, tags, info: info && infoOf(info) });
const recovery = ({ offset, epoch }) => ({ recover: true, offset, epoch });

function subscribedTo(channel, { was_recovering, offset = 0, epoch = "", data, ...given }) {
  const [positioned, recoverable, recovered] = [!!given.positioned, !!given.recoverable, !!given.recovered];
  const streamPosition = positioned || recoverable ? { offset, epoch } : undefined;
  return { channel, data, positioned, recoverable, recovered, wasRecovering: !!was_recovering, streamPosition };
}

// How a method asks, and what it makes of the answer.
const CALLS = {
  rpc: (method, data) => [{ method, data }, (result) => ({ data: result.data })],
  publish: (channel, data) => [{ channel, data }, () => ({})],
  presence: (channel) => [{ channel }, ({ presence }) => ({ clients: mapped(presence, infoOf) })],
  presence_stats: (channel) => [{ channel }, (stats) => ({ numClients: stats.num_clients, numUsers: stats.num_users })],
  history: (channel, options) => [
    { channel, ...options },
    ({ publications = [], offset = 0, epoch = "" }) =>
      ({ publications: publications.map((pub) => publicationOf(channel, pub)), offset, epoch }),
  ],
};

/** For `getToken` to throw when there will be no token. */
export class UnauthorizedError extends Error {}

// What a client and a subscription have in common. Events have the names of the states that they tell.
class Base {
  _listeners = {};
  _timers = {};
  _turn = 0; // grows when whatever is under way no longer counts
  _waiting = new Set();

  // `codes`: what is asked for with a token, and the errors of not getting one.
  constructor(states, gone, codes, options, ...delays) {
    [this.state, this._trying, this._on] = states;
    [this._verb, this._refreshing] = Object.keys(codes);
    Object.assign(this, { _off: this.state, _gone: gone, _codes: codes, _delays: delays });
    Object.assign(this, { _options: options, _token: options.token });
  }

  on(event, listener) {
    (this._listeners[event] ??= new Set()).add(listener);
    return this;
  }

  off(event, listener) {
    this._listeners[event]?.delete(listener);
    return this;
  }

  once(event, listener) {
    const first = (ctx) => this.off(event, first) && listener(ctx);
    return this.on(event, first);
  }

  // A handler that throws has left undone nobody knows what: the client stops.
  _emit(event, ctx) {
    try {
      for (const listener of [...(this._listeners[event] ?? [])]) listener({ channel: this.channel, ...ctx });
    } catch (error) {
      this._client._fail(error);
    }
  }

  async ready(timeout) {
    if (this.state === this._off) throw this._gone;
    if (this.state !== this._on) await this._wait(timeout);
  }

  _wait(timeout) {
    return new Promise((resolve, reject) => {
      const timer = timeout && setTimeout(reject, timeout, failure(1, "timeout"));
      this._waiting.add((error) => (clearTimeout(timer), error ? reject(error) : resolve()));
    });
  }

  _settle(error) {
    for (const settle of this._waiting) settle(error);
    this._waiting.clear();
  }

  _later(what, delay, work) {
    clearTimeout(this._timers[what]);
    this._timers[what] = setTimeout(work, Math.min(delay, 2 ** 31 - 1));
  }

  // Whether no handler has changed it again.
  _become(state, ctx) {
    const news = this.state !== state;
    const turn = ++this._turn;
    Object.values(this._timers).forEach(clearTimeout);
    this.state = state;
    if (news) this._emit(state, ctx);
    return turn === this._turn;
  }

  _begin(code, reason) {
    this._attempts = 0;
    return this.state === this._off && this._become(this._trying, { code, reason });
  }

  async _start() {
    this._turn++;
    clearTimeout(this._timers.retry);
    const result = await this._obtain(this._verb, false);
    if (!result) return;
    this._attempts = 0;
    if (!this._become(this._on, this._context(result))) return;
    this._settle();
    this._expire(result);
    this._begun(result);
  }

  // With full jitter, so that the clients of a server that was away do not all come back at once.
  _retry() {
    const [min = 500, max = 20000] = this._delays;
    const delay = min + Math.random() * Math.min(max, min * 2 ** this._attempts++);
    this._later("retry", Math.min(max, delay), () => this._start());
  }

  // What the server grants, to a new token if need be. What it refuses for now is asked again, else this is the end.
  async _obtain(kind, fresh) {
    const { channel, _turn: turn } = this;
    const { getToken } = this._options;
    const current = () => turn === this._turn;
    let type = `${kind}Token`;
    try {
      if (fresh || this._expired || (!this._token && getToken)) {
        const token = await getToken?.({ channel });
        if (!current()) return;
        // An empty one is for where anybody may connect.
        if (!token && (token == null || kind !== "connect")) throw new UnauthorizedError();
        this._token = token;
        this._expired = false;
      }
      type = kind;
      const request = { channel, token: this._token };
      const result = await (fresh ? this._client._ask(kind, request) : this._request(request, current));
      if (current()) return result;
    } catch (error) {
      if (!current()) return;
      if (error instanceof UnauthorizedError) return this._end(1, "unauthorized");
      if (!error.code) error = failure(this._codes[kind], String(error));
      const { code, message, temporary } = error;
      this._expired = code === 109;
      if (code > 99 && !temporary && !this._expired) return this._end(code, message, type === this._verb);
      this._emit("error", { type: type.replace("sub_", ""), error });
      if (!current()) return;
      if (fresh) this._expire({ expires: true }, 5000 + Math.random() * 5000);
      else this._again(error);
    }
  }

  // Gets another token in time.
  _expire({ expires, ttl }, delay = ttl * 1000) {
    const refresh = async () => this._expire((await this._obtain(this._refreshing, true)) ?? {});
    if (expires) this._later("refresh", delay, refresh);
  }
}

export class Subscription extends Base {
  constructor(client, channel, options = {}) {
    const { since, minResubscribeDelay: min, maxResubscribeDelay: max } = options;
    const states = ["unsubscribed", "subscribing", "subscribed"];
    super(states, failure(7, "unsubscribed"), { subscribe: 8, sub_refresh: 9 }, options, min, max);
    Object.assign(this, { channel, _client: client, _at: { ...since, recoverable: !!since } });
  }

  subscribe() {
    if (this._begin(0, "subscribe called") && this._client._open) this._start();
  }

  unsubscribe() {
    this._end(0, "unsubscribe called");
  }

  // Subscribes again, as soon as there is a connection.
  _lapse(code, reason) {
    this._asked = false;
    if (this._become(this._trying, { code, reason }) && this._client._open) this._start();
  }

  _request(request) {
    const { data, positioned, recoverable, joinLeave: join_leave } = this._options;
    this._asked = true;
    if (this._at.recoverable) Object.assign(request, recovery(this._at));
    return this._client._ask("subscribe", { ...request, data, positioned, recoverable, join_leave });
  }

  _again({ code }) {
    this._asked = false;
    if (code === 1) this._client._lose(3, "subscribe timeout");
    else this._retry();
  }

  _context(result) {
    this._at = result;
    return subscribedTo(this.channel, result);
  }

  _begun({ publications }) {
    for (const pub of publications ?? []) this._client._push({ channel: this.channel, pub });
  }

  // `told`: the server knows.
  _end(code, reason, told) {
    if (this.state === this._off) return;
    if (this._asked && !told) this._client._unsubscribe(this.channel);
    this._asked = false;
    this._settle(this._gone);
    this._become(this._off, { code, reason });
  }
}

export class Centrifuge extends Base {
  _client = this;
  _subs = {};
  _served = {}; // what the server has subscribed us to, by channel
  _calls = {};
  _id = 0;
  _arrived = Promise.resolve();
  // The network is back, and so may the server be: no need to sit out the delay.
  _online = () => this._socket || this._start();

  constructor(url, options) {
    options = { name: "js", timeout: 5000, maxServerPingDelay: 10000, ...options };
    const { minReconnectDelay: min, maxReconnectDelay: max } = options;
    const states = ["disconnected", "connecting", "connected"];
    super(states, failure(3, "client disconnected"), { connect: 5, refresh: 6 }, options, min, max);
    this._url = url;
  }

  connect() {
    globalThis.addEventListener?.("online", this._online);
    if (this._begin(0, "connect called")) this._start();
  }

  disconnect() {
    this._end(0, "disconnect called");
  }

  setToken(token) {
    this._token = token;
    this._expired &&= this._options.getToken;
  }

  setData(data) {
    this._options.data = data;
  }

  newSubscription(channel, options) {
    if (this._subs[channel]) throw new Error(`Subscription to the channel ${channel} already exists`);
    return (this._subs[channel] = new Subscription(this, channel, options));
  }

  getSubscription(channel) {
    return this._subs[channel] ?? null;
  }

  removeSubscription(sub) {
    sub?.unsubscribe();
    if (sub && this._subs[sub.channel] === sub) delete this._subs[sub.channel];
  }

  subscriptions() {
    return this._subs;
  }

  async send(data) {
    await this._connected();
    if (!this._write({ send: { data } })) throw failure(10, "transport write error");
  }

  async _connected() {
    if (this.state !== this._on) await this._wait(this._options.timeout);
  }

  _ask(kind, body) {
    return new Promise((resolve, reject) => {
      const id = ++this._id;
      const settle = (reply) => {
        delete this._calls[id];
        clearTimeout(timer);
        if (reply.error) reject({ message: "", temporary: false, ...reply.error });
        else resolve(reply[kind] ?? {});
      };
      const timer = setTimeout(settle, this._options.timeout, { error: failure(1, "timeout") });
      this._calls[id] = settle;
      if (!this._write({ [kind]: body, id })) settle({ error: failure(10, "transport write error") });
    });
  }

  _write(command) {
    try {
      const text = JSON.stringify(command);
      if (this._batch) this._batch.push(text);
      else this._socket.send(text);
      return true;
    } catch {
      return false;
    }
  }

  async _request({ token }, current) {
    const { websocket: Socket = WebSocket, timeout, data, getData, name, version, headers } = this._options;
    const request = { token, data: getData ? await getData() : data, name, version, headers };
    if (!current()) return;
    const socket = (this._socket = new Socket(this._url));
    socket.onmessage = (event) => socket === this._socket && this._receive(event.data);
    socket.onclose = (event) => socket === this._socket && this._closed(event);
    socket.onerror = () => {}; // a close follows
    this._later("open", timeout, () => this._closed({ code: 1006 }));
    await new Promise((resolve) => (socket.onopen = resolve));
    clearTimeout(this._timers.open);
    this._open = true;
    // What is to be subscribed goes along in one frame.
    this._batch = [];
    for (const [channel, at] of Object.entries(this._served))
      if (at.recoverable) (request.subs ??= {})[channel] = recovery(at);
    const reply = this._ask("connect", request);
    for (const sub of Object.values(this._subs)) if (sub.state === "subscribing") sub._start();
    socket.send(this._batch.join("\n"));
    this._batch = null;
    return reply;
  }

  _again({ code, message }) {
    this._lose(code, message);
  }

  _context({ client, data, ping, pong }) {
    this._ping = ping * 1000;
    this._pong = pong;
    return { client, transport: "websocket", data };
  }

  _begun({ subs = {} }) {
    this._watch();
    for (const [channel, subscribe] of Object.entries(subs)) this._push({ channel, subscribe });
    for (const [channel, { recovered, publications }] of Object.entries(subs))
      for (const pub of (recovered && publications) || []) this._push({ channel, pub });
    for (const channel in this._served) if (!subs[channel]) this._push({ channel, unsubscribe: {} });
  }

  _closed({ code, reason }) {
    if (code === 1009) return this._end(3, "message size limit exceeded");
    // 3500 to 3999 and 4500 to 4999 are for good.
    if (code >= 3000) return this._lose(code, reason, code % 1000 < 500);
    if (!this._open) this._emit("error", { type: "transport", error: failure(2, "transport closed") });
    this._lose(1, "transport closed");
  }

  _end(code, reason) {
    globalThis.removeEventListener?.("online", this._online);
    this._settle(failure(3, "disconnected"));
    this._lose(code, reason, false);
  }

  _lose(code, reason, again = true) {
    const { state, _socket: socket } = this;
    if (state === this._off) return;
    this._open = this._socket = this._batch = this._ping = null;
    socket?.close();
    for (const settle of Object.values(this._calls)) settle({ error: failure(11, "connection closed") });
    for (const sub of Object.values(this._subs)) if (sub.state !== sub._off) sub._lapse(1, "transport closed");
    if (state === this._on) for (const channel in this._served) this._emit("subscribing", { channel });
    if (this._become(again ? this._trying : this._off, { code, reason }) && again) this._retry();
  }

  _fail(error) {
    Promise.reject(error); // for the page's own handling of errors
    this._end(2, `exception in event handler: ${error?.message ?? error}`);
  }

  _unsubscribe(channel) {
    const { _socket: socket } = this;
    const failed = () => socket === this._socket && this._lose(4, "unsubscribe error");
    if (this._open) this._ask("unsubscribe", { channel }).catch(failed);
  }

  _watch() {
    const grace = this._options.maxServerPingDelay;
    if (this._ping && grace) this._later("ping", this._ping + grace, () => this._lose(2, "no ping"));
  }

  _receive(text) {
    const { _socket: socket } = this;
    this._watch();
    this._arrived = this._arrived.then(async () => {
      for (const line of text.split("\n")) {
        if (socket !== this._socket || !line.trim()) continue;
        try {
          const reply = JSON.parse(line);
          if (reply.id) this._calls[reply.id]?.(reply);
          else if (reply.push) this._push(reply.push);
          else if (this._pong) this._write({});
          // Whoever awaits the reply goes on before what follows is handled.
          for (let i = 0; reply.id && i < 12; i++) await null;
        } catch {
          this._lose(1, "transport closed");
        }
      }
    });
  }

  _push({ channel, pub, join, leave, message, subscribe, unsubscribe, disconnect }) {
    if (this.state !== this._on) return;
    const sub = this._subs[channel]?.state === "subscribed" && this._subs[channel];
    const at = sub ? sub._at : this._served[channel];
    const target = sub || this;
    if (message) this._emit("message", { data: message.data });
    else if (disconnect) this._closed(disconnect);
    else if (subscribe) {
      this._served[channel] = subscribe;
      this._emit("subscribed", subscribedTo(channel, subscribe));
    } else if (!at) return;
    else if (pub) {
      if (pub.offset) at.offset = pub.offset;
      target._emit("publication", publicationOf(channel, pub));
    } else if (join) target._emit("join", { channel, info: infoOf(join.info) });
    else if (leave) target._emit("leave", { channel, info: infoOf(leave.info) });
    else if (unsubscribe && !sub) {
      delete this._served[channel];
      this._emit("unsubscribed", { channel });
    } else if (unsubscribe?.code < 2500) sub._end(unsubscribe.code, unsubscribe.reason, true);
    else if (unsubscribe) sub._lapse(unsubscribe.code, unsubscribe.reason);
  }
}

for (const [kind, call] of Object.entries(CALLS)) {
  const name = kind === "presence_stats" ? "presenceStats" : kind;
  Centrifuge.prototype[name] = async function (...args) {
    const [body, made] = call(...args);
    await this._connected();
    return made(await this._ask(kind, body));
  };
  if (kind !== "rpc")
    Subscription.prototype[name] = async function (...args) {
      await this.ready(this._client._options.timeout);
      return this._client[name](this.channel, ...args);
    };
}
