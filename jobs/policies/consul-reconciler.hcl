# What the control plane needs in Consul, except sessions. Set key_prefix to the prefix of your registry.
#
# Leases are sessions. Consul's rules for sessions are per node: that of the Consul agent that the replica uses. Write
# access to the sessions of a node is enough to end every session of that node, also those of other programs. Therefore
# list only the nodes where replicas run:
#
#   printf 'session "%s" { policy = "write" }\n' client-1 client-2 | cat consul-reconciler.hcl - |
#     consul acl policy create -name watchdog-reconciler -rules -

# Deliberately not granted: agent_prefix "" { policy = "read" }. Only `nomad-watchdog doctor` would use it, to display
# the version of Consul. Without it the check passes and reports that the version is not visible.

# The registry of devices and its sentinel.
key_prefix "nomad-watchdog/" {
  policy = "write"
}

# For the health of the agents. Without the right to read nodes, Consul returns an empty list.
service "device-watchdog-agent" {
  policy = "read"
}

node_prefix "" {
  policy = "read"
}

# For the registration of the control planes, with the check that their leases depend on.
service "nomad-watchdog-replica" {
  policy = "write"
}
