// The three services on Bun, whose rooms and framing are uWebSockets' (C++):  bun bun_server.js PORT SECONDS
const [port, seconds] = process.argv.slice(2).map(Number)
setTimeout(() => process.exit(), seconds * 1000).unref()

const server = Bun.serve({
  port,
  hostname: "127.0.0.1",
  fetch(request, server) {
    const { pathname } = new URL(request.url)
    return server.upgrade(request, { data: { pathname } }) ? undefined : new Response("WebSocket only", { status: 400 })
  },
  websocket: {
    perMessageDeflate: true,
    open(ws) {
      if (ws.data.pathname === "/echo") return
      ws.subscribe(ws.data.pathname)
      ws.send(Buffer.from("ready"))
    },
    message(ws, message) {
      const { pathname } = ws.data
      if (pathname === "/room") server.publish(pathname, message, true) // true: compressed where negotiated
      else if (pathname === "/chat") ws.publish(pathname, message, true)
      else ws.send(message, true)
    },
  },
})
