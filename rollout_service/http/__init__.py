"""The HTTP interface: routes, and what every request and answer passes through. May import all other rooms."""
