// Drives a client of the Centrifuge protocol, whichever it is, as a script orders, and reports everything that it says.

// Every order is an object: `do` names a method of the client, or of its subscription to `room`, and `call` the number
// under which the outcome of its promise is to be reported.
export function drive({ Centrifuge, UnauthorizedError }, report, websocket) {
  let client;

  const copy = (value) => (value === undefined ? null : JSON.parse(JSON.stringify(value)));

  function watch(emitter, names, room) {
    for (const name of names) emitter.on(name, (ctx) => report({ event: name, room, ctx: copy(ctx) }));
  }

  // A function that gives what is listed, one after the other; an Error where an `error` is listed.
  function dispenser(asked, list) {
    const left = [...list];
    return async (ctx) => {
      report({ event: asked, ctx: copy(ctx) });
      const next = left.shift();
      if (next?.unauthorized && UnauthorizedError) throw new UnauthorizedError("");
      if (next?.unauthorized) return null;
      if (next?.error || next === undefined) throw new Error(next?.error ?? `no more for ${asked}`);
      return next;
    };
  }

  const withTokens = ({ tokens, ...options } = {}, asked) => ({
    ...options,
    ...(tokens && { getToken: dispenser(asked, tokens) }),
  });

  // What the scripts need, and no client has.
  const own = {
    new(url, options) {
      client = new Centrifuge(url, { ...withTokens(options, "getToken"), ...(websocket && { websocket }) });
      watch(client, ["connecting", "connected", "disconnected", "error", "message"]);
      watch(client, ["subscribing", "subscribed", "unsubscribed", "publication", "join", "leave"]);
    },
    newSubscription(room, options) {
      const sub = client.newSubscription(room, withTokens(options, "getSubscriptionToken"));
      watch(sub, ["subscribing", "subscribed", "unsubscribed", "publication", "join", "leave", "error"], room);
    },
    remove: (room) => client.removeSubscription(client.getSubscription(room)),
    rooms: () => Object.keys(client.subscriptions()),
    stateOf: (room) => (room ? client.getSubscription(room) : client).state,
    disconnectOn(event) {
      const disconnect = () => client.off(event, disconnect).disconnect();
      client.on(event, disconnect);
    },
    throwOn(event) {
      client.on(event, () => {
        throw new Error("a handler's mistake");
      });
    },
  };

  return function order({ do: name, args, room, call }) {
    const settled = (outcome) => report({ settled: call, ...outcome });
    const act = async () => {
      if (name in own) return own[name](...args);
      return (room ? client.getSubscription(room) : client)[name](...args);
    };
    act().then(
      (value) => settled({ value: copy(value) }),
      (error) => settled({ error: { code: error.code ?? null, message: String(error.message) } }),
    );
  };
}
