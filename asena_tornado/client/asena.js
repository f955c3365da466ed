// A small client of the Centrifuge protocol (JSON, version 2). Names and behaviour are those of the npm package
// `centrifuge`, as far as they go: a page that outgrows this one changes its import, and nothing else.

const failure = (code, message) => ({ code, message });
const infoOf = ({ client, user, conn_info: connInfo, chan_info: chanInfo }) => ({ client, user, connInfo, chanInfo });
const publicationOf = (channel, { info, data, offset, tags }) =>
  Object.assign({ channel, data, offset, tags }, info && { info: infoOf(info) });
const recovery = ({ offset, epoch }) => ({ recover: true, offset, epoch });

function subscribedTo(channel, { was_recovering, offset = 0, epoch = "", data, ...given }) {
  const [positioned, recoverable, recovered] = [!!given.positioned, !!given.recoverable, !!given.recovered];
  const streamPosition = positioned || recoverable ? { offset, epoch } : undefined;
  return { channel, data, positioned, recoverable, recovered, wasRecovering: !!was_recovering, streamPosition };
}

/** For `getToken` to throw when there will be no token. */
export class UnauthorizedError extends Error {}

// What a client and a subscription have in common. An event has the name of the state that it tells.
class Base {
  _listeners = {};
  _waiting = new Set();
  _timers = {};
  _turn = 0; // grows when whatever is under way no longer counts

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
      this._client._break(error);
    }
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
    this._waiting.forEach((settle) => settle(error));
    this._waiting.clear();
  }

  _later(what, delay, work) {
    clearTimeout(this._timers[what]);
    this._timers[what] = setTimeout(work, Math.min(delay, 2 ** 31 - 1));
  }

  // With full jitter, so that the clients of a server that was away do not all come back at once.
  _retry() {
    const { min = 500, max = 20000 } = this._delays;
    const delay = min + Math.random() * Math.min(max, min * 2 ** this._attempts++);
    this._later("retry", Math.min(max, delay), () => this._start());
  }

  // What `ask` gets, with a new token if need be; what fails for now is done `again`, and else this is the end.
  async _obtain(kind, fresh, ask, again) {
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
      }
      type = kind;
      const result = await ask(current);
      if (current()) return result;
    } catch (error) {
      if (!current()) return;
      if (error instanceof UnauthorizedError) return this._end(1, "unauthorized");
      if (!error.code) error = failure(this._failed[kind], String(error));
      this._expired = error.code === 109;
      if (error.code > 99 && !error.temporary && !this._expired) return this._end(error.code, error.message);
      this._emit("error", { type, error });
      if (current()) again(error);
    }
  }

  // Gets another token in time.
  _expire({ expires, ttl }, delay = ttl * 1000) {
    const kind = this._refresh;
    const ask = () => this._client._ask(kind, { channel: this.channel, token: this._token });
    const again = () => this._expire({ expires }, 5000 + Math.random() * 5000);
    const renew = async () => this._expire((await this._obtain(kind, true, ask, again)) ?? {});
    if (expires) this._later("refresh", delay, renew);
  }
}

export class Subscription extends Base {
  state = "unsubscribed";
  _off = "unsubscribed";
  _on = "subscribed";
  _gone = failure(7, "unsubscribed");
  _failed = { subscribe: 8, sub_refresh: 9 };
  _refresh = "sub_refresh";

  constructor(client, channel, options = {}) {
    super();
    const { token, since, minResubscribeDelay: min, maxResubscribeDelay: max } = options;
    Object.assign(this, { channel, _client: client, _options: options, _token: token, _delays: { min, max } });
    Object.assign(this, { _at: { ...since }, _recover: !!since });
  }

  subscribe() {
    this._attempts = 0;
    if (this.state === this._off) this._lapse(0, "subscribe called");
  }

  unsubscribe() {
    this._end(0, "unsubscribe called");
  }

  // Subscribes, again, as soon as there is a connection.
  _lapse(code, reason) {
    this._asked = false;
    if (this._become("subscribing", { code, reason }) && this._client._open) this._start();
  }

  async _start() {
    const { channel, _client: client } = this;
    const { data, positioned, recoverable, joinLeave: join_leave } = this._options;
    const ask = () => {
      this._asked = true;
      const body = { channel, token: this._token, data, positioned, recoverable, join_leave };
      return client._ask("subscribe", this._recover ? { ...body, ...recovery(this._at) } : body);
    };
    const result = await this._obtain("subscribe", false, ask, ({ code }) => {
      this._asked = false;
      if (code === 1) client._lose(3, "subscribe timeout");
      else this._retry();
    });
    if (!result) return;
    this._attempts = 0;
    Object.assign(this, { _at: result, _recover: result.recoverable });
    if (!this._become("subscribed", subscribedTo(channel, result))) return;
    this._settle();
    for (const pub of result.publications ?? []) client._push({ channel, pub });
    this._expire(result);
  }

  _end(code, reason) {
    if (this.state === this._off) return;
    if (this._asked) this._client._unsubscribe(this.channel);
    this._settle(this._gone);
    this._become("unsubscribed", { code, reason });
  }
}

for (const name of ["publish", "history", "presence", "presenceStats"])
  Subscription.prototype[name] = async function (argument) {
    await this.ready(this._client._options.timeout);
    return this._client[name](this.channel, argument);
  };

export class Centrifuge extends Base {
  state = "disconnected";
  _off = "disconnected";
  _on = "connected";
  _gone = failure(3, "client disconnected");
  _failed = { connect: 5, refresh: 6 };
  _refresh = "refresh";
  _client = this;
  _subs = {};
  _served = {}; // what the server has subscribed us to, by channel
  _calls = {};
  _id = 0;
  _arrived = Promise.resolve();

  constructor(url, options) {
    super();
    options = { name: "js", timeout: 5000, maxServerPingDelay: 10000, ...options };
    const { token, minReconnectDelay: min, maxReconnectDelay: max } = options;
    Object.assign(this, { _url: url, _options: options, _token: token, _delays: { min, max } });
  }

  connect() {
    this._attempts = 0;
    if (this.state === this._off && this._become("connecting", { code: 0, reason: "connect called" })) this._start();
  }

  disconnect() {
    this._end(0, "disconnect called");
  }

  setToken(token) {
    this._token = token;
    this._expired &&= this._options.getToken;
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
    await this._request();
    if (!this._write({ send: { data } })) throw failure(10, "transport write error");
  }

  async rpc(method, data) {
    return { data: (await this._request("rpc", { method, data })).data };
  }

  publish(channel, data) {
    return this._request("publish", { channel, data });
  }

  async history(channel, options) {
    const { publications = [], offset = 0, epoch = "" } = await this._request("history", { channel, ...options });
    return { publications: publications.map((pub) => publicationOf(channel, pub)), offset, epoch };
  }

  async presence(channel) {
    const { presence } = await this._request("presence", { channel });
    return { clients: Object.fromEntries(Object.entries(presence).map(([id, info]) => [id, infoOf(info)])) };
  }

  async presenceStats(channel) {
    const { num_clients: numClients, num_users: numUsers } = await this._request("presence_stats", { channel });
    return { numClients, numUsers };
  }

  async _request(kind, body) {
    if (this.state !== this._on) await this._wait(this._options.timeout);
    return kind && this._ask(kind, body);
  }

  _ask(kind, body) {
    return new Promise((resolve, reject) => {
      const id = ++this._id;
      const fail = (code, message) => this._take({ id, error: { code, message } });
      const timer = setTimeout(fail, this._options.timeout, 1, "timeout");
      this._calls[id] = (reply) => {
        delete this._calls[id];
        clearTimeout(timer);
        if (reply.error) reject({ message: "", temporary: false, ...reply.error });
        else resolve(reply[kind] ?? {});
      };
      if (!this._write({ [kind]: body, id })) fail(10, "transport write error");
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

  async _start() {
    const again = ({ code, message }) => this._lose(code, message);
    const result = await this._obtain("connect", false, (current) => this._connect(current), again);
    if (!result) return;
    this._attempts = 0;
    const { client, data, ping, pong, subs = {} } = result;
    if (!this._become("connected", { client, transport: "websocket", data })) return;
    this._ping = ping * 1000;
    this._pong = pong;
    this._watch();
    this._expire(result);
    this._settle();
    for (const [channel, subscribe] of Object.entries(subs)) this._push({ channel, subscribe });
    for (const [channel, { recovered, publications }] of Object.entries(subs))
      for (const pub of (recovered && publications) || []) this._push({ channel, pub });
    for (const channel in this._served) if (!subs[channel]) this._push({ channel, unsubscribe: {} });
  }

  async _connect(current) {
    const { websocket: Socket = WebSocket, timeout, getData, name, version, headers } = this._options;
    const data = getData ? await getData() : this._options.data;
    if (!current()) return;
    const socket = (this._socket = new Socket(this._url));
    socket.onmessage = (event) => socket === this._socket && this._receive(event.data);
    socket.onclose = (event) => socket === this._socket && this._closed(event);
    socket.onerror = () => {}; // a close follows
    this._later("open", timeout, () => this._closed({ code: 1006 }));
    await new Promise((resolve) => (socket.onopen = resolve));
    clearTimeout(this._timers.open);
    const served = Object.entries(this._served).filter(([, at]) => at.recoverable);
    const subs = served.length ? Object.fromEntries(served.map(([channel, at]) => [channel, recovery(at)])) : undefined;
    // Everything goes in one frame.
    this._batch = [];
    const reply = this._ask("connect", { token: this._token, data, name, version, headers, subs });
    this._open = true;
    for (const sub of Object.values(this._subs)) if (sub.state === "subscribing") sub._start();
    socket.send(this._batch.join("\n"));
    this._batch = null;
    return reply;
  }

  _closed({ code, reason }) {
    if (code === 1009) this._end(3, "message size limit exceeded");
    else if (code >= 3000) this._lose(code, reason, code % 1000 < 500);
    else {
      if (!this._open) this._emit("error", { type: "transport", error: failure(2, "transport closed") });
      this._lose(1, "transport closed");
    }
  }

  _end(code, reason) {
    this._settle(failure(3, "disconnected"));
    this._lose(code, reason, false);
  }

  _lose(code, reason, again = true) {
    const { state, _socket: socket } = this;
    if (state === this._off) return;
    this._open = this._socket = this._batch = this._ping = null;
    socket?.close();
    this.state
    for (const call of Object.values(this._calls)) call({ error: failure(11, "connection closed") });
    for (const sub of Object.values(this._subs)) if (sub.state !== sub._off) sub._lapse(1, "transport closed");
    if (state === this._on) for (const channel in this._served) this._emit("subscribing", { channel });
    if (this._become(again ? "connecting" : this._off, { code, reason }) && again) this._retry();
  }

  _break(error) {
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
        let reply;
        try {
          reply = JSON.parse(line);
        } catch {
          return this._lose(1, "transport closed");
        }
        this._take(reply);
        // Whoever awaits the reply goes on before what follows is handled.
        for (let i = 0; reply.id && i < 12; i++) await null;
      }
    });
  }

  _take(reply) {
    const { id, push } = reply;
    if (id) this._calls[id]?.(reply);
    else if (push) this._push(push);
    else if (this._pong) this._write({});
  }

  _push({ channel, pub, join, leave, message, subscribe, unsubscribe, disconnect }) {
    if (this.state !== this._on) return;
    const sub = this._subs[channel]?.state === "subscribed" && this._subs[channel];
    const at = sub ? sub._at : this._served[channel];
    const target = sub || (at && this);
    if (message) this._emit("message", { data: message.data });
    else if (disconnect) this._closed(disconnect);
    else if (subscribe) {
      this._served[channel] = { ...subscribe };
      this._emit("subscribed", subscribedTo(channel, subscribe));
    } else if (!target) return;
    else if (pub) {
      if (pub.offset) at.offset = pub.offset;
      target._emit("publication", publicationOf(channel, pub));
    } else if (join) target._emit("join", { channel, info: infoOf(join.info) });
    else if (leave) target._emit("leave", { channel, info: infoOf(leave.info) });
    else if (!unsubscribe) return;
    else if (!sub) {
      delete this._served[channel];
      this._emit("unsubscribed", { channel });
    } else if (unsubscribe.code < 2500) {
      sub._asked = false;
      sub._end(unsubscribe.code, unsubscribe.reason);
    } else sub._lapse(unsubscribe.code, unsubscribe.reason);
  }
}
