// The services as events of Socket.IO's own server:  node socketio_server.js PORT SECONDS
const [port, seconds] = process.argv.slice(2).map(Number)
setTimeout(() => process.exit(), seconds * 1000).unref()

const { Server } = require("socket.io")
const io = new Server({ transports: ["websocket"], perMessageDeflate: true, pingTimeout: seconds * 1000 })

io.on("connection", (socket) => {
  socket.on("room", (data) => io.emit("room", data))
  socket.on("chat", (data) => socket.broadcast.emit("chat", data))
  socket.on("echo", (data) => socket.emit("echo", data))
  socket.on("rpc", (data, answer) => answer(data))
})

const http = require("node:http").createServer()
io.attach(http)
http.listen(port, "127.0.0.1")
