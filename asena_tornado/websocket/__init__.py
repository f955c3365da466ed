"""A namespace at run time: its sockets, rooms and messages, and the service behind it. No I/O."""
