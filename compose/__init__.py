"""What stands around the nodes: proxy, Redis, monitoring, and an example of a web application that publishes."""
