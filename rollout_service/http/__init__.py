"""The HTTP interface: routes, and what every request and answer passes. May import the server's other rooms."""
