"""Components and what they need of each other: `inject` is what users write, `container` builds, starts and stops."""
