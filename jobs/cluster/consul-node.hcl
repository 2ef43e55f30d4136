# The Consul agent of each host: it writes its own node, and reads what it syncs.
node_prefix "" {
  policy = "write"
}

service_prefix "" {
  policy = "read"
}
