// A small client of the Centrifuge protocol (JSON, version 2). Names and behaviour are those of the npm package
// `centrifuge`, as far as they go: a page that outgrows this one changes its import, and nothing else.

const failure = (code, message) => ({ code, message });
const infoOf = ({ client, user, conn_info: connInfo, chan_info: chanInfo }) => ({ client, user, connInfo, chanInfo });
const recovery = ({ recoverable, offset, epoch }) => recoverable && { recover: true, offset, epoch };

const subscribedTo = ({ data, positioned, recoverable, recovered, was_recovering, offset = 0, epoch = "" }) => ({
  data, positioned: !!positioned, recoverable: !!recoverable, recovered: !!recovered, wasRecovering: !!was_recovering,
  streamPosition: positioned || recoverable ? { offset, epoch } : undefined,
});

// What a client and a subscription have in common. Events have the names of the states that they tell.
class Live {
  _listeners = {};
  _waiting = [];
  _attempts = 0;
  _turn = 0; // grows when whatever is under way no longer counts

  constructor([off, trying, on], gone, delays, more) {
    Object.assign(this, { state: off, _off: off, _trying: trying, _on: on, _gone: gone, _delays: delays, ...more });
  }

  on(event, listener) {
    (this._listeners[event] ??= new Set()).add(listener);
    return this;
  }

  off(event, listener) {
    this._listeners[event]?.delete(listener);
    return this;
  }

  _emit(event, ctx) {
    for (const listener of [...(this._listeners[event] ?? [])])
      try {
        listener({ channel: this.channel, ...ctx });
      } catch (error) {
        Promise.reject(error); // for the browser to report
      }
  }

  // Whether no listener has changed the state again.
  _become(state, code, reason, ctx) {
    const [before, turn] = [this.state, ++this._turn];
    clearTimeout(this._timer);
    this.state = state;
    if (state !== this._trying) {
      this._attempts = 0;
      for (const settle of this._waiting.splice(0)) settle();
    }
    if (state !== before) this._emit(state, ctx ?? { code, reason });
    return turn === this._turn;
  }

  async ready(timeout) {
    if (this.state === this._off) throw this._gone;
    await this._wait(timeout);
  }

  // Until it is ready, or has ended.
  async _wait(timeout) {
    if (this.state === this._on) return;
    await new Promise((resolve, reject) => {
      this._waiting.push(resolve);
      if (timeout) setTimeout(reject, timeout, failure(1, "timeout"));
    });
    await this.ready();
  }

  // With full jitter, so that the clients of a server that was away do not all come back at once.
  _retry(work) {
    const [min = 500, max = 20000] = this._delays;
    const delay = min + Math.random() * Math.min(max, min * 2 ** this._attempts++);
    this._timer = setTimeout(work, Math.min(max, delay));
  }

  // The result of asking. What fails for now is done again; else this is the end.
  async _try(type, ask, again, end) {
    const turn = this._turn;
    const current = () => turn === this._turn;
    try {
      const result = await ask(current);
      if (current()) return result;
    } catch (error) {
      if (!current()) return;
      const { code = 5, message, temporary } = error;
      // An expired token (109) may be replaced, where there are several.
      if (code > 99 && !temporary && (code !== 109 || this.channel)) return end(code, message);
      this._emit("error", { type, error: { code, message } });
      if (current()) again(code, message);
    }
  }
}

export function Centrifuge(url, options = {}) {
  const { getToken, data, name = "js", version, headers, websocket: Socket = globalThis.WebSocket } = options;
  const { timeout = 5000, maxServerPingDelay: grace = 10000, minReconnectDelay, maxReconnectDelay } = options;
  const subscriptions = {};
  const served = {}; // what the server has subscribed us to, by channel
  const calls = {};
  let { token } = options;
  let [lastId, arrived] = [0, Promise.resolve()];
  let expired, socket, open, ping, pong, pingTimer, refreshTimer;

  const states = ["disconnected", "connecting", "connected"];
  const delays = [minReconnectDelay, maxReconnectDelay];
  const client = new Live(states, failure(3, "client disconnected"), delays, {
    connect() {
      if (client.state === "disconnected" && client._become("connecting", 0, "connect called")) start();
    },
    disconnect: () => end(0, "disconnect called"),
    newSubscription,
    getSubscription: (channel) => subscriptions[channel] ?? null,
    subscriptions: () => subscriptions,
    removeSubscription(sub) {
      sub.unsubscribe();
      delete subscriptions[sub.channel];
    },
    rpc: async (method, data) => ({ data: (await call("rpc", { method, data })).data }),
    publish: (channel, data) => call("publish", { channel, data }),
    async send(data) {
      await client._wait(timeout);
      write({ send: { data } });
    },
  });

  async function call(kind, body) {
    await client._wait(timeout);
    return ask(kind, body);
  }

  const ask = (kind, body) =>
    new Promise((resolve, reject) => {
      const id = ++lastId;
      write({ [kind]: body, id });
      const timer = setTimeout(() => calls[id]({ error: failure(1, "timeout") }), timeout);
      calls[id] = ({ error, [kind]: result }) => {
        clearTimeout(timer);
        delete calls[id];
        if (error) reject(error);
        else resolve(result);
      };
    });

  function write(command) {
    if (!socket) throw failure(11, "connection closed");
    socket.send(JSON.stringify(command));
  }

  async function renew(current) {
    const renewed = await getToken?.({});
    if (current() && renewed == null) end(1, "unauthorized");
    if (current()) [token, expired] = [renewed, false];
  }

  async function enter(current) {
    if (expired || (!token && getToken)) await renew(current);
    if (!current()) return;
    const mine = (socket = new Socket(url));
    socket.onmessage = (event) => mine === socket && receive(event.data);
    socket.onclose = (event) => mine === socket && closed(event);
    socket.onerror = () => {}; // a close follows
    client._timer = setTimeout(closed, timeout, { code: 1006 });
    await new Promise((resolve) => (mine.onopen = resolve));
    clearTimeout(client._timer);
    const subs = {};
    for (const [channel, at] of Object.entries(served)) if (at.recoverable) subs[channel] = recovery(at);
    return ask("connect", { token, data, name, version, headers, subs });
  }

  async function start() {
    const again = (code, message) => {
      expired = code === 109;
      lose(code, message);
    };
    const result = await client._try("connect", enter, again, end);
    if (!result) return;
    const { client: id, subs = {} } = result;
    [ping, pong] = [result.ping * 1000, result.pong];
    if (!client._become("connected", 0, "", { client: id, transport: "websocket", data: result.data })) return;
    watch();
    expire(result);
    for (const [channel, subscribe] of Object.entries(subs)) push({ channel, subscribe });
    for (const [channel, { recovered, publications }] of Object.entries(subs))
      for (const pub of (recovered && publications) || []) push({ channel, pub });
    for (const channel in served) if (!subs[channel]) push({ channel, unsubscribe: {} });
    if (client.state !== "connected") return;
    open = true;
    for (const sub of Object.values(subscriptions)) if (sub.state === "subscribing") sub._start();
  }

  // Gets another token in time.
  function expire({ expires, ttl }) {
    const enter = async (current) => {
      await renew(current);
      return current() && ask("refresh", { token });
    };
    const again = () => expire({ expires, ttl: 5 + 5 * Math.random() });
    const refresh = async () => expire((await client._try("refresh", enter, again, end)) || {});
    if (expires) refreshTimer = setTimeout(refresh, Math.min(ttl * 1000, 2 ** 31 - 1));
  }

  function closed({ code, reason }) {
    if (code === 1009) return end(3, "message size limit exceeded");
    // 3500 to 3999 and 4500 to 4999 are for good.
    if (code >= 3000) return lose(code, reason, code % 1000 < 500);
    if (client.state !== "connected") client._emit("error", { type: "transport", error: failure(2, "transport closed") });
    lose(1, "transport closed");
  }

  const end = (code, reason) => lose(code, reason, false);

  function lose(code, reason, again = true) {
    const { state } = client;
    if (state === "disconnected") return;
    const mine = socket;
    open = socket = ping = null;
    clearTimeout(pingTimer);
    clearTimeout(refreshTimer);
    mine?.close();
    for (const settle of Object.values(calls)) settle({ error: failure(11, "connection closed") });
    for (const sub of Object.values(subscriptions)) if (sub.state !== "unsubscribed") sub._again(1, "transport closed");
    if (state === "connected") for (const channel in served) client._emit("subscribing", { channel });
    if (client._become(again ? "connecting" : "disconnected", code, reason) && again) client._retry(start);
  }

  function watch() {
    clearTimeout(pingTimer);
    if (ping && grace) pingTimer = setTimeout(lose, ping + grace, 2, "no ping");
  }

  function receive(text) {
    const mine = socket;
    watch();
    arrived = arrived.then(async () => {
      for (const line of text.split("\n")) {
        if (mine !== socket || !line.trim()) continue;
        try {
          const reply = JSON.parse(line);
          if (reply.id) calls[reply.id]?.(reply);
          else if (reply.push) push(reply.push);
          else if (pong) write({});
          // Whoever awaits the reply goes on before what follows is handled.
          for (let i = 0; reply.id && i < 12; i++) await null;
        } catch {
          lose(1, "transport closed");
        }
      }
    });
  }

  function push({ channel, pub, join, leave, message, subscribe, unsubscribe, disconnect }) {
    if (client.state !== "connected") return;
    const sub = subscriptions[channel]?.state === "subscribed" && subscriptions[channel];
    const at = sub ? sub._at : served[channel];
    const tell = (event, ctx) => (sub || client)._emit(event, { channel, ...ctx });
    if (message) client._emit("message", { data: message.data });
    else if (disconnect) closed(disconnect);
    else if (subscribe) {
      served[channel] = subscribe;
      client._emit("subscribed", { channel, ...subscribedTo(subscribe) });
    } else if (!at) return;
    else if (pub) {
      if (pub.offset) at.offset = pub.offset;
      tell("publication", { ...pub, info: pub.info && infoOf(pub.info) });
    } else if (join) tell("join", { info: infoOf(join.info) });
    else if (leave) tell("leave", { info: infoOf(leave.info) });
    else if (unsubscribe && !sub) {
      delete served[channel];
      tell("unsubscribed");
    } else if (unsubscribe?.code < 2500) sub._become("unsubscribed", unsubscribe.code, unsubscribe.reason);
    else if (unsubscribe) sub._again(unsubscribe.code, unsubscribe.reason);
  }

  function newSubscription(channel, options = {}) {
    if (subscriptions[channel]) throw new Error(`Subscription to the channel ${channel} already exists`);
    const { token, data, since, positioned, recoverable, joinLeave: join_leave } = options;
    const delays = [options.minResubscribeDelay, options.maxResubscribeDelay];

    async function start() {
      const request = { channel, token, data, positioned, recoverable, join_leave, ...recovery(sub._at) };
      const again = (code) => (code === 1 ? lose(3, "subscribe timeout") : sub._retry(start));
      const refused = (code, message) => sub._become("unsubscribed", code, message);
      sub._turn++;
      const result = await sub._try("subscribe", () => ask("subscribe", request), again, refused);
      if (!result) return;
      sub._at = result;
      if (!sub._become("subscribed", 0, "", subscribedTo(result))) return;
      for (const pub of result.publications ?? []) push({ channel, pub });
    }

    const states = ["unsubscribed", "subscribing", "subscribed"];
    const sub = (subscriptions[channel] = new Live(states, failure(7, "unsubscribed"), delays, {
      channel,
      _at: { ...since, recoverable: !!since },
      _start: start,
      _again(code, reason) {
        if (sub._become("subscribing", code, reason) && open) start();
      },
      subscribe() {
        if (sub.state === "unsubscribed") sub._again(0, "subscribe called");
      },
      unsubscribe() {
        if (sub.state === "unsubscribed") return;
        if (open) ask("unsubscribe", { channel }).catch(() => {});
        sub._become("unsubscribed", 0, "unsubscribe called");
      },
      async publish(data) {
        await sub.ready(timeout);
        return client.publish(channel, data);
      },
    }));
    return sub;
  }

  return client;
}
