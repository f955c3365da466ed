"""Who connects: a plain client, one that comes back and asks, and one for pages, `asena.js`."""
